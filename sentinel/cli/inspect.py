"""`sentinel inspect`: look at a global model before anybody trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentinel.cli.console import REFUSED, AsJson, StateDir, console, print_json, read_tensors
from sentinel.cli.peers import (
    check_round,
    document,
    end,
    own_state,
    read_peers,
    round_name,
    say_round,
)
from sentinel.errors import MisuseError
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sentinel.detection import Inspection

ALARM = 0.5


def inspect_command(
    global_model: Annotated[
        Path, typer.Argument(metavar="GLOBAL", help="The global model, as safetensors.")
    ],
    previous: Annotated[
        Path | None,
        typer.Option("--previous", help="The global model of an earlier round, as safetensors."),
    ] = None,
    peers: Annotated[
        list[Path] | None,
        typer.Option(
            "--peers",
            metavar="FILE",
            help="What `audit digests` wrote at another site, for --round; may be repeated.",
        ),
    ] = None,
    round_number: Annotated[
        int | None,
        typer.Option("--round", min=0, max=2**53, help="The round that it was received for."),
    ] = None,
    federation: Annotated[str, typer.Option(help="With --peers: who is trained with.")] = "default",
    run: Annotated[str, typer.Option(help="With --peers: which job.")] = "default",
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Say what a global model looks like: honest, crafted to leak, or broken.

    Only the weights are read; with the architecture at hand (in Python) probes are run as well.
    With --peers it says too which other sites were sent this very model in the round. Exit code 1
    where suspicion is .5 or more, the model is unhealthy, or another site was sent another one; 2
    where no other site has the round, or this site's log has it with another model.
    """
    from sentinel.detection import inspect_global_model
    from sentinel.update import model_digest

    if (not peers) != (round_number is None):
        raise MisuseError("--peers and --round go together: say which round the model is for.")
    name = round_name(federation, run, round_number or 0)
    site = own_state(state_dir) if peers else None
    others = read_peers(peers) if peers else []
    state = read_tensors(global_model, "a global model")
    before = None if previous is None else read_tensors(previous, "an earlier global model")
    digest = model_digest(state) if peers else ""
    check = check_round(name, digest, others, site) if peers else None
    found = inspect_global_model(state, before)
    names = sorted(state.keys() | (before or {}).keys()) if _restructured(found) else sorted(state)
    if as_json:
        more = {} if check is None else {"global_model": digest, "comparison": document(check)}
        print_json(_document(found, names) | more)
    else:
        _print(found, names)
        if check is not None:
            say_round(check, digest)
    alarm = found.suspicion >= ALARM or found.unhealthy
    if check is not None:
        end(check, alarm=alarm)
    if alarm:
        raise typer.Exit(REFUSED)


def _restructured(found: Inspection) -> bool:
    from sentinel.detection import Kind

    return any(finding.kind is Kind.STRUCTURE for finding in found.findings)


def _print(found: Inspection, names: list[str]) -> None:
    screen = console()
    said = found.verdict is Verdict.UNHEALTHY  # a crafted model may be unhealthy besides
    health = " The model is unhealthy as well." if found.unhealthy and not said else ""
    screen.print(
        f"Verdict: {found.verdict.value}, suspicion {found.suspicion:.2f}.{health}", markup=False
    )
    for line in sentences(found, names):
        screen.print(f"  {line}", markup=False, soft_wrap=True)
    if not found.findings:
        screen.print("No rule found anything.")


def sentences(found: Inspection, names: list[str]) -> Iterable[str]:
    """Yield one sentence per finding, strongest first; names are for this console only."""
    from sentinel.detection.rules import SENTENCES

    for finding in found.findings:
        name = names[finding.layer]
        yield f"{name} {SENTENCES[finding.kind]} (strength {finding.strength:.2f})."


def _document(found: Inspection, names: list[str]) -> dict[str, object]:
    findings = [
        {"kind": entry.kind.value, "layer": entry.layer, "name": names[entry.layer]}
        | {"strength": round(entry.strength, 4), "sentence": sentence}
        for entry, sentence in zip(found.findings, sentences(found, names), strict=True)
    ]
    return {
        "verdict": found.verdict.value,
        "suspicion": round(found.suspicion, 4),
        "unhealthy": found.unhealthy,
        "findings": findings,
    }
