"""Other sites' digests on the command line: read, compared, and told to whoever is on duty."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import REFUSED, console, say_error
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sentinel.audit import Findings
    from sentinel.audit.peers import Answer, Comparison, Digests, Models, RoundName
    from sentinel.state import StateFolder

Federation = Annotated[
    str | None, typer.Option(help="Only rounds trained with this federation; needs --run.")
]
Run = Annotated[str | None, typer.Option(help="Only rounds of this run.")]
FromRound = Annotated[int, typer.Option(min=0, help="Only rounds of this number or a later one.")]

_SHOWN = 20  # more than that, of one kind, nobody reads
STOP = (
    "The server is inconsistent: stop taking part, and call your security team and the other "
    "site, by another way than the server. See docs/runbook.md, Other hospitals."
)


def wanted_rounds(
    federation: str | None, run: str | None, first: int
) -> Callable[[RoundName], bool]:
    """Which rounds are meant; all of them from `first` where nobody names a run."""
    if run is None:
        if federation is not None:
            raise MisuseError("--federation needs --run: rounds are known by both together.")
        return lambda name: name.number >= first
    digest = _digest_of(federation or "default", run)
    return lambda name: name.number >= first and name.round == digest(name.number)


def round_name(federation: str, run: str, number: int) -> RoundName:
    """A round as the log of a guard names it."""
    from sentinel.audit.peers import RoundName

    return RoundName(number, _digest_of(federation, run)(number))


def _digest_of(federation: str, run: str) -> Callable[[int], str]:
    from sentinel.arguments import require_name
    from sentinel.releases import RoundKey

    require_name(federation, "--federation")
    require_name(run, "--run")
    return lambda number: RoundKey(federation, run, number).digest


def verified(state: StateFolder) -> Findings:
    """What the log holds, once it, the chain of hashes and the ledger were checked."""
    from sentinel.audit import verify_log
    from sentinel.gate import require_sound

    noted = [(row.log_head.seq, row.log_head.hash) for row in state.ledger.rows()]
    found = verify_log(state.audit, state.ledger.hash_at, noted)
    require_sound(state)
    return found


def own_digests(state: StateFolder, wanted: Callable[[RoundName], bool]) -> Digests:
    """This site's own, from a log that was checked."""
    from sentinel.audit import read_log
    from sentinel.audit.peers import digests_of

    verified(state)
    return digests_of(read_log(state.audit, torn_end=True), wanted)  # a guard may be writing


def own_log(state_dir: Path | None) -> Callable[[int], str | None] | None:
    """How this site's own digests are known: by its log; None where no guard keeps one here."""
    from sentinel.state import StateFolder

    try:
        state = StateFolder.existing(state_dir)
    except MisuseError:
        if state_dir is not None:
            raise
        say_error("No log of this site is here, so a file of its own would not be known by it.")
        return None
    verified(state)
    return state.log.hash_at


def read_peers(
    paths: Sequence[Path], hash_at: Callable[[int], str | None] | None
) -> list[tuple[str, Digests]]:
    """Other sites' digests, each with the name of its file as it was given.

    Raises:
        MisuseError: a file that is no such thing, this site's own, or the same log as another.
    """
    from sentinel.audit.peers import read_digests, require_others

    peers = [(str(path), read_digests(_content(path), str(path))) for path in paths]
    require_others(peers, hash_at)
    return peers


def _content(path: Path) -> bytes:
    from sentinel.audit.peers import LARGEST

    if not str(path).isprintable():
        raise MisuseError("The file of another site must have a name that can be printed.")
    try:
        if not path.is_file():
            raise MisuseError(
                f"{path} is no file: what `sentinel audit digests` wrote at another site was "
                "expected."
            )
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError:
        raise MisuseError(f"{path} cannot be read; check its permissions.") from None
    if len(content) > LARGEST:
        raise MisuseError(
            f"{path} is larger than what `sentinel audit digests` writes ({LARGEST >> 20} MiB at "
            "most)."
        )
    return content


@dataclass(frozen=True, slots=True)
class Check:
    """This site's rounds beside those of others.

    Attributes:
        verdict: what it came to.
        own: this site's.
        beside: each peer's, with the name of its file.
    """

    verdict: Answer
    own: Models
    beside: Sequence[tuple[str, Comparison]]


def check_log(
    own: Models, peers: Iterable[tuple[str, Digests]], wanted: Callable[[RoundName], bool]
) -> Check:
    """All wanted rounds; a file that shares none of them is never passed over."""
    from sentinel.audit.peers import Answer, compare, repeated

    beside = [(file, compare(own, theirs.only(wanted).models)) for file, theirs in peers]
    answers = {found.answer for _, found in beside}
    if repeated(own):
        answers.add(Answer.INCONSISTENCY)
    order = (Answer.INCONSISTENCY, Answer.NOT_COMPARED, Answer.NO_DIFFERENCE)
    return Check(next(answer for answer in order if answer in answers), own, beside)


def check_round(name: RoundName, digest: str, peers: Iterable[tuple[str, Digests]]) -> Check:
    """One round, in which not every site takes part; one of them has to."""
    from sentinel.audit.peers import Answer, compare

    own = {name: frozenset({digest})}
    beside = [(file, compare(own, theirs.only(own.__contains__).models)) for file, theirs in peers]
    answers = {found.answer for _, found in beside}
    order = (Answer.INCONSISTENCY, Answer.NO_DIFFERENCE, Answer.NOT_COMPARED)
    return Check(next(answer for answer in order if answer in answers), own, beside)


def say_log(check: Check) -> None:
    """Print what was found in a log; the worst last, where it is seen."""
    from sentinel.audit.peers import repeated

    for file, found in check.beside:
        share = 100 * found.compared // max(1, len(check.own))  # 100 % are all of them
        _say(f"{file}: {found.compared} of {len(check.own)} rounds compared ({share} %).")
        if found.not_compared:
            _say(f"  Not compared, since it has no such round: {_spans(found.not_compared)}.")
        if found.not_here:
            _say(f"  Not compared, since this site has no such round: {found.not_here}.")
    for line in _each(repeated(check.own), "this site was sent more than one global model"):
        _say(line)
    _say_differences(check)


def say_round(check: Check, digest: str) -> None:
    """Print what was found about one round."""
    _say(f"Digest of this global model: {digest}")
    for file, found in check.beside:
        for name in found.not_compared:
            _say(f"Round {name.number}: {file} has no such round; not compared.")
        if not found.repeated:
            for name in found.same:
                _say(f"Round {name.number}: {file} was sent the same global model.")
    _say_differences(check)


def end(check: Check) -> None:
    """Leave with the exit code of a verdict."""
    from sentinel.audit.peers import Answer

    if check.verdict is Answer.INCONSISTENCY:
        raise typer.Exit(REFUSED)
    if check.verdict is Answer.NOT_COMPARED:
        raise MisuseError(
            "No round in common, with any of the files or with one of them: nothing was compared "
            "there. Federation and run must be named alike at all sites: Guard(..., "
            "federation=..., run=...)."
        )


def document(check: Check) -> dict[str, Any]:
    """What was found, for machines; every round named."""
    from sentinel.audit.peers import repeated

    return {
        "verdict": check.verdict.value,
        "rounds": len(check.own),
        "repeated": [_named(name) for name in repeated(check.own)],
        "peers": [_plain(file, found, len(check.own)) for file, found in check.beside],
    }


def _say_differences(check: Check) -> None:
    from sentinel.audit.peers import Answer

    for file, found in check.beside:
        for line in _each(found.repeated, f"{file} was sent more than one global model"):
            _say(line)
        for line in _each(found.another, f"{file} was sent another global model than this site"):
            _say(line)
    if check.verdict is Answer.INCONSISTENCY:
        _say(STOP)
    elif any(found.compared for _, found in check.beside):
        _say("No difference in any round that was compared.")


def _say(line: str) -> None:
    console().print(line, markup=False, soft_wrap=True)


def _each(names: Sequence[RoundName], fact: str) -> Iterator[str]:
    """One sentence for each round, as far as anybody reads them."""
    for name in names[:_SHOWN]:
        yield f"Round {name.number}: {fact} ({name.round[:12]} in the log)."
    if names[_SHOWN:]:
        yield f"And in {len(names) - _SHOWN} more rounds {fact}; --json names them."


def _spans(names: Iterable[RoundName]) -> str:
    """Numbers of rounds, neighbours drawn together: `0 to 3, 7`."""
    numbers = sorted({name.number for name in names})
    breaks = [at for at, (left, right) in enumerate(pairwise(numbers), 1) if right != left + 1]
    spans = [
        (numbers[start], numbers[end - 1]) for start, end in pairwise([0, *breaks, len(numbers)])
    ]
    shown = [f"{low}" if low == high else f"{low} to {high}" for low, high in spans[:_SHOWN]]
    return ", ".join([*shown, "and more; --json names them"] if spans[_SHOWN:] else shown)


def _plain(file: str, found: Comparison, rounds: int) -> dict[str, Any]:
    return {
        "file": file,
        "verdict": found.answer.value,
        "compared": found.compared,
        "share": round(found.compared / max(1, rounds), 4),
        "another": [_named(name) for name in found.another],
        "repeated": [_named(name) for name in found.repeated],
        "not_compared": [_named(name) for name in found.not_compared],
        "not_here": found.not_here,
    }


def _named(name: RoundName) -> dict[str, object]:
    return {"number": name.number, "round": name.round}
