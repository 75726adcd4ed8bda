"""Records: the closed types of everything the audit log may say.

A field is an enum, a boolean, a bounded integer, a log2 bucket, a sequence number, a time in
seconds, a random id that the guard made, or a digest of something public (policy, detector bundle,
build, global model, released bytes, ledger). There is no free text, no float, no tensor name, no
path and no exception text. A field that depends on the raw update is marked `FromData`; under a
promise such fields are absent (None), so that a record holds no bit of the raw update.

Records have no version number. A line is good only if its record would be written again byte for
byte, so a field that a type got after its first lines were written (`LATER`) is left out of a line
where it says nothing: lines from before it read, and verify, as they were.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from sentinel.terms import Reason, Sharpness, Unit, Verdict, Weakness

SCORE_STEPS = 20  # scores are logged in twentieths
LEVEL: Literal["L0"] = "L0"  # in the training process; other levels come with the agent


class FromData:
    """Marks a field whose value may depend on the raw update."""


Seq = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[int, Field(ge=0, le=2**40)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RandomId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Score = Annotated[int, Field(ge=0, le=SCORE_STEPS)]
Index = Annotated[int, Field(ge=0, le=2**16)]
Log2 = Annotated[int, Field(ge=0, le=63)]
Steps = Annotated[int, Field(ge=1, le=10**9)]  # as in the ledger's events


class Record(BaseModel):
    """What every record carries.

    Attributes:
        at: seconds since 1970.
        process: random id of the guard that wrote it.
        level: how far it can be trusted; under L0, what a record says of training per patient or
            record is the training process's claim.
        ledger_seq: the ledger's head when the record was written.
        data_bits: upper bound on the bits of the raw update in this record: the sum of log2 of
            the ranges of its `FromData` fields.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    at: Seconds
    process: RandomId
    level: Literal["L0"] = LEVEL
    ledger_seq: Seq
    ledger_head: Digest

    @property
    def data_bits(self) -> int:
        """Bits of the raw update that this record can hold at most."""
        held = 0.0
        for name, field in type(self).model_fields.items():
            if any(isinstance(mark, FromData) for mark in field.metadata):
                held += 0.0 if getattr(self, name) is None else math.log2(self.RANGES[name])
        return math.ceil(held)

    @model_serializer(mode="wrap")
    def _as_first_written(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = whole(self)
        unsaid = {name for name in self.LATER if getattr(self, name) is None}
        return {name: value for name, value in written.items() if name not in unsaid}

    RANGES: ClassVar[dict[str, int]] = {}
    LATER: ClassVar[frozenset[str]] = frozenset()


class GuardStarted(Record):
    """A guard began its work."""

    type: Literal["guard.started"] = "guard.started"
    build: Digest
    policy: Digest
    detectors: Annotated[tuple[Digest, ...], Field(max_length=16)]
    weaknesses: Annotated[tuple[Weakness, ...], Field(max_length=16)]


class RoundOpened(Record):
    """A global model was inspected, and the round may go on."""

    type: Literal["round.opened"] = "round.opened"
    round: Digest
    number: Seq
    global_model: Digest
    inspected: bool
    verdict: Verdict
    suspicion: Score


class RoundRefused(Record):
    """A round was refused before training; verdict and suspicion only where it was inspected."""

    type: Literal["round.refused"] = "round.refused"
    round: Digest
    number: Seq
    global_model: Digest | None
    verdict: Verdict | None
    suspicion: Score | None
    reason: Reason


class RoundAborted(Record):
    """The training block ended with an error; nothing was released."""

    type: Literal["round.aborted"] = "round.aborted"
    round: Digest


class UpdateDecided(Record):
    """What will be done to an update.

    Under a promise everything here follows from the noised update; without one the score depends on
    the raw update. The rules that apply grow with the score, so of n rules at most n + 1 sets can
    be told apart; what is released, withheld and counted follows from the set.

    Attributes:
        unit: whom the promise is for; None without one, and in records from before it was told.
        steps: private training steps behind the update; None but for unit patient and record. What
            a step cost, its noise multiplier among it, is in the ledger: the row of this round, at
            or before `ledger_seq`.
    """

    type: Literal["update.decided"] = "update.decided"
    round: Digest
    promised: bool
    sensitivity: Annotated[Score, FromData()]
    sharpness: Sharpness
    suspicion: Score
    budget_spent: Score
    rules: Annotated[tuple[Index, ...], Field(max_length=256), FromData()]  # places in the policy
    released: Index  # parameters let out
    withheld: Index
    coordinates: Log2
    clipped: Annotated[bool | None, FromData()] = None  # None under a promise
    unit: Unit | None = None
    steps: Steps | None = None

    RANGES: ClassVar[dict[str, int]] = {"sensitivity": SCORE_STEPS + 1, "rules": 257, "clipped": 2}
    LATER: ClassVar[frozenset[str]] = frozenset({"unit", "steps"})

    @model_validator(mode="after")
    def _steps_belong_to_a_promise(self) -> Self:
        if self.unit is not None and not self.promised:
            raise ValueError("unit: only under a promise")
        if (self.steps is not None) != (self.unit in (Unit.PATIENT, Unit.RECORD)):
            raise ValueError("steps: with unit patient or record, and only then")
        return self

    @property
    def data_bits(self) -> int:
        """Under a promise everything here is post-processing: no bit of the raw update."""
        return 0 if self.promised else super().data_bits


class UpdateReleased(Record):
    """An update may leave now; written before it does."""

    type: Literal["update.released"] = "update.released"
    round: Digest
    released: Digest


class UpdateReplayed(Record):
    """A released round was asked for again; the stored bytes were given."""

    type: Literal["update.replayed"] = "update.replayed"
    round: Digest
    released: Digest


class UpdateWithheld(Record):
    """Nothing left."""

    type: Literal["update.withheld"] = "update.withheld"
    round: Digest
    reason: Annotated[Reason, FromData()]

    RANGES: ClassVar[dict[str, int]] = {"reason": len(Reason)}


class LogRecovered(Record):
    """A crash left part of a record behind, never acknowledged; it was cut off."""

    type: Literal["log.recovered"] = "log.recovered"
    dropped_bytes: Log2


AnyRecord = Annotated[
    GuardStarted
    | RoundOpened
    | RoundRefused
    | RoundAborted
    | UpdateDecided
    | UpdateReleased
    | UpdateReplayed
    | UpdateWithheld
    | LogRecovered,
    Field(discriminator="type"),
]
RECORD_TYPES: tuple[type[Record], ...] = (
    GuardStarted,
    RoundOpened,
    RoundRefused,
    RoundAborted,
    UpdateDecided,
    UpdateReleased,
    UpdateReplayed,
    UpdateWithheld,
    LogRecovered,
)
_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyRecord)


def record_from_json(text: str | bytes) -> Record:
    """Read a record strictly; ValueError for an unknown type, field or value."""
    record: Record = _ADAPTER.validate_json(text)
    return record


def score_step(score: float) -> int:
    """A score from 0 to 1 in whole twentieths, rounded up so that none looks smaller."""
    return min(SCORE_STEPS, math.ceil(score * SCORE_STEPS - 1e-9))


def log2_bucket(count: int) -> int:
    """The bucket of a count: 0 for 0, else 1 + floor(log2)."""
    return count.bit_length()
