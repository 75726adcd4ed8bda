"""A hospital of the demo, in two forms: bare, and with the guard at its door.

Both train with the same ordinary loop. The only difference is who hands the update over.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from sentinel.errors import RoundRefused, Withheld
from sentinel.guard import Guard
from sentinel.stress.layers import State, copied

if TYPE_CHECKING:
    from pathlib import Path

    from sentinel.demo.cohorts import Cohort
    from sentinel.round import Round

FEDERATION = "heart-demo"


@dataclass(frozen=True, slots=True)
class Loop:
    """How a hospital trains between two updates.

    Attributes:
        epochs: passes over its patients.
        batch: patients per step.
        rate: learning rate of plain SGD.
    """

    epochs: int = 2
    batch: int = 32
    rate: float = 0.05


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital's patients and how it trains."""

    name: str
    train: Cohort
    held_out: Cohort
    loop: Loop

    def fit(self, model: nn.Module, shuffle: torch.Generator) -> None:
        """Train `model` in place: the loop that a hospital already has."""
        optimizer = torch.optim.SGD(model.parameters(), lr=self.loop.rate)
        loss = nn.BCEWithLogitsLoss()
        for _ in range(self.loop.epochs):
            order = torch.randperm(len(self.train), generator=shuffle)
            for first in range(0, len(order), self.loop.batch):
                batch = self.train.take(order[first : first + self.loop.batch])
                optimizer.zero_grad()
                loss(model(batch.rows)[:, 0], batch.labels).backward()
                optimizer.step()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one round at one hospital.

    Attributes:
        state: what was handed to the server; None where nothing was.
        action: "released", "refused" (before training) or "withheld" (after it).
        reason: code of a refusal or of what was withheld.
        verdict: of the inspection; None without one.
        suspicion: about the global model, 0 to 1; None without an inspection.
        sensitivity: sensitivity score of the update; None where it was not measured.
        norm: L2 norm of the local update before anything was done to it; None before training.
        clipped: whether a norm bound was reached; None where nothing was decided.
        rules: ids of the policy's rules that applied.
    """

    state: State | None
    action: str
    reason: str | None = None
    verdict: str | None = None
    suspicion: float | None = None
    sensitivity: float | None = None
    norm: float | None = None
    clipped: bool | None = None
    rules: tuple[str, ...] = ()


class Door(Protocol):
    """The way from a hospital to the server."""

    def take_part(
        self, site: Site, number: int, sent: State, model: nn.Module, shuffle: torch.Generator
    ) -> Outcome:
        """Train on `sent` in round `number` and hand the update over, or not."""


class BareDoor:
    """No guard: whatever was trained leaves as it is."""

    def take_part(
        self, site: Site, number: int, sent: State, model: nn.Module, shuffle: torch.Generator
    ) -> Outcome:
        """Train and hand over the local state."""
        del number
        model.load_state_dict(sent)
        site.fit(model, shuffle)
        local = copied(model.state_dict())
        return Outcome(local, "released", norm=update_norm(sent, local))


class GuardedDoor:
    """The guard at the door: three lines around the same loop."""

    def __init__(self, policy: str, state_dir: Path, run: str, *, inspects: bool = True) -> None:
        """Open the guard.

        Args:
            policy: name or path of the policy.
            state_dir: this hospital's own state.
            run: names the job.
            inspects: switched off only to measure what sanitizing does alone.
        """
        self._alerts = io.StringIO()  # for the report instead of the screen
        self.guard = Guard(
            policy,
            state_dir,
            federation=FEDERATION,
            run=run,
            unsafe_skip_inspection=not inspects,
            alerts=self._alerts,
        )

    def told(self) -> list[str]:
        """Every alert so far, line by line."""
        return self._alerts.getvalue().splitlines()

    def take_part(
        self, site: Site, number: int, sent: State, model: nn.Module, shuffle: torch.Generator
    ) -> Outcome:
        """Inspect, train, and hand over what the policy lets leave."""
        rnd = self.guard.round(number, sent, model, patients=len(site.train))
        norm = None
        try:
            with rnd:
                site.fit(model, shuffle)
                norm = update_norm(sent, model.state_dict())
            outcome = Outcome(rnd.release(), "released", norm=norm)
        except RoundRefused as error:
            outcome = Outcome(None, "refused", error.reason.value)
        except Withheld as error:
            outcome = Outcome(None, "withheld", error.reason.value, norm=norm)
        return _annotated(outcome, rnd)


def _annotated(outcome: Outcome, rnd: Round) -> Outcome:
    """Add what the round found and decided."""
    if (found := rnd.inspection) is not None:
        outcome = replace(outcome, verdict=found.verdict.value, suspicion=found.suspicion)
    if (decided := rnd.decided) is not None:
        outcome = replace(
            outcome,
            sensitivity=decided.evidence.sensitivity,
            clipped=decided.clipped,
            rules=decided.plan.decided_by,
        )
    return outcome


def update_norm(sent: State, local: State) -> float:
    """Return the L2 norm of what training changed, over all floating entries."""
    squares = [
        (local[name].double() - value.double()).square().sum()
        for name, value in sent.items()
        if value.is_floating_point()
    ]
    return float(torch.stack(squares).sum().sqrt())
