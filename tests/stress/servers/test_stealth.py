"""Each way of hiding does what it says, and whether an attack is left is measured."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.corpus import Net, Task
from sentinel.stress.servers import WRAPPERS, Leak, Public, measure, measure_sum
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
    """Batches of 16 records through 64 neurons (rows) or 128 (images); of 6 x 16 tokens, 256."""
    net = net_of(craft)
    model = nets.drawn(net.build, seeded(1))
    state = servers.copied(model.state_dict())
    task = Task(net, seeded(2))
    sample, labels = task.draw(256)
    made = servers.recipe(craft).craft(Public(sample, labels, 16))
    hidden = WRAPPERS[wrapper](made) if wrapper else made
    sent = hidden(model, state, generator=seeded(5))
    batches, size = (8, 6) if craft == "token-bins" else (2, 16)
    return measure(model, state, sent, [task.draw(size) for _ in range(batches)])


# Least reads of 32 records (of 768 tokens) for each wrapper in the order of `WRAPPERS`: permuted,
# scaled, turned, jittered, mixed, among-honest; None where no attack is left. A tenth of jitter
# and a half of the honest model move cuts past one another, so bins and tokens suffer; a fished
# class needs its certain loss, which half of it is not.
LEAST: dict[str, tuple[int | None, ...]] = {
    "binning-gaussian": (20, 20, 18, 1, None, 5),
    "binning-mean": (17, 17, 14, 1, None, 6),
    "loki": (24, 24, 22, 12, None, 17),
    "qbi": (16, 16, 7, 15, 17, 3),
    "trap-weights": (27, 27, 23, 26, 25, 17),
    "fishing-class": (6, 6, 4, 6, None, 3),
    "class-separation": (15, 15, 14, 5, 4, 9),
    "token-bins": (400, 350, 300, None, 25, 90),
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


def test_a_hidden_suppression_leaves_one_client_of_four_unless_rows_stay_alive() -> None:
    """A turned or an honest row fires, so the other clients are heard."""
    model = mlp()
    state = servers.copied(model.state_dict())
    batches = [
        (torch.randn(8, 13, generator=seeded(place)), torch.arange(8) % 3) for place in range(4)
    ]
    clients = {}
    for name, wrapper in WRAPPERS.items():
        dead = wrapper(servers.suppression)(model, state, generator=seeded(6))
        clients[name] = measure_sum(model, state, state, dead, batches).effective
    alone = {"permuted", "scaled", "jittered", "mixed"}
    assert all(clients[name] == pytest.approx(1.0) for name in alone)
    assert all(clients[name] > 2 for name in clients.keys() - alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["jittered", "mixed"])
def test_on_a_net_of_one_dense_layer_what_needs_no_neurons_is_hidden_and_leaks(
    wrapper: str,
) -> None:
    net = Net("resnet", lambda: nets.resnet18(5, 8, norm=nets.group_norm), (1, 28, 28), 5)
    model = nets.drawn(net.build, seeded(1))
    state = servers.copied(model.state_dict())
    task = Task(net, seeded(2))
    public = Public(*task.draw(64), 8)
    batches = [task.draw(8) for _ in range(3)]
    for name in ("fishing-class", "fishing-feature", "class-separation"):
        craft = WRAPPERS[wrapper](servers.recipe(name).craft(public))
        leak = measure(model, state, craft(model, state, generator=seeded(6)), batches)
        assert leak.honest_read == 0
        assert leak.is_attack, name
    dead = WRAPPERS[wrapper](servers.suppression)(model, state, generator=seeded(6))
    assert measure_sum(model, state, state, dead, batches).fishes


def test_a_seer_s_secret_needs_its_neurons_in_their_places() -> None:
    """It is hidden as it is: what moves its rows must move the mixtures with them."""
    net = net_of("qbi")
    model = nets.drawn(net.build, seeded(1))
    state = servers.copied(model.state_dict())
    task = Task(net, seeded(2))
    craft = servers.recipe("seer").craft(Public(task.draw(256)[0], batch=16))
    batches = [task.draw(16) for _ in range(4)]
    secret = servers.seer_secret(64, seeded(5))
    reads = {}
    for name, made in {"plain": craft, "permuted": permuted(craft)}.items():
        sent = made(model, state, generator=seeded(5))
        reads[name] = measure(model, state, sent, batches, secret=secret).share
    assert reads["plain"] > 0.25
    assert reads["permuted"] < reads["plain"] / 2
