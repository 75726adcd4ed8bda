"""`sentinel sanitize`: the release steps for files, from any language."""

from __future__ import annotations

import enum
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from sentinel.cli.console import (
    REFUSED,
    AsJson,
    StateDir,
    console,
    print_json,
    read_tensors,
    say_error,
    working,
)
from sentinel.errors import MisuseError


class Form(enum.StrEnum):
    """What is released."""

    WEIGHTS = "weights"
    DELTA = "delta"


def sanitize_command(
    update: Annotated[Path, typer.Argument(help="The model after training (safetensors).")],
    base: Annotated[Path, typer.Option("--global", help="The global model it started from.")],
    policy: Annotated[str, typer.Option(help="A policy file, or the name of a shipped policy.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write what may leave.")],
    round_number: Annotated[
        int | None,
        typer.Option(
            "--round", min=0, help="Number of the round; asked again, it gives the same bytes."
        ),
    ] = None,
    run: Annotated[str, typer.Option(help="Which job the round belongs to.")] = "default",
    federation: Annotated[str, typer.Option(help="Who is trained with.")] = "default",
    patients: Annotated[int | None, typer.Option(min=0, help="How many stand behind it.")] = None,
    kind: Annotated[Form, typer.Option(help="Release weights, or the difference.")] = Form.WEIGHTS,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Inspect the global model, measure the update, sanitize it, and write what may leave.

    Without --round every call is a round of its own, with a new charge.
    """
    from sentinel.guard import Guard
    from sentinel.releases import write_tensors

    _require_writable(out, update, base)
    global_state = read_tensors(base, "the global model")
    local_state = read_tensors(update, "the model after training")
    if round_number is None:
        run, round_number = f"{run}/{secrets.token_hex(16)}", 0
    with working("inspecting, measuring, sanitizing"):
        guard = Guard(policy, state_dir, federation=federation, run=run)
        with guard.round(round_number, global_state, patients=patients) as rnd:
            pass
        released = rnd.release(local_state, kind=kind.value)
    try:
        write_tensors(out, released)
    except OSError:
        say_error(
            f"{out} could not be written. The round was released; ask for the same bytes again "
            f"with --round {round_number} --run {run}."
        )
        raise typer.Exit(REFUSED) from None
    decided = rnd.decided
    summary = {
        "out": str(out),
        "replayed": rnd.replayed,
        "sensitivity": None if decided is None else round(decided.evidence.sensitivity, 3),
        "sharpness": None if decided is None else decided.score.sharpness,
        "suspicion": None if rnd.inspection is None else round(rnd.inspection.suspicion, 3),
        "rules": [] if decided is None else list(decided.plan.decided_by),
        "promise": None
        if guard.policy.policy.privacy is None
        else guard.policy.policy.privacy.unit,
    }
    if as_json:
        print_json(summary)
        return
    _tell(summary)


def _require_writable(out: Path, *inputs: Path) -> None:
    """Refuse an output that cannot work, before anything is charged."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise MisuseError(f"{out} must be a file in a folder that is there.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise MisuseError(f"The folder of {out} cannot be written.")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise MisuseError(f"{out} is one of the inputs; name another file.")


def _tell(summary: dict[str, Any]) -> None:
    screen = console()
    if summary["replayed"]:
        screen.print(f"{summary['out']}: this round was released before; these are its bytes.")
        return
    screen.print(f"{summary['out']}: released.")
    screen.print(
        f"  sensitivity score {summary['sensitivity']} ({summary['sharpness']}), "
        f"suspicion {summary['suspicion']}, "
        f"rules applied: {', '.join(summary['rules'])}"
    )
    if summary["promise"] is None:
        screen.print("  no formal guarantee: the policy promises none.")
