"""Matching and ranking: what is there is found, and what is not is at chance."""

import numpy as np
import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.interval import Count
from sentinel.stress.passive.images import Gain, Truth, dealt
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import ImagePrior, fit_prior
from sentinel.stress.passive.reidentify import (
    Found,
    Recognition,
    influences,
    match_within_class,
    ranked_first,
)
from sentinel.stress.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.rand((count, 1, 16, 16), generator=torch.Generator().manual_seed(seed))


def flat_prior(classes: int = 2) -> ImagePrior:
    return ImagePrior(torch.full((classes, 1, 16, 16), 0.5), torch.zeros(classes, 1, 256))


LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def test_shuffled_pictures_are_put_back_in_their_places() -> None:
    pictures = noise(6, 0)
    shuffled = pictures[torch.tensor([4, 3, 0, 5, 2, 1])]  # within the class
    assert torch.equal(match_within_class(shuffled, pictures, LABELS), pictures)


def test_no_guess_is_given_to_a_picture_of_another_class() -> None:
    pictures = noise(2, 0)
    swapped = pictures.flip(0)
    matched = match_within_class(swapped, pictures, torch.tensor([0, 1]))
    assert torch.equal(matched, swapped)


def test_perfect_guesses_are_all_found_among_decoys() -> None:
    pictures = noise(6, 0)
    decoys = (noise(99, 1), noise(99, 2))
    found = ranked_first(pictures.flip(0).roll(1, 0), pictures, LABELS, decoys, flat_prior())
    assert (found.count.hits, found.count.trials) == (6, 6)
    assert found.by_chance < 1e-6


def test_guesses_that_know_nothing_find_a_picture_once_in_a_hundred() -> None:
    """The chance of the measure itself: 1 in 1 + decoys, whatever the guesses are."""
    hits = []
    for seed in range(40):
        pictures, guesses = noise(32, 10 * seed), noise(32, 10 * seed + 1)
        labels = torch.zeros(32, dtype=torch.int64)
        decoys = (noise(99, 10 * seed + 2),)
        hits.append(ranked_first(guesses, pictures, labels, decoys, flat_prior(1)).count.hits)
    assert 3 <= sum(hits) <= 26  # 12.8 expected of 1280; pictures of one draw share their decoys


def test_the_chance_of_each_count_is_exact() -> None:
    """Against shuffling: which of 5 pictures and 20 decoys come before the first decoy."""
    shuffle = np.random.default_rng(0)
    counts = []
    for _ in range(20_000):
        two = [shuffle.permutation([True] * 5 + [False] * 20) for _ in range(2)]
        counts.append(sum(int(np.argmin(order)) for order in two))
    for hits in range(5):
        found = Found(Count(hits, 10), ((5, 20), (5, 20)))
        seen = sum(count >= hits for count in counts) / len(counts)
        assert found.by_chance == pytest.approx(seen, abs=0.012)


def test_chance_finds_one_in_a_hundred_in_the_mean_and_stays_under_its_limit() -> None:
    found = Found(Count(0, 64), ((32, 99), (32, 99)))
    mean = sum(Found(Count(hits, 64), found.classes).by_chance for hits in range(1, 65)) / 64
    assert mean == pytest.approx(0.01)
    limit = round(64 * found.chance_limit(0.99))
    assert Found(Count(limit + 1, 64), found.classes).by_chance <= 0.01
    assert Found(Count(limit, 64), found.classes).by_chance > 0.01
    assert found.by_chance == pytest.approx(1.0)


def test_matching_lifts_guesses_that_know_nothing() -> None:
    """Why a figure for an unrelated update stands beside the attacker's."""
    pictures, guesses = noise(32, 0), noise(32, 1)
    truth = Truth(pictures, torch.zeros(32, dtype=torch.int64), (noise(99, 2),))
    scored = truth.score(guesses, flat_prior(1))
    assert scored.ssim > float(ssim(guesses, pictures).mean()) + 0.02


def test_a_class_without_decoys_is_refused() -> None:
    pictures = noise(6, 0)
    with pytest.raises(MisuseError, match="decoys"):
        ranked_first(pictures, pictures, LABELS, (noise(5, 1),), flat_prior())


def test_the_prior_holds_the_class_means_and_spans_its_pictures() -> None:
    pictures, labels = noise(40, 0), torch.arange(2).repeat_interleave(20)
    prior = fit_prior(pictures, labels, 19)  # as many directions as twenty pictures have
    assert torch.allclose(prior.means[1], pictures[20:].mean(dim=0))
    target = (pictures[25] - prior.means[1]).flatten()
    solution = torch.linalg.lstsq(prior.directions[1].T, target[:, None]).solution[:, 0]
    back = prior.decode(solution[None], torch.tensor([1]))
    assert torch.allclose(back[0], pictures[25], atol=1e-3)


def test_the_prior_draws_pictures_as_varied_as_the_public_ones() -> None:
    pictures, labels = noise(60, 0), torch.zeros(60, dtype=torch.int64)
    prior = fit_prior(pictures, labels, 59)
    latent = torch.randn((2000, 59), generator=torch.Generator().manual_seed(1))
    drawn = prior.decode(latent, torch.zeros(2000, dtype=torch.int64))
    assert float(drawn.var(dim=0).mean()) == pytest.approx(
        float(pictures.var(dim=0).mean()), rel=0.05
    )


@pytest.mark.parametrize("components", [0, 20, 21])
def test_too_few_public_pictures_are_refused(components: int) -> None:
    with pytest.raises(MisuseError, match="more pictures"):
        fit_prior(noise(40, 0), torch.arange(2).repeat_interleave(20), components)


def test_pictures_are_dealt_out_once_and_no_decoy_is_behind_its_update() -> None:
    pictures = (noise(23, 0), noise(25, 1))
    updates = dealt(pictures, 4, 15, torch.Generator().manual_seed(0))
    assert len(updates) == 5
    behind = torch.cat([truth.pictures for truth in updates]).flatten(1)
    assert len(behind.unique(dim=0)) == 40
    for truth in updates:
        assert truth.labels.tolist() == [0] * 4 + [1] * 4
        for label, decoys in enumerate(truth.decoys):
            both = torch.cat([truth.pictures[truth.labels == label], decoys]).flatten(1)
            assert len(both.unique(dim=0)) == 4 + 15
            assert len(torch.cat([both, pictures[label].flatten(1)]).unique(dim=0)) == len(
                pictures[label]
            )


def test_too_few_pictures_to_deal_out_are_refused() -> None:
    with pytest.raises(MisuseError, match="takes 4 pictures"):
        dealt((noise(23, 0), noise(18, 1)), 4, 15, torch.Generator())


def test_a_gain_is_over_the_class_mean_and_pooled_over_updates() -> None:
    truth = Truth(noise(6, 0), LABELS, (noise(9, 1), noise(9, 2)))
    prior = flat_prior()
    means = prior.means[LABELS]
    nothing, everything = truth.score(means, prior), truth.score(truth.pictures, prior)
    gain = Gain.over([(truth, nothing), (truth, everything)], prior)
    blind = float(ssim(means, truth.pictures).mean())
    assert gain.mean == pytest.approx((1 - blind) / 2, abs=1e-5)
    assert gain.half == pytest.approx(1.96 * float(gain.gains.std()) / 12**0.5)
    assert gain.upper == pytest.approx(gain.mean + gain.half)
    assert (gain.found.count.hits, gain.found.count.trials) == (6, 12)
    assert gain.found.classes == ((3, 9),) * 4


def site(labels: torch.Tensor) -> LocalTraining:
    """One step of a small net on pictures of those labels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return LocalTraining(model, model.state_dict(), labels, (torch.arange(len(labels)),), 0.5)


def test_influences_add_up_to_the_update_as_it_was_treated() -> None:
    """Exact for one step; clip and mask included."""
    pictures, training = noise(6, 0), site(LABELS)
    raw = training.update(pictures, differentiable=False)
    kept = torch.arange(len(raw)) % 2
    seen = Seen(raw * 0.3 * kept / 0.5, scale=0.3, keep=0.5)
    total = torch.stack(
        [
            influences(training, seen, pictures[label == LABELS], label).sum(dim=0)
            for label in (0, 1)
        ]
    ).sum(dim=0)
    assert torch.allclose(total, seen.values, atol=1e-6)


def recognised(noise_std: float, *, behind: bool = True) -> Found:
    """An attacker who holds six pictures and 99 decoys of each class, in ten updates."""
    found = []
    for seed in range(10):
        pictures, training = noise(6, 5 * seed), site(LABELS)
        source = pictures if behind else noise(6, 5 * seed + 4)
        raw = training.update(source, differentiable=False)
        error = noise_std * torch.randn(raw.shape, generator=torch.Generator().manual_seed(seed))
        seen = Seen(raw + error, noise_std=noise_std)
        public = (noise(40, 5 * seed + 1), noise(40, 5 * seed + 2))
        decoys = (noise(99, 5 * seed + 3), noise(99, 5 * seed + 103))
        found.append(Recognition(training, seen, public).first(pictures, decoys))
    return Found.pooled(found)


def test_who_holds_the_candidates_finds_those_behind_a_raw_update() -> None:
    found = recognised(0.0)
    assert found.count.trials == 60
    assert found.count.share > 0.3
    assert found.by_chance < 1e-9


@pytest.mark.parametrize(("noise_std", "behind"), [(10.0, True), (0.0, False)])
def test_and_nobody_behind_noise_or_behind_another_update(
    noise_std: float, *, behind: bool
) -> None:
    found = recognised(noise_std, behind=behind)
    assert found.count.hits <= 60 * found.chance_limit(0.999)


def test_candidates_are_not_recognised_over_several_steps_or_without_public_pictures() -> None:
    several = LocalTraining(
        site(LABELS).model, {}, LABELS, (torch.arange(3), torch.arange(3, 6)), 0.5
    )
    for training, public in ((several, (noise(4, 0),) * 2), (site(LABELS), (noise(0, 0),) * 2)):
        with pytest.raises(MisuseError, match="one step"):
            Recognition(training, Seen(torch.zeros(3)), public)
