"""What an inspection costs: time and memory by the size of the model."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sentinel.detection import inspect_global_model
from sentinel.stress.bench.nets import Net, net
from sentinel.stress.nets import VisionTransformer, mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sentinel.detection import Detector

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one model.

    Attributes:
        net: which.
        parameters: how many.
        alone: seconds from the state alone, median and 95th percentile.
        probed: the same with the architecture at hand.
        repeats: how often each was timed.
        extra: MiB that an inspection with probes needs at its peak beyond what was held before;
            None where the system does not tell.
    """

    net: str
    parameters: int
    alone: tuple[float, float]
    probed: tuple[float, float]
    repeats: int
    extra: float | None


SMALL: tuple[Net, ...] = (net("mlp-20-96-3"), net("lenet5-120-84"), net("resnet18-gn-8"))
LARGE: tuple[Net, ...] = (
    net("resnet18-64"),
    Net("mlp-1000-4096-4096-10", lambda: mlp(1000, 4096, 4096, 10), (1000,), 10),
    Net(
        "vit-768-12",
        lambda: VisionTransformer(10, width=768, hidden=3072, depth=12),
        (1, 28, 28),
        10,
    ),
)


def costs(
    nets: Sequence[Net], repeats: int, seed: int, detector: Detector | None = None
) -> list[Cost]:
    """Time inspections of each architecture, on as many threads as torch has now.

    Args:
        nets: architectures.
        repeats: of each timing; the first call of each is not counted.
        seed: of the first values.
        detector: the learned part; the shipped one where left out.
    """
    found = []
    for one in nets:
        module = one.fresh(torch.Generator().manual_seed(seed))
        state = {name: value.detach() for name, value in module.state_dict().items()}
        count = sum(value.numel() for value in module.parameters())
        bare = functools.partial(inspect_global_model, state, detector=detector)
        whole = functools.partial(inspect_global_model, state, None, module, detector=detector)
        alone, extra = _timed(bare, repeats), _peak(whole)
        probed = _timed(whole, repeats)
        found.append(Cost(one.name, count, alone, probed, repeats, extra))
    return found


def _timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    table = torch.tensor(seconds, dtype=torch.float64)
    return float(table.quantile(0.5)), float(table.quantile(0.95))


def _peak(work: Callable[[], object]) -> float | None:
    """Return how many MiB the process held more at its peak than before; Linux alone tells."""
    try:
        RESET.write_text("5", encoding="ascii")  # the high-water mark begins again
        before = _field("VmRSS")
        work()
        return max(0.0, _field("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _field(name: str) -> float:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / MIB
