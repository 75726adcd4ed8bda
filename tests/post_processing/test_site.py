"""Under a site's promise, nothing after the base mechanism looks at anything but what it put out.

Two hospitals whose raw updates differ are given noise that makes the noised updates equal. With the
same clock, names and later random bits, every byte that leaves or is written must be the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from left_behind import RULES, Left, ScriptedEntropy, Site, fixed_house, require_same

from sentinel import release
from sentinel.mechanism import clip_factor, grid_step, rounding_reach
from sentinel.release import Outgoing, PublicRound
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.mechanism import Entropy
    from sentinel.update import State

SHAPES = {"first.weight": (12, 10), "first.bias": (12,), "last.weight": (3, 12), "temperature": ()}
COORDINATES = sum(math.prod(shape) for shape in SHAPES.values())
CLIP, MULTIPLIER = 1.0, 4.0


def policy_text(rules: str) -> str:
    return f"""
schema = 1
name = "promised"
[privacy]
unit = "site"
epsilon = 40.0
delta = 1e-6
clip_norm = {CLIP}
noise_multiplier = {MULTIPLIER}
patients = 1000
[limits]
metrics = ["num-examples"]
[[rule]]
id = "baseline"
{RULES[rules]}"""


def update_of(generator: np.random.Generator, kind: str) -> State:
    """A raw update: off the grid, and from a hundredth of the clip norm to a thousand times it."""
    values = generator.standard_normal(COORDINATES)
    if kind == "one record":  # what the score is there to find
        record, units = np.linspace(0.1, 1.0, 10), np.linspace(-1.0, 1.0, 12)
        values = np.zeros(COORDINATES)
        values[:132] = np.concatenate([np.outer(units, record).ravel(), units])
    elif kind == "one value":
        values = np.zeros(COORDINATES)
        values[generator.integers(COORDINATES)] = 1.0
    elif kind == "nothing":
        return shaped(np.zeros(COORDINATES))
    size = CLIP * 10 ** generator.uniform(-2, 3)
    return shaped(values / np.linalg.norm(values) * size)


def shaped(values: np.ndarray) -> State:
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = torch.from_numpy(values).split(sizes)
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def left_out(rules: str) -> set[str]:
    """Names that are dropped before the base mechanism, and so get no noise."""
    return {"last.weight"} if rules == "partly" else set()


def gridded(raw: State, rules: str) -> np.ndarray:
    """What the base mechanism adds noise to, in whole steps."""
    kept = [value for name, value in raw.items() if name not in left_out(rules)]
    flat = torch.cat([value.reshape(-1) for value in kept])
    step = step_of(rules)
    tightened = CLIP - rounding_reach(step, flat.numel())
    factor = clip_factor([float(flat.square().sum())], tightened)
    return (flat * (factor / step)).round().numpy().astype(np.int64)


def step_of(rules: str) -> float:
    kept = sum(math.prod(SHAPES[name]) for name in SHAPES if name not in left_out(rules))
    return grid_step(CLIP, kept, CLIP * MULTIPLIER)


def looked_at(settled: Callable[..., release.Released]) -> Callable[..., release.Released]:
    """Steps 3 to 8, entered with sums of squares that are the noised update's own."""

    def look(house: object, opened: object, outgoing: Outgoing, kind: str) -> release.Released:
        for name, delta in outgoing.update.deltas.items():
            expected = float(delta.square().sum())
            assert outgoing.update.squares[name] == pytest.approx(expected, rel=1e-12)
        return settled(house, opened, outgoing, kind)

    return look


def run(rules: str, raw: State, noise: np.ndarray, later: Entropy) -> Left:
    """Take raw update and noise through a whole round, in a state folder of its own."""
    scripted = ScriptedEntropy(noise, CLIP * MULTIPLIER / step_of(rules))
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with fixed_house(iter([scripted, later])) as (folder, patch):
        patch.setattr("sentinel.release._settled", looked_at(release._settled))
        site = Site(folder, policy_text(rules))
        with site.guard.round(1, base) as opened:
            pass
        site.release(opened, float(raw["temperature"]), raw)
        assert not scripted.words.size  # one draw for each coordinate that gets noise
        return site.left()


KINDS = ("dense", "one record", "one value", "nothing")


def examples(test: Callable[..., None]) -> Callable[..., None]:
    """Every rule set at least once, the raw updates far beyond the clip norm and far within it."""
    for seed, rules in enumerate(sorted(RULES)):
        test = example(seed=seed, kinds=(KINDS[seed % 3], KINDS[seed % 4]), rules=rules)(test)
    return test


@examples
@given(
    seed=st.integers(0, 2**32),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    rules=st.sampled_from(sorted(RULES)),
)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_what_leaves_and_what_is_written_depends_on_the_noised_update_alone(
    fixed_entropy: Callable[[int], Entropy], seed: int, kinds: tuple[str, str], rules: str
) -> None:
    generator = np.random.default_rng(seed)
    first, second = (update_of(generator, kind) for kind in kinds)
    before, after = gridded(first, rules), gridded(second, rules)
    drawn = generator.standard_normal(before.size).clip(-3, 3)
    noise = np.rint(drawn * CLIP * MULTIPLIER / step_of(rules)).astype(np.int64)
    one = run(rules, first, noise, fixed_entropy(seed))
    other = run(rules, second, noise + before - after, fixed_entropy(seed))
    require_same(one, other)
    assert len(one.charges) == 1
    assert one.files
    assert (one.released is None) == (one.reason is not None)
    assert one.reason is None or one.reason[0] is not Reason.INTERNAL_ERROR


def test_the_comparison_sees_a_noised_update_that_differs_by_one_step(fixed_entropy) -> None:
    """The test of the test: one step more in one coordinate, and the bytes differ."""
    raw = update_of(np.random.default_rng(1), "dense")
    noise = np.rint(np.random.default_rng(2).standard_normal(COORDINATES) * 1000).astype(np.int64)
    moved = noise.copy()
    moved[5] += 1
    one, other = (run("plain", raw, drawn, fixed_entropy(0)) for drawn in (noise, moved))
    assert one.released != other.released
    assert one.files != other.files


def test_a_rule_on_the_score_really_fires_in_some_of_these_runs(fixed_entropy) -> None:
    """Otherwise the runs would agree for want of any decision."""
    noise = np.zeros(COORDINATES, np.int64)
    revealing = update_of(np.random.default_rng(0), "one record")
    left = run("withheld", revealing, noise, fixed_entropy(0))
    calm = run("plain", revealing, noise, fixed_entropy(0))
    assert left.reason[0] is Reason.TOO_SENSITIVE
    assert calm.released is not None


def test_steps_3_to_8_are_not_handed_the_raw_update_or_the_training() -> None:
    """What the type checker enforces: their arguments lead back to neither."""
    given_to_them = [PublicRound, Outgoing]
    names = {field.name for kind in given_to_them for field in dataclasses.fields(kind)}
    assert not names & {"private", "local", "model", "training", "raw"}
    takes = inspect.signature(release._settled).parameters
    assert {name: takes[name].annotation for name in takes} == {
        "house": "House",
        "opened": "PublicRound",
        "outgoing": "Outgoing",
        "kind": "Kind",
    }
