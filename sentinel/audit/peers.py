"""Peers: which global model each site was sent in the same round, compared by digest.

A server that sends one site another model than the rest (gradient suppression, an attack on one
client in one round of fifty) may send models that each look honest. No site sees that alone; two
that compare digests do, whatever the attack.

- A site's digests come from its log: every round that was opened, or refused once its global model
  was digested.
- They hold digests of public things, numbers of rounds, and the place of the log's last record.
  The hash of that record tells nobody what it says: the record holds a random id of 128 bits.
- A peer's digests are hostile: bounded, and good only if they would be written again byte for byte.
- A round that only one of two sites has is not compared. It is never the same.
- Who wrote them, and that nobody changed them since, is for the way they came by.
"""

from __future__ import annotations

import enum
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sentinel.audit.records import Digest, RoundOpened, RoundRefused, Seq
from sentinel.errors import MisuseError
from sentinel.terms import GENESIS, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sentinel.audit.log import Entry

    Models = Mapping["RoundName", frozenset[str]]  # the digests of each round's global models

MOST_ROUNDS = 100_000  # five years of 48 rounds a day
LARGEST = 32 << 20  # bytes; more than that many rounds take


class Answer(enum.StrEnum):
    """What a comparison came to."""

    INCONSISTENCY = Verdict.INCONSISTENCY.value
    NO_DIFFERENCE = "no-difference"
    NOT_COMPARED = "not-compared"  # nothing at all was


@dataclass(frozen=True, slots=True, order=True)
class RoundName:
    """A round as the log names it: its number, and the digest of federation, run and number."""

    number: int
    round: str


class RoundSeen(BaseModel):
    """One global model that a site was sent, by digest, and the round it was for."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    number: Seq
    round: Digest
    global_model: Digest

    @property
    def name(self) -> RoundName:
        """The round alone."""
        return RoundName(self.number, self.round)


class Digests(BaseModel):
    """What one site shows to others.

    Attributes:
        log_seq: number of the last record of the log that they are from.
        log_head: its hash.
        rounds: in order, none twice; a round with two global models has two of them.

    Guarantees:
        There is no field for anything but digests and whole numbers, and one way to write each.

    Edges:
        a log without a round:                     no rounds
        rounds out of order, or one twice:         ValidationError
        more rounds than the log has records:      ValidationError
        a head without a record, or the reverse:   ValidationError
        an unknown field, format or version:       ValidationError
        `only` of no round:                        no rounds, of the same log
        `to_bytes` of as many rounds as there may: fewer than `LARGEST`
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal["sentinel-digests"] = "sentinel-digests"
    version: Literal[1] = 1
    log_seq: Seq
    log_head: Digest
    rounds: Annotated[tuple[RoundSeen, ...], Field(max_length=MOST_ROUNDS)]

    @model_validator(mode="after")
    def _as_a_log_gives_them(self) -> Self:
        rows = [(row.name, row.global_model) for row in self.rounds]
        if any(later <= earlier for earlier, later in pairwise(rows)):
            raise ValueError("rounds: in order, none twice")
        if len(rows) > self.log_seq or (self.log_seq == 0) != (self.log_head == GENESIS):
            raise ValueError("log_seq: the number of the log's last record")
        return self

    @property
    def models(self) -> Models:
        """The global models of each round."""
        found: dict[RoundName, set[str]] = defaultdict(set)
        for row in self.rounds:
            found[row.name].add(row.global_model)
        return {name: frozenset(models) for name, models in found.items()}

    def only(self, wanted: Callable[[RoundName], bool]) -> Digests:
        """These, without the rounds that are not wanted."""
        kept = tuple(row for row in self.rounds if wanted(row.name))
        return self.model_copy(update={"rounds": kept})

    def to_bytes(self) -> bytes:
        """As they are written to a file."""
        whole = self.model_dump(mode="json")
        return (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()


def digests_of(entries: Iterable[Entry], wanted: Callable[[RoundName], bool]) -> Digests:
    """What a log has to show of the wanted rounds.

    Args:
        entries: the whole log, in order.
        wanted: whether a round is shown.

    Raises:
        MisuseError: more rounds than one file holds.

    Guarantees:
        Of a record nothing is taken but the round, its number and the digest of its global model;
        the same records give the same bytes.

    Edges:
        a round that was opened again on the same model: once
        a round with two global models:                  both
        a round refused before its model was digested:   left out
        a log without a record:                          no rounds, record 0
    """
    seq, head = 0, GENESIS
    found: set[tuple[RoundName, str]] = set()
    for entry in entries:
        seq, head, record = entry.seq, entry.hash, entry.record
        if isinstance(record, RoundOpened | RoundRefused) and record.global_model is not None:
            name = RoundName(record.number, record.round)
            if wanted(name):
                found.add((name, record.global_model))
    if len(found) > MOST_ROUNDS:
        raise MisuseError(
            f"The log has more than {MOST_ROUNDS} rounds; name the first one that is wanted with "
            "--from-round."
        )
    rows = [
        RoundSeen(number=name.number, round=name.round, global_model=model)
        for name, model in sorted(found)
    ]
    return Digests(log_seq=seq, log_head=head, rounds=tuple(rows))


def read_digests(content: bytes, name: str) -> Digests:
    """A peer's digests.

    Args:
        content: the whole file, at most `LARGEST` bytes.
        name: what to call it in an error; nothing of its content is told.

    Raises:
        MisuseError: it is not what `Digests.to_bytes` gives.

    Guarantees:
        What is read would be written again byte for byte: no second key of a name, no second
        spelling of a number, nothing beside.

    Edges:
        cut short, changed, or of another kind: MisuseError
        written in another order or layout:     MisuseError
        a key that is there twice:              MisuseError
        no byte at all:                         MisuseError
    """
    try:
        digests = Digests.model_validate_json(content)
    except ValidationError:
        digests = None
    if digests is None or digests.to_bytes() != content:
        raise MisuseError(
            f"{name} is not what `sentinel audit digests` writes: format sentinel-digests, version "
            "1, byte for byte. Ask the other site to write and send it again, unchanged."
        )
    return digests


def require_others(
    peers: Sequence[tuple[str, Digests]], hash_at: Callable[[int], str | None] | None
) -> None:
    """Refuse a comparison of a site with itself, and one peer that would count as two.

    Args:
        peers: digests, each with the name of its file.
        hash_at: the hash of one record of this site's log; None where there is no log at hand.

    Raises:
        MisuseError: the name of the file that is this site's own, or the same log as another.

    Guarantees:
        No digests that pass say that they are from this log, nor any two that they are from one
        record of one log. A peer that lies about its log is not found out.

    Edges:
        an export of this log, also an older one: MisuseError
        two exports of one log at one record:     MisuseError
        an export of a log without a record:      passes; it has no round to compare
    """
    logs: dict[tuple[int, str], str] = {}
    for name, digests in peers:
        if digests.log_seq == 0:
            continue
        if hash_at is not None and hash_at(digests.log_seq) == digests.log_head:
            raise MisuseError(
                f"{name} is from this site's own log. A comparison with oneself proves nothing: "
                "name files of other sites."
            )
        log = (digests.log_seq, digests.log_head)
        if log in logs:
            raise MisuseError(f"{logs[log]} and {name} are from the same log; name one of them.")
        logs[log] = name


@dataclass(frozen=True, slots=True)
class Comparison:
    """One peer's rounds beside this site's, each in order.

    Attributes:
        same: both were sent the same.
        another: the peer was sent another global model than this site.
        not_compared: this site's rounds that the peer has none of.
        repeated: the peer's rounds with more than one global model.
        not_here: how many of the peer's rounds this site has none of.
    """

    same: tuple[RoundName, ...]
    another: tuple[RoundName, ...]
    not_compared: tuple[RoundName, ...]
    repeated: tuple[RoundName, ...]
    not_here: int

    @property
    def compared(self) -> int:
        """How many rounds were compared."""
        return len(self.same) + len(self.another)

    @property
    def answer(self) -> Answer:
        """What it came to."""
        if self.another or self.repeated:
            return Answer.INCONSISTENCY
        return Answer.NO_DIFFERENCE if self.compared else Answer.NOT_COMPARED


def compare(own: Models, theirs: Models) -> Comparison:
    """Hold a peer's rounds beside this site's.

    Guarantees:
        A round is the same only where both sites name the very same global models for it. Which
        site is told of makes no difference: both find the same rounds to differ.

    Edges:
        a round that one of them has:                      not compared
        a round of one digest under two numbers:           not compared: one of them is no round
        one global model here, that and another there:     another, and repeated
        the same two global models on both sides:          the same, and repeated
        nothing in common:                                 NOT_COMPARED
    """
    both = sorted(own.keys() & theirs.keys())
    return Comparison(
        same=tuple(name for name in both if own[name] == theirs[name]),
        another=tuple(name for name in both if own[name] != theirs[name]),
        not_compared=tuple(sorted(own.keys() - theirs.keys())),
        repeated=repeated(theirs),
        not_here=len(theirs.keys() - own.keys()),
    )


def repeated(models: Models) -> tuple[RoundName, ...]:
    """The rounds with more than one global model, in order."""
    return tuple(sorted(name for name, found in models.items() if len(found) > 1))
