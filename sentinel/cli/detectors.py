"""`sentinel detectors`: what is shipped, and how it is trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sentinel.cli import detectors_calibrate
from sentinel.cli.console import (
    REFUSED,
    AsJson,
    SentinelGroup,
    console,
    print_json,
    progress,
    say_error,
)
from sentinel.cli.detectors_evaluate import evaluate_command
from sentinel.errors import MisuseError, Withheld

app = typer.Typer(
    cls=SentinelGroup,
    no_args_is_help=True,
    help="List the shipped detectors, train or evaluate them.",
)

Folder = Annotated[
    Path | None, typer.Option("--folder", help="Folder of bundles; the shipped ones if left out.")
]
app.command("evaluate")(evaluate_command)


detectors_calibrate.register(app)


@app.command("list")
def list_command(folder: Folder = None, as_json: AsJson = False) -> None:
    """Load every detector as a guard would, and say what it is; exit code 1 where one is unfit."""
    from sentinel.detection.bundle import EXPECTED

    rows = [_row(name, folder) for name in EXPECTED]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            what = row.get("problem") or (
                f"{row['detector']}, features version {row['feature_version']}, "
                f"manifest {row['digest'][:16]}"
            )
            console().print(f"{row['name']}: {what}", markup=False, soft_wrap=True)
    if any("problem" in row for row in rows):
        raise typer.Exit(REFUSED)


def _row(name: str, folder: Path | None) -> dict[str, Any]:
    from sentinel.detection import load_detector

    try:
        found = load_detector(name, folder=folder)
    except Withheld as error:
        return {"name": name, "problem": str(error)}
    return {
        "name": name,
        "detector": found.manifest.detector,
        "feature_version": found.manifest.feature_version,
        "digest": found.digest,
        "libraries": found.manifest.libraries,
    }


@app.command("train")
def train_command(
    name: Annotated[
        str | None, typer.Argument(help="update-sensitivity or global-model; both if left out.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder that the bundles are written to.")
    ] = Path("detectors"),
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A recipe.toml; the shipped one if left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small corpus: to see that it works, not for use.")
    ] = False,
) -> None:
    """Train detectors from their recipes, on a corpus that is made on the spot.

    Needs the extra `train`. The same recipe and libraries give the same bundle.
    """
    from sentinel.detection.bundle import EXPECTED

    names = list(EXPECTED) if name is None else [name]
    unknown = [one for one in names if one not in EXPECTED]
    if unknown:
        raise MisuseError(f"no detector is called {name!r}; there are {', '.join(EXPECTED)}")
    for one in names:
        with progress(f"training {one}") as step:
            step(0, 1)
            _train(one, out / one, recipe, quick=quick)
            step(1, 1)
        console().print(f"Written: {out / one}", markup=False, soft_wrap=True)


def _train(name: str, folder: Path, recipe_file: Path | None, *, quick: bool) -> None:
    import torch

    try:
        from sentinel.detection.training import (
            ModelCorpus,
            train_global_model,
            train_sensitivity,
        )
    except ImportError as error:
        say_error(
            "Training needs the extra: pip install 'gradient-sentinel[train]' "
            f"(missing: {error.name})"
        )
        raise typer.Exit(2) from None
    from sentinel.detection.bundle import GLOBAL_MODEL, RECIPE
    from sentinel.detection.training.recipe import read_recipe
    from sentinel.paths import bundled
    from sentinel.stress import corpus, sites

    recipe = read_recipe(recipe_file or bundled("detectors") / name / RECIPE)
    recipe = recipe.quick() if quick else recipe
    torch.set_num_threads(1)  # sums in another order would give another bundle
    if name == GLOBAL_MODEL:
        seed = recipe.seed
        harder = max(1, recipe.crafted // 2)
        made = ModelCorpus(
            honest=corpus.honest_runs(recipe.honest_runs, recipe.rounds, seed),
            test=corpus.honest_runs(recipe.test_runs, recipe.rounds, seed + 1000),
            crafted=corpus.crafted_models(recipe.crafted, seed + 2000),
            harder=corpus.crafted_models(harder, seed + 3000, corpus.HARDER),
        )
        train_global_model(recipe, made, folder)
    else:
        size = sites.Size(recipe.nets, recipe.kinds, recipe.stages, recipe.repeats)
        train_sensitivity(recipe, sites.sites(size, recipe.seed), folder)
