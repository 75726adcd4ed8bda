"""Exchanges: the server sends a global model, the site trains, and the update goes to the guard.

Whatever is attacked here as released went through `Guard.round` and `Round.release`, with ledger,
log and store in a scratch folder: the site's own ledger is never touched.
"""

from __future__ import annotations

import copy
import io
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch._dynamo  # torch loads it with the first optimizer: seconds that are no part of a test

from sentinel.errors import RoundRefused, Withheld
from sentinel.guard import Guard
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.setting import LOPSIDED, Setting, Stage
from sentinel.stress.layers import State, copied
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sentinel.policy import LoadedPolicy
    from sentinel.policy.schema import Privacy
    from sentinel.release import Decided
    from sentinel.stress.lab.servers import Server
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

LATER_EPOCHS = 5  # of plain training before the stage "later"
FEDERATION = "stress"
REPLAY = 6.0  # trainings that two replays take, with the derivative of each


@dataclass(frozen=True, slots=True)
class Update:
    """What a site's training came to in one round, before anybody treated it.

    Attributes:
        setting: under which conditions.
        sent: the global state that the server sent.
        local: the state after training on it.
        behind: the records that were trained on.
        batches: indices into `behind`, in the order of the steps.
        secret: mixtures of neurons that the server reads by, [mixtures, neurons]; mostly none.
        seconds: that the training took.
    """

    setting: Setting
    sent: State
    local: State
    behind: Records
    batches: tuple[Tensor, ...]
    secret: Tensor | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What the server got, and what its attacker knows of the treatment.

    Attributes:
        delta: name -> change; None where nothing left.
        reason: code of what was withheld or refused.
        refused: whether the round was refused before training.
        std: standard deviation of the noise on each coordinate.
        scale: factor of the clip.
        keep: share of coordinates kept.
        rules: ids of the policy's rules that applied.
        sensitivity: score of the update, 0 to 1; None where it was not measured.
        decided: the whole plan, for attackers who take each tensor's own; None of a raw update.
    """

    delta: State | None = None
    reason: str | None = None
    refused: bool = False
    std: float = 0.0
    scale: float = 1.0
    keep: float = 1.0
    rules: tuple[str, ...] = ()
    sensitivity: float | None = None
    decided: Decided | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that an attacker has: what it sent, what came back, and what it knows besides.

    Attributes:
        subject: model, public records and kind. An attack must not read its private records.
        model: a copy of the architecture, free to be used.
        setting: the condition.
        sent: the global state it sent.
        sent_back: what it got.
        training: the site's training as it can be replayed, labels and batches included.
        secret: mixtures of neurons that it laid in what it sent, [mixtures, neurons]; mostly none.
        seconds: that the site's training took here; a replay takes no less.
    """

    subject: Subject
    model: nn.Module
    setting: Setting
    sent: State
    sent_back: Sent
    training: LocalTraining
    secret: Tensor | None = None
    seconds: float = 0.0

    @property
    def delta(self) -> State:
        """Name -> change of every entry."""
        assert self.sent_back.delta is not None  # noqa: S101 - a case is made of what left
        return self.sent_back.delta

    @property
    def received(self) -> State:
        """Sent + change."""
        return {name: value + self.delta[name] for name, value in self.sent.items()}

    def require_replay(self, deadline: Deadline) -> None:
        """See that there is time for what an attacker replays only to see how long it takes.

        Raises:
            OutOfTimeError: there is not.
        """
        deadline.require(REPLAY * self.seconds)

    @property
    def seen(self) -> Seen:
        """The update as one vector, with the figures of its treatment."""
        back = self.sent_back
        return Seen(self.training.flatten(self.delta), back.scale, back.std, back.keep)


class Site:
    """Trains as the subject's site does, and can be asked for any number of updates."""

    def __init__(
        self, subject: Subject, generator: torch.Generator, deadline: Deadline | None = None
    ) -> None:
        """Work on a copy of the model.

        Args:
            subject: whose site.
            generator: of records, orders of batches, and the crafting of malicious servers.
            deadline: a training that would not end before it is not gone on with.
        """
        self.subject, self._generator = subject, generator
        self.model = copy.deepcopy(subject.model)
        self._stages: dict[Stage, State] = {}
        self._deadline = deadline or Deadline.never()
        self._quickest = math.inf  # seconds of a step

    def stage(self, stage: Stage) -> State:
        """The honest global state at this stage."""
        if stage not in self._stages:
            state = self.subject.start
            if stage is Stage.LATER:
                known = self.subject.public or self.subject.train
                state = self.trained(state, known, self.order(len(known), LATER_EPOCHS))
            self._stages[stage] = state
        return copied(self._stages[stage])

    def update(self, setting: Setting, server: Server) -> Update:
        """One update under this condition, of records drawn anew.

        Raises:
            OutOfTimeError: the training would not end in time.
        """
        honest = self.stage(setting.stage)
        crafted = server.craft(self.subject, honest, setting.records, self._generator)
        behind = self.subject.train.take(self._drawn(setting))
        batches = self.order(len(behind), setting.epochs)
        begun = time.monotonic()
        local = self.trained(crafted.state, behind, batches)
        seconds = time.monotonic() - begun
        return Update(setting, crafted.state, local, behind, batches, crafted.secret, seconds)

    def _drawn(self, setting: Setting) -> Tensor:
        """Indices of the records behind an update."""
        train = self.subject.train
        order = torch.randperm(len(train), generator=self._generator)
        if not setting.lopsided:
            return order[: setting.records]
        assert train.flags is not None  # noqa: S101 - such a setting is made where there are flags
        most = round(LOPSIDED * setting.records)
        having = torch.rand((), generator=self._generator) < 1 / 2
        flags = train.flags[order] == having
        return torch.cat([order[flags][:most], order[~flags][: setting.records - most]])

    def trained(self, state: State, records: Records, batches: tuple[Tensor, ...]) -> State:
        """The loop that a site has: plain SGD, one step for each batch.

        Raises:
            OutOfTimeError: it would not end in time.
        """
        model = self.model
        model.load_state_dict(state)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.subject.rate)
        for at, batch in enumerate(batches):
            self.require(len(batches) - at)
            begun = time.monotonic()
            optimizer.zero_grad()
            loss = self.subject.loss(model(records.inputs[batch]), records.labels[batch])
            torch.autograd.backward([loss])
            optimizer.step()
            self._quickest = min(self._quickest, time.monotonic() - begun)
        optimizer.zero_grad()
        return copied(model.state_dict())

    def require(self, steps: int) -> None:
        """See that there is time for so many steps, each as quick as the quickest so far.

        Raises:
            OutOfTimeError: there is not.
        """
        known = math.isfinite(self._quickest)
        self._deadline.require(steps * self._quickest if known else 0.0)

    def case(self, update: Update, back: Sent) -> Case:
        """What the attacker has of this update."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(update.sent)
        training = LocalTraining(
            model,
            update.sent,
            update.behind.labels,
            update.batches,
            self.subject.rate,
            loss=self.subject.loss,
        )
        return Case(
            self.subject,
            model,
            update.setting,
            update.sent,
            back,
            training,
            update.secret,
            update.seconds,
        )

    def order(self, count: int, epochs: int) -> tuple[Tensor, ...]:
        """Indices of the records of each step; one step on all of them for no epochs."""
        if epochs == 0:
            return (torch.arange(count),)
        orders = [torch.randperm(count, generator=self._generator) for _ in range(epochs)]
        steps = range(0, count, self.subject.batch)
        return tuple(order[at : at + self.subject.batch] for order in orders for at in steps)


def raw(update: Update) -> Sent:
    """What a server gets of a site without a guard."""
    return Sent(changed(update.sent, update.local))


def changed(sent: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> State:
    """Local - sent, for every entry."""
    return {name: local[name] - value for name, value in sent.items()}


class GuardedDoor:
    """The guard between the site and the server, its state in a scratch folder.

    `alone` asks what would have left had the guard been fooled: the inspection is off, so that no
    rule on suspicion or ill health holds, and as many patients are named as the policy wants. Every
    other rule holds, also those with `when` on the update's score.
    """

    def __init__(self, loaded: LoadedPolicy, home: Path, *, alone: bool = False) -> None:
        """Nothing is opened before the first update.

        Args:
            loaded: the policy.
            home: the scratch folder; every key has a folder of its own in it.
            alone: as above.
        """
        # The test makes more rounds than a day has; the limit would end it, and protects nothing.
        limits = loaded.policy.limits.model_copy(update={"rounds_per_day": None})
        self._loaded = replace(loaded, policy=loaded.policy.model_copy(update={"limits": limits}))
        self._home, self._alone = home, alone
        self._guards: dict[str, Guard] = {}
        self._number = 0

    def send(self, update: Update, model: nn.Module, patients: int) -> Sent:
        """Take one update through a round of its own.

        Args:
            update: what was trained.
            model: of that architecture; loaded with the update's states.
            patients: how many are behind it.
        """
        self._number += 1
        least = self._loaded.policy.limits.min_patients or 0
        named = max(patients, least) if self._alone else patients
        guard = self._guard(update.setting)
        rnd = guard.round(self._number, update.sent, model, patients=named)
        try:
            with rnd:
                model.load_state_dict(update.local)
            delta = rnd.release(kind="delta")
        except RoundRefused as error:
            return Sent(reason=error.reason.value, refused=True)
        except Withheld as error:
            return Sent(reason=error.reason.value)
        assert rnd.decided is not None  # noqa: S101 - the number is new, so nothing is replayed
        return _told(delta, rnd.decided, self._loaded.policy.privacy, norm_of(update))

    def _guard(self, setting: Setting) -> Guard:
        """One guard for each condition; under a promise one for each update, so that it is paid."""
        once = self._loaded.policy.privacy is not None
        key = f"{self._number}" if once else f"{setting.server} {setting.stage}"
        if key not in self._guards:
            self._guards[key] = Guard(
                self._loaded,
                self._home / f"{len(self._guards)}",
                federation=FEDERATION,
                run="test",
                unsafe_skip_inspection=self._alone,
                alerts=io.StringIO(),  # what was withheld is in the report
            )
        return self._guards[key]


def norm_of(update: Update) -> float:
    """L2 norm of what training changed, over floating entries."""
    squares = [
        (update.local[name].double() - value.double()).square().sum()
        for name, value in update.sent.items()
        if value.is_floating_point()
    ]
    return float(torch.stack(squares).sum().sqrt())


def _told(delta: State, decided: Decided, privacy: Privacy | None, norm: float) -> Sent:
    """Tell the attacker everything about the treatment, the factor of the clip included.

    Parameters that are treated differently are told as one: the least noise, the least share kept.
    """
    recipes = decided.done.recipes
    used = [recipe for name, recipe in recipes.items() if delta[name].numel()]
    std = min((recipe.std for recipe in used), default=0.0)
    scale = min((recipe.factor for recipe in used), default=1.0)
    if privacy is not None and privacy.unit is Unit.SITE:  # its clip and noise came before
        std = math.hypot(std, privacy.noise_multiplier * privacy.clip_norm * scale)
        scale *= min(1.0, privacy.clip_norm / max(norm, 1e-12))
    return Sent(
        delta=delta,
        std=std,
        scale=scale,
        keep=min((recipe.keep for recipe in used), default=1.0),
        rules=decided.plan.decided_by,
        sensitivity=decided.evidence.sensitivity,
        decided=decided,
    )
