"""The whole protocol, in its full and its quick form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.stress.bench.cost import LARGE, SMALL, costs
from sentinel.stress.bench.crafted import FAMILIES, LEARNED
from sentinel.stress.bench.figures import Seen
from sentinel.stress.bench.honest import KINDS, Kind
from sentinel.stress.bench.left_out import left_out
from sentinel.stress.bench.nets import NETS, Net, net
from sentinel.stress.bench.seen import Known, crafted_rows, honest_rows, siege_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sentinel.detection import Detector
    from sentinel.stress.bench.cost import Cost
    from sentinel.stress.bench.left_out import LeftOut

    Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


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


def evaluate(
    size: Size, seed: int, progress: Progress, *, detector: Detector | None = None
) -> Seen:
    """Run the protocol for the detector of global models.

    Args:
        size: `FULL` or `QUICK`.
        seed: of everything that is drawn.
        progress: makes a bar with a title, which is told (done, total).
        detector: the learned part; the shipped one where left out.
    """
    with progress("honest runs") as step:
        honest = honest_rows(size.kinds, size.share, seed, step=step, detector=detector)
    crafted = []
    known = Known(detector)
    for place, family in enumerate(FAMILIES):
        quota = size.learned if family == LEARNED else size.quota
        with progress(f"family {family}") as step:
            crafted += crafted_rows(
                family, quota, seed + 100 * place, nets=size.nets, known=known, step=step
            )
    with progress("servers that turn") as step:
        sieges = siege_rows(size.besieged, size.rounds, seed, step=step, detector=detector)
    with progress("time and memory") as step:
        spent: list[Cost] = costs(size.costly, size.repeats, seed, step=step)
    refitted: list[LeftOut] = []
    if size.refits is not None:
        with progress("leave one architecture out") as step:
            refitted = left_out(*size.refits, step=step)
    return Seen(honest, crafted, sieges, spent, refitted)
