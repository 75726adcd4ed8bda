"""Crafted global models do what their papers say, and a server that turns cannot be told apart."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError
from sentinel.stress.servers import crafting as servers
from sentinel.stress.servers.crafting import Direction, Stealth
from sentinel.stress.servers.federation import FedAvgServer, MaliciousServer

if TYPE_CHECKING:
    from sentinel.stress.layers import State

SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))
CRAFTS = {
    "binning": servers.binning,
    "binning-hidden": functools.partial(
        servers.binning,
        scale=0.01,
        stealth=Stealth(True, 1.0, 0.5, 0.1, 0.5),  # noqa: FBT003 - permute
    ),
    "isolation": functools.partial(servers.isolation, sample=SAMPLE),
    "trap-weights": servers.trap_weights,
    "qbi": servers.qbi,
    "fishing-class": servers.fishing_class,
    "fishing-feature": servers.fishing_feature,
    "suppression": servers.suppression,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Sequential:
    """A perceptron with ReLUs and weights drawn from a generator of its own."""
    generator = seeded(sum(widths))
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layer = nn.Linear(before, after)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(before**-0.5), before**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2, padding=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    )


def gradients(model: nn.Module, state: State, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.load_state_dict(state)
    model.zero_grad()
    out = model(rows)
    if out.shape[1] == 1:
        F.binary_cross_entropy_with_logits(out[:, 0], labels.float()).backward()
    else:
        F.cross_entropy(out, labels).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def read(gradient: dict[str, Tensor], rows: Tensor, layer: str = "0") -> int:
    """How many rows stand in a quotient of neighbouring differences, to 1 %."""
    weight, bias = gradient[f"{layer}.weight"].double(), gradient[f"{layer}.bias"].double()
    weight = torch.cat([weight, weight.diff(dim=0)])
    bias = torch.cat([bias, bias.diff()])
    kept = bias.abs() > 1e-12
    distance = torch.cdist(rows.double(), weight[kept] / bias[kept, None])
    return int((distance.amin(1) < 0.01 * rows.double().norm(dim=1)).sum())


@pytest.mark.parametrize("craft", CRAFTS.values(), ids=CRAFTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_crafted_model_has_the_names_shapes_and_dtypes_of_the_honest_one(
    craft: servers.Craft, dtype: torch.dtype
) -> None:
    model = mlp(13, 32, 16, 2).to(dtype)
    if isinstance(craft, functools.partial) and craft.func is servers.isolation:
        craft = functools.partial(servers.isolation, sample=SAMPLE.to(dtype))
    state = servers.copied(model.state_dict())
    before = servers.copied(state)
    crafted = craft(model, state, generator=seeded())
    described = [(name, value.shape, value.dtype) for name, value in state.items()]
    assert [(name, value.shape, value.dtype) for name, value in crafted.items()] == described
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert any(not torch.equal(crafted[name], state[name]) for name in state)
    assert all(value.isfinite().all() for value in crafted.values())


@pytest.mark.parametrize("craft", CRAFTS.values(), ids=CRAFTS.keys())
def test_crafting_is_fixed_by_its_generator_and_leaves_the_global_one_alone(
    craft: servers.Craft,
) -> None:
    model = mlp(13, 32, 1)
    state = servers.copied(model.state_dict())
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = craft(model, state, generator=seeded())
    torch.manual_seed(12)
    again = craft(model, state, generator=seeded())
    assert all(torch.equal(first[name], again[name]) for name in state)
    torch.manual_seed(11)
    craft(model, state, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "craft",
    [CRAFTS[name] for name in ("binning", "trap-weights", "qbi", "fishing-class", "suppression")],
)
def test_a_model_without_the_layer_an_attack_needs_is_refused_with_a_sentence(
    craft: servers.Craft,
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 2, bias=False))
    with pytest.raises(MisuseError, match=r"needs a torch\.nn\.Linear"):
        craft(model, servers.copied(model.state_dict()), generator=seeded())


def test_binning_refuses_a_last_layer_and_a_name_that_is_not_there() -> None:
    model = mlp(13, 32, 1)
    state = servers.copied(model.state_dict())
    with pytest.raises(MisuseError, match="two fully connected layers in a row"):
        servers.binning(model, state, generator=seeded(), layer="2")
    with pytest.raises(MisuseError, match="there are 0, 2"):
        servers.binning(model, state, generator=seeded(), layer="head")


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("widths", [(13, 256, 1), (13, 256, 16, 3)])
def test_binning_reads_most_of_a_batch_where_the_honest_model_gives_away_few(
    direction: Direction, widths: tuple[int, ...]
) -> None:
    model = mlp(*widths)
    state = servers.copied(model.state_dict())
    rows, labels = torch.randn(32, 13, generator=seeded(1)), torch.arange(32) % 2
    crafted = servers.binning(model, state, generator=seeded(), direction=direction, scale=0.1)
    honest = read(gradients(model, state, rows, labels), rows)
    assert honest < 8
    assert read(gradients(model, crafted, rows, labels), rows) >= 20


def test_binning_puts_its_cuts_at_quantiles_of_the_sample_it_is_given() -> None:
    """On inputs far from standard normal, only the sample's own quantiles split them evenly."""
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    rows = 5 + 0.1 * torch.randn(2000, 13, generator=seeded(1))
    fired = []
    for sample in (None, rows[:1000]):
        crafted = servers.binning(model, state, generator=seeded(), sample=sample)
        active = rows[1000:] @ crafted["0.weight"].T + crafted["0.bias"] > 0
        fired.append(active.float().mean(0))
    assert int(((fired[0] > 0.05) & (fired[0] < 0.95)).sum()) < 16
    assert torch.allclose(fired[1], 1 - (torch.arange(64) + 0.5) / 64, atol=0.1)


def test_binning_reaches_a_named_layer_behind_convolutions() -> None:
    model = lenet()
    state = servers.copied(model.state_dict())
    crafted = servers.binning(model, state, generator=seeded(), layer="4")
    changed = {name for name in state if not torch.equal(state[name], crafted[name])}
    assert changed == {"4.weight", "4.bias", "6.weight", "6.bias"}
    assert torch.linalg.matrix_rank(crafted["4.weight"]) == 1


def test_hidden_bins_compute_the_same_function_in_another_order_and_scale() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    outputs = []
    for stealth in (Stealth(), Stealth(permute=True, scale=1.0)):
        crafted = servers.binning(model, state, generator=seeded(), stealth=stealth)
        model.load_state_dict(crafted)
        outputs.append(model(SAMPLE).detach())
    assert torch.allclose(*outputs, rtol=1e-4)
    assert crafted["0.weight"].norm(dim=1).std() > 0.2


def test_flipped_and_jittered_rows_are_flipped_and_jittered_in_the_share_asked_for() -> None:
    model = mlp(13, 400, 1)
    state = servers.copied(model.state_dict())
    hidden = Stealth(flip=0.5, jitter=0.1, rows=0.25)
    crafted = servers.binning(model, state, generator=seeded(), stealth=hidden)
    bent = (crafted["0.weight"] != state["0.weight"]).any(1)
    assert int(bent.sum()) == 100
    rows = F.normalize(crafted["0.weight"][bent], dim=1)
    cosines = rows @ rows[0]
    assert 0.35 < (cosines > 0).float().mean() < 0.65
    assert 0.9 < cosines[1:].abs().mean() < 0.999


def test_trap_weights_fire_for_fewer_records_than_an_honest_layer_does() -> None:
    model = mlp(200, 100, 1)
    state = servers.copied(model.state_dict())
    rows = torch.rand(64, 200, generator=seeded(1))  # as pixels: from 0 to 1
    crafted = servers.trap_weights(model, state, generator=seeded())
    fired = (rows @ crafted["0.weight"].T + crafted["0.bias"] > 0).float().mean()
    honest = (rows @ state["0.weight"].T + state["0.bias"] > 0).float().mean()
    negative = crafted["0.weight"].clamp(max=0).sum(1)
    positive = crafted["0.weight"].clamp(min=0).sum(1)
    assert torch.allclose(positive, -0.95 * negative, rtol=1e-4)
    assert fired < 0.6 * honest


@pytest.mark.parametrize("batch", [8, 64])
def test_qbi_rows_fire_for_about_one_record_of_a_batch(batch: int) -> None:
    model = mlp(50, 500, 1)
    crafted = servers.qbi(
        model, servers.copied(model.state_dict()), generator=seeded(), batch=batch
    )
    rows = torch.randn(2000, 50, generator=seeded(1))
    fired = (rows @ crafted["0.weight"].T + crafted["0.bias"] > 0).float().mean()
    assert fired * batch == pytest.approx(1.0, rel=0.2)


def test_qbi_refuses_a_batch_of_one() -> None:
    model = mlp(13, 32, 1)
    with pytest.raises(MisuseError, match="at least 2 records"):
        servers.qbi(model, servers.copied(model.state_dict()), generator=seeded(), batch=1)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("target", [0, 1])
def test_fishing_for_a_class_leaves_no_gradient_to_the_others(outputs: int, target: int) -> None:
    model = mlp(13, 32, outputs)
    state = servers.copied(model.state_dict())
    crafted = servers.fishing_class(model, state, generator=seeded(), target=target)
    labels = torch.arange(40) % max(outputs, 2)
    shares = [
        gradients(model, crafted, SAMPLE[labels == label], labels[labels == label])[
            "0.weight"
        ].norm()
        for label in range(max(outputs, 2))
    ]
    others = [share for label, share in enumerate(shares) if label != target]
    assert shares[target] > 1e-3
    assert all(share < 1e-6 * shares[target] for share in others)


def test_fishing_for_a_feature_silences_the_records_past_the_threshold() -> None:
    model = mlp(13, 32, 3)
    state = servers.copied(model.state_dict())
    hidden = servers.layer_inputs(model, state, SAMPLE, "2")
    feature = int(hidden.std(0).argmax())
    cut = float(hidden[:, feature].quantile(0.7))
    crafted = servers.fishing_feature(
        model, state, generator=seeded(), target=1, feature=feature, threshold=cut
    )
    norms = torch.stack(
        [gradients(model, crafted, row[None], torch.tensor([1]))["2.bias"].norm() for row in SAMPLE]
    )
    past, before = hidden[:, feature] > cut + 0.05, hidden[:, feature] < cut - 0.05
    assert past.sum() > 4
    assert norms[past].max() < 1e-3
    assert norms[before].min() > 0.9


def test_fishing_refuses_a_class_that_is_not_there() -> None:
    model = mlp(13, 32, 3)
    state = servers.copied(model.state_dict())
    with pytest.raises(MisuseError, match="class must be from 0 to 2"):
        servers.fishing_class(model, state, generator=seeded(), target=3)


def test_suppression_leaves_nothing_of_this_client_but_the_spared_rows() -> None:
    model = mlp(13, 100, 1)
    state = servers.copied(model.state_dict())
    labels = torch.arange(40) % 2
    for spared, expected in ((0.0, 0), (0.1, 10)):
        crafted = servers.suppression(model, state, generator=seeded(), spared=spared)
        gradient = gradients(model, crafted, SAMPLE, labels)["0.weight"]
        assert int((gradient.norm(dim=1) > 0).sum()) == expected


def test_pass_through_lets_a_later_layer_see_the_image_itself() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    image = torch.rand(2, 1, 8, 8, generator=seeded())
    crafted = servers.pass_through(model, servers.copied(model.state_dict()))
    arrived = servers.layer_inputs(model, crafted, image, "3")
    assert torch.equal(arrived[:, :64], image.flatten(1))
    with pytest.raises(MisuseError, match="convolution"):
        servers.pass_through(mlp(13, 4, 1), mlp(13, 4, 1).state_dict())


def test_isolation_makes_the_layer_s_update_one_record() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    crafted = servers.isolation(model, state, generator=seeded(), sample=SAMPLE)
    fired = SAMPLE @ crafted["0.weight"].T + crafted["0.bias"] > 0
    assert fired.any(1).sum() == 1
    assert fired.any(1).equal(fired.all(1))
    gradient = gradients(model, crafted, SAMPLE, torch.zeros(40))
    row = (gradient["0.weight"][0] / gradient["0.bias"][0]).double()
    assert torch.allclose(row, SAMPLE[fired.any(1)][0].double(), rtol=1e-4)


def test_layer_inputs_leaves_the_model_and_its_mode_alone() -> None:
    model = lenet().train()
    before = servers.copied(model.state_dict())
    servers.layer_inputs(model, before, torch.rand(3, 1, 16, 16, generator=seeded()), "4")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_submodule("4")._forward_pre_hooks


def test_blending_moves_every_floating_entry_by_the_share() -> None:
    model = lenet()
    state = servers.copied(model.state_dict())
    crafted = servers.suppression(model, state, generator=seeded())
    mixed = servers.blended(crafted, state, 0.5)
    assert torch.allclose(mixed["4.bias"], (crafted["4.bias"] + state["4.bias"]) / 2)
    assert mixed["1.num_batches_tracked"].equal(state["1.num_batches_tracked"])


def test_the_honest_server_takes_the_weighted_mean() -> None:
    server = FedAvgServer({"w": torch.zeros(2), "n": torch.tensor(5)})
    states = {"a": {"w": torch.ones(2), "n": torch.tensor(9)}}
    states["b"] = {"w": torch.tensor([4.0, 7.0]), "n": torch.tensor(9)}
    server.aggregate(1, states, {"a": 3.0, "b": 1.0, "absent": 5.0})
    after = server.global_state(2)
    assert torch.allclose(after["w"], torch.tensor([1.75, 2.5]))
    assert after["n"] == 5
    server.aggregate(2, {}, {"a": 3.0})
    assert torch.equal(server.global_state(3)["w"], after["w"])


def test_what_a_client_does_to_its_global_model_does_not_reach_the_server() -> None:
    server = FedAvgServer({"w": torch.zeros(2)})
    server.global_state(1)["w"].add_(1)
    assert torch.equal(server.global_state(1)["w"], torch.zeros(2))


def test_the_malicious_server_turns_in_one_round_and_is_honest_before_and_after() -> None:
    model = mlp(13, 32, 1)
    start = servers.copied(model.state_dict())
    evil = MaliciousServer(start, model, servers.binning, turns_at=2, generator=seeded())
    honest = FedAvgServer(start)
    for number in (1, 2, 3):
        sent = [evil.global_state(number) for _ in range(2)]
        same = all(torch.equal(sent[0][name], honest.global_state(number)[name]) for name in start)
        assert same is (number != 2)
        assert all(torch.equal(sent[0][name], sent[1][name]) for name in start)
        local = {name: value + 1 for name, value in sent[0].items()}
        evil.aggregate(number, {"a": local}, {"a": 1.0})
        if number != 2:
            honest.aggregate(number, {"a": local}, {"a": 1.0})
    last = evil.global_state(4), honest.global_state(4)
    assert all(torch.equal(last[0][name], last[1][name]) for name in start)


def test_a_layer_that_no_forward_pass_reaches_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = mlp(13, 4)[0], mlp(13, 4)[0]

        def forward(self, rows: Tensor) -> Tensor:
            return self.used(rows)

    model = Idle()
    with pytest.raises(MisuseError, match="not reached"):
        servers.layer_inputs(model, model.state_dict(), SAMPLE, "idle")
