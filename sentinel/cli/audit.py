"""`sentinel audit`: read and check the log."""

from __future__ import annotations

import datetime as dt
import itertools
import re
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import AsJson, SentinelGroup, StateDir, console, print_json

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
    from sentinel.errors import MisuseError
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
    from sentinel.audit import read_log, verify_log
    from sentinel.errors import MisuseError, Withheld
    from sentinel.gate import require_sound
    from sentinel.state import StateFolder
    from sentinel.terms import Reason

    if since is not None and not re.fullmatch(f"[0-9a-f]{{{_DIGEST}}}", since):
        raise MisuseError("--since takes a head as `audit verify` prints it: 64 hex digits.")
    state = StateFolder.existing(state_dir)
    noted = [(row.log_head.seq, row.log_head.hash) for row in state.ledger.rows()]
    found = verify_log(state.audit, state.ledger.hash_at, noted)
    require_sound(state)
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
