"""`sentinel detectors evaluate`: the whole protocol, on models that it makes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sentinel.cli.console import AsJson, console, print_json, progress
from sentinel.errors import MisuseError

SEED = 20_261


def evaluate_command(
    name: Annotated[str, typer.Argument(help="global-model.")] = "global-model",
    out: Annotated[
        Path, typer.Option("--out", help="Folder that the figures are written to.")
    ] = Path("evaluation-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute: to see that it works, not for figures.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Processes; the figures are the same for any.")
    ] = 2,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Folder of bundles; the shipped ones if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a detector on honest and crafted models that it was not trained on.

    Writes evaluation.json, evaluation.md and two pictures. Nothing is downloaded; every model is
    made from a seed. The full form takes twenty minutes or more on two cores, and needs the extra
    `train` for the refits without an architecture.
    """
    from sentinel.detection.bundle import GLOBAL_MODEL, load_detector

    if name != GLOBAL_MODEL:
        raise MisuseError(f"{name!r} cannot be evaluated; there is {GLOBAL_MODEL}")
    from sentinel.stress.bench import card, charts, figures
    from sentinel.stress.bench.evaluate import FULL, QUICK, evaluate

    detector = load_detector(GLOBAL_MODEL, folder=folder)
    size = QUICK if quick else FULL
    with progress(f"evaluating {name}") as step:
        step(0, 1)
        seen = evaluate(size, SEED, step=step, jobs=jobs, folder=folder)
    document = figures.document(seen) | {"detector": detector.digest, "size": size.name}
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "evaluation.json": json.dumps(document, indent=2, sort_keys=True) + "\n",
        "evaluation.md": card.card(seen, size, detector.digest),
        "curves.svg": charts.curves_svg(seen),
        "suspicion.svg": charts.spread_svg(seen),
    }
    for file, text in files.items():
        (out / file).write_text(text, encoding="utf-8")
    if as_json:
        print_json(document)
        return
    for file in files:
        console().print(f"Written: {out / file}", markup=False, soft_wrap=True)
