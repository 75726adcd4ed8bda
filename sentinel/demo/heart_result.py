"""What is run on the four hospitals, and everything that came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from sentinel.demo.hospitals import Loop, Outcome
from sentinel.errors import MisuseError
from sentinel.interval import of_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentinel.interval import Interval
    from sentinel.stress.passive.tabular import Reads


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run.

    Attributes:
        policy: name or path of the guarded hospitals' policy.
        repeats: federations, each with its own split and start; at least 1.
        rounds: of one federation, numbered from 1.
        turns_at: number of the crafted round.
        scales: factors on all layers of the crafted model. The first is what the server sends in
            the run; where the inspection is switched off, it tries all of them.
        hidden: neurons of the attacked layer.
        train_share: share of each hospital's patients that train.
        loop: how a hospital trains.
        seed: of the first repeat.
    """

    policy: str = "tabular-ehr"
    repeats: int = 10
    rounds: int = 20
    turns_at: int = 10
    scales: tuple[float, ...] = (0.01, 0.1, 1.0)
    hidden: int = 256
    train_share: float = 0.7
    loop: Loop = field(default_factory=Loop)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a run that has nothing to show."""
        if self.repeats < 1 or not self.scales:
            msg = "a run needs at least one repeat and one scale of the crafted model"
            raise MisuseError(msg)
        if not 1 <= self.turns_at <= self.rounds:
            msg = f"turns_at must be a round from 1 to {self.rounds}, got {self.turns_at}"
            raise MisuseError(msg)


@dataclass(frozen=True, slots=True)
class Note:
    """What one guarded hospital did in one round.

    Attributes:
        repeat: from 0.
        number: of the round.
        site: name of the hospital.
        crafted: whether the global model of this round was crafted.
        outcome: what came of it; its state is dropped.
    """

    repeat: int
    number: int
    site: str
    crafted: bool
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Example:
    """One patient whom the crafted model gave away, and what the server got.

    Attributes:
        site: name of the hospital.
        truth: column name to value; a missing value stands at the column's middle.
        unguarded: what the server read from the bare hospital.
        sanitized: its best guess behind the guard, with inspection switched off; empty where the
            policy withheld the update.
        unguarded_error: relative error of the first.
        sanitized_error: relative error of the second, chosen with the truth known; infinite where
            there is no guess.
    """

    site: str
    truth: Mapping[str, float]
    unguarded: Mapping[str, float]
    sanitized: Mapping[str, float]
    unguarded_error: float
    sanitized_error: float


@dataclass(frozen=True, slots=True)
class HeartsResult:
    """Everything the demo and its report say about the four hospitals.

    Attributes:
        settings: what was run.
        auc_unguarded_by_site: mean over repeats, held-out patients.
        auc_guarded_by_site: the same with the guard.
        auc_losses: unguarded less guarded, mean over hospitals, one for each repeat.
        notes: what the guarded hospitals did, round by round.
        unguarded: reads out of the crafted round's bare updates.
        guarded: reads out of everything the guarded hospitals released; a hospital's guesses of
            all its rounds are taken together.
        uninspected: reads out of the crafted round's sanitized updates with inspection switched
            off, by the factor on the crafted model's layers.
        examples: patients whom the server read, for the picture.
        alerts: what the guarded hospitals of the first repeat told operations, line by line.
    """

    settings: Settings
    auc_unguarded_by_site: Mapping[str, float]
    auc_guarded_by_site: Mapping[str, float]
    auc_losses: tuple[float, ...]
    notes: tuple[Note, ...]
    unguarded: Reads
    guarded: Reads
    uninspected: Mapping[float, Reads]
    examples: tuple[Example, ...]
    alerts: tuple[str, ...]

    @property
    def auc_unguarded(self) -> float:
        """Mean over hospitals and repeats."""
        return fmean(self.auc_unguarded_by_site.values())

    @property
    def auc_guarded(self) -> float:
        """Mean over hospitals and repeats."""
        return fmean(self.auc_guarded_by_site.values())

    @property
    def auc_lost(self) -> Interval | None:
        """95 % interval of the mean loss over repeats; None of one."""
        return of_mean(self.auc_losses) if len(self.auc_losses) > 1 else None

    @property
    def worst_uninspected(self) -> Reads:
        """The crafted model that gave the server most, by the upper bound."""
        return max(self.uninspected.values(), key=lambda reads: reads.interval.high)

    @property
    def rounds_refused(self) -> int:
        """How often a hospital refused a crafted global model."""
        return sum(n.crafted and n.outcome.action == "refused" for n in self.notes)

    @property
    def false_refusals(self) -> int:
        """How often a hospital refused an honest global model."""
        return sum(not n.crafted and n.outcome.action == "refused" for n in self.notes)

    @property
    def withheld(self) -> int:
        """How often an update of an honest round was withheld after training."""
        return sum(not n.crafted and n.outcome.action == "withheld" for n in self.notes)
