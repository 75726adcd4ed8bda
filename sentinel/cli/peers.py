"""Other sites' digests on the command line: read, compared, and told to whoever is on duty."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import MISUSE, REFUSED, console, say_error
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sentinel.audit import Entry, Findings
    from sentinel.audit.peers import Answer, Claims, Comparison, Digests, Models, RoundName
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


def verified(state: StateFolder, *, torn_end: bool = False) -> Findings:
    """What the log holds, once it, the chain of hashes and the ledger were checked.

    With `torn_end` a last line that was cut short is passed over.
    """
    from sentinel.audit import verify_log
    from sentinel.gate import require_sound

    noted = [(row.log_head.seq, row.log_head.hash) for row in state.ledger.rows()]
    found = verify_log(state.audit, state.ledger.hash_at, noted, torn_end=torn_end)
    require_sound(state)
    return found


def own_entries(state: StateFolder) -> Iterator[Entry]:
    """This site's log; a last line that was cut short is passed over: a guard may be writing."""
    from sentinel.audit import read_log

    return read_log(state.audit, torn_end=True)


def own_digests(
    state: StateFolder, wanted: Callable[[RoundName], bool], *, named: bool = False
) -> Digests:
    """This site's own, from a log that is checked first.

    Raises:
        MisuseError: a run was named, and there is no round of it.
    """
    from sentinel.audit.peers import digests_of

    verified(state, torn_end=True)
    found = digests_of(own_entries(state), wanted)
    if named and not found.rounds:
        raise MisuseError(
            "The log has no such round: check the spelling of --run and --federation, and "
            "--from-round."
        )
    return found


def own_state(state_dir: Path | None) -> StateFolder | None:
    """This site's state; None where no guard keeps one here and nobody names one."""
    from sentinel.state import StateFolder

    try:
        return StateFolder.existing(state_dir)
    except MisuseError:
        if state_dir is not None:
            raise
        say_error("No log of this site is here, so a file of its own would not be known by it.")
        return None


def read_peers(paths: Sequence[Path]) -> list[tuple[str, Digests]]:
    """Other sites' digests, each with the name of its file as it was given.

    Raises:
        MisuseError: a file that is no such thing.
    """
    from sentinel.audit.peers import read_digests

    return [(str(path), read_digests(_content(path), str(path))) for path in paths]


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
        claims: files whose log cannot be theirs alone.
    """

    verdict: Answer
    own: Models
    beside: Sequence[tuple[str, Comparison]]
    claims: Claims

    @property
    def with_nobody(self) -> list[RoundName]:
        """This site's rounds that were compared with nobody, in order."""
        compared = {name for _, found in self.beside for name in (*found.same, *found.another)}
        return sorted(self.own.keys() - compared)


def check_log(
    own: Models,
    peers: Sequence[tuple[str, Digests]],
    wanted: Callable[[RoundName], bool],
    claims: Claims,
) -> Check:
    """All wanted rounds; a file that shares none of them is never passed over."""
    from sentinel.audit.peers import Answer, repeated

    beside = _beside(own, peers, wanted, claims)
    answers = {found.answer for _, found in beside}
    if repeated(own):
        answers.add(Answer.INCONSISTENCY)
    if claims:
        answers.add(Answer.NOT_COMPARED)
    order = (Answer.INCONSISTENCY, Answer.NOT_COMPARED, Answer.NO_DIFFERENCE)
    return Check(next(answer for answer in order if answer in answers), own, beside, claims)


def check_round(
    name: RoundName, digest: str, peers: Sequence[tuple[str, Digests]], state: StateFolder | None
) -> Check:
    """One round, in which not every site takes part; one of them has to.

    Raises:
        MisuseError: this site's log has the round, with other global models alone.
    """
    from sentinel.audit.peers import Answer, claims_of

    if state is not None:
        _require_model(name, digest, state)
    claims = claims_of(peers, () if state is None else own_entries(state))
    own = {name: frozenset({digest})}
    beside = _beside(own, peers, own.__contains__, claims)
    answers = {found.answer for _, found in beside}
    if claims:
        answers = (answers & {Answer.INCONSISTENCY}) | {Answer.NOT_COMPARED}
    order = (Answer.INCONSISTENCY, Answer.NO_DIFFERENCE, Answer.NOT_COMPARED)
    return Check(next(answer for answer in order if answer in answers), own, beside, claims)


def _require_model(name: RoundName, digest: str, state: StateFolder) -> None:
    known = own_digests(state, name.__eq__).models.get(name, {digest})
    if digest not in known:
        raise MisuseError(
            f"This site's log has round {name.number} with another global model than this file: "
            "most likely --round is mistyped, or the file is of another round. Nothing was "
            "compared. If both are right, the server sent this site two models for one round."
        )


def _beside(
    own: Models,
    peers: Iterable[tuple[str, Digests]],
    wanted: Callable[[RoundName], bool],
    claims: Claims,
) -> list[tuple[str, Comparison]]:
    """Each file's rounds beside this site's; of one that may be a copy, what differs counts."""
    from sentinel.audit.peers import compare

    found = ((file, compare(own, theirs.only(wanted).models)) for file, theirs in peers)
    return [
        (file, each.differences_alone() if file in claims.own else each) for file, each in found
    ]


def say_log(check: Check) -> None:
    """Print what was found in a log; the worst last, where it is seen."""
    from sentinel.audit.peers import repeated

    for file, found in check.beside:
        share = 100 * found.compared // max(1, len(check.own))  # 100 % are all of them
        _say(f"{file}: {found.compared} of {len(check.own)} rounds compared ({share} %).")
        if found.not_compared and file not in check.claims.own:
            _say(f"  Not compared, since it has no such round: {_spans(found.not_compared)}.")
        if found.not_here:
            _say(f"  Not compared, since this site has no such round: {found.not_here}.")
        if found.repeated_elsewhere:
            _say(
                "  With more than one global model there, and not here, so no alarm: "
                f"{_spans(found.repeated_elsewhere)}."
            )
    for line in _each(repeated(check.own), "this site was sent more than one global model"):
        _say(line)
    _say_differences(check)
    if check.with_nobody:
        _say(
            f"{len(check.with_nobody)} of {len(check.own)} rounds were compared with nobody, and "
            f"what was sent in them is not known to be the same: {_spans(check.with_nobody)}."
        )


def say_round(check: Check, digest: str) -> None:
    """Print what was found about one round."""
    _say(f"Digest of this global model: {digest}")
    for file, found in check.beside:
        for name in () if file in check.claims.own else found.not_compared:
            _say(f"Round {name.number}: {file} has no such round; not compared.")
        if not found.repeated:
            for name in found.same:
                _say(f"Round {name.number}: {file} was sent the same global model.")
    _say_differences(check)


def end(check: Check, *, alarm: bool = False) -> None:
    """Say what files falsely claim, and leave with the exit code of a verdict, or of an alarm."""
    from sentinel.audit.peers import Answer

    _say_claims(check.claims)
    if alarm or check.verdict is Answer.INCONSISTENCY:
        raise typer.Exit(REFUSED)
    if check.claims:
        raise typer.Exit(MISUSE)
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
        "compared_with_nobody": [_named(name) for name in check.with_nobody],
        "claim_own_log": list(check.claims.own),
        "claim_one_log": [list(files) for files in check.claims.shared],
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
    elif any(found.compared for _, found in check.beside) and not check.claims:
        _say("No difference in any round that was compared.")


def _say_claims(claims: Claims) -> None:
    for file in claims.own:
        say_error(
            f"{file} claims to be from this site's own log. Where it agrees it proves nothing, and "
            "is not counted. If another site sent it, it may be forged: do not drop it, ask that "
            "site by another way."
        )
    for files in claims.shared:
        say_error(
            f"{' and '.join(files)} claim to be from one log: one of them may be forged. Do not "
            "drop either; ask both sites by another way."
        )


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
        "repeated_elsewhere": [_named(name) for name in found.repeated_elsewhere],
    }


def _named(name: RoundName) -> dict[str, object]:
    return {"number": name.number, "round": name.round}
