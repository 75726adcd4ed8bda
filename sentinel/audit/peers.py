"""Peers: which global model each site was sent in the same round, compared by digest.

A server that sends one site another model than the rest (gradient suppression, an attack on one
client in one round of fifty) may send models that each look honest. No site sees that alone; two
that compare digests do, where both were sent a model for the same named round.

- A site's digests come from its log: every round that was opened, or refused once its global model
  was digested.
- They hold digests of public things, numbers of rounds, and the hash of the last record shown. It
  tells nobody what that record says, which holds a random id of 128 bits; nor how many there are.
- A peer's digests are hostile: bounded, and good only if they would be written again byte for byte.
- A round that only one of two sites has is not compared. It is never the same. A server that makes
  up a round for one site alone is not seen here.
- Who wrote them, and that nobody changed them since, is for the way they came by.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
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

_ROW = (
    rb'\{\n      "global_model": "[0-9a-f]{64}",\n      "number": (?:0|[1-9][0-9]{0,15}+),\n'
    rb'      "round": "[0-9a-f]{64}"\n    \}'
)
_LAYOUT = re.compile(  # of `Digests.to_bytes`; nothing in it is ever tried twice
    rb'\{\n  "format": "sentinel-digests",\n  "log": "[0-9a-f]{64}",\n  "rounds": \['
    rb"(?:\n    %b(?:,\n    %b){0,%d}+\n  )?+"
    rb'\],\n  "version": 1\n\}\n' % (_ROW, _ROW, MOST_ROUNDS - 1)
)


class Answer(enum.StrEnum):
    """What a comparison came to."""

    INCONSISTENCY = Verdict.INCONSISTENCY.value
    NO_DIFFERENCE = "no-difference"
    NOT_COMPARED = "not-compared"  # nothing was, or it is not certain with whom


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
        log: names the log that they are from, by the hash of the last record that is shown.
        rounds: in order, none twice; a round with two global models has two of them.

    Guarantees:
        There is no field for anything but digests and whole numbers, and one way to write each.

    Edges:
        a log without a round:                     no rounds
        rounds out of order, or one twice:         ValidationError
        a round without a log, or the reverse:     ValidationError
        an unknown field, format or version:       ValidationError
        `only` of no round:                        no rounds, of the same log
        `to_bytes` of as many rounds as there may: fewer than `LARGEST`
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal["sentinel-digests"] = "sentinel-digests"
    version: Literal[1] = 1
    log: Digest
    rounds: Annotated[tuple[RoundSeen, ...], Field(max_length=MOST_ROUNDS)]

    @model_validator(mode="after")
    def _as_a_log_gives_them(self) -> Self:
        rows = [(row.name, row.global_model) for row in self.rounds]
        if any(later <= earlier for earlier, later in pairwise(rows)):
            raise ValueError("rounds: in order, none twice")
        if (not rows) != (self.log == GENESIS):
            raise ValueError("log: the hash of the last record that is shown")
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
        Of a record nothing is taken but the round, its number, the digest of its global model and,
        of the last one shown, its hash. Records that are not shown change nothing, be they few or
        many; the same records give the same bytes.

    Edges:
        a round that was opened again on the same model: once
        a round with two global models:                  both
        a round refused before its model was digested:   left out
        a log without a round that is shown:             no rounds, and no log is named
    """
    log = GENESIS
    found: set[tuple[RoundName, str]] = set()
    for entry in entries:
        record = entry.record
        if isinstance(record, RoundOpened | RoundRefused) and record.global_model is not None:
            name = RoundName(record.number, record.round)
            if wanted(name):
                found.add((name, record.global_model))
                log = entry.hash
    if len(found) > MOST_ROUNDS:
        raise MisuseError(
            f"The log has more than {MOST_ROUNDS} rounds; name the first one that is wanted with "
            "--from-round."
        )
    rows = [
        RoundSeen(number=name.number, round=name.round, global_model=model)
        for name, model in sorted(found)
    ]
    return Digests(log=log, rounds=tuple(rows))


def read_digests(content: bytes, name: str) -> Digests:
    """A peer's digests.

    Args:
        content: the whole file, at most `LARGEST` bytes.
        name: what to call it in an error; nothing of its content is told.

    Raises:
        MisuseError: it is not what `Digests.to_bytes` gives.

    Guarantees:
        What is read would be written again byte for byte: no second key of a name, no second
        spelling of a number, nothing beside. Bytes of another layout are refused before anything
        is made of them: one pass, no memory of their size.

    Edges:
        cut short, changed, or of another kind: MisuseError
        written in another order or layout:     MisuseError
        a key that is there twice:              MisuseError
        no byte at all:                         MisuseError
        `LARGEST` bytes of small things:        MisuseError
    """
    digests = None
    if _LAYOUT.fullmatch(content):
        with contextlib.suppress(ValidationError):
            digests = Digests.model_validate_json(content)
    if digests is None or digests.to_bytes() != content:
        raise MisuseError(
            f"{name} is not what `sentinel audit digests` writes: format sentinel-digests, version "
            "1, byte for byte. Ask the other site to write and send it again, unchanged."
        )
    return digests


@dataclass(frozen=True, slots=True)
class Claims:
    """Files that say that they come from a log which cannot be theirs alone.

    Attributes:
        own: files that claim this site's own log.
        shared: groups of files that claim one log of another site.
    """

    own: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.own or self.shared)


def claims_of(peers: Sequence[tuple[str, Digests]], entries: Iterable[Entry]) -> Claims:
    """Which files claim this site's log, or one log together.

    Args:
        peers: digests, each with the name of its file.
        entries: this site's whole log; empty where there is none at hand.

    Guarantees:
        Nothing is left out of a comparison for what a file claims: a hostile peer can copy what an
        honest one wrote. A peer that lies about its log is not found out.

    Edges:
        an export of this log, also an older one:       own
        two exports of one log up to one shown record:  shared
        an export without a round:                      neither; it has no round to compare
    """
    logs: dict[str, list[str]] = defaultdict(list)
    for name, digests in peers:
        if digests.log != GENESIS:
            logs[digests.log].append(name)
    ours = {entry.hash for entry in entries if entry.hash in logs}
    own = tuple(name for log in logs if log in ours for name in logs[log])
    shared = [tuple(found) for log, found in logs.items() if log not in ours and found[1:]]
    return Claims(own, tuple(shared))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One peer's rounds beside this site's, each in order.

    Attributes:
        same: both were sent the same.
        another: the peer was sent another global model than this site.
        not_compared: this site's rounds that the peer has none of.
        repeated: this site's rounds with more than one global model at the peer.
        not_here: how many of the peer's rounds this site has none of.
        repeated_elsewhere: those among them with more than one global model: no business of this
            site's, and no alarm.
    """

    same: tuple[RoundName, ...]
    another: tuple[RoundName, ...]
    not_compared: tuple[RoundName, ...]
    repeated: tuple[RoundName, ...]
    not_here: int
    repeated_elsewhere: tuple[RoundName, ...]

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

    def differences_alone(self) -> Comparison:
        """This, where what is the same proves nothing: the peer may have copied it from here."""
        return replace(self, same=(), not_compared=tuple(sorted(self.not_compared + self.same)))


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
        two global models of a round that is not here:     repeated elsewhere, no inconsistency
        nothing in common:                                 NOT_COMPARED
    """
    more = repeated(theirs)
    both = sorted(own.keys() & theirs.keys())
    return Comparison(
        same=tuple(name for name in both if own[name] == theirs[name]),
        another=tuple(name for name in both if own[name] != theirs[name]),
        not_compared=tuple(sorted(own.keys() - theirs.keys())),
        repeated=tuple(name for name in more if name in own),
        not_here=len(theirs.keys() - own.keys()),
        repeated_elsewhere=tuple(name for name in more if name not in own),
    )


def repeated(models: Models) -> tuple[RoundName, ...]:
    """The rounds with more than one global model, in order."""
    return tuple(sorted(name for name, found in models.items() if len(found) > 1))
