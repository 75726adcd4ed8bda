"""What a federation of four sites learns under the defences that reports credit."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import private_utility
import torch
from defences import (
    EPSILON,
    STEPS,
    TOP,
    TREATMENTS,
    guard_of,
    largest,
    mask,
    memory,
    treatments,
)
from private_utility import Knobs
from torch import Tensor, nn
from trade_off import line, scored, told

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.stress.inference.loop import Loop
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.records import Records
from sentinel.stress.servers.federation import FedAvgServer
from sentinel.terms import Unit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from sentinel import Guard
    from sentinel.policy import LoadedPolicy

ROUNDS = 20


@dataclass(frozen=True)
class Task:
    """A federation of four sites.

    Attributes:
        sites: training records by site.
        tests: records outside training; scores are the mean over them.
        loop: local training of the network.
        start: of the network.
        margins: of the network's answers, positive for class 1.
        features: what the head under a promise takes.
        knobs: of the private training.
    """

    sites: dict[str, Records]
    tests: tuple[Records, ...]
    loop: Loop
    start: State
    margins: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    knobs: Knobs

    def score(self, answers: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """AUC and accuracy of margins."""
        with torch.no_grad():
            found = [scored(answers(test.inputs), test.labels) for test in self.tests]
        return fmean(area for area, _ in found), fmean(right for _, right in found)


def hearts(seed: int) -> Task:
    """Four hospitals."""
    generator, sites, tests = torch.Generator().manual_seed(seed), {}, []
    for name in cohorts.SITES:
        train, held = cohorts.split(cohorts.load(name), 0.7, generator)
        sites[name] = Records(train.rows, train.labels)
        tests.append(Records(held.rows, held.labels))
    model = network(len(cohorts.FEATURES), 256, generator)
    return Task(
        sites,
        tuple(tests),
        Loop(model, binary_loss, 0.05, epochs=2, batch=32),
        copied(model.state_dict()),
        lambda answers: answers[:, 0],
        private_utility.heart_features,
        Knobs(STEPS["rows"], 1, 0.3, 1.0),
    )


def xrays(file: Path | None) -> Callable[[int], Task]:
    """Four sites by chance."""
    every = private_utility.pictures(file)
    images, labels = (torch.cat(parts) for parts in zip(*every, strict=True))

    def draw(seed: int) -> Task:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        count = round(0.74 * len(labels))
        data, model = Records(images, labels.long()), xray_net()
        initialise(model, generator)
        sites = {
            f"site-{place}": data.take(part) for place, part in enumerate(order[:count].chunk(4))
        }
        return Task(
            sites,
            (data.take(order[count:]),),
            Loop(model, nn.CrossEntropyLoss(), 0.1, epochs=2, batch=32),
            copied(model.state_dict()),
            lambda answers: answers[:, 1] - answers[:, 0],
            private_utility.xray_features,
            Knobs(STEPS["pictures"], 4, 0.1, 30.0),
        )

    return draw


class Door(Protocol):
    """The way of an update [D] to the server."""

    def leave(self, site: str, number: int, sent: State, local: State, loop: Loop) -> State:
        """The state that the server gets."""


@dataclass
class TopDoor:
    """The largest values alone; `carries` adds what was left out to the next update."""

    share: float
    carries: bool
    left: dict[str, Tensor] = field(default_factory=dict)

    def leave(self, site: str, number: int, sent: State, local: State, loop: Loop) -> State:
        """Leave the rest behind."""
        del number
        update = loop.flatten(local) - loop.flatten(sent)
        if self.carries:
            update += self.left.get(site, torch.zeros_like(update))
        kept = largest(update, self.share)
        self.left[site] = update - kept
        return loop.moved(sent, kept)


@dataclass
class MaskedDoor:
    """A guard for each site that thins out at random."""

    policy: LoadedPolicy
    home: Path
    guards: dict[str, Guard] = field(default_factory=dict)

    def leave(self, site: str, number: int, sent: State, local: State, loop: Loop) -> State:
        """Release."""
        if site not in self.guards:
            self.guards[site] = guard_of(self.policy, self.home / site)
        rnd = self.guards[site].round(number, sent, loop.model, patients=1)
        with rnd:
            loop.model.load_state_dict(local)
        return rnd.release()


def federated(task: Task, door: Door | None, seed: int) -> tuple[float, float]:
    """AUC and accuracy of the network."""
    server = FedAvgServer(task.start)
    weights = {name: float(len(records)) for name, records in task.sites.items()}
    order = torch.Generator().manual_seed(seed)
    for number in range(ROUNDS):
        states = {}
        for name, records in task.sites.items():
            sent = server.global_state(number)
            local = task.loop.train(sent, records, order)
            states[name] = (
                local if door is None else door.leave(name, number, sent, local, task.loop)
            )
        server.aggregate(number, states, weights)
    model = copy.deepcopy(task.loop.model)
    model.load_state_dict(server.global_state(ROUNDS))
    return task.score(lambda inputs: task.margins(model(inputs)))


def promised(task: Task, home: Path) -> tuple[float, float]:
    """AUC and accuracy of the linear heads under a promise."""
    doors = {
        name: private_utility.Door(
            home / name,
            private_utility.Site(
                task.features(own.inputs), own.labels.float(), torch.arange(len(own))
            ),
            Unit.RECORD,
            EPSILON,
            task.knobs,
        )
        for name, own in task.sites.items()
    }
    server = FedAvgServer(copied(next(iter(doors.values())).model.state_dict()))
    weights = {name: float(len(records)) for name, records in task.sites.items()}
    rounds, kept = task.knobs.steps // task.knobs.steps_per_round, []
    for number in range(rounds):
        states = {n: door.round(number, server.global_state(number)) for n, door in doors.items()}
        server.aggregate(number, states, weights)
        if number >= rounds * (1 - task.knobs.averaged):
            kept.append(server.global_state(number))
    final = private_utility.head(len(kept[0]["weight"][0]))
    final.load_state_dict({name: torch.stack([s[name] for s in kept]).mean(0) for name in kept[0]})
    return task.score(lambda inputs: final(task.features(inputs))[:, 0])


def trained(task: Task, treatment: str, seed: int) -> tuple[float, float]:
    """AUC and accuracy of a federation under one treatment."""
    with tempfile.TemporaryDirectory(dir=memory()) as home:
        if treatment.startswith("epsilon"):
            return promised(task, Path(home))
        if treatment.startswith("keep"):
            door: Door = MaskedDoor(mask(float(treatment.split()[1])), Path(home))
            return federated(task, door, seed)
        if treatment.startswith("top"):
            return federated(task, TopDoor(TOP, treatment.endswith("carried over")), seed)
        return federated(task, None, seed)


def utility(asked: argparse.Namespace) -> dict[str, object]:
    """The table of utility."""
    seeds = 2 if asked.quick else asked.seeds
    print(f"\nFour sites, {seeds} seeds.\n")
    print(line("data", "treatment", "AUC", "points lost", "accuracy", "points lost", "kept, %"))
    print("|---|---|---|---|---|---|---|", flush=True)
    made: dict[str, object] = {}
    every = [*TREATMENTS[:4], f"{TREATMENTS[3]}, rest carried over", TREATMENTS[4]]
    tasks = {"hearts": hearts, "X-rays": xrays(asked.xrays)}
    for name, draw in list(tasks.items())[: 1 if asked.quick else 2]:
        raw = None
        for treatment in treatments(quick=True) if asked.quick else every:
            found = [trained(draw(seed), treatment, seed) for seed in range(seeds)]
            got = torch.tensor(found, dtype=torch.float64)
            raw = got if raw is None else raw
            made[f"{name}, {treatment}"] = found
            print(utility_row(name, treatment, got, raw), flush=True)
    return made


def utility_row(name: str, treatment: str, got: Tensor, raw: Tensor) -> str:
    """One line: means, points lost with intervals, and the shares kept of AUC and accuracy."""
    means = got.mean(0)
    lost = ["-", "-"] if got is raw else [told(100 * (raw - got)[:, i], 1) for i in range(2)]
    kept = ", ".join(f"{100 * float(share):.0f}" for share in means / raw.mean(0))
    area, right = (f"{float(mean):.3f}" for mean in means)
    return line(name, treatment, area, lost[0], right, lost[1], kept)
