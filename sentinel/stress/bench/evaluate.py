"""Both protocols, in their full and their quick form."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sentinel.detection import load_detector
from sentinel.detection.bundle import GLOBAL_MODEL, UPDATE_SENSITIVITY
from sentinel.stress import servers
from sentinel.stress.bench.cost import LARGE, SMALL, costs
from sentinel.stress.bench.crafted import FAMILIES, LEARNED, crafted_models
from sentinel.stress.bench.figures import Seen
from sentinel.stress.bench.honest import KINDS, Kind, honest_runs
from sentinel.stress.bench.left_out import left_out
from sentinel.stress.bench.nets import GENOTYPES, NETS, TIED, Net, net
from sentinel.stress.bench.seen import Known, crafted_rows, honest_rows, siege_rows
from sentinel.stress.bench.updates import UpdateRow, update_rows
from sentinel.stress.bench.work import performed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentinel.detection import Detector
    from sentinel.stress.bench.seen import HonestRow


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        name: "full" or "quick".
        kinds: of honest runs.
        share: of the full number of runs of each kind.
        quota: crafted models that leak, for each handcrafted family.
        learned: the same for each learned recipe.
        nets: architectures that models are crafted on.
        besieged: architectures on which a server turns in the middle of a run.
        rounds: of those runs.
        costly: architectures whose inspections are timed.
        repeats: of each timing.
        updates: architectures whose updates are scored.
        stages: rounds of training before those updates.
        refits: runs, rounds, crafted models and trees of each refit without an architecture; none
            where that is left out.
    """

    name: str
    kinds: tuple[Kind, ...]
    share: float
    quota: int
    learned: int
    nets: tuple[Net, ...]
    besieged: tuple[Net, ...]
    rounds: int
    costly: tuple[Net, ...]
    repeats: int
    updates: tuple[Net, ...]
    stages: tuple[int, ...]
    refits: tuple[int, int, int, int] | None


FULL = Size(
    "full",
    KINDS,
    1.0,
    quota=400,
    learned=40,
    nets=NETS,
    besieged=(net("mlp-54-384-7"), net("lenet5-120-84"), net("vit-32")),
    rounds=100,
    costly=(*SMALL, *LARGE),
    repeats=20,
    updates=(*NETS, TIED[0], GENOTYPES),
    stages=(0, 12),
    refits=(48, 6, 24, 100),
)
QUICK = Size(
    "quick",
    tuple(kind for kind in KINDS if kind.rounds <= 12 and kind.before <= 20)[::4],  # noqa: PLR2004 - short runs
    0.05,
    quota=4,
    learned=2,
    nets=(net("mlp-20-96-3"), net("lenet5-120-84"), net("vit-32")),
    besieged=(net("mlp-20-96-3"),),
    rounds=30,
    costly=SMALL[:2],
    repeats=3,
    updates=(net("mlp-20-96-3"), GENOTYPES),
    stages=(0,),
    refits=None,
)


SIZES = {size.name: size for size in (FULL, QUICK)}
CHUNKS = 24  # into which the honest runs are divided


@dataclass(frozen=True, slots=True)
class Task:
    """A part of the protocol that one process does.

    Attributes:
        what: "honest", "crafted", "sieges" or "left out".
        part: which of the chunks, or of the architectures besieged.
        family: of crafted models.
        recipe: of a learned family; all of the others'.
    """

    what: str
    part: int = 0
    family: str = ""
    recipe: str | None = None


def tasks(size: Size) -> list[Task]:
    """Return all tasks of a size, the longest first."""
    found = [Task("crafted", family=family) for family in FAMILIES if family != LEARNED]
    learned = [recipe.name for recipe in servers.RECIPES if recipe.family == LEARNED]
    found += [Task("crafted", family=LEARNED, recipe=name) for name in learned]
    if size.refits is not None:
        found.append(Task("left out"))
    found += [Task("sieges", part) for part in range(len(size.besieged))]
    return [*found, *(Task("honest", part) for part in range(CHUNKS))]


def perform(size: Size, seed: int, folder: Path | None, task: Task) -> list[Any]:
    """Do one task.

    Args:
        size: of the protocol.
        seed: of everything that is drawn.
        folder: of the bundles; the shipped ones where left out.
        task: one of `tasks`.

    Returns:
        Rows of the task's kind. Refits that need an extra which is not installed give none.
    """
    if task.what == "honest":
        runs = honest_runs(size.share, seed, size.kinds, (task.part, CHUNKS))
        return honest_rows(runs, seed, _detector(folder))
    if task.what == "crafted":
        quota = size.learned if task.family == LEARNED else size.quota
        models = crafted_models(task.family, quota, seed, size.nets, task.recipe)
        return crafted_rows(models, seed, _known(folder))
    if task.what == "sieges":
        return siege_rows(size.besieged[task.part], size.rounds, seed, _detector(folder))
    try:
        return left_out(*(size.refits or ()))
    except ImportError:
        return []


def evaluate(
    size: Size,
    seed: int,
    *,
    step: Callable[[int, int], None],
    jobs: int = 1,
    folder: Path | None = None,
) -> Seen:
    """Run the protocol for the detector of global models.

    Args:
        size: one of `SIZES`; any other in one process only.
        seed: of everything that is drawn.
        step: told (done, total) tasks.
        jobs: processes; what is measured does not depend on how many.
        folder: of the bundles; the shipped ones where left out.
    """
    every = tasks(size)
    rows: dict[Task, list[Any]] = {}
    work = functools.partial(perform, size, seed, folder)
    if jobs > 1:
        work = functools.partial(_remote, size.name, seed, folder)
    for task, found in performed(work, every, jobs):
        rows[task] = found
        step(len(rows), len(every) + 1)
    spent = costs(size.costly, size.repeats, seed, _detector(folder))
    step(len(every) + 1, len(every) + 1)

    def joined(what: str) -> list[Any]:
        return [row for task in every if task.what == what for row in rows[task]]

    honest = _renumbered([rows[task] for task in every if task.what == "honest"])
    return Seen(honest, joined("crafted"), joined("sieges"), spent, joined("left out"))


def _remote(name: str, seed: int, folder: Path | None, task: Task) -> list[Any]:
    return perform(SIZES[name], seed, folder, task)  # the kinds of a size cannot be pickled


def _renumbered(chunks: list[list[HonestRow]]) -> list[HonestRow]:
    """Give every run of all chunks a number of its own."""
    found: list[HonestRow] = []
    for chunk in chunks:
        first = 1 + max((row.run for row in found), default=-1)
        found += [replace(row, run=first + row.run) for row in chunk]
    return found


def evaluate_updates(
    size: Size,
    seed: int,
    *,
    step: Callable[[int, int], None],
    jobs: int = 1,
    folder: Path | None = None,
) -> list[UpdateRow]:
    """Score updates of known leakage; arguments as for `evaluate`."""
    names = [one.name for one in size.updates]
    rows: dict[str, list[UpdateRow]] = {}
    work = functools.partial(_updates, seed, size.stages, folder)
    for name, found in performed(work, names, jobs):
        rows[name] = found
        step(len(rows), len(names))
    return [row for name in names for row in rows[name]]


def _updates(seed: int, stages: tuple[int, ...], folder: Path | None, name: str) -> list[UpdateRow]:
    detector = load_detector(UPDATE_SENSITIVITY, folder=folder)
    return update_rows(net(name), seed, detector, stages)


@functools.cache
def _detector(folder: Path | None) -> Detector:
    return load_detector(GLOBAL_MODEL, folder=folder)


@functools.cache
def _known(folder: Path | None) -> Known:
    return Known(_detector(folder))
