"""Kept: a calibration on disk, in the state folder: scores of past rounds, and what they came to.

The file holds numbers from 0 to 1, digests and counts: no name of a tensor, a run or a record. It
is its owner's alone (0600), replaced whole, and read strictly: a threshold that does not follow
from the scores beside it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sentinel.calibration.gather import Which
from sentinel.detection import conformal
from sentinel.durable import storage
from sentinel.errors import MisuseError, Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.calibration.gather import Gathered
    from sentinel.state import StateFolder

VERSION: Literal[1] = 1
MOST_ROUNDS = 100_000  # a file of a few megabytes

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kept(_Strict):
    """One score's calibration.

    Attributes:
        which: suspicion or sensitivity.
        bundle: digest of the detector that gave the scores.
        source: where they come from.
        promised: whether nothing but what a promise allows was read for them.
        scores: of the calibration rounds, in their order.
        alpha: the rate of false alarms that was asked for.
        threshold: an alarm is a score above it.
        expected: the most that the rate is, over these rounds and the next.
        confident: the most that the rate is with 95 % confidence, given these rounds.
        order: natural logarithm of the most that bets against their own order came to.
    """

    which: Annotated[Which, Field(strict=False)]
    bundle: Digest
    source: Literal["log", "folder"]
    promised: bool
    scores: Annotated[tuple[Share, ...], Field(strict=False, max_length=MOST_ROUNDS)]
    alpha: Alpha
    threshold: Share
    expected: Share
    confident: Share
    order: Annotated[float, Field(ge=0)]

    @property
    def found(self) -> conformal.Threshold:
        """The threshold with its guarantee."""
        return conformal.threshold(self.scores, self.alpha)

    @model_validator(mode="after")
    def _follows_from_the_scores(self) -> Self:
        found = self.found
        # A bound may differ in its last digits between versions of the library that computes it.
        same = abs(found.confident - self.confident) < 1e-9  # noqa: PLR2004 - see above
        if (found.score, found.expected) != (self.threshold, self.expected) or not same:
            msg = "the threshold does not follow from the scores"
            raise ValueError(msg)
        return self


class Calibration(_Strict):
    """What one `sentinel detectors calibrate` came to.

    Attributes:
        version: of this file.
        at: seconds since 1970.
        policy: digest of the policy that was named.
        dataset: whose updates were meant.
        log_seq: last record of the audit log then; later rounds are new.
        log_head: its hash, so that another log is noticed.
        seed: of the coins that break ties.
        kept: one for each score that had rounds enough.
    """

    version: Literal[1] = VERSION
    at: Annotated[int, Field(ge=0, le=2**40)]
    policy: Digest
    dataset: Annotated[str, Field(max_length=64)]
    log_seq: Annotated[int, Field(ge=0, le=2**53)]
    log_head: Digest
    seed: Digest
    kept: Annotated[tuple[Kept, ...], Field(strict=False, min_length=1, max_length=len(Which))]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({kept.which for kept in self.kept}) != len(self.kept):
            msg = "a score is there twice"
            raise ValueError(msg)
        return self


def coins_of(seed: str, which: Which) -> Callable[[int], float]:
    """The coins of one score, so that no two scores share a coin; `seed` in hex."""
    return conformal.coins(bytes.fromhex(seed) + which.value.encode())


def keep(  # noqa: PLR0913 - each says one thing of a calibration
    gathered: Gathered,
    which: Which,
    bundle: str,
    alpha: float,
    seed: str,
    *,
    source: Literal["log", "folder"],
    promised: bool,
) -> Kept:
    """Calibrate one score.

    Args:
        gathered: the calibration rounds.
        which: what was scored.
        bundle: digest of the detector.
        alpha: the rate of false alarms.
        seed: of the coins that break ties, drawn without a look at the scores; hex.
        source: where the rounds come from.
        promised: whether nothing but what a promise allows was read.

    Raises:
        MisuseError: fewer rounds than alpha takes, or more than are kept.
    """
    scores = gathered.scores
    if len(scores) > MOST_ROUNDS:
        raise MisuseError(f"At most {MOST_ROUNDS} rounds are kept; name the newest with --newest.")
    found = conformal.threshold(scores, alpha)
    p_values = conformal.smoothed_p_values([], scores, coins_of(seed, which))
    return Kept(
        which=which,
        bundle=bundle,
        source=source,
        promised=promised,
        scores=tuple(scores),
        alpha=alpha,
        threshold=found.score,
        expected=found.expected,
        confident=found.confident,
        order=conformal.bet(p_values)[-1].log_highest,
    )


def write_calibration(state: StateFolder, calibration: Calibration) -> None:
    """Replace the calibration of a state folder, durably.

    Raises:
        Withheld: STORAGE_FAILED or STATE_UNSAFE.
    """
    file = state.calibration
    with storage(), file.locked():
        file.write(calibration.model_dump_json() + "\n")


def read_calibration(state: StateFolder) -> Calibration:
    """The calibration of a state folder.

    Raises:
        MisuseError: there is none.
        Withheld: STATE_UNSAFE where it is damaged, was changed, or is of another version or log.
    """
    with storage():
        text = state.calibration.read()
    if text is None:
        raise MisuseError(
            "There is no calibration in this state folder; make one with `sentinel detectors "
            "calibrate`."
        )
    try:
        found = Calibration.model_validate_json(text)
    except (ValidationError, MisuseError):
        raise _unusable(f"cannot be read as version {VERSION} of its kind") from None
    if state.log.hash_at(found.log_seq) != found.log_head:
        raise _unusable("belongs to another audit log than the one in this folder")
    return found


def _unusable(problem: str) -> Withheld:
    return Withheld(
        Reason.STATE_UNSAFE,
        f"The calibration in the state folder {problem}. Calibrate again with `sentinel detectors "
        "calibrate`; nothing else depends on it.",
    )
