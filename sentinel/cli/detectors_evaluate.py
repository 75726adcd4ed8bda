"""`sentinel detectors evaluate`: both protocols, on models and updates that it makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from sentinel.cli.console import AsJson, console, print_json, progress
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from sentinel.stress.bench.evaluate import Size

SEED = 20_261


Step = Callable[[int, int], None]


def evaluate_command(
    name: Annotated[
        str | None, typer.Argument(help="global-model or update-sensitivity; both if left out.")
    ] = None,
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

    Writes evaluation.json, evaluation.md and pictures into a folder for each detector. Nothing is
    downloaded; every model is made from a seed. The full form takes twenty minutes or more on two
    cores; the refits without an architecture need the extra `train`.
    """
    from sentinel.detection.bundle import GLOBAL_MODEL, UPDATE_SENSITIVITY, load_detector
    from sentinel.stress.bench.evaluate import FULL, QUICK

    size = QUICK if quick else FULL
    every: dict[str, Measure] = {GLOBAL_MODEL: _global_model, UPDATE_SENSITIVITY: _updates}
    if name is not None and name not in every:
        raise MisuseError(f"no detector is called {name!r}; there are {', '.join(every)}")
    for one in every if name is None else [name]:
        with progress(f"evaluating {one}") as step:
            step(0, 1)
            digest = load_detector(one, folder=folder).digest
            files, document = every[one](size, digest, jobs=jobs, folder=folder, step=step)
        document |= {"detector": digest, "size": size.name}
        files["evaluation.json"] = json.dumps(document, indent=2, sort_keys=True) + "\n"
        (out / one).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (out / one / file).write_text(text, encoding="utf-8")
        if as_json:
            print_json(document)
        else:
            console().print(f"Written: {out / one}", markup=False, soft_wrap=True)


class Measure(Protocol):
    """What measures one detector."""

    def __call__(
        self, size: Size, digest: str, *, jobs: int, folder: Path | None, step: Step
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Return files by name, and the figures for a machine."""


def _global_model(
    size: Size, digest: str, *, jobs: int, folder: Path | None, step: Step
) -> tuple[dict[str, str], dict[str, Any]]:
    from sentinel.stress.bench import card, charts, figures
    from sentinel.stress.bench.evaluate import evaluate

    seen = evaluate(size, SEED, step=step, jobs=jobs, folder=folder)
    files = {
        "evaluation.md": card.card(seen, size, digest),
        "curves.svg": charts.curves_svg(seen),
        "suspicion.svg": charts.spread_svg(seen),
    }
    return files, figures.document(seen)


def _updates(
    size: Size, digest: str, *, jobs: int, folder: Path | None, step: Step
) -> tuple[dict[str, str], dict[str, Any]]:
    from sentinel.stress.bench import update_card, update_figures
    from sentinel.stress.bench.evaluate import evaluate_updates

    rows = evaluate_updates(size, SEED, step=step, jobs=jobs, folder=folder)
    files = {
        "evaluation.md": update_card.update_card(rows, size, digest),
        "leakage.svg": update_card.scatter_svg(rows),
    }
    return files, update_figures.document(rows)
