"""Drift: do the rounds since the calibration still look like those that it was made of?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.audit import score_step
from sentinel.audit.records import SCORE_STEPS
from sentinel.calibration.gather import Which
from sentinel.calibration.kept import coins_of
from sentinel.detection import conformal
from sentinel.terms import Action

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.calibration.gather import Gathered
    from sentinel.calibration.kept import Kept
    from sentinel.policy import Policy


@dataclass(frozen=True, slots=True)
class Drift:
    """The rounds since a calibration, held against it.

    Attributes:
        which: suspicion or sensitivity.
        paths: where the capital of the bets stood after 0, 1, 2, ... of the rounds.
        alarms: how many of the rounds scored above the calibrated threshold.
    """

    which: Which
    paths: tuple[conformal.Path, ...]
    alarms: int

    @property
    def rounds(self) -> int:
        """How many rounds came since."""
        return len(self.paths) - 1

    @property
    def last(self) -> conformal.Path:
        """Where the bets stand now."""
        return self.paths[-1]


def drift_of(kept: Kept, seed: str, since: Gathered, policy: Policy) -> Drift:
    """Bet against the new rounds being exchangeable with those before; see `conformal`.

    Args:
        kept: the calibration.
        seed: the calibration's.
        since: the rounds that came after it, from the log.
        policy: now in force.

    Guarantees:
        Were all rounds exchangeable, the capital would ever reach c with probability at most 1 / c.
        Asked again, the same rounds give the same answer.
    """
    before = alike(kept.which, kept.scores, policy)
    new = alike(kept.which, since.scores, policy)
    p_values = conformal.smoothed_p_values(before, new, coins_of(seed, kept.which))
    alarms = sum(score > kept.threshold for score in since.scores)
    return Drift(kept.which, tuple(conformal.bet(p_values)), alarms)


def alike(which: Which, scores: Sequence[float], policy: Policy) -> list[float]:
    """Scores by one measure, wherever they come from and whichever policy was in force.

    In twentieths as in the log; and 1 for an update that the policy of today would withhold, as the
    log has it, though it was scored under one that let it leave. It grows with the score, so that
    exchangeable scores stay so.
    """
    bar = withheld_from(policy) if which is Which.SENSITIVITY else None
    first = SCORE_STEPS + 1 if bar is None else score_step(bar)
    steps = map(score_step, scores)
    return [(SCORE_STEPS if step >= first else step) / SCORE_STEPS for step in steps]


def withheld_from(policy: Policy) -> float | None:
    """The sensitivity from which the policy withholds an update; None where it never does."""
    return min(
        (
            rule.when.sensitivity
            for rule in policy.rules
            if rule.action >= Action.WITHHOLD_UPDATE
            and rule.when is not None
            and rule.when.sensitivity is not None
            and rule.when.model_fields_set == {"sensitivity"}
        ),
        default=None,
    )
