"""The image attacker on chest X-rays: raw gradients give them away; masking never helps it."""

import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import nn

from sentinel import Guard
from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.stress.layers import copied
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.images import RAW, ImageAttacker
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.labels import lone_label
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import ImagePrior, filled_prior, fit_prior, smooth_prior
from sentinel.stress.passive.reidentify import Recognition
from sentinel.stress.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread", "known_noise")
DATA = xray_data.load()
SIZE = (28, 28)
SMOOTH = smooth_prior(SIZE, 2)
BLIND = RAW.blind["smooth prior"]
NINE = range(0, 63, 7)  # of both classes
POLICY = """
schema = 1
name = "masked"
[limits]
min_patients = 1
[[rule]]
id = "all"
max_norm = 0.01
noise_ratio = {ratio}
keep = {keep}
"""


@pytest.fixture(scope="module")
def prior() -> ImagePrior:
    return fit_prior(DATA.public.images, DATA.public.labels, 60)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sent(epochs: int) -> nn.Module:
    """The global model: at its start, or after so many epochs on public pictures."""
    model = xray_net()
    initialise(model, generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(epochs):
        for batch in torch.randperm(280, generator=generator(epoch)).split(8):
            optimizer.zero_grad()
            answers = model(DATA.public.images[batch])
            nn.CrossEntropyLoss()(answers, DATA.public.labels[batch]).backward()
            optimizer.step()
    return model


def alone(model: nn.Module, index: int, rate: float = 1.0) -> tuple[LocalTraining, torch.Tensor]:
    """A site with one picture, and that picture."""
    labels = DATA.hospital.labels[index][None]
    site = LocalTraining(model, copied(model.state_dict()), labels, (torch.arange(1),), rate)
    return site, DATA.hospital.images[index][None]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_nine_xrays_come_back_from_raw_gradients_without_any_other_picture(epochs: int) -> None:
    """Mean SSIM of .9 and more, at the start of training and after one epoch."""
    model = sent(epochs)
    likeness = []
    for index in NINE:
        site, picture = alone(model, index)
        seen = Seen(site.update(picture, differentiable=False))
        found = match_direction(site, seen, RAW.searches["TV .01"], SIZE, generator())
        likeness.append(float(ssim(found, picture)))
    assert fmean(likeness) >= 0.9


def test_two_of_them_come_back_after_an_epoch_in_a_second_each() -> None:
    """By Gauss-Newton, with a prior that knows no picture."""
    model = sent(1)
    likeness = []
    for index in (0, 40):
        site, picture = alone(model, index)
        seen = Seen(site.update(picture, differentiable=False))
        found = most_likely(site, seen, SMOOTH, BLIND, generator())
        likeness.append(float(ssim(found, picture)))
    assert min(likeness) >= 0.9


def normalised() -> nn.Sequential:
    """The small CNN with batch normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 2)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_picture_comes_back_through_batch_normalisation_without_its_label(mode: str) -> None:
    """The label is read first, then the picture; under the batch's or the server's statistics."""
    model = normalised()
    initialise(model, generator())
    site, picture = alone(model.train(mode == "train"), 40)
    seen = Seen(site.update(picture, differentiable=False))
    label = lone_label(replace(site, labels=1 - site.labels), seen)
    assert label == int(site.labels)
    read = replace(site, labels=torch.tensor([label]))
    search = Matching(iterations=300, total_variation=5e-2)
    found = match_direction(read, seen, search, SIZE, generator())
    assert float(ssim(found, picture)) > 0.8


def released(
    index: int, ratio: float, keep: float, home: Path, *, hidden: bool
) -> tuple[LocalTraining, Seen, torch.Tensor]:
    """One picture's update as the guard lets it out, and all that the attacker knows of it."""
    model = sent(0)
    site, picture = alone(model, index, rate=0.05)
    policy = home / "policy.toml"
    policy.write_text(POLICY.format(ratio=ratio, keep=keep))
    guard = Guard(policy, home / "state", federation="f", run="r", alerts=io.StringIO())
    with guard.round(1, site.global_state, model, patients=1) as rnd:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        nn.CrossEntropyLoss()(model(picture), site.labels).backward()
        optimizer.step()
    values = site.flatten(rnd.release(kind="delta"))
    decided = rnd.decided
    assert decided is not None
    (treatment,) = set(decided.plan.treatments.values())
    assert treatment.keep == keep
    norm = float(site.update(picture, differentiable=False).norm())
    scale = min(bound.max_norm for bound in decided.plan.bounds) / norm
    assert scale < 1.0  # else the noise would be stronger than it says
    return site, Seen(values, scale, treatment.noise_std, keep, hidden), picture


KEEPS = (1.0, 0.5, 0.25, 0.1)


@pytest.mark.parametrize("hidden", [False, True], ids=["visible", "hidden"])
@pytest.mark.parametrize(
    "ratio",
    [
        pytest.param(0.0, id="raw", marks=pytest.mark.soak),
        pytest.param(1.0, id="noised", marks=pytest.mark.slow),
    ],
)
def test_a_stricter_keep_never_raises_what_leaks(
    ratio: float, *, hidden: bool, prior: ImagePrior, tmp_path: Path
) -> None:
    """Through the release; the best of attackers with a prior, who can always fall back on it."""
    fine = Estimation(rounds=6, products=50, least_noise=0.1)
    searches = (Estimation(), Estimation(least_noise=2.0)) if ratio else (fine,)
    leaked = {}
    for keep in KEEPS:
        likeness: dict[int, list[float]] = {}
        for index in (0, 13, 40, 57) if ratio else (0, 40):
            home = tmp_path / f"{keep}-{index}"
            home.mkdir()
            site, seen, picture = released(index, ratio, keep, home, hidden=hidden)
            assert keep == 1.0 or 0.0 < float((seen.values != 0).float().mean()) < 1.2 * keep
            guesses = [most_likely(site, seen, prior, how, generator()) for how in searches]
            for number, guess in enumerate([prior.means[site.labels], *guesses]):
                likeness.setdefault(number, []).append(float(ssim(guess, picture)))
        leaked[keep] = max(fmean(found) for found in likeness.values())
    for looser, stricter in itertools.pairwise(KEEPS):
        assert leaked[stricter] <= leaked[looser] + 0.01
    if ratio:
        assert leaked[0.1] < leaked[1.0] - 0.02  # it is no constant


@pytest.mark.soak
@pytest.mark.parametrize("hidden", [False, True], ids=["visible", "hidden"])
@pytest.mark.parametrize("ratio", [0.0, 8.0], ids=["raw", "noised"])
def test_a_stricter_keep_never_helps_who_holds_the_candidates(
    ratio: float, *, hidden: bool, tmp_path: Path
) -> None:
    """By how much the picture stands out among 99 others under the matched filter."""
    public = tuple(DATA.public.of_class(label)[:40] for label in (0, 1))
    apart = {}
    for keep in KEEPS:
        found = []
        for index in (0, 13, 40, 57):
            home = tmp_path / f"{keep}-{index}"
            home.mkdir()
            site, seen, picture = released(index, ratio, keep, home, hidden=hidden)
            label = int(site.labels)
            candidates = [public[0][:1], public[1][:1]]
            candidates[label] = torch.cat([picture, DATA.decoys.of_class(label)])
            ratios = Recognition(site, seen, public).ratios(tuple(candidates))[label]
            found.append(float((ratios[0] - ratios[1:].mean()) / ratios[1:].std()))
        apart[keep] = fmean(found)
    for looser, stricter in itertools.pairwise(KEEPS):
        assert apart[stricter] <= apart[looser] + 0.25  # of a standard deviation
    if ratio:
        assert apart[0.1] < apart[1.0] - 0.5  # it is no constant


def test_a_rescale_before_the_noise_would_raise_it_and_be_noticed(prior: ImagePrior) -> None:
    """The control of the test above: masked, scaled up, and only then noised."""
    likeness: dict[float, list[float]] = {1.0: [], 0.1: []}
    for index in (0, 40):
        site, picture = alone(sent(0), index)
        raw = site.update(picture, differentiable=False)
        std = 10.0 * float(raw.norm()) / math.sqrt(raw.numel())
        for keep, found in likeness.items():
            mask = torch.rand(raw.shape, generator=generator(1)) < keep
            noise = std * torch.randn(raw.shape, generator=generator(2))
            seen = Seen((raw / keep + noise) * mask, 1.0, std * keep, keep)
            guess = most_likely(site, seen, prior, Estimation(), generator())
            found.append(float(ssim(guess, picture)))
    assert fmean(likeness[0.1]) > fmean(likeness[1.0]) + 0.02


def test_every_attacker_is_tried_and_counted(prior: ImagePrior) -> None:
    attacker = ImageAttacker(
        searches={"search": Matching(iterations=2)},
        estimates={"public": Estimation(rounds=1, products=2)},
        blind={"blind": Estimation(rounds=1, products=2)},
        steps={"near": Matching(iterations=2, step=1e-3)},
        filled={"filled": Estimation(rounds=1, products=2)},
    )
    site, picture = alone(sent(0), 0)
    seen = Seen(site.update(picture, differentiable=False))
    found = dict(attacker.reconstruct(site, seen, prior, generator()))
    assert list(found) == ["search", "blind", "near", "public", "filled"]
    assert len(attacker) == 5
    # Small steps stay near the mean that they set out from.
    assert float((found["near"] - prior.means[site.labels]).abs().max()) <= 2e-3 + 1e-6
    assert all(guess.shape == picture.shape for guess in found.values())
    assert len(attacker.with_prior_only()) == 1


def test_a_prior_without_pictures_can_hold_any_picture() -> None:
    picture = DATA.hospital.images[3]
    offset = (picture - 0.5).flatten().double()
    latent = torch.linalg.solve(SMOOTH.directions[0].T.double(), offset)
    back = SMOOTH.decode(latent.float()[None], torch.tensor([0]))
    assert torch.allclose(back[0], picture, atol=1e-2)
    assert SMOOTH.directions[0].square().sum(dim=0).sqrt().mean() == pytest.approx(0.25, abs=0.01)


def test_a_remainder_beside_the_public_directions_finds_more_where_there_is_little_noise(
    prior: ImagePrior,
) -> None:
    filled = filled_prior(prior)
    spread = prior.directions.square().sum(dim=1) + 0.05**2
    assert torch.allclose(filled.directions.square().sum(dim=1), spread, rtol=0.05)
    site, picture = alone(sent(0), 0)
    raw = site.update(picture, differentiable=False)
    std = 0.2 * float(raw.norm()) / math.sqrt(raw.numel())
    seen = Seen(raw + std * torch.randn(raw.shape, generator=generator(4)), 1.0, std)
    search = Estimation(rounds=6, products=50, least_noise=0.1)
    likeness = [
        float(ssim(most_likely(site, seen, known, search, generator()), picture))
        for known in (prior, filled)
    ]
    assert likeness[1] > likeness[0] + 0.01
    assert likeness[1] > 0.9


def test_a_search_can_start_from_pictures(prior: ImagePrior) -> None:
    picture, labels = DATA.public.images[:2], DATA.public.labels[:2]
    latent = prior.encode(picture, labels)
    again = prior.encode(prior.decode(latent, labels), labels)
    assert torch.allclose(latent, again, atol=1e-3)
    site, _ = alone(sent(0), 0)
    seen = Seen(torch.ones_like(site.update(picture[:1], differentiable=False)))
    start = prior.decode(latent, labels)[:1].clamp(0.0, 1.0)
    nothing = Estimation(rounds=0)
    kept = most_likely(site, seen, prior, nothing, generator(), start=start)
    nearest = prior.decode(prior.encode(start, site.labels), site.labels).clamp(0.0, 1.0)
    assert torch.allclose(kept, nearest, atol=1e-5)
