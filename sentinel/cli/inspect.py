"""`sentinel inspect`: look at a global model before anybody trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentinel.cli.console import REFUSED, AsJson, console, print_json, read_tensors
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
    as_json: AsJson = False,
) -> None:
    """Say what a global model looks like: honest, crafted to leak, or broken.

    Only the weights are read; with the architecture at hand (in Python) probes are run as well.
    Exit code 1 where suspicion is .5 or more or the model is unhealthy.
    """
    from sentinel.detection import inspect_global_model

    state = read_tensors(global_model, "a global model")
    before = None if previous is None else read_tensors(previous, "an earlier global model")
    found = inspect_global_model(state, before)
    names = sorted(state.keys() | (before or {}).keys()) if _restructured(found) else sorted(state)
    if as_json:
        print_json(_document(found, names))
    else:
        _print(found, names)
    if found.suspicion >= ALARM or found.unhealthy:
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
