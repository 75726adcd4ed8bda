"""Local steps in an unknown order are simulated, which beats taking the update for one step."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.fedavg import (
    LocalLoop,
    Simulation,
    _tied,
    match_loop,
    most_likely_loop,
    unrolled,
)
from sentinel.stress.passive.inversion import Matching
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import smooth_prior
from sentinel.stress.passive.reidentify import match_within_class
from sentinel.stress.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = xray_data.load()
SIZE = (28, 28)
LOOP = LocalLoop(epochs=3, batch=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigmoid_lenet() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(588, 2),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator())
    return model


def two() -> xray_data.Pictures:
    return DATA.hospital.split(1)[0]


def local(labels: torch.Tensor, rate: float = 0.1) -> LocalTraining:
    """A site that trains in an order of its own."""
    model = sigmoid_lenet()
    order = LOOP.batches(len(labels), generator(98))
    return LocalTraining(model, model.state_dict(), labels, order, rate)


def likeness(found: torch.Tensor, truth: xray_data.Pictures) -> float:
    return float(ssim(match_within_class(found, truth.images, truth.labels), truth.images).mean())


@pytest.mark.slow
def test_simulating_the_loop_beats_one_step_though_the_order_is_unknown() -> None:
    truth = two()
    site = local(truth.labels)
    seen = Seen(site.update(truth.images, differentiable=False))
    prior = smooth_prior(SIZE, 2)
    search = Estimation(rounds=6, products=30, least_noise=0.1, first_noise=1.0)
    simulated = most_likely_loop(site, seen, LOOP, prior, search, generator())
    step = replace(site, batches=(torch.arange(2),), learning_rate=0.1 * len(site.batches))
    taken_for_one = most_likely(step, seen, prior, search, generator())
    assert likeness(simulated, truth) > likeness(taken_for_one, truth) + 0.3


def test_every_epoch_holds_every_record_once_and_mixes_the_classes() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    site = replace(local(labels), labels=labels)
    replayed = unrolled(site, LocalLoop(epochs=2, batch=4), generator())
    assert [len(step) for step in replayed.batches] == [4, 4, 4, 4]
    assert torch.cat(replayed.batches).sort().values.tolist() == list(range(16))
    assert all(int(step.max()) < 8 for step in replayed.batches[:2])
    assert [int(replayed.labels[step].sum()) for step in replayed.batches] == [2, 2, 2, 2]


def test_a_drawn_loop_has_the_steps_that_were_asked_for() -> None:
    batches = LocalLoop(epochs=2, batch=3).batches(7, generator())
    assert [len(step) for step in batches] == [3, 3, 1, 3, 3, 1]
    assert torch.cat(batches[:3]).sort().values.tolist() == list(range(7))


def test_the_tie_between_epochs_pulls_their_pictures_together() -> None:
    """The prior knows no order: only the class means of the epochs are compared."""
    labels = torch.tensor([0, 0, 1])
    first = torch.rand((3, 1, 4, 4), generator=generator())
    swapped = first[torch.tensor([1, 0, 2])]
    tie = _tied(labels, 2, 1.0)
    assert tie is not None
    assert float(tie(torch.cat([first, swapped]))) == pytest.approx(0.0, abs=1e-9)
    assert float(tie(torch.cat([first, first + 0.2]))) == pytest.approx(0.01)
    assert _tied(labels, 1, 1.0) is None


def test_the_published_search_returns_one_picture_for_each_record() -> None:
    truth = two()
    site = local(truth.labels, rate=0.02)
    seen = Seen(site.update(truth.images, differentiable=False))
    search = Simulation(Matching(iterations=3, restarts=2))
    found = match_loop(site, seen, LOOP, search, SIZE, generator())
    again = match_loop(site, seen, LOOP, search, SIZE, generator())
    assert found.shape == truth.images.shape
    assert torch.equal(found, again)
