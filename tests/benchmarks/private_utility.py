"""What private training is worth: AUC at epsilon 1.5, 3 and 8, per record and per patient.

    python tests/benchmarks/private_utility.py [--xrays FILE] [--quick] [--json]

The claim to beat: epsilon <= 1.5 keeps at least 90 % of the baseline's AUC. Everything private runs
through `guard.private`, round after round, and its epsilon is read from the ledger.

- hearts, pooled: Fed-Heart-Disease, the patients of all four hospitals behind one guard.
- hearts, four hospitals: each hospital has a guard and a ledger of its own, and the server averages
  their releases, weighted by public size. Each patient is in one ledger.
- X-rays: chest X-rays behind one guard. FILE is MedMNIST's pneumoniamnist.npz, or any file with its
  arrays; without it the 542 pictures of the demo are used, which are too few for a fair picture.

Heart disease has one record per patient, so there a patient is a record. No patient has several
X-rays either: patients of 1 to 8 pictures are made up by chance, and the rows say "synthetic".

All models are a linear head on features that public constants alone define. The baseline is the
better of two models without clipping and noise: that same head, and a network (perceptron, CNN).
Test patients are fixed and were never used to choose a figure of `Knobs`; those were chosen on
other patients of the same data, which is not charged: a hospital that does so on patients behind
its promise has to charge it. Five runs differ in noise (baselines: in start and order).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know
from torch.utils.data import DataLoader, TensorDataset

from sentinel import Guard
from sentinel.crew import one_thread
from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import auc, network
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.house import promise_of
from sentinel.mechanism import slack
from sentinel.privacy import DpSgdEvent, Promise
from sentinel.privacy.forecast import noise_multiplier_for
from sentinel.state import StateFolder
from sentinel.stress.layers import State, copied
from sentinel.stress.servers.federation import FedAvgServer
from sentinel.terms import Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sentinel.privacy import Spent

EPSILONS = (1.5, 3.0, 8.0)
DELTA = 1e-5
SPLIT = 2026  # which patients are for testing
MOST = 8  # pictures of a synthetic patient
POLICY = """
schema = 1
name = "utility"
[privacy]
unit = "{unit}"
patients = {units}
batch = {units}
epsilon = {epsilon}
delta = {delta}
clip_norm = {clip_norm}
noise_multiplier = {noise}
[[rule]]
id = "all"
[limits]
keep_releases = 1
"""


@dataclass(frozen=True)
class Knobs:
    """Figures of the training; all public.

    Attributes:
        steps: noisy steps in all, each on everybody (q = 1: with few patients the noise of a step
            weighs more than what sampling saves).
        steps_per_round: after which a model is released.
        clip_norm: L2 bound on a unit's gradient.
        rate: learning rate x clip norm.
        averaged: the share of the released models, the last ones, whose mean is the result.
    """

    steps: int
    steps_per_round: int
    clip_norm: float
    rate: float
    averaged: float = 0.5


@dataclass(frozen=True)
class Site:
    """One hospital's training records: features, labels, and whose each record is."""

    x: Tensor
    y: Tensor
    patients: Tensor


@dataclass(frozen=True)
class Task:
    """A data set, its baselines, and how it is trained privately."""

    name: str
    sites: tuple[Site, ...]
    test: tuple[Tensor, Tensor]
    knobs: dict[Unit, Knobs]
    plain: Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A line of the table; AUCs are means over the seeds, with the standard deviation."""

    task: str
    unit: str
    adjacency: str
    epsilon: float
    spent: float
    delta: float
    accountant: str
    noise_multiplier: tuple[float, ...]
    auc: float
    spread: float
    baseline: float
    kept: float
    kept_above_chance: float


# The data.


def heart_sites() -> tuple[list[cohorts.Cohort], cohorts.Cohort]:
    """Training patients by hospital, and the test patients of all: 70 and 30 %."""
    generator = torch.Generator().manual_seed(SPLIT)
    parts = [cohorts.split(cohorts.load(site), 0.7, generator) for site in cohorts.SITES]
    held = [held for _, held in parts]
    test = cohorts.Cohort(torch.cat([c.rows for c in held]), torch.cat([c.labels for c in held]))
    return [train for train, _ in parts], test


def heart_features(rows: Tensor) -> Tensor:
    """The 13 prepared columns, and for each whether it is missing (or the middle): [n, 26]."""
    return torch.cat([rows, (rows == 0).float()], 1)


def hearts(*, pooled: bool) -> Task:
    """Fed-Heart-Disease."""
    parts, test = heart_sites()
    if pooled:
        parts = [
            cohorts.Cohort(
                torch.cat([c.rows for c in parts]),
                torch.cat([c.labels for c in parts]),
            )
        ]
    sites = tuple(Site(heart_features(c.rows), c.labels, torch.arange(len(c))) for c in parts)
    knobs = Knobs(100, 2, 0.3, 1.0) if pooled else Knobs(40, 1, 0.3, 1.0)
    x, y = heart_features(test.rows), test.labels

    def plain(seed: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "same head": auc(fitted(sites, Knobs(100, 1, 1.0, 1.0, 0.0))(x)[:, 0], y),
            "perceptron": auc(fit_network(network(26, 32, generator), sites, 20, seed)(x)[:, 0], y),
        }

    name = "hearts, pooled" if pooled else "hearts, four hospitals"
    return Task(name, sites, (x, y), dict.fromkeys((Unit.RECORD, Unit.PATIENT), knobs), plain)


def xray_features(images: Tensor) -> Tensor:
    """Half the resolution, less middle grey, each picture of norm 1, [n, 196]."""
    small = F.avg_pool2d(images - 0.5, 2).flatten(1)
    return small / small.norm(dim=1, keepdim=True).clamp(min=1e-6)


def pictures(file: Path | None) -> list[tuple[Tensor, Tensor]]:
    """Training and test pictures with their labels; the file's validation pictures are not used."""
    if file is None:
        data = xray_data.load()
        tests = (data.hospital, data.decoys)
        train = data.public.images, data.public.labels
        return [train, (torch.cat([t.images for t in tests]), torch.cat([t.labels for t in tests]))]
    if not file.is_file():
        raise SystemExit(
            f"{file} is no file; fetch pneumoniamnist.npz of MedMNIST, or leave it out"
        )
    with np.load(file, allow_pickle=False) as arrays:
        return [
            (
                torch.from_numpy(arrays[f"{part}_images"]).float().div(255).unsqueeze(1),
                torch.from_numpy(arrays[f"{part}_labels"])[:, 0],
            )
            for part in ("train", "test")
        ]


def xrays(file: Path | None) -> Task:
    """Chest X-rays: pneumonia or not."""
    (images, labels), (test_images, test_labels) = pictures(file)
    generator = torch.Generator().manual_seed(SPLIT)
    sizes = torch.randint(1, MOST + 1, (len(images),), generator=generator)
    ids = torch.arange(len(images)).repeat_interleave(sizes)[: len(images)]
    ids = ids[torch.randperm(len(images), generator=generator)]
    sites = (Site(xray_features(images), labels.float(), ids),)
    raw = (Site(images, labels.float(), ids),)
    x, y = xray_features(test_images), test_labels

    def plain(seed: int) -> dict[str, float]:
        cnn = nn.Sequential(xray_net(), Margin())
        initialise(cnn, torch.Generator().manual_seed(seed))
        scores = fit_network(cnn, raw, 15, seed)(test_images)[:, 0]
        return {
            "same head": auc(fitted(sites, Knobs(400, 1, 1.0, 30.0, 0.0))(x)[:, 0], y),
            "CNN": auc(scores, y),
        }

    knobs = {Unit.RECORD: Knobs(100, 4, 0.1, 30.0), Unit.PATIENT: Knobs(100, 4, 0.3, 10.0)}
    return Task(f"X-rays ({len(images):,} for training)", sites, (x, y), knobs, plain)


class Margin(nn.Module):
    """Two classes' outputs to one score."""

    def forward(self, outputs: Tensor) -> Tensor:
        """[n, 2] to [n, 1]."""
        return outputs[:, 1:] - outputs[:, :1]


# Without privacy.


def fitted(sites: tuple[Site, ...], knobs: Knobs) -> nn.Module:
    """The same head, all sites pooled, full batches, no clipping and no noise."""
    x, y = (torch.cat([getattr(site, part) for site in sites]) for part in ("x", "y"))
    model = head(x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=knobs.rate)
    for _ in range(knobs.steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        optimizer.step()
    return model.requires_grad_(requires_grad=False)


def fit_network(model: nn.Module, sites: tuple[Site, ...], epochs: int, seed: int) -> nn.Module:
    """A network under Adam, all sites pooled, batches of 64."""
    x, y = (torch.cat([getattr(site, part) for site in sites]) for part in ("x", "y"))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
    return model.requires_grad_(requires_grad=False)


def head(width: int) -> nn.Linear:
    """A linear head that starts at zero."""
    model = nn.Linear(width, 1, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


# With privacy.


class Door:
    """One hospital: its guard, its own model, its private loop."""

    def __init__(self, home: Path, site: Site, unit: Unit, epsilon: float, knobs: Knobs) -> None:
        """Find the noise multiplier that the budget asks for, and make the loop private."""
        self.units = len(site.x) if unit is Unit.RECORD else int(site.patients.unique().numel())
        self.knobs = knobs
        self.model = head(site.x.shape[1])
        self.noise_multiplier = noise(unit, epsilon, knobs.steps, site.x.shape[1] + 1)
        home.mkdir()
        policy = home / "policy.toml"
        policy.write_text(
            POLICY.format(
                unit=unit,
                units=self.units,
                epsilon=epsilon,
                delta=DELTA,
                clip_norm=knobs.clip_norm,
                noise=self.noise_multiplier,
            )
        )
        policy.chmod(0o600)
        self.state_dir = home / "state"
        self.guard = Guard(
            policy, self.state_dir, unsafe_skip_inspection=True, alerts=io.StringIO()
        )
        optimizer = torch.optim.SGD(self.model.parameters(), lr=knobs.rate / knobs.clip_norm)
        _, self.optimizer, self.loader = self.guard.private(
            self.model,
            optimizer,
            DataLoader(TensorDataset(site.x, site.y)),
            patients=site.patients.tolist() if unit is Unit.PATIENT else None,
        )

    def round(self, number: int, state: State) -> State:
        """Some steps from the global model, released."""
        with self.guard.round(number, state, self.model, patients=self.units) as rnd:
            for _ in range(self.knobs.steps_per_round):
                for x, y in self.loader:
                    self.optimizer.zero_grad()
                    F.binary_cross_entropy_with_logits(self.model(x)[:, 0], y).backward()
                    self.optimizer.step()
        return rnd.release()

    def spent(self) -> Spent:
        """What the ledger says."""
        policy = self.guard.policy.policy
        promise = promise_of(policy)
        assert promise is not None
        return StateFolder(self.state_dir).ledger.spent(policy.dataset, promise, tight=True)


def noise(unit: Unit, epsilon: float, steps: int, coordinates: int) -> float:
    """The noise multiplier with which the budget pays for all steps, by the project's forecast."""
    far = slack(coordinates)
    event = DpSgdEvent(
        unit=unit,
        adjacency=Adjacency.ADD_OR_REMOVE,
        noise_multiplier=1.0,
        sampling="none",
        sampling_rate=1.0,
        steps=steps,
        log_ratio=steps * far.log_ratio,
        mass=steps * far.mass,
    )
    found = noise_multiplier_for({}, event, Promise(unit, event.adjacency, epsilon, DELTA), 1)
    assert found is not None
    return found


def federate(task: Task, unit: Unit, epsilon: float, home: Path) -> tuple[float, list[Door]]:
    """Train privately from zero; the area on the test patients, and the doors."""
    knobs = task.knobs[unit]
    doors = [Door(home / str(n), s, unit, epsilon, knobs) for n, s in enumerate(task.sites)]
    server = FedAvgServer(copied(doors[0].model.state_dict()))
    rounds = knobs.steps // knobs.steps_per_round
    kept: list[State] = []
    for number in range(rounds):
        states = {
            str(n): door.round(number, server.global_state(number)) for n, door in enumerate(doors)
        }
        server.aggregate(
            number, states, {str(n): float(door.units) for n, door in enumerate(doors)}
        )
        if number >= rounds * (1 - knobs.averaged):
            kept.append(server.global_state(number))
    final = head(task.test[0].shape[1])
    final.load_state_dict({n: torch.stack([s[n] for s in kept]).mean(0) for n in kept[0]})
    with torch.no_grad():
        return auc(final(task.test[0])[:, 0], task.test[1]), doors


def measure(task: Task, unit: Unit, epsilon: float, seeds: int, baseline: float) -> Row:
    """One line of the table."""
    areas: list[float] = []
    spent: list[Spent] = []
    multipliers: tuple[float, ...] = ()
    for _ in range(seeds):
        with tempfile.TemporaryDirectory(dir=memory()) as home:
            area, doors = federate(task, unit, epsilon, Path(home))
            areas.append(area)
            spent += [door.spent() for door in doors]
            multipliers = tuple(sorted({door.noise_multiplier for door in doors}))
    most = max(spent, key=lambda one: one.epsilon)
    mean = fmean(areas)
    return Row(
        task=task.name,
        unit=str(unit),
        adjacency=str(most.adjacency),
        epsilon=epsilon,
        spent=most.epsilon,
        delta=most.delta,
        accountant=most.accountant,
        noise_multiplier=multipliers,
        auc=mean,
        spread=stdev(areas) if len(areas) > 1 else 0.0,
        baseline=baseline,
        kept=mean / baseline,
        kept_above_chance=(mean - 0.5) / (baseline - 0.5),
    )


def memory() -> str | None:
    """A folder that is kept in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder in it


# The table.


def baselines(task: Task, seeds: int, *, quiet: bool) -> float:
    """The best model without privacy: its mean area."""
    runs = [task.plain(seed) for seed in range(seeds)]
    means = {name: fmean(run[name] for run in runs) for name in runs[0]}
    if not quiet:
        print(f"\n{task.name}: {sum(len(s.x) for s in task.sites)} records for training, ", end="")
        print(f"{len(task.test[1])} for testing; without privacy: ", end="")
        print(", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return max(means.values())


def table(tasks: list[Task], seeds: int, *, quiet: bool) -> Iterator[Row]:
    """Every task, unit and epsilon."""
    for task in tasks:
        baseline = baselines(task, seeds, quiet=quiet)
        one_each = all(len(s.patients.unique()) == len(s.patients) for s in task.sites)
        for unit in (Unit.RECORD,) if one_each else (Unit.RECORD, Unit.PATIENT):
            for epsilon in EPSILONS:
                row = measure(task, unit, epsilon, seeds, baseline)
                told = "record = patient" if one_each else str(unit)
                told = "patient (synthetic)" if unit is Unit.PATIENT else told
                yield replace(row, unit=told)


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"  {row.unit:20} epsilon {row.spent:5.2f}   z {max(row.noise_multiplier):6.2f}   "
        f"AUC {row.auc:.3f} +- {row.spread:.3f}   kept {100 * row.kept:5.1f} %   "
        f"above chance {100 * row.kept_above_chance:5.1f} %"
    )


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xrays", type=Path, help="pneumoniamnist.npz of MedMNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    seeds = 1 if asked.quick else asked.seeds
    begin = time.perf_counter()
    rows = []
    with one_thread():
        tasks = [hearts(pooled=True), hearts(pooled=False), xrays(asked.xrays)]
        for row in table(tasks, seeds, quiet=asked.json):
            rows.append(row)
            if not asked.json:
                print(line(row), flush=True)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    accountants = ", ".join(sorted({row.accountant for row in rows}))
    print(f"\nadd-or-remove, delta {DELTA:g}, {accountants}; {seeds} runs each, +- one standard ")
    print(f"deviation over the runs' noise; {time.perf_counter() - begin:.0f} s")
    if asked.xrays is None:
        print("X-rays: the demo's 542 pictures only; name the whole file with --xrays.")


if __name__ == "__main__":
    main()
