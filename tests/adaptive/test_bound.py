"""The bound follows the site's released updates, within its limits, and cannot be run away with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.adaptive import Bound, Seen, fill_of, shown, sketch
from sentinel.adaptive.bound import LARGEST_MOVE, REMEMBERED, STEPS
from sentinel.adaptive.sketch import WIDTH
from sentinel.terms import Action, AutoNorm, Plan, Treatment

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMITS = AutoNorm(0.1, 10.0)
REACH = "0" * 64


def started(norm: float, limits: AutoNorm = LIMITS) -> Bound:
    """As uncertain as a fresh bound, from another start."""
    return Bound(norm, Bound.fresh(limits).variance)


def looked(number: int, fill: float | None, *, blur: float = 0.0, model: float = 0.0) -> Seen:
    """A look at a model of one sketched number."""
    return Seen(f"{number:064x}", number, REACH, fill, blur, (model, *[0.0] * 255), 1000)


@dataclass(frozen=True, slots=True)
class Federation:
    """A site, and what its server makes of the updates.

    Attributes:
        ratio: noise_ratio of every site.
        coordinates: of the model.
        sites: how many there are, all alike; the model stands still where 0.
        shared: share of an update's energy in the direction that all sites and rounds share.
        forged: length of the step that a malicious server makes each round instead, one direction.
    """

    ratio: float
    coordinates: int
    sites: int = 0
    shared: float = 0.8
    forged: float = 0.0

    def run(self, bound: Bound, norms: Iterable[float], seed: int = 0) -> list[float]:
        """The bound after each round; noise, clip and look as in a release."""
        generator = torch.Generator().manual_seed(seed)
        common, forged = self._direction(generator), self._direction(generator)
        state = torch.zeros(self.coordinates)
        found = []
        for number, norm in enumerate(norms):
            used = bound.norm
            alone = math.sqrt(1 - self.shared) * self._direction(generator)
            update = min(norm, used) * (math.sqrt(self.shared) * common + alone)
            std = self.ratio * used / math.sqrt(self.coordinates)
            out = update + std * self._noise(generator)
            plan = Plan(Action.RELEASE, {"w": Treatment(noise_std=std)}, (), ())
            base = {"w": state}
            fill = fill_of(shown(base, {"w": out}, ["w"], deltas=True), [plan], used, {})
            assert fill is not None
            still = not (self.sites or self.forged)
            model = (0.0,) * WIDTH if still else sketch(base, ["w"])
            seen = Seen(
                f"{number:064x}", number, REACH, fill.value, fill.blur, model, self.coordinates
            )
            bound = bound.after(seen, used, LIMITS)
            found.append(bound.norm)
            if self.forged:
                state = state + self.forged * forged
            elif self.sites:
                others = math.sqrt(self.shared) * min(norm, used) * common
                rest = std * self._noise(generator) / math.sqrt(self.sites)
                state = state + out / self.sites + others * (1 - 1 / self.sites) + rest
        return found

    def _noise(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self.coordinates, generator=generator)

    def _direction(self, generator: torch.Generator) -> torch.Tensor:
        direction = self._noise(generator)
        return direction / direction.norm()


ENDS = {"below": LIMITS.floor, "above": LIMITS.ceiling}


def rounds_to(found: list[float], norms: list[float], factor: float = 2.0) -> int:
    """How many rounds pass until the bound is within a factor of the norm."""
    near = [abs(math.log(bound / norm)) <= math.log(factor) for bound, norm in _pairs(found, norms)]
    return near.index(True) + 1


def _pairs(found: list[float], norms: list[float]) -> list[tuple[float, float]]:
    return list(zip(found, norms, strict=True))


def level(found: list[float], norms: list[float]) -> float:
    """Geometric mean of bound / norm."""
    return math.exp(fmean(math.log(bound / norm) for bound, norm in zip(found, norms, strict=True)))


# Convergence.


@pytest.mark.parametrize("start", ENDS)
@pytest.mark.parametrize(("ratio", "coordinates"), [(0, 1000), (1, 1000), (1, 10**6), (8, 10**6)])
def test_the_bound_finds_the_norm_from_below_and_from_above(
    start: str, ratio: float, coordinates: int
) -> None:
    """From a factor of 10 off, within a factor of 2 in 12 rounds, then at 1.2 times the norm."""
    norms = [1.0] * (18 if coordinates > 1000 else 60)
    found = Federation(ratio, coordinates).run(started(ENDS[start]), norms)
    assert rounds_to(found, norms) <= 12
    assert level(found[-4:], norms[-4:]) == pytest.approx(1.2, rel=0.12)


@pytest.mark.parametrize("start", ENDS)
def test_under_much_noise_on_few_values_the_bound_finds_the_norm_slowly(start: str) -> None:
    """Noise of 8 bounds on 1000 values hides one update whole; 300 rounds of them tell."""
    norms = [1.0] * 400
    levels = [
        level(Federation(8, 1000).run(started(ENDS[start]), norms, seed)[300:], norms[300:])
        for seed in range(4)
    ]
    assert 1 / 2 < math.prod(levels) ** (1 / 4) < 2
    assert all(1 / 5 < one < 5 for one in levels)


def test_the_steps_of_a_large_federation_tell_what_the_noise_of_one_site_hides() -> None:
    """The same noise, 64 sites: no bound stays below half the norm; alone, some do."""
    norms = [1.0] * 150
    lowest = {
        sites: min(
            level(Federation(8, 1000, sites).run(started(0.1), norms, seed)[75:], norms[75:])
            for seed in range(5)
        )
        for sites in (0, 64)
    }
    assert lowest[64] > 1 / 2 > lowest[0], lowest


@pytest.mark.parametrize(("ratio", "coordinates"), [(1, 1000), (4, 10**4)])
def test_the_bound_follows_a_norm_that_drifts(ratio: float, coordinates: int) -> None:
    """A norm that falls to a tenth over 100 rounds, and one that grows tenfold."""
    for sign in (-1, 1):
        norms = [math.exp(sign * math.log(10) * at / 100) for at in range(100)]
        found = Federation(ratio, coordinates).run(started(1.0), norms)
        assert all(
            1 / 2 < bound / norm < 2 for bound, norm in list(zip(found, norms, strict=True))[10:]
        )


@pytest.mark.parametrize(("ratio", "coordinates"), [(1, 1000), (4, 10**4)])
def test_heavy_tails_do_not_carry_the_bound_away(ratio: float, coordinates: int) -> None:
    """Log-normal norms of median 1, every twentieth of them 20 times as large."""
    generator = torch.Generator().manual_seed(3)
    spread = (torch.randn(200, generator=generator) * 0.5).exp()
    spread[::20] *= 20
    for start in ENDS.values():
        found = Federation(ratio, coordinates).run(started(start), spread.tolist())
        assert 1 / 2 < level(found[50:], [1.0] * 150) < 2
        assert max(found[50:]) < 3


# The server.


@pytest.mark.parametrize(("ratio", "coordinates"), [(1, 1000), (4, 10**4)])
def test_a_server_that_sends_huge_steps_moves_a_bound_that_sees_its_own_updates_a_little(
    ratio: float, coordinates: int
) -> None:
    """Steps a million times the bound, all in one direction, for 80 rounds: less than 10 %."""
    honest = Federation(ratio, coordinates).run(started(1.0), [1.0] * 80)
    forged = Federation(ratio, coordinates, forged=1e6).run(started(1.0), [1.0] * 80)
    assert level(forged[30:], honest[30:]) == pytest.approx(1.0, abs=0.1)


def test_a_server_that_sends_huge_steps_moves_a_blind_bound_to_its_ceiling_and_no_further() -> None:
    """Where noise hides the site's own updates, the ceiling is what holds."""
    found = Federation(8, 1000, forged=1e6).run(started(1.0), [1.0] * 150)
    assert max(found) == LIMITS.ceiling
    rises = [math.log(after / before) for before, after in pairwise([1.0, *found])]
    assert max(rises) <= LARGEST_MOVE * (1 + 1e-12)
    assert next(at for at, bound in enumerate(found) if bound == LIMITS.ceiling) >= 7


def test_one_crafted_global_model_in_five_rounds_moves_nothing() -> None:
    """It touches two products of steps, of which the larger cannot be both; the median holds."""

    def run(crafted: float) -> list[float]:
        bound, found = started(1.0), []
        for number in range(20):
            model = 0.01 * number + (crafted if number == 10 else 0.0)
            bound = bound.after(looked(number, 0.7, blur=8.0, model=model), bound.norm, LIMITS)
            found.append(bound.norm)
        return found

    assert run(1e9) == run(0.0)
    assert run(-1e9) == run(0.0)


def test_the_noise_of_four_sites_is_not_taken_for_large_updates() -> None:
    """Their steps are four bounds long, and a bound that followed the length would run away."""
    norms = [1.0] * 200
    levels = [
        level(Federation(8, 1000, sites=4).run(started(1.0), norms, seed)[100:], norms[100:])
        for seed in range(3)
    ]
    assert max(levels) < 4
    assert math.prod(levels) ** (1 / 3) < 2


# The guarantees, line by line.

_any = st.floats(allow_nan=True, allow_infinity=True)
_fills = st.one_of(st.none(), _any, st.floats(-10, 10))
_seen = st.builds(
    lambda number, fill, blur, model, coordinates: Seen(
        f"{number:064x}", number, REACH, fill, blur, tuple(model) * 64, coordinates
    ),
    st.integers(0, 40),
    _fills,
    st.one_of(st.floats(0, 100), _any),
    st.lists(st.floats(-1e12, 1e12), min_size=4, max_size=4),
    st.integers(0, 10**9),
)
_limits = st.tuples(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12)).map(
    lambda ends: AutoNorm(min(ends), max(ends))
)


@settings(deadline=None)
@given(_limits, st.lists(_seen, max_size=30), st.floats(1e-12, 1e12))
def test_the_bound_stays_between_floor_and_ceiling_whatever_is_seen(
    limits: AutoNorm, looks: list[Seen], used: float
) -> None:
    """And one round moves it by a factor of at most sqrt(2)."""
    bound = Bound.fresh(limits)
    assert limits.floor <= bound.norm <= limits.ceiling
    for seen in looks:
        after = bound.after(seen, used, limits)
        assert limits.floor <= after.norm <= limits.ceiling
        assert abs(math.log(after.norm / bound.norm)) <= LARGEST_MOVE + 1e-9
        assert math.isfinite(after.variance)
        bound = after


def test_a_round_counts_once() -> None:
    """Also where others counted in between."""
    bound = Bound.fresh(LIMITS).after(looked(1, 0.0), 1.0, LIMITS)
    assert bound.norm < 1.0
    assert bound.after(looked(1, 0.0), bound.norm, LIMITS) == bound
    later = bound.after(looked(2, 1.0), bound.norm, LIMITS)
    assert later.after(looked(1, 0.0), later.norm, LIMITS) == later
    for number in range(100):
        later = later.after(looked(number, 0.5), later.norm, LIMITS)
    assert len(later.counted) == REMEMBERED


@pytest.mark.parametrize("fill", [None, math.nan, math.inf, -math.inf])
def test_a_fill_that_is_no_number_moves_nothing(fill: float | None) -> None:
    bound = Bound.fresh(LIMITS)
    assert bound.after(looked(1, fill), 1.0, LIMITS).norm == bound.norm
    assert bound.after(looked(1, 0.0, blur=math.nan), 1.0, LIMITS).norm == bound.norm


def test_a_bound_about_other_parameters_is_no_guide() -> None:
    """Another model, or another `match`, starts anew."""
    bound = Bound.fresh(LIMITS)
    for number in range(10):
        bound = bound.after(looked(number, 1.0), bound.norm, LIMITS)
    other = replace(looked(10, 0.7), reach="1" * 64)
    assert bound.norm > 2.0
    assert bound.after(other, bound.norm, LIMITS).norm == LIMITS.start


def test_only_consecutive_rounds_make_a_step_of_the_global_model() -> None:
    bound = started(1.0)
    for number in range(0, 40, 2):
        bound = bound.after(looked(number, None, model=1e6 * number), bound.norm, LIMITS)
    assert (bound.norm, bound.coherent) == (1.0, ())


def test_global_steps_never_lower_the_bound() -> None:
    """A model that stands still, or turns back and forth, is no reason to."""
    for models in ([0.0] * 12, [0.0, 5.0] * 6):
        bound = started(1.0)
        for number, model in enumerate(models):
            bound = bound.after(looked(number, None, model=model), bound.norm, LIMITS)
        assert bound.norm == 1.0
        assert bound.coherent == (0.0,) * STEPS


def test_a_look_is_public_figures_alone() -> None:
    """What `after` is given has no place for the raw update, its norm or whether it was clipped."""
    assert [field.name for field in fields(Seen)] == [
        *("round", "number", "reach", "fill", "blur", "model", "coordinates")
    ]


def test_limits_that_have_changed_hold_at_once() -> None:
    assert started(5.0).within(AutoNorm(0.1, 2.0)).norm == 2.0
    assert started(5.0).within(AutoNorm(7.0, 9.0)).norm == 7.0


def test_the_start_is_the_geometric_middle() -> None:
    assert Bound.fresh(AutoNorm(0.01, 100.0)).norm == pytest.approx(1.0)
    assert Bound.fresh(AutoNorm(3.0, 3.0)).norm == 3.0
    assert Bound.fresh(AutoNorm(1e-12, 1e12)).norm == pytest.approx(1.0)
