"""Under a promise, nothing after the base mechanism looks at anything but what it put out.

Two hospitals whose raw updates differ are given noise that makes the noised updates equal. With the
same clock, names and later random bits, every byte that leaves or is written must be the same.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import math
import types
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentinel import Guard, release
from sentinel.errors import Withheld
from sentinel.mechanism import grid_step
from sentinel.mechanism.rounded_normal import BIAS, RoundedNormal
from sentinel.release import Outgoing, PublicRound
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.mechanism import Entropy

SHAPES = {"first.weight": (12, 10), "first.bias": (12,), "last.weight": (3, 12), "temperature": ()}
COORDINATES = sum(math.prod(shape) for shape in SHAPES.values())
CLIP, MULTIPLIER = 1.0, 4.0
STEP = grid_step(CLIP, COORDINATES, CLIP * MULTIPLIER)
RULES = {
    "plain": "",
    "sensitive": '[[rule]]\nid = "calm"\nwhen = { sensitivity = 0.1 }\nnoise_ratio = 500.0\n',
    "masked": '[[rule]]\nid = "mask"\nwhen = { sensitivity = 0.0 }\nkeep = 0.5\nmax_abs = 3.0\n',
    "spent": '[[rule]]\nid = "spent"\nwhen = { budget_spent = 0.3 }\nnoise_ratio = 90.0\n',
    "withheld": '[[rule]]\nid = "stop"\nwhen = { sensitivity = 0.2 }\naction = "withhold-update"\n',
    "partly": '[[rule]]\nid = "head"\nmatch = ["last.*"]\naction = "withhold"\n',
}


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


class ScriptedEntropy:
    """Only for testing! Words that make the base mechanism draw given numbers."""

    def __init__(self, numbers: np.ndarray) -> None:
        """Keep the numbers, whole steps of the grid."""
        self.words = words_for(numbers)

    def fill(self, buffer: memoryview) -> None:
        """Give the next words: one for each coordinate, and no more than there are."""
        out = np.frombuffer(buffer, dtype=np.uint64)
        given, self.words = np.split(self.words, [out.size])
        out[:] = given

    def branch(self) -> ScriptedEntropy:
        """The same: there is one block."""
        return self


def words_for(numbers: np.ndarray) -> np.ndarray:
    """One word for each number: the slot of its cell above, its place in the cell below."""
    tables = RoundedNormal.of(CLIP * MULTIPLIER / STEP)
    starts = (tables.starts.view(np.float64)[: tables.boxes] - BIAS).astype(np.int64)
    cells = (numbers >> tables.bits) << tables.bits
    slots = np.searchsorted(starts, cells)
    assert (starts[slots] == cells).all()  # farther out is the rest, which no single word gives
    return (slots.astype(np.uint64) << np.uint64(48)) | (numbers - cells).astype(np.uint64)


@dataclass(frozen=True)
class Left:
    """All that a round left behind: what left, and what was written."""

    released: dict[str, bytes] | None
    reason: tuple[Reason, str] | None
    metrics: dict[str, float]
    files: dict[str, bytes]
    charges: list[object]


def update_of(generator: np.random.Generator, kind: str) -> np.ndarray:
    """A raw update in steps of the grid, inside the clip norm."""
    values = generator.standard_normal(COORDINATES)
    if kind == "one record":  # what the score is there to find
        values = np.zeros(COORDINATES)
        values[:10] = np.linspace(0.1, 1.0, 10)
    elif kind == "one value":
        values = np.zeros(COORDINATES)
        values[generator.integers(COORDINATES)] = 1.0
    elif kind == "nothing":
        return np.zeros(COORDINATES, np.int64)
    room = 0.99 * CLIP * generator.uniform(0.01, 1.0) / STEP
    return np.rint(values / np.linalg.norm(values) * room).astype(np.int64)


def shaped(steps: np.ndarray) -> dict[str, torch.Tensor]:
    values = torch.from_numpy(steps * STEP)
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = values.split(sizes)
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def run(rules: str, raw: np.ndarray, noise: np.ndarray, later: Entropy) -> Left:
    """Take raw update and noise through a whole round, in a state folder of its own."""
    clock = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    fixed = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda _: clock), UTC=dt.UTC)
    sources = iter([ScriptedEntropy(noise), later])
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sentinel.guard.dt", fixed)
        patch.setattr("sentinel.guard.secrets.token_hex", lambda size: "ab" * size)
        patch.setattr("sentinel.guard.SystemEntropy", lambda: next(sources))
        policy = Path(folder) / "policy.toml"
        policy.write_text(policy_text(rules))
        guard = Guard(policy, Path(folder) / "state", unsafe_skip_inspection=True)
        released, reason, metrics = None, None, {}
        try:
            with guard.round(1, base) as opened:
                pass
            state = opened.release(shaped(raw))
            released = {name: value.numpy().tobytes() for name, value in state.items()}
            metrics = opened.metrics({"num-examples": float(raw.any()), "loss": float(raw[0])})
        except Withheld as error:
            reason = (error.reason, str(error))
        written = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and "ledger" not in path.name and "references" not in str(path)
        }
        charges = guard._state.ledger.rows()
    return Left(released, reason, metrics, written, charges)


@given(
    seed=st.integers(0, 2**32),
    kinds=st.tuples(*[st.sampled_from(["dense", "one record", "one value", "nothing"])] * 2),
    rules=st.sampled_from(sorted(RULES)),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_what_leaves_and_what_is_written_depends_on_the_noised_update_alone(
    fixed_entropy: Callable[[int], Entropy], seed: int, kinds: tuple[str, str], rules: str
) -> None:
    generator = np.random.default_rng(seed)
    first, second = (update_of(generator, kind) for kind in kinds)
    scale = CLIP * MULTIPLIER / STEP
    drawn = generator.standard_normal(COORDINATES).clip(-3, 3)
    noise = np.rint(drawn * scale).astype(np.int64)
    one = run(rules, first, noise, fixed_entropy(seed))
    other = run(rules, second, noise + first - second, fixed_entropy(seed))
    for field in dataclasses.fields(Left):
        assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert len(one.charges) == 1
    assert one.files
    assert (one.released is None) == (one.reason is not None)
    assert one.reason is None or one.reason[0] is not Reason.INTERNAL_ERROR


def test_the_comparison_sees_a_noised_update_that_differs_by_one_step(fixed_entropy) -> None:
    """The test of the test: one step more in one coordinate, and the bytes differ."""
    generator = np.random.default_rng(1)
    raw = update_of(generator, "dense")
    noise = np.rint(generator.standard_normal(COORDINATES) * 1000).astype(np.int64)
    moved = raw.copy()
    moved[5] += 1
    one, other = (run("plain", update, noise, fixed_entropy(0)) for update in (raw, moved))
    assert one.released != other.released
    assert one.files != other.files


def test_a_rule_on_the_score_really_fires_in_some_of_these_runs(fixed_entropy) -> None:
    """Otherwise the runs would agree for want of any decision."""
    noise = np.zeros(COORDINATES, np.int64)
    left = run(
        "withheld", update_of(np.random.default_rng(0), "one record"), noise, fixed_entropy(0)
    )
    calm = run("plain", update_of(np.random.default_rng(0), "one record"), noise, fixed_entropy(0))
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
