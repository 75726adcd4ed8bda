"""Private training beside Opacus's, unit record, flat clipping, each in a fresh process.

`python tests/benchmarks/dpsgd.py` prints seconds per step and peak extra memory, and the ratios; it
judges nothing. Opacus runs as its documentation shows it: Poisson sampling, noise from torch's
generator, no ledger. Ours runs as it ships: noise from the system's entropy on a grid, chain and
budget checked at every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH = 64
POLICY = """
schema = 1
name = "bench"
[privacy]
unit = "record"
patients = {records}
batch = {batch}
epsilon = 1000.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = 1.0
[[rule]]
id = "all"
"""
Loss = "Callable[[Tensor, Tensor], Tensor]"


class Block(nn.Module):
    """A small transformer: one block over 64 tokens of width 64, out of Linear and LayerNorm."""

    def __init__(self, words: int = 256, width: int = 64, heads: int = 4) -> None:
        """Make the layers."""
        super().__init__()
        self.words, self.heads = nn.Embedding(words, width), heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.before, self.after = (
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, tokens) to (rows, 2)."""
        x = self.words(tokens)
        normal = self.before(x)
        query, key, value = (
            layer(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.after(x))))
        return self.head(x.mean(1))


def mlp() -> tuple[nn.Module, TensorDataset]:
    """Heart disease: 13 figures of a patient, 32 hidden, as in the demo."""
    from sentinel.demo import cohorts

    rows = [cohorts.load(site) for site in cohorts.SITES]
    data = torch.cat([part.rows for part in rows]), torch.cat([part.labels for part in rows]).long()
    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 2)), TensorDataset(*data)


def wide_mlp() -> tuple[nn.Module, TensorDataset]:
    """The same patients, 512 and 512 hidden."""
    _, data = mlp()
    layers = nn.Linear(13, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2)
    return nn.Sequential(*layers), data


def cnn() -> tuple[nn.Module, TensorDataset]:
    """Chest X-rays, 28 x 28: three convolutions with GroupNorm."""
    from sentinel.demo import xray_data

    data = xray_data.load()
    parts = (data.hospital, data.decoys, data.public)
    layers: list[nn.Module] = []
    for inside, outside in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(inside, outside, 3, stride=2, padding=1),
            nn.GroupNorm(4, outside),
            nn.ReLU(),
        ]
    layers += [nn.Flatten(), nn.Linear(64 * 16, 2)]
    images = torch.cat([part.images for part in parts])
    return nn.Sequential(*layers), TensorDataset(images, torch.cat([p.labels for p in parts]))


def transformer() -> tuple[nn.Module, TensorDataset]:
    """Tokens drawn by chance: only the time matters."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (512, 64), generator=generator)
    return Block(), TensorDataset(tokens, tokens[:, 0] % 2)


TASKS: dict[str, Callable[[], tuple[nn.Module, TensorDataset]]] = {
    "mlp": mlp,
    "wide-mlp": wide_mlp,
    "cnn": cnn,
    "transformer": transformer,
}


def plain(model: nn.Module, data: TensorDataset) -> Iterator[tuple[Any, Any, Any]]:
    """No privacy: the floor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    yield model, optimizer, DataLoader(data, batch_size=BATCH, shuffle=True)


def opacus(model: nn.Module, data: TensorDataset) -> Iterator[tuple[Any, Any, Any]]:
    """Opacus as its documentation shows it."""
    from opacus import PrivacyEngine

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(data, batch_size=BATCH)
    yield PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def ours(model: nn.Module, data: TensorDataset) -> Iterator[tuple[Any, Any, Any]]:
    """Inside a round of a guard."""
    from sentinel import Guard

    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(POLICY.format(records=len(data), batch=BATCH))
        policy.chmod(0o600)
        guard = Guard(policy, Path(folder) / "state", unsafe_skip_inspection=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        private = guard.private(model, optimizer, DataLoader(data, batch_size=BATCH))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with guard.round(1, state, model):
            yield private


CONTESTANTS = {"plain": plain, "opacus": opacus, "sentinel": ours}


def kib(field: str) -> int:
    """One line of this process's memory figures."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, task: str, seconds: float) -> dict[str, float]:
    """Time one contestant in this process: median seconds a step, peak extra MiB."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, data = TASKS[task]()
    for trained, optimizer, loader in CONTESTANTS[name](model, data):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
        before = kib("VmRSS")
        times: list[float] = []
        begin, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            last = time.perf_counter()
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(trained(x), y).backward()
                optimizer.step()
                now = time.perf_counter()
                times.append(now - last)
                last = now
        peak = kib("VmHWM") - before
        cpu = (time.process_time() - used) / len(times)
        seconds = statistics.median(times)
        return {"seconds": seconds, "cpu": cpu, "mib": peak / 1024, "steps": len(times)}
    raise AssertionError(name)


def main() -> None:
    """Every task, every contestant, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.seconds)))
        return
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {BATCH} records expected")
    for task in arguments.tasks:
        found = {}
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--one", name, task]
            command += ["--seconds", str(arguments.seconds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this very file
            found[name] = json.loads(done.stdout.splitlines()[-1])
        parameters = sum(p.numel() for p in TASKS[task]()[0].parameters())
        print(f"\n{task}, {parameters:,} parameters")
        for name, row in found.items():
            print(
                f"  {name:10} {1e3 * row['seconds']:8.2f} ms a step, {1e3 * row['cpu']:8.2f} ms of "
                f"a core, peak extra {row['mib']:7.1f} MiB   ({row['steps']} steps)"
            )
        own, other = found["sentinel"], found["opacus"]
        for what in ("seconds", "cpu", "mib"):
            ratio = own[what] / max(other[what], 1e-9)
            print(f"  sentinel / opacus, {what:8} {ratio:6.2f}   aim: at most 1")


if __name__ == "__main__":
    main()
