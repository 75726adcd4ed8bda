"""Defences that published reports credit, on one update: masks, largest values, private steps."""

from __future__ import annotations

import copy
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import private_utility
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sentinel import Guard
from sentinel.policy.store import parse_policy
from sentinel.stress.layers import copied
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.released import let_out
from sentinel.terms import Unit

if TYPE_CHECKING:
    from sentinel.policy import LoadedPolicy

EPSILON = 1.5
STEPS = {"pictures": 100, "rows": 40}  # private steps of the federation that pays EPSILON
CLIP_NORM = 1.0
TOP = 0.1
ROUNDS = 20
OPEN = 'schema = 1\nname = "mask"\n[limits]\nkeep_releases = 1\n[[rule]]\nid = "all"\nkeep = {}\n'


def mask(keep: float) -> LoadedPolicy:
    """A policy that thins out, and nothing else."""
    return parse_policy(OPEN.format(keep).encode(), "mask")


def largest(values: Tensor, share: float) -> Tensor:
    """Values [D] with all but the largest share, by size, set to 0."""
    kept = values.abs().topk(max(1, round(share * len(values)))).indices
    return torch.zeros_like(values).index_copy(0, kept, values[kept])


# One update under each treatment.


@dataclass(frozen=True)
class Case:
    """A site's training of one step, the records behind it, and the private steps to pay for."""

    training: LocalTraining
    inputs: Tensor
    steps: int

    def seen(self, treatment: str) -> Seen:
        """What the server gets, with all figures of the treatment."""
        raw = self.training.update(self.inputs, differentiable=False)
        if treatment == "raw":
            return Seen(raw)
        if treatment == f"top {TOP:g}":  # scale and keep such that what stays is not rescaled
            return Seen(largest(raw, TOP), scale=TOP, keep=TOP)
        with tempfile.TemporaryDirectory(dir=memory()) as home:
            if treatment.startswith("keep"):
                guard = guard_of(mask(float(treatment.split()[1])), Path(home))
                return let_out(guard, 1, self.training, self.inputs, len(self.inputs))
            return self._private(Path(home))

    def _private(self, home: Path) -> Seen:
        """One private step with everybody in it, at the noise that the budget asks of each."""
        training, count = self.training, len(self.inputs)
        state = copied(training.model.state_dict())
        width = sum(value.numel() for value in state.values())
        noise = private_utility.noise(Unit.RECORD, EPSILON, self.steps, width)
        policy = private_utility.POLICY.format(
            unit=Unit.RECORD,
            units=count,
            epsilon=EPSILON,
            delta=private_utility.DELTA,
            clip_norm=CLIP_NORM,
            noise=noise,
        )
        guard = guard_of(parse_policy(policy.encode(), "promise"), home)
        model = copy.deepcopy(training.model)  # what is private stays so
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        data = DataLoader(TensorDataset(self.inputs, training.labels))
        _, _, loader = guard.private(model, optimizer, data)
        with guard.round(1, state, model, patients=count) as rnd:
            for x, y in loader:
                optimizer.zero_grad()
                training.loss(model(x), y).backward()
                optimizer.step()
        values = training.flatten(rnd.release(kind="delta"))
        return Seen(values, self._clip(), noise * CLIP_NORM * training.learning_rate / count)

    def _clip(self) -> float:
        """The mean factor of the clip over the records."""
        rate, factors = self.training.learning_rate, []
        for x, y in zip(self.inputs, self.training.labels, strict=True):
            one = LocalTraining(
                self.training.model,
                self.training.global_state,
                y[None],
                (torch.arange(1),),
                rate,
                loss=self.training.loss,
            )
            norm = float(one.update(x[None], differentiable=False).norm()) / rate
            factors.append(min(1.0, CLIP_NORM / norm))
        return fmean(factors)


def guard_of(policy: LoadedPolicy, home: Path) -> Guard:
    """A guard with a state of its own; nothing in these policies acts on an inspection."""
    return Guard(policy, home, unsafe_skip_inspection=True, alerts=io.StringIO())


TREATMENTS = ("raw", "keep 0.5", "keep 0.1", f"top {TOP:g}", f"epsilon {EPSILON:g}")


def treatments(*, quick: bool) -> tuple[str, ...]:
    """All of them, or two."""
    return ("raw", "keep 0.1") if quick else TREATMENTS


def memory() -> str | None:
    """A folder that is kept in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder in it
