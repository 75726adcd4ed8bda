"""Under a patient's or record's promise, nothing after the noise of a step looks at the patients.

Two hospitals with different patients train through `guard.private`. They are given noise that makes
the noised sums of every step equal, and that of the count by which a clip norm moves. With the same
clock, names and later random bits, every byte that leaves or is written must be the same.

Covered: who was drawn (each hospital has coins of its own, so batches differ, are empty, or come in
another number of pieces), how many records a patient has and how many the cap left out, NaN, norms,
dropout, momentum, and what a round hands on to the next. Not covered: how long it takes, and a loop
that chooses by its raw loss.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from left_behind import RULES, Left, ScriptedEntropy, Site, fixed_house, require_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sentinel.dpsgd import step, training
from sentinel.dpsgd.quantile import Quantile
from sentinel.mechanism import add_noise_
from sentinel.privacy.events import DpSgdEvent
from sentinel.round import Round
from sentinel.terms import Reason, Unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentinel.dpsgd.clipping import ClippedSum
    from sentinel.mechanism import Entropy

POLICY = """
schema = 1
name = "private"
[privacy]
unit = "{unit}"
patients = 128
batch = 64
epsilon = 2.0
delta = 1e-4
clip_norm = 3.0
noise_multiplier = 4.0
{more}
[limits]
metrics = ["num-examples"]
[[rule]]
id = "baseline"
{rules}"""
FOLLOWS = "adaptive_clip = { quantile = 0.5, floor = 0.01, ceiling = 10.0 }\n"
AUTO = 'max_norm = "auto"\nmax_norm_floor = 0.01\nmax_norm_ceiling = 10.0\n'
OWN_RULES = {**RULES, "auto": AUTO, "auto, masked": AUTO + RULES["masked"]}
REFERENCES: dict[str, bytes] = {}  # of the score: made of the global model alone, in a second


@dataclass(frozen=True)
class Patients:
    """Those of one hospital: rows, labels, and whose each row is. Synthetic."""

    rows: torch.Tensor
    labels: torch.Tensor
    ids: list[int]

    @classmethod
    def drawn(
        cls, generator: np.random.Generator, count: int, *, spoiled: bool = False
    ) -> Patients:
        """1 to 4 records each, of any size; one record has a NaN where `spoiled`."""
        ids = [one for one in range(count) for _ in range(generator.integers(1, 5))]
        sizes = 10 ** generator.uniform(-2, 3, (len(ids), 1))
        rows = torch.from_numpy(generator.standard_normal((len(ids), 3)) * sizes).float()
        if spoiled:
            rows[generator.integers(len(ids)), 0] = math.nan
        return cls(rows, torch.from_numpy(generator.random((len(ids), 1)) - 0.5).float(), ids)


@dataclass(frozen=True)
class Loop:
    """What both hospitals have in common: policy, model, optimizer and the number of steps."""

    unit: str = "patient"
    rules: str = "plain"
    seed: int = 0
    steps: int = 2
    follows: bool = False
    most: int | None = None

    @property
    def policy(self) -> str:
        """The policy's text."""
        more = FOLLOWS if self.follows else ""
        more += "records_per_patient = 2\n" if self.unit == "patient" else ""
        return POLICY.format(unit=self.unit, more=more, rules=OWN_RULES[self.rules])

    def wrap(self, site: Site, patients: Patients) -> tuple[nn.Module, Any, Any]:
        """A model with a layer that draws for itself, an optimizer with a memory, and a loader."""
        layers = {"first": nn.Linear(3, 4), "act": nn.Tanh(), "drop": nn.Dropout(0.2)}
        model = nn.Sequential(OrderedDict(layers, last=nn.Linear(4, 1)))
        values = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=values)
        if self.seed % 2:
            optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.1)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        loader = DataLoader(TensorDataset(patients.rows, patients.labels), batch_size=4)
        ids = patients.ids if self.unit == "patient" else None
        return site.guard.private(model, optimizer, loader, patients=ids, max_records=self.most)


class AimedEntropy:
    """Only for testing! Noise that brings each noised sum to a target, whatever the sum was."""

    def __init__(self, seed: int, chance: Entropy) -> None:
        """Targets follow from `seed`; `chance` is for the model's own layers."""
        self._targets, self._chance = np.random.default_rng(seed), chance
        self._scripted: ScriptedEntropy | None = None
        self.sums: list[list[int]] = []

    def branch(self) -> Entropy:
        """For the next noise; for the model's layers before the first."""
        return self._chance if self._scripted is None else self._scripted

    def add_noise_(
        self, tensor: torch.Tensor, std: float, step: float, entropy: AimedEntropy
    ) -> None:
        """The real one, after its noise was chosen by the sum that it is for."""
        assert entropy is self
        sums = (tensor / step).round().numpy().astype(np.int64)
        drawn = self._targets.standard_normal(sums.size).clip(-1, 1)
        target = np.rint(drawn * std / step).astype(np.int64)
        self.sums.append(sums.tolist())
        self._scripted = ScriptedEntropy(target - sums, std / step)
        add_noise_(tensor, std, step, entropy)
        assert not self._scripted.words.size  # one draw for each coordinate
        assert (tensor / step).tolist() == target.tolist()


@dataclass(frozen=True)
class Trained:
    """What a hospital leaves behind, and what it saw on the way: raw, so never compared."""

    left: Left
    sums: list[list[int]]
    rows: list[int]
    counts: tuple[int, int]


def trained(loop: Loop, patients: Patients, coins: Entropy, streams: Any) -> Trained:
    """Two rounds at one hospital; the second where the first let something out."""
    aimed = AimedEntropy(loop.seed, coins.branch())
    seen: list[int] = []
    sources = iter([aimed, coins, streams(2), streams(3)])
    with fixed_house(sources) as (folder, patch):
        for module in ("step", "quantile"):
            patch.setattr(f"sentinel.dpsgd.{module}.add_noise_", aimed.add_noise_)
        site = Site(folder, loop.policy)
        _known_references(folder)
        model, optimizer, loader = loop.wrap(site, patients)
        private = site.guard._private[model]
        state: Any = {name: value.clone() for name, value in model.state_dict().items()}
        for number in (1, 2):
            with site.guard.round(number, state, model) as opened:
                loss = _steps(loop, private, model, optimizer, loader, seen)
            state = site.release(opened, loss)
            if state is None:
                break
        _keep_references(folder)
        counts = (private.not_finite, private.left_out)
        return Trained(site.left(), aimed.sums, seen, counts)


def _steps(  # noqa: PLR0913, PLR0917 - the parts of a loop
    loop: Loop, private: Any, model: nn.Module, optimizer: Any, loader: Any, seen: list[int]
) -> float:
    """An ordinary loop, up to a public number of steps; its last loss."""
    lost = torch.zeros(())
    while private.steps < loop.steps:
        for rows, labels in loader:
            seen.append(len(rows))
            optimizer.zero_grad()
            lost = nn.functional.mse_loss(model(rows), labels)
            lost.backward()
            optimizer.step()
            if private.steps == loop.steps:
                break
    return float(lost.detach().nan_to_num())


def _known_references(folder: Path) -> None:
    for name, content in REFERENCES.items():
        (folder / "state" / "references" / name).write_bytes(content)


def _keep_references(folder: Path) -> None:
    for path in (folder / "state" / "references").iterdir():
        REFERENCES[path.name] = path.read_bytes()


def pair(loop: Loop, counts: tuple[int, int], streams: Any, *, spoiled: bool) -> list[Trained]:
    """Two hospitals with patients and coins of their own."""
    generator = np.random.default_rng(loop.seed)
    patients = [
        Patients.drawn(generator, counts[0]),
        Patients.drawn(generator, counts[1], spoiled=spoiled),
    ]
    coins = [streams(2 * loop.seed + 100), streams(2 * loop.seed + 101)]
    return [trained(loop, one, own, streams) for one, own in zip(patients, coins, strict=True)]


def examples(test: Callable[..., None]) -> Callable[..., None]:
    """Every rule set at least once, under both units, with and without pieces."""
    for seed, rules in enumerate(sorted(OWN_RULES)):
        unit, most = ("patient", "record")[seed % 2], (None, 2, 3)[seed % 3]
        steps = 1 if seed % 2 else 3  # one step of Adam is what the score finds odd
        loop = Loop(unit, rules, seed, steps, seed % 4 < 2, most)
        test = example(loop=loop, counts=(1, 1 + seed % 4), spoiled=seed % 3 == 0)(test)
    return test


loops = st.builds(
    Loop,
    unit=st.sampled_from(["patient", "record"]),
    rules=st.sampled_from(sorted(OWN_RULES)),
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 3),
    follows=st.booleans(),
    most=st.sampled_from([None, 2, 3]),
)


@examples
@given(
    loop=loops,
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    spoiled=st.booleans(),
)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_what_leaves_and_what_is_written_depends_on_the_noised_sums_alone(
    fixed_entropy: Callable[[int], Entropy], loop: Loop, counts: tuple[int, int], *, spoiled: bool
) -> None:
    one, other = pair(loop, counts, fixed_entropy, spoiled=spoiled)
    require_same(one.left, other.left)
    left = one.left
    assert left.files
    assert (left.released is None) == (left.reason is not None)
    assert left.reason is None or left.reason[0] in (Reason.TOO_SENSITIVE, Reason.WITHHELD_BY_RULE)
    events = [row.event for row in left.charges]
    assert len(events) == (1 if left.reason else 2)
    assert all(isinstance(event, DpSgdEvent) and event.steps == loop.steps for event in events)


def test_these_hospitals_really_differ(fixed_entropy: Callable[[int], Entropy]) -> None:
    """Else they would agree for want of anything to tell: one has nobody in some batch, a NaN."""
    loop = Loop(seed=3, steps=3, most=2)
    one, other = pair(loop, (1, 4), fixed_entropy, spoiled=True)
    require_same(one.left, other.left)
    assert one.sums != other.sums
    assert any(not any(sums) for sums in one.sums)  # an empty batch
    assert all(any(sums) for sums in other.sums)
    assert len(one.rows) != len(other.rows)  # pieces
    assert one.counts != other.counts
    assert one.left.charges[0].event.unit is Unit.PATIENT


def test_rules_on_the_score_really_fire_in_some_of_these_runs(
    fixed_entropy: Callable[[int], Entropy],
) -> None:
    """Otherwise the runs would agree for want of any decision."""
    told = [
        trained(
            Loop(rules=rules, seed=5, steps=1),
            Patients.drawn(np.random.default_rng(0), 3),
            *streams,
        ).left
        for rules in ("plain", "sensitive", "withheld")
        for streams in [(fixed_entropy(9), fixed_entropy)]
    ]
    calm, noisy, stopped = told
    assert stopped.reason is not None
    assert stopped.reason[0] is Reason.TOO_SENSITIVE
    assert None not in (calm.released, noisy.released)
    assert calm.released != noisy.released


def _divided_by_who_came(self: Any) -> None:
    """By units that were there, where the public figure belongs."""
    plan = self._plan
    self._plan = replace(plan, rate=replace(plan.rate, batch=max(1, self._units)))
    FINISH_SUM(self)
    self._plan = plan


def _one_bit_of_the_sum(total: ClippedSum, divisor: int, entropy: Entropy) -> torch.Tensor:
    """Whether the raw sum of squares is above 1, in one coordinate of the average."""
    raw = float(total.values.square().sum())
    average = step.noised_average(total, divisor, entropy)
    average[0] += 2.0**-10 * (raw > 1.0)
    return average


def _share_without_noise(
    self: Quantile, clip_norm: float, unclipped: int, units: int, _: Entropy
) -> float:
    """The clip norm moves by the raw share."""
    return clip_norm * math.exp(-0.2 * (unclipped / max(units, 1) - self.unclipped))


def _every_metric(_: Round, values: dict[str, float]) -> dict[str, float]:
    """Whatever the loop hands over."""
    return values


FINISH_SUM = training.PrivateTraining._finish_sum
MUTANTS = {
    "divisor": (training.PrivateTraining, "_finish_sum", _divided_by_who_came),
    "one bit": (training, "noised_average", _one_bit_of_the_sum),
    "clip norm": (Quantile, "following", _share_without_noise),
    "metrics": (Round, "metrics", _every_metric),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_what_looks_past_the_noise(
    fixed_entropy: Callable[[int], Entropy], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    """The test of the test: one raw bit that is passed on, and the hospitals differ."""
    loop = Loop(steps=3, most=2, follows=mutant == "clip norm")
    unchanged = pair(loop, (1, 4), fixed_entropy, spoiled=True)
    require_same(*[one.left for one in unchanged])
    monkeypatch.setattr(*MUTANTS[mutant])
    changed = pair(loop, (1, 4), fixed_entropy, spoiled=True)
    with pytest.raises(AssertionError):
        require_same(*[one.left for one in changed])
