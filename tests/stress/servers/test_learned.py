"""A net trained to leak does so measurably, with weights near those it started from."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.corpus import Net, Task
from sentinel.stress.servers import measure
from sentinel.stress.servers.raw import gradient_of

if TYPE_CHECKING:
    from sentinel.stress.layers import State


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nets.drawn(lambda: nets.mlp(13, 64, 3), seeded(1))


def task() -> Task:
    return Task(Net("mlp", mlp, (13,), 3), seeded(2))


def moved(state: State, crafted: State) -> float:
    far = sum(float((crafted[name] - state[name]).square().sum()) for name in state)
    return (far / sum(float(value.square().sum()) for value in state.values())) ** 0.5


def test_trained_neurons_give_most_records_one_of_their_own() -> None:
    model, drawn = mlp(), task()
    state = servers.copied(model.state_dict())
    sample, _ = drawn.draw(400)
    crafted = servers.learned_neurons(model, state, generator=seeded(), sample=sample, batch=8)
    leak = measure(model, state, crafted, [drawn.draw(8) for _ in range(6)])
    assert leak.honest_share < 0.5
    assert leak.share >= 0.6
    assert moved(state, crafted) < 1.0


def test_trained_weights_have_none_of_the_marks_of_crafted_ones() -> None:
    """No two rows are parallel, and no column behind them is even."""
    model, drawn = mlp(), task()
    crafted = servers.learned_neurons(
        model, model.state_dict(), generator=seeded(), sample=drawn.draw(400)[0], batch=8
    )
    unit = nn.functional.normalize(crafted["0.weight"], dim=1)
    assert (unit @ unit.T - torch.eye(64)).max() < 0.99
    assert crafted["2.weight"].std(1).min() > 0.01


@pytest.mark.parametrize("told", [True, False])
def test_trained_dominance_makes_the_gradient_that_of_few_records(told: bool) -> None:  # noqa: FBT001 - a parameter
    model, drawn = mlp(), task()
    state = servers.copied(model.state_dict())
    sample, labels = drawn.draw(400)
    crafted = servers.learned_dominance(
        model, state, generator=seeded(), sample=sample, labels=labels if told else None
    )
    leak = measure(model, state, crafted, [drawn.draw(8) for _ in range(6)])
    assert leak.honest_effective > 6
    assert leak.effective < (0.5 if told else 0.65) * leak.honest_effective
    assert leak.largest > 0.3


def test_training_for_a_kind_of_patient_gives_those_the_gradient() -> None:
    """One record in eight is of the kind; of the gradient's norm they get most."""
    model, drawn = mlp(), task()
    state = servers.copied(model.state_dict())
    sample, labels = drawn.draw(800)
    cut = sample.mean(1).quantile(0.875)
    crafted = servers.learned_dominance(
        model,
        state,
        generator=seeded(),
        sample=sample,
        labels=labels,
        batch=64,
        wanted=sample.mean(1) > cut,
    )
    rows, known = drawn.draw(200)
    shares = []
    for sent in (state, crafted):
        norms = gradient_of(model, sent, (rows, known), "0").norms
        shares.append(float(norms[rows.mean(1) > cut].sum() / norms.sum()))
    assert shares[0] < 0.25
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("every", [True, False])
def test_a_kind_that_is_all_or_none_is_refused(every: bool) -> None:  # noqa: FBT001 - a parameter
    model = mlp()
    with pytest.raises(MisuseError, match="to be of the kind, and some not"):
        servers.learned_dominance(
            model,
            model.state_dict(),
            generator=seeded(),
            sample=torch.rand(20, 13),
            wanted=torch.full((20,), every),
        )


@pytest.mark.parametrize("craft", [servers.learned_neurons, servers.learned_dominance])
def test_training_in_half_precision_stays_finite(craft: servers.Craft) -> None:
    model = mlp().half()
    sample = torch.randn(40, 13, generator=seeded(3)).half()
    made = functools.partial(craft, sample=sample, batch=8, steps=20)
    sent = made(model, servers.copied(model.state_dict()), generator=seeded())
    assert all(value.dtype == torch.float16 for value in sent.values())
    assert all(value.isfinite().all() for value in sent.values())
    assert any(not value.equal(model.state_dict()[name]) for name, value in sent.items())


def test_statistics_of_normalisation_stay_the_honest_ones() -> None:
    model = nets.drawn(lambda: nets.resnet18(3, 8), seeded(1))
    state = servers.copied(model.state_dict())
    sample = torch.rand(16, 1, 28, 28, generator=seeded(3))
    crafted = servers.learned_dominance(model, state, generator=seeded(), sample=sample, steps=2)
    buffers = [name for name, _ in model.named_buffers()]
    assert buffers
    assert all(torch.equal(crafted[name], state[name]) for name in buffers)


@pytest.mark.parametrize("craft", [servers.learned_neurons, servers.learned_dominance])
def test_a_sample_smaller_than_a_batch_is_refused(craft: servers.Craft) -> None:
    model = mlp()
    with pytest.raises(MisuseError, match="the sample must hold a batch"):
        craft(model, model.state_dict(), generator=seeded(), sample=torch.rand(5, 13), batch=8)
