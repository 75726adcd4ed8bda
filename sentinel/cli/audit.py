"""`sentinel audit`: read and check the log."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import re
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import (
    REFUSED,
    AsJson,
    SentinelGroup,
    StateDir,
    console,
    print_json,
    say_error,
)
from sentinel.cli.peers import (
    Federation,
    FromRound,
    Run,
    check_log,
    document,
    end,
    own_digests,
    own_entries,
    read_peers,
    say_log,
    verified,
    wanted_rounds,
)
from sentinel.durable import replace_file
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from sentinel.audit import Entry

app = typer.Typer(cls=SentinelGroup, no_args_is_help=True, help="Read and check the audit log.")

_EVERYWHERE = {"at", "process", "level", "ledger_seq", "ledger_head", "type"}
_DIGEST = 64


@app.callback()
def audit() -> None:
    """Read and check the audit log."""


@app.command()
def show(
    last: Annotated[int, typer.Option(min=1, help="How many records, from the end.")] = 20,
    only: Annotated[str | None, typer.Option("--type", help="Only this type of record.")] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Print the last records, oldest first, one line each."""
    from sentinel.audit import read_log
    from sentinel.audit.records import RECORD_TYPES
    from sentinel.state import StateFolder

    known = sorted(str(record.model_fields["type"].default) for record in RECORD_TYPES)
    if only is not None and only not in known:
        raise MisuseError(f"There is no record of type {only!r}; there are {', '.join(known)}.")
    entries = read_log(StateFolder.existing(state_dir).audit, torn_end=True)
    wanted = (entry for entry in entries if only in (None, entry.record.model_dump()["type"]))
    shown = deque(wanted, maxlen=last)
    if as_json:
        print_json([_plain(entry) for entry in shown])
        return
    screen = console()
    for entry in shown:
        screen.print(_line(entry), markup=False, soft_wrap=True)


@app.command()
def verify(
    since: Annotated[
        str | None,
        typer.Option(help="A head that was noted earlier: check that it is still part of the log."),
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Check every record, the chain of hashes, and the ledger that it names."""
    from sentinel.audit import read_log
    from sentinel.errors import Withheld
    from sentinel.state import StateFolder
    from sentinel.terms import Reason

    if since is not None and not re.fullmatch(f"[0-9a-f]{{{_DIGEST}}}", since):
        raise MisuseError("--since takes a head as `audit verify` prints it: 64 hex digits.")
    state = StateFolder.existing(state_dir)
    found = verified(state)
    if since is not None and not any(entry.hash == since for entry in read_log(state.audit)):
        raise Withheld(
            Reason.LOG_DAMAGED,
            "The head that was noted earlier is not in this log: history was rewritten.",
        )
    if as_json:
        print_json(
            {
                "records": found.records,
                "head": found.head,
                "types": found.types,
                "data_bits": found.data_bits,
            }
        )
        return
    screen = console()
    screen.print(f"{found.records} records, every one in its place. Head: {found.head}")
    for name, count in sorted(found.types.items()):
        screen.print(f"  {count:6d}  {name}")
    screen.print(f"At most {found.data_bits} bits in it depend on raw updates.")


@app.command()
def digests(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write it (0600); standard output if left out."),
    ] = None,
    federation: Federation = None,
    run: Run = None,
    from_round: FromRound = 0,
    state_dir: StateDir = None,
) -> None:
    """Write what other sites need to see whether the server sent all of you the same models.

    One JSON document: for each round its number, the digest of its name, and the digest of the
    global model; nothing else. The log is checked first; a damaged one gives nothing.
    """
    from sentinel.state import StateFolder

    wanted = wanted_rounds(federation, run, from_round)
    state = StateFolder.existing(state_dir)
    if out is not None:
        _require_place(out, state.path)
    found = own_digests(state, wanted, named=run is not None)
    if out is None:
        _write_out(found.to_bytes())
        return
    try:
        replace_file(out, found.to_bytes())
    except OSError:
        say_error(f"{out} could not be written; check space and permissions.")
        raise typer.Exit(REFUSED) from None
    console().print(f"{out}: {len(found.models)} rounds.", markup=False, soft_wrap=True)


@app.command("compare")
def compare_command(
    peers: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="What `audit digests` wrote at other sites."),
    ],
    federation: Federation = None,
    run: Run = None,
    from_round: FromRound = 0,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Name each round in which the server sent another site another global model.

    A round that only one of two sites has is not compared; those of this site that no file has are
    named. Exit code 1 where any round differs, 2 where a file has no round in common with this
    site's log, or claims the log of another file or of this site.
    """
    from sentinel.audit.peers import claims_of
    from sentinel.state import StateFolder

    wanted = wanted_rounds(federation, run, from_round)
    state = StateFolder.existing(state_dir)
    own = own_digests(state, wanted, named=run is not None).models
    others = read_peers(peers)
    check = check_log(own, others, wanted, claims_of(others, own_entries(state)))
    if as_json:
        print_json(document(check))
    else:
        say_log(check)
    end(check)


def _require_place(out: Path, state: Path) -> None:
    """Refuse a file that cannot be, or that would lie among what the guard keeps."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise MisuseError(f"{out} must be a file in a folder that is there.")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise MisuseError(f"{out} is there and is no plain file; name another, or move it away.")
    if out.absolute().parent.resolve().is_relative_to(state.resolve()):
        raise MisuseError(f"{out} lies in the state folder; name a file outside it.")


def _write_out(content: bytes) -> None:
    """To standard output, or exit with a sentence; what did not fit is not tried again at exit."""
    try:
        sys.stdout.write(content.decode())
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        say_error("Standard output could not be written; check space and permissions.")
        raise typer.Exit(REFUSED) from None


def _plain(entry: Entry) -> dict[str, Any]:
    return {"seq": entry.seq, "hash": entry.hash, **entry.record.model_dump(mode="json")}


def _line(entry: Entry) -> str:
    fields = entry.record.model_dump(mode="json")
    at = dt.datetime.fromtimestamp(fields["at"], dt.UTC).isoformat(timespec="seconds")
    said = [f"{name}={_short(value)}" for name, value in fields.items() if name not in _EVERYWHERE]
    start = [f"{entry.seq:6d}", at, fields["level"], f"{fields['type']:16}"]
    return " ".join(itertools.chain(start, said))


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == _DIGEST:
        return value[:12]
    if isinstance(value, list):
        return ",".join(_short(item) for item in value) or "-"
    return str(value)
