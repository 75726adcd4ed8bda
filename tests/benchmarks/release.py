"""A whole release beside Flower's and NVFLARE's own code, each in a fresh process.

`make bench` runs it. It prints seconds (median), ratios and peak extra memory; it judges nothing.
Digests and the durable copy are lines of their own: no contestant writes anything to disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MILLION = 1_000_000
DIGEST, COPY, TRAINING = "digests, global model", "copy and its digests", "training"
APART: dict[str, float] = {}  # seconds of the process so far that are in no ratio, by kind
POLICY = """
schema = 1
name = "bench"
[[rule]]
id = "baseline"
max_norm = 1.0
noise_ratio = 1.0
"""


def states(millions: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A global and a local state of square layers of a million values each."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"layer{i}.weight": torch.randn(1000, 1000, generator=generator).mul_(0.03)
        for i in range(millions)
    }
    local = {
        name: value + 1e-3 * torch.randn(value.shape, generator=generator)
        for name, value in base.items()
    }
    return base, local


def floor(millions: int) -> Iterator[Callable[[], object]]:
    """torch.randn of the size, and two copies."""
    source = torch.empty(millions * MILLION)
    yield lambda: (torch.randn(millions * MILLION), source.clone(), source.clone())


def flower(millions: int) -> Iterator[Callable[[], object]]:
    """The core of Flower's LocalDpMod: clip the update, add Gaussian noise."""
    from flwr.supercore.differential_privacy import (
        add_gaussian_noise_inplace,
        compute_clip_model_update,
    )

    base, local = states(millions)
    before = [value.numpy() for value in base.values()]
    after = [value.numpy() for value in local.values()]

    def run() -> None:
        compute_clip_model_update(after, before, 1.0)
        add_gaussian_noise_inplace(after, 1e-4)

    yield run


def nvflare(name: str, millions: int) -> Iterator[Callable[[], object]]:
    """One of NVFLARE's privacy filters on the difference."""
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
    from nvflare.app_common.filters.svt_privacy import SVTPrivacy

    logging.disable(logging.CRITICAL)
    base, local = states(millions)
    delta = {key: (local[key] - base[key]).numpy() for key in base}
    privacy = PercentilePrivacy() if name == "percentile" else SVTPrivacy()

    def run() -> None:
        data = {key: np.array(value) for key, value in delta.items()}
        privacy.process_dxo(DXO(DataKind.WEIGHT_DIFF, data), Shareable(), FLContext())

    yield run


def ours(millions: int) -> Iterator[Callable[[], object]]:
    """Read, clip, noise from system entropy, score, decide, record, release."""
    from sentinel import Guard

    base, local = states(millions)
    tell_apart()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(POLICY)
        guard = Guard(policy, Path(folder) / "state", unsafe_skip_inspection=True)
        rounds = [guard.round(number, base) for number in range(8)]
        for opened in rounds:
            opened.__enter__()
        del opened  # a round keeps what it released
        yield lambda: rounds.pop().release(local)


def guarded_round(millions: int) -> Iterator[Callable[[], object]]:
    """All that a guard adds to a round of training."""
    from torch import nn

    from sentinel import Guard

    tell_apart()

    layers = [nn.Linear(1000, 1000, bias=False) for _ in range(millions)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    rows, goal = torch.randn(64, 1000), torch.randn(64, 1000)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(POLICY)
        guard = Guard(policy, Path(folder) / "state")
        with guard.round(next(numbers), base, model):
            pass  # the reference of this architecture is made once

        def train() -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            nn.functional.mse_loss(model(rows), goal).backward()
            optimizer.step()
            optimizer.zero_grad()

        def run() -> None:
            with guard.round(next(numbers), base, model) as opened:
                timed(train, TRAINING)()
            opened.release()

        yield run


def small_release(tensors: int, side: int) -> Iterator[Callable[[], object]]:
    """A whole round of a small model: what a release costs at the least."""
    from sentinel import Guard

    tell_apart()
    base = {f"layer{i}.weight": torch.randn(side, side).mul_(0.03) for i in range(tensors)}
    local = {name: value + 1e-3 * torch.randn(value.shape) for name, value in base.items()}
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(POLICY)
        guard = Guard(policy, Path(folder) / "state")

        def run() -> None:
            with guard.round(next(numbers), base) as opened:
                pass
            opened.release(local)

        run()
        yield run


def tell_apart() -> None:
    """Time what is in no ratio: digests, and the durable copy with its own."""
    from sentinel import door, release

    door.model_digest = timed(door.model_digest, DIGEST)
    release.model_digest = timed(release.model_digest, DIGEST)
    release._kept = timed(release._kept, COPY)


def timed(function: Callable[..., object], kind: str) -> Callable[..., object]:
    """`function`, adding its seconds to those apart; what runs within another such one is its."""

    def run(*args: object, **kwargs: object) -> object:
        if timed.busy:
            return function(*args, **kwargs)
        timed.busy = True
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            APART[kind] = APART.get(kind, 0.0) + time.perf_counter() - start
            timed.busy = False

    return run


timed.busy = False


def secure_noise(millions: int) -> Iterator[Callable[[], object]]:
    """Our noise alone, added in place."""
    from sentinel.mechanism import SystemEntropy, add_noise_

    tensor = torch.zeros(millions * MILLION)
    yield lambda: add_noise_(tensor, 1.0, 2.0**-20, SystemEntropy())


def normal(millions: int) -> Iterator[Callable[[], object]]:
    """torch.Tensor.normal_."""
    tensor = torch.zeros(millions * MILLION)
    yield tensor.normal_


def inspection(millions: int) -> Iterator[Callable[[], object]]:
    """Inspection of a global model by its weights."""
    from sentinel.detection import inspect_global_model

    base, _ = states(millions)
    yield lambda: inspect_global_model(base)


CONTESTANTS: dict[str, Callable[[int], Iterator[Callable[[], object]]]] = {
    "floor": floor,
    "flower": flower,
    "nvflare-percentile": lambda size: nvflare("percentile", size),
    "nvflare-svt": lambda size: nvflare("svt", size),
    "sentinel": ours,
    "noise": secure_noise,
    "normal_": normal,
    "inspection": inspection,
    "guarded round": guarded_round,
    "10 000 in 4 tensors": lambda _: small_release(4, 50),
    "900 000 in 36 tensors": lambda _: small_release(36, 158),
    "900 000 in 364 tensors": lambda _: small_release(364, 50),
}
SMALL = tuple(name for name in CONTESTANTS if name.endswith("tensors"))
ROUND = 30.0  # seconds of training beside which a guarded round is set


def _memory(*, anew: bool = False) -> int:
    """Bytes that this process has held at most since it was last asked anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure(name: str, millions: int, runs: int) -> dict[str, float]:
    """Time one contestant in this process: median seconds, and peak extra memory over the size.

    The first run also brings in libraries, tables and threads that stay: its memory is told apart.
    """
    for run in CONTESTANTS[name](millions):
        APART.clear()
        seconds, peaks = [], []
        for _ in range(runs):
            held, memory = sum(APART.values()), _memory(anew=True)
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            seconds.append(taken - (sum(APART.values()) - held))
            peaks.append((_memory() - memory) / (millions * MILLION * 4))
        return {
            "seconds": statistics.median(seconds),
            "first": peaks[0],
            "memory": max(peaks[1:], default=peaks[0]),
            **{kind: APART.get(kind, 0.0) / runs for kind in (DIGEST, COPY)},
        }
    raise AssertionError(name)


def table(millions: int, runs: int) -> dict[str, dict[str, float]]:
    """Measure every contestant in a process of its own."""
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--one", name, "--millions", str(millions)]
        done = subprocess.run(  # noqa: S603 - this very file
            [*command, "--runs", str(runs)], check=True, capture_output=True, text=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def tell(millions: int, found: dict[str, dict[str, float]]) -> None:
    """Print seconds, memory and the ratios of the design."""
    print(f"\n{millions} M float32 parameters")
    for name, row in found.items():
        memory = f"{row['memory']:5.2f} x the update ({row['first']:.2f} in the first run)"
        print(f"  {name:20} {row['seconds']:8.3f} s   peak extra {memory}")
        for kind in (DIGEST, COPY):
            if row[kind]:
                print(f"    {kind:24} {row[kind]:8.3f} s   apart")
    seconds = {name: row["seconds"] for name, row in found.items()}
    release = seconds["sentinel"]
    for text, ratio, aim in [
        ("Flower / release", seconds["flower"] / release, "at least 3"),
        ("NVFLARE percentile / release", seconds["nvflare-percentile"] / release, "at least 6"),
        ("NVFLARE SVT / release", seconds["nvflare-svt"] / release, "at least 6"),
        ("release / floor", release / seconds["floor"], "at most 1.5"),
        ("secure noise / normal_", seconds["noise"] / seconds["normal_"], "at most 1"),
        ("peak extra memory", found["sentinel"]["memory"], "at most 1.1"),
        ("inspection, ms per 100 M", seconds["inspection"] * 1e5 / millions, "at most 100"),
    ]:
        print(f"  {text:30} {ratio:8.2f}   aim: {aim}")
    print("  digests and the durable copy are in no ratio; with them in the second figure:")
    for name, unit, text in [
        ("guarded round", 100 / ROUND, "% of 30 s    aim: at most 2 at 25 M"),
        *((name, 1e3, "ms           aim: at most 50") for name in SMALL),
    ]:
        row = found[name]
        whole = row["seconds"] + row[DIGEST] + row[COPY]
        print(f"  {name:30} {unit * row['seconds']:8.2f} {unit * whole:8.2f} {text}")


def main() -> None:
    """Run the table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=CONTESTANTS)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 25, 100])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.millions[0], arguments.runs)))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for millions in arguments.millions:
        tell(millions, table(millions, arguments.runs))


if __name__ == "__main__":
    main()
