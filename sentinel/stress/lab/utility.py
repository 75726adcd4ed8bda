"""Utility: what a model learns from the updates that a policy lets out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from sentinel.stress.auc import auc
from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.exchange import GuardedDoor, Sent, Site, Update, raw
from sentinel.stress.lab.setting import Setting

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

SITES = 4  # equal parts of the site's records, each playing a hospital
ROUNDS = 6
EPOCHS = 2  # of local training in a round


@dataclass(frozen=True, slots=True)
class Utility:
    """What was learned.

    Attributes:
        metric: "AUC" or "accuracy", on held-out records.
        values: one for each repeat.
    """

    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the repeats."""
        return fmean(self.values)


def learned(  # noqa: PLR0913, PLR0917 - each is one part of a federation
    subject: Subject,
    loaded: LoadedPolicy | None,
    home: Path,
    seed: int,
    repeats: int,
    soft: Deadline,
    hard: Deadline,
) -> Utility | None:
    """Train a federation of parts of this site's records, with the guard at every door.

    Args:
        subject: the model and the records.
        loaded: the policy of every part; None for no guard.
        home: scratch folder of the guards.
        seed: of the parts and the orders of batches, which are the same with and without a guard;
            never of the guard's noise.
        repeats: federations, at least one.
        soft: after which no repeat but the first is begun.
        hard: a repeat that would not be through before it is left out.

    Returns:
        The utility; None where not even one repeat was through.
    """
    values = []
    for repeat in range(repeats):
        if repeat and soft.passed:
            break
        folder = home / f"repeat-{repeat}"
        try:
            values.append(_federation(subject, loaded, folder, seed + repeat, hard))
        except OutOfTimeError:
            break
    return Utility(_metric(subject), tuple(values)) if values else None


def _federation(
    subject: Subject, loaded: LoadedPolicy | None, home: Path, seed: int, deadline: Deadline
) -> float:
    """Train one; it is given up as soon as it is seen that it would not end in time."""
    generator = torch.Generator().manual_seed(seed)
    site = Site(subject, generator, deadline)
    parts = _parts(subject.train, generator)
    # One guard for all parts: it then looks at each global model once.
    door = None if loaded is None else GuardedDoor(loaded, home, alone=True)
    state = subject.start
    ahead = ROUNDS * sum(_steps(part, subject.batch) for part in parts)
    for _ in range(ROUNDS):
        deltas = []
        for part in parts:
            site.require(ahead)
            ahead -= _steps(part, subject.batch)
            back = _one(site, state, part, door)
            if back.delta is not None:
                deltas.append(back.delta)
        state = _averaged(state, deltas)
    site.model.load_state_dict(state)
    return measured(site.model, subject)


def _steps(part: Records, batch: int) -> int:
    """Of one part's training in a round."""
    return EPOCHS * math.ceil(len(part) / batch)


def _one(site: Site, state: State, part: Records, door: GuardedDoor | None) -> Sent:
    batches = site.order(len(part), EPOCHS)
    setting = Setting(records=len(part), epochs=EPOCHS)
    update = Update(setting, state, site.trained(state, part, batches), part, batches)
    return raw(update) if door is None else door.send(update, site.model, len(part))


def measured(model: torch.nn.Module, subject: Subject) -> float:
    """AUC or accuracy of a model on the held-out records."""
    model.eval()
    held_out = subject.held_out
    with torch.no_grad():
        answers = model(held_out.inputs)
    model.train()
    if _metric(subject) == "AUC":
        return auc(_scores(answers), held_out.labels)
    return float((answers.argmax(1) == held_out.labels).double().mean())


def _metric(subject: Subject) -> str:
    both = {0, 1} <= set(subject.held_out.labels.long().tolist())
    return "AUC" if subject.classes == 2 and both else "accuracy"  # noqa: PLR2004 - two classes


def _scores(answers: Tensor) -> Tensor:
    """One number for each record, larger for the second class."""
    flat = answers.flatten(1) if answers.ndim > 1 else answers[:, None]
    return flat[:, 0] if flat.shape[1] == 1 else flat[:, 1] - flat[:, 0]


def _parts(records: Records, generator: torch.Generator) -> list[Records]:
    order = torch.randperm(len(records), generator=generator)
    return [records.take(part) for part in order.tensor_split(SITES)]


def _averaged(state: State, deltas: list[State]) -> State:
    if not deltas:
        return state
    return {
        name: value + torch.stack([delta[name] for delta in deltas]).mean(0)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
