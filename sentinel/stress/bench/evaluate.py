"""The whole protocol, in its full and its quick form."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from sentinel.detection import load_detector
from sentinel.detection.bundle import GLOBAL_MODEL
from sentinel.stress import servers
from sentinel.stress.bench.cost import LARGE, SMALL, costs
from sentinel.stress.bench.crafted import FAMILIES, LEARNED, crafted_models
from sentinel.stress.bench.figures import Seen
from sentinel.stress.bench.honest import KINDS, Kind
from sentinel.stress.bench.left_out import left_out
from sentinel.stress.bench.nets import NETS, Net, net
from sentinel.stress.bench.seen import Known, crafted_rows, honest_rows, siege_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


def perform(size: Size, task: Task, seed: int, folder: Path | None) -> list[Any]:
    """Do one task, on one thread, so that the same seed gives the same rows.

    Args:
        size: of the protocol.
        task: one of `tasks`.
        seed: of everything that is drawn.
        folder: of the bundles; the shipped ones where left out.

    Returns:
        Rows of the task's kind. Refits that need an extra which is not installed give none.
    """
    torch.set_num_threads(1)
    if task.what == "honest":
        chosen = size.kinds[task.part :: CHUNKS]
        return honest_rows(chosen, size.share, seed + task.part, _detector(folder))
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
    for task, found in _performed(size, every, seed, jobs, folder):
        rows[task] = found
        step(len(rows), len(every) + 1)
    spent = costs(size.costly, size.repeats, seed, _detector(folder))
    step(len(every) + 1, len(every) + 1)

    def joined(what: str) -> list[Any]:
        return [row for task in every if task.what == what for row in rows[task]]

    honest = _renumbered([rows[task] for task in every if task.what == "honest"])
    return Seen(honest, joined("crafted"), joined("sieges"), spent, joined("left out"))


def _performed(
    size: Size, every: list[Task], seed: int, jobs: int, folder: Path | None
) -> Iterator[tuple[Task, list[Any]]]:
    threads = torch.get_num_threads()
    try:
        if jobs == 1:
            for task in every:
                yield task, perform(size, task, seed, folder)
            return
    finally:
        torch.set_num_threads(threads)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_remote, size.name, task, seed, folder): task for task in every}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _remote(name: str, task: Task, seed: int, folder: Path | None) -> list[Any]:
    return perform(SIZES[name], task, seed, folder)


def _renumbered(chunks: list[list[HonestRow]]) -> list[HonestRow]:
    """Give every run of all chunks a number of its own."""
    found: list[HonestRow] = []
    for chunk in chunks:
        first = 1 + max((row.run for row in found), default=-1)
        found += [replace(row, run=first + row.run) for row in chunk]
    return found


@functools.cache
def _detector(folder: Path | None) -> Detector:
    return load_detector(GLOBAL_MODEL, folder=folder)


@functools.cache
def _known(folder: Path | None) -> Known:
    return Known(_detector(folder))
