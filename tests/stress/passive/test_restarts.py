"""All restarts in one pass give what each alone gives."""

from __future__ import annotations

import pytest
import torch

from sentinel.demo.hearts import network
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.restarts import Restarts, descend, misfits


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_updates_of_an_ensemble_are_those_of_its_members(steps: int) -> None:
    draw = generator()
    model = network(5, 7, draw)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    batches = torch.arange(4).chunk(steps)
    training = LocalTraining(model, model.state_dict(), labels, batches, 0.5, loss=binary_loss)
    inputs = torch.randn(3, 4, 5, generator=draw)
    each = torch.stack([training.update(one, differentiable=False) for one in inputs])
    assert torch.allclose(Restarts(training, 3).updates(inputs), each, atol=1e-6)


def test_members_of_an_ensemble_do_not_touch() -> None:
    draw = generator()
    model = network(5, 7, draw)
    training = LocalTraining(
        model, model.state_dict(), torch.ones(2), (torch.arange(2),), 0.5, loss=binary_loss
    )
    inputs = torch.randn(3, 2, 5, generator=draw).requires_grad_()
    Restarts(training, 3).updates(inputs)[1].square().sum().backward()
    moved = inputs.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [False, True, False]


def test_the_misfit_under_noise_is_minus_the_log_of_the_likelihood() -> None:
    """Up to a constant: the mask is kept, and noise was scaled with what was kept."""
    values = torch.tensor([2.0, 0.0, -4.0])
    seen = Seen(values, scale=0.5, noise_std=1.5, keep=0.5)
    simulated = torch.tensor([[1.0, 5.0, -1.0]])
    normal = torch.distributions.Normal(values[[0, 2]], 1.5 / 0.5)
    density = normal.log_prob(torch.tensor([1.0, -1.0])) - normal.log_prob(values[[0, 2]])
    assert float(misfits(simulated, seen)) == pytest.approx(-float(density.sum()))


def test_the_true_update_has_no_misfit() -> None:
    values = torch.tensor([[1.0, -2.0, 0.5]])
    assert float(misfits(values, Seen(values[0]))) == pytest.approx(0.0, abs=1e-6)
    assert float(misfits(-values, Seen(values[0]))) > 1.0


def test_a_descent_gives_the_lowest_place_of_every_restart() -> None:
    start = torch.tensor([[3.0], [-2.0]])
    found, lowest = descend(lambda x: (x - 1).square().sum(-1), start, 400, 0.1)
    assert torch.allclose(found, torch.ones(2, 1), atol=1e-2)
    assert bool((lowest < 1e-3).all())
