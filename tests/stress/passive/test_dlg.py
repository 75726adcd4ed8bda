"""DLG rebuilds a picture, and its label, from the raw gradient of a smooth net; noise ends it."""

import math

import pytest
import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.stress.passive.dlg import Descent, match_distance
from sentinel.stress.passive.inversion import Matching, match_jointly
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = xray_data.load()
SIZE = (28, 28)
PICTURE, LABEL = DATA.hospital.images[:1], DATA.hospital.labels[:1]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigmoid_lenet(kind: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """The net and the start of the weights that were published with the attack."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        kind(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        kind(),
        nn.Conv2d(12, 12, 5, padding=2),
        kind(),
        nn.Flatten(),
        nn.Linear(588, 2),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator(0))
    return model


def site(model: nn.Module) -> LocalTraining:
    return LocalTraining(model, model.state_dict(), LABEL, (torch.arange(1),), 1.0)


@pytest.mark.parametrize("classes", [None, 2])
def test_a_smooth_nets_raw_gradient_gives_picture_and_label(classes: int | None) -> None:
    local = site(sigmoid_lenet())
    seen = Seen(local.update(PICTURE, differentiable=False))
    found = match_distance(local, seen, Descent(restarts=2), SIZE, generator(), classes=classes)
    assert float(ssim(found.pictures, PICTURE)) > 0.99
    assert found.labels.tolist() == LABEL.tolist()
    assert found.objective < 1e-5


def test_inverting_gradients_searches_the_label_as_well() -> None:
    local = site(sigmoid_lenet())
    seen = Seen(local.update(PICTURE, differentiable=False))
    unlabelled = LocalTraining(
        local.model, local.global_state, 1 - LABEL, local.batches, local.learning_rate
    )
    search = Matching(iterations=200, total_variation=5e-3)
    found = match_jointly(unlabelled, seen, search, SIZE, 2, generator())
    assert found.labels.tolist() == LABEL.tolist()
    assert float(ssim(found.pictures, PICTURE)) > 0.85


def test_noise_ends_it() -> None:
    local = site(sigmoid_lenet())
    raw = local.update(PICTURE, differentiable=False)
    std = float(raw.norm()) / math.sqrt(raw.numel())
    seen = Seen(raw + std * torch.randn(raw.shape, generator=generator(2)), 1.0, std)
    found = match_distance(local, seen, Descent(iterations=40, restarts=1), SIZE, generator())
    assert float(ssim(found.pictures, PICTURE)) < 0.5
    assert found.pictures.min() >= 0
    assert found.pictures.max() <= 1


def test_the_clip_takes_nothing_away_from_an_attacker_who_knows_its_scale() -> None:
    local = site(sigmoid_lenet())
    raw = local.update(PICTURE, differentiable=False)
    search = Descent(restarts=2)
    found = match_distance(local, Seen(0.1 * raw, scale=0.1), search, SIZE, generator())
    assert float(ssim(found.pictures, PICTURE)) > 0.99


def test_of_several_restarts_the_one_that_fits_best_is_kept() -> None:
    local = site(sigmoid_lenet())
    seen = Seen(local.update(PICTURE, differentiable=False))
    fits = [
        match_distance(local, seen, Descent(12, restarts=count), SIZE, generator()).objective
        for count in (1, 3)
    ]
    assert fits[1] <= fits[0]
