"""The clip norm that follows a quantile: where it goes, what it costs, what it cannot do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sentinel.dpsgd.quantile import RATE, Quantile

from .conftest import Clipper
from .test_training import Site, mlp

MEDIAN = Quantile(unclipped=0.5, floor=1e-6, ceiling=1e6, batch=100)


def test_the_noise_is_split_so_that_both_answers_together_cost_one_multiplier() -> None:
    """By hand, for z = 1 and a batch of 100: sigma_b = 5, 1 / sqrt(1 - 1/100)."""
    assert MEDIAN.count_std == 5.0
    assert MEDIAN.gradient_multiplier(1.0) == pytest.approx(1 / math.sqrt(0.99))
    for z in (0.5, 1.0, 4.0):
        spread = MEDIAN.gradient_multiplier(z)
        joint = 1 / math.sqrt(spread**-2 + (0.5 / MEDIAN.count_std) ** 2)
        assert joint == pytest.approx(z)
        assert spread > z


def test_a_batch_too_small_for_the_count_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 10 are needed"):
        Quantile(0.5, 0.1, 10.0, batch=10).gradient_multiplier(1.0)


@pytest.mark.parametrize("start", [0.01, 100.0], ids=["from below", "from above"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_clip_norm_comes_to_the_quantile(start, share, fixed_entropy) -> None:
    """Norms are lognormal; each step draws 100 of them anew."""
    rule = Quantile(share, 1e-6, 1e6, batch=100)
    norms = np.random.default_rng(1).lognormal(0.0, 1.0, 10_000)
    generator, entropy, clip = np.random.default_rng(2), fixed_entropy(11), start
    trace = []
    for _ in range(300):
        batch = generator.choice(norms, generator.poisson(100))
        clip = rule.following(clip, int((batch <= clip).sum()), len(batch), entropy)
        trace.append(clip)
    settled = math.exp(np.mean(np.log(trace[-50:])))
    assert np.mean(norms <= settled) == pytest.approx(share, abs=0.06)


def test_all_unclipped_moves_it_down_and_none_moves_it_up(fixed_entropy) -> None:
    """The bit says unclipped: to take it for clipped would run away from the quantile."""
    assert MEDIAN.following(1.0, 100, 100, fixed_entropy(1)) < 0.95
    assert MEDIAN.following(1.0, 0, 100, fixed_entropy(1)) > 1.05


@pytest.mark.parametrize("unclipped", [0, 10**6])
def test_no_step_moves_it_further_than_the_rate(unclipped, fixed_entropy) -> None:
    moved = MEDIAN.following(1.0, unclipped, 10**6, fixed_entropy(3))
    assert math.exp(-RATE) <= moved <= math.exp(RATE)


def test_it_stays_between_floor_and_ceiling(fixed_entropy) -> None:
    rule = Quantile(0.5, 0.9, 1.1, batch=100)
    assert rule.following(1.0, 0, 100, fixed_entropy(1)) == 1.1 or rule.following(
        1.1, 0, 100, fixed_entropy(1)
    ) == pytest.approx(1.1)
    assert rule.following(0.9, 100, 100, fixed_entropy(1)) == 0.9


def test_an_empty_batch_moves_it_by_noise_around_a_half(fixed_entropy) -> None:
    entropy = fixed_entropy(5)
    moves = [math.log(MEDIAN.following(1.0, 0, 0, entropy)) for _ in range(400)]
    assert np.mean(moves) == pytest.approx(0.0, abs=3 * RATE * 0.05 / 20)
    assert np.std(moves) == pytest.approx(RATE * 5.0 / 100, rel=0.15)


def test_the_divisor_is_public_and_not_the_size_of_the_batch(fixed_entropy) -> None:
    """The same centred count gives the same step, whatever the batch holds."""
    small = MEDIAN.following(1.0, 20, 20, fixed_entropy(6))
    large = MEDIAN.following(1.0, 70, 120, fixed_entropy(6))
    assert small == large


@pytest.mark.parametrize("start", [0.02, 50.0], ids=["from below", "from above"])
def test_in_a_private_round_it_comes_to_the_median_of_the_real_gradients(tmp_path, start) -> None:
    """Fed-Heart-Disease; the learning rate is 0, so that the gradients stay what they are."""
    site = Site(
        tmp_path,
        batch=60,
        epsilon=900.0,
        more="adaptive_clip = { quantile = 0.5, floor = 0.001, ceiling = 100.0 }",
    )
    path = tmp_path / "policy.toml"
    text = path.read_text().replace("clip_norm = 1.0", f"clip_norm = {start}")
    path.write_text(text)
    site.guard = type(site.guard)(path, tmp_path / "site")
    site.wrap()
    site.optimizer.param_groups[0]["lr"] = 0.0
    trace = []
    with site.round() as rnd:
        for _ in range(25):
            for x, y in site.loader:
                site.step(x, y)
                trace.append(site.training.clip_norm)
    rnd.release()
    settled = math.exp(np.mean(np.log(trace[-30:])))
    norms = [norm_of(site.data[row]) for row in range(303)]
    assert np.mean(np.array(norms) <= settled) == pytest.approx(0.5, abs=0.12)
    assert site.events[0].noise_multiplier == 1.0


def norm_of(record: tuple[torch.Tensor, torch.Tensor]) -> float:
    model = mlp()
    x, y = (part[None] for part in record)
    nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


def test_a_clip_norm_of_uncharged_steps_is_forgotten(tmp_path) -> None:
    more = "adaptive_clip = { quantile = 0.5, floor = 0.001, ceiling = 100.0 }"
    site = Site(tmp_path, more=more)
    site.wrap()
    with site.round():
        site.train(4)
    assert site.training.clip_norm != 1.0
    with site.round() as rnd:
        assert site.training.clip_norm == 1.0
        site.train(4)
    moved = site.training.clip_norm
    rnd.release()
    with site.round():
        assert site.training.clip_norm == moved


def test_units_are_counted_as_unclipped_up_to_the_clip_norm() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[0.1], [1.0], [2.0], [50.0]])
    found = Clipper(clip_norm=1.0).sum(model, inputs, [0, 1, 2, 3])
    assert found.unclipped == 2  # norms are 0.6 times the input
