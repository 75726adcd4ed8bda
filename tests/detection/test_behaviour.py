"""Behaviour: traps that no weight shows are found by what they do to synthetic probes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.detection import Kind, inspect_global_model
from sentinel.detection.behaviour import effective
from sentinel.detection.probes import MANY, probed
from sentinel.detection.synthetic import twin
from sentinel.stress import corpus, nets, servers
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from sentinel.detection.inspection import Inspection

LENET = next(net for net in corpus.NETS if net.name == "lenet-256")
WIDE = next(net for net in corpus.NETS if net.name == "mlp-13-256-1")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(
    net: corpus.Net, steps: int, rate: float = 0.05
) -> tuple[nn.Module, corpus.State, corpus.Task]:
    module, task = corpus.fresh(net, seeded(3)), corpus.Task(net, seeded(4))
    corpus.train(module, task, steps=steps, rate=rate)
    return module, servers.copied(module.state_dict()), task


def kinds(found: Inspection) -> set[Kind]:
    return {finding.kind for finding in found.findings}


@pytest.mark.parametrize("craft", [servers.qbi, servers.trap_weights])
def test_traps_tuned_to_public_records_are_found_whatever_their_weights(
    craft: servers.Craft,
) -> None:
    module, state, task = trained(LENET, 20)
    tuned = functools.partial(craft, sample=task.draw(300)[0], batch=16)
    crafted = servers.blended(tuned(module, state, generator=seeded(1)), state, 0.5)
    found = inspect_global_model(crafted, None, module)
    assert Kind.EXCLUSIVE_UNITS in kinds(found)
    assert found.verdict is Verdict.SPARSE_ACTIVATION
    assert found.suspicion > 0.5
    assert inspect_global_model(state, None, module).suspicion < 0.3


def test_a_net_trained_so_that_each_record_has_neurons_of_its_own_is_found() -> None:
    module, state, task = trained(WIDE, 20)
    crafted = servers.learned_neurons(
        module, state, generator=seeded(1), sample=task.draw(300)[0], batch=16
    )
    found = inspect_global_model(crafted, None, module)
    assert Kind.EXCLUSIVE_UNITS in kinds(found)
    assert found.suspicion > 0.5


def test_a_net_trained_so_that_one_record_dominates_is_named_learned() -> None:
    module, state, task = trained(LENET, 20)
    sample, labels = task.draw(300)
    crafted = servers.learned_dominance(
        module, state, generator=seeded(1), sample=sample, labels=labels, batch=8
    )
    found = inspect_global_model(crafted, None, module)
    assert Kind.DOMINANT_RECORD in kinds(found)
    assert found.verdict is Verdict.LEARNED


def test_a_trained_last_layer_times_thirty_is_magnification() -> None:
    module, state, _ = trained(LENET, 40)
    for name in ("9.weight", "9.bias"):
        state[name] = state[name] * 30.0
    found = inspect_global_model(state, None, module)
    assert found.verdict is Verdict.MAGNIFICATION
    assert found.suspicion > 0.8


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("name", ["mlp-30-128-64-5", "lenet-256", "norm-cnn-128", "small-resnet"])
def test_honest_nets_pass_also_where_they_were_trained_ten_times_too_fast(
    name: str, rate: float
) -> None:
    net = next(net for net in corpus.NETS if net.name == name)
    module, state, _ = trained(net, 40, rate)
    found = inspect_global_model(state, None, module)
    assert found.suspicion < 0.4
    assert found.probed


class InPlace(nn.Module):
    """Writes into what its first layer gave."""

    def __init__(self) -> None:
        """Build."""
        super().__init__()
        self.first, self.last = nn.Linear(13, 64), nn.Linear(64, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Use an activation in place."""
        return self.last(self.first(rows).relu_())


def test_an_activation_in_place_hides_no_silent_unit() -> None:
    model = InPlace()
    state = servers.qbi(model, model.state_dict(), generator=seeded(1))
    copied = twin(model, state)
    assert copied is not None
    seen = probed(copied.module, None, seeded(0))
    assert seen is not None
    active = seen.layers["first"].active
    assert active is not None
    assert float(active.double().mean()) < 0.1
    assert torch.equal(active & ~seen.layers["first"].fired, torch.zeros_like(active))


class Frozen(nn.Module):
    """Gives outputs that no gradient can be taken of."""

    def __init__(self) -> None:
        """Build."""
        super().__init__()
        self.net = nets.mlp(13, 64, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Run without a graph."""
        with torch.no_grad():
            return self.net(rows)


def test_without_a_gradient_the_units_that_fire_are_looked_at() -> None:
    model = Frozen()
    honest = inspect_global_model(model.state_dict(), None, model)
    assert honest.probed
    assert honest.suspicion < 0.3
    crafted = servers.qbi(
        model.net, model.net.state_dict(), generator=seeded(1), sample=torch.randn(300, 13)
    )
    named = {f"net.{name}": value for name, value in crafted.items()}
    assert Kind.EXCLUSIVE_UNITS in kinds(inspect_global_model(named, None, model))


def test_probes_are_of_several_kinds_in_one_batch() -> None:
    for model, count in ((nets.mlp(13, 8, 2), 2), (nets.lenet(), 3)):
        copied = twin(model, model.state_dict())
        assert copied is not None
        seen = probed(copied.module, None, seeded(0))
        assert seen is not None
        assert len(seen.kinds()) == count
        assert len(seen.output) == count * MANY
        assert seen.loss is not None
        assert torch.isfinite(seen.loss).all()


def test_the_effective_share_is_one_for_equals_and_small_for_one_that_dominates() -> None:
    assert effective(torch.ones(8)) == pytest.approx(1.0)
    assert effective(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective(torch.zeros(4)) == 1.0
