"""Each way of hiding does what it says, and whether an attack is left is measured."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.corpus import Net, Task
from sentinel.stress.servers import WRAPPERS, Leak, Public, measure
from sentinel.stress.servers.stealth import (
    among_honest,
    blended,
    jittered,
    mixed,
    permuted,
    scaled,
    turned,
)

SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nets.drawn(lambda: nets.mlp(13, 64, 3), seeded(1))


@pytest.mark.parametrize("wrapper", [permuted, functools.partial(scaled, spread=2.0)])
def test_permuting_and_scaling_keep_the_function_that_the_model_computes(
    wrapper: functools.partial[servers.Craft],
) -> None:
    model = mlp()
    outputs = []
    for craft in (servers.qbi, wrapper(servers.qbi)):
        sent = craft(model, model.state_dict(), generator=seeded())
        model_of = nets.drawn(lambda: nets.mlp(13, 64, 3), seeded(1))
        model_of.load_state_dict(sent)
        outputs.append((model_of(SAMPLE).detach(), sent["0.weight"]))
    assert torch.allclose(outputs[0][0], outputs[1][0], rtol=1e-3, atol=1e-5)
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_half_the_rows_are_turned() -> None:
    model = mlp()
    plain = servers.binning(model, model.state_dict(), generator=seeded())
    sent = turned(servers.binning)(model, model.state_dict(), generator=seeded())
    signs = (sent["0.weight"] * plain["0.weight"]).sum(1).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert torch.equal(sent["0.weight"] * signs[:, None], plain["0.weight"])
    assert torch.equal(sent["0.bias"] * signs, plain["0.bias"])
    assert torch.equal(sent["2.weight"], plain["2.weight"])


def test_jitter_shakes_what_was_crafted_and_nothing_else() -> None:
    model = mlp()
    state = servers.copied(model.state_dict())
    plain = servers.fishing_class(model, state, generator=seeded())
    sent = jittered(servers.fishing_class, 0.1)(model, state, generator=seeded())
    changed = {name for name in state if not torch.equal(sent[name], plain[name])}
    assert changed == {"2.weight"}
    relative = (sent["2.weight"] - plain["2.weight"])[0].std() / 0.5
    assert float(relative) == pytest.approx(0.1, rel=0.3)


def test_among_honest_rows_a_quarter_is_crafted() -> None:
    model = mlp()
    state = servers.copied(model.state_dict())
    sent = among_honest(servers.qbi, 0.25)(model, state, generator=seeded())
    bent = (sent["0.weight"] != state["0.weight"]).any(1)
    assert int(bent.sum()) == 16
    assert torch.equal(sent["2.weight"], state["2.weight"])


def test_blending_moves_every_floating_entry_by_the_share() -> None:
    model = nets.drawn(lambda: nets.resnet18(3, 8), seeded(1))
    state = servers.copied(model.state_dict())
    crafted = servers.suppression(model, state, generator=seeded())
    half = blended(crafted, state, 0.5)
    assert torch.allclose(half["11.bn2.bias"], (crafted["11.bn2.bias"] + state["11.bn2.bias"]) / 2)
    assert half["1.num_batches_tracked"].equal(state["1.num_batches_tracked"])
    sent = mixed(servers.suppression, 0.5)(model, state, generator=seeded())
    assert all(torch.equal(sent[name], half[name]) for name in half)


def test_wrappers_wrap_one_another() -> None:
    model = mlp()
    hidden = permuted(scaled(jittered(servers.qbi)))
    sent = hidden(model, model.state_dict(), generator=seeded())
    assert {name: value.shape for name, value in sent.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_what_needs_a_hidden_layer_says_so_where_there_is_none() -> None:
    model = nets.resnet18(3, 8)
    for name in ("permuted", "scaled", "turned", "among-honest"):
        with pytest.raises(MisuseError, match="two fully connected layers in a row"):
            WRAPPERS[name](servers.fishing_class)(model, model.state_dict(), generator=seeded())
    for name in ("jittered", "mixed"):
        WRAPPERS[name](servers.fishing_class)(model, model.state_dict(), generator=seeded())


def net_of(craft: str) -> Net:
    if craft in {"trap-weights", "loki"}:
        return Net("lenet", lambda: nets.lenet(128, 3), (1, 28, 28), 3)
    if craft == "token-bins":
        return Net("vit", lambda: nets.VisionTransformer(3, width=32, depth=2), (1, 28, 28), 3)
    return Net("mlp", lambda: nets.mlp(13, 64, 3), (13,), 3)


def found(craft: str, wrapper: str | None) -> Leak:
    """Two batches of 16 records, read through 64 neurons (rows), 128 (images) or 256 (tokens)."""
    net = net_of(craft)
    model = nets.drawn(net.build, seeded(1))
    state = servers.copied(model.state_dict())
    task = Task(net, seeded(2))
    sample, labels = task.draw(256)
    made = servers.recipe(craft).craft(Public(sample, labels, 16))
    hidden = WRAPPERS[wrapper](made) if wrapper else made
    sent = hidden(model, state, generator=seeded(5))
    return measure(model, state, sent, [task.draw(16) for _ in range(2)])


# Least reads of 32 records (of 512 tokens) for each wrapper in the order of `WRAPPERS`: permuted,
# scaled, turned, jittered, mixed, among-honest; None where no attack is left. A tenth of jitter
# and a half of the honest model move cuts past one another, so bins and tokens suffer; a fished
# class needs its certain loss, which half of it is not.
LEAST: dict[str, tuple[int | None, ...]] = {
    "binning-gaussian": (20, 20, 18, 1, None, 5),
    "binning-mean": (17, 17, 14, 1, None, 6),
    "loki": (24, 24, 22, 8, None, 17),
    "qbi": (16, 16, 7, 15, 17, 3),
    "trap-weights": (9, 9, 6, 9, 9, 6),
    "fishing-class": (6, 6, 4, 6, None, 3),
    "class-separation": (15, 15, 14, 5, 4, 9),
    "token-bins": (80, 70, 65, None, 11, 11),
    "learned-neurons": (19, 19, 12, 19, 1, 4),
    "scan": (4, 4, 4, 1, None, 1),
}


SLOW = ("loki", "trap-weights", "token-bins", "learned-neurons")


@pytest.mark.parametrize(
    "craft",
    [pytest.param(craft, marks=[pytest.mark.slow] if craft in SLOW else []) for craft in LEAST],
)
def test_a_hidden_attack_stays_one_or_is_known_not_to(craft: str) -> None:
    for wrapper, least in zip(WRAPPERS, LEAST[craft], strict=True):
        leak = found(craft, wrapper)
        assert leak.reads is (least is not None), wrapper
        assert leak.read >= (least or 0), wrapper
