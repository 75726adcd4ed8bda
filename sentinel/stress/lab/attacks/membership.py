"""Membership: was this record behind the update?

Beside the figure stands a control: the same attack on raw updates with planted records in them,
unlike any patient. An attacker who does not tell those from planted ones that stayed out could not
see anybody.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.membership import Attacker, Suspects, membership
from sentinel.stress.inference.observed import raw, sanitized
from sentinel.stress.inference.planted import outlying
from sentinel.stress.lab.finding import Finding, Tally
from sentinel.stress.lab.setting import HONEST

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.inference.observed import Observed
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

FEWEST = 8  # members under which a share says nothing
MARGIN = 0.05  # difference of the shares that counts as nothing
OTHERS = "others called members"
TOGETHER = (
    "torch gives no gradients of single records for this model, as of one with dropout in training "
    "mode or with a recurrent layer (LSTM, GRU)"
)
_MIXING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ATTACKER = Attacker(points=3, shadows=8)
PLANTED = 4  # one in so many candidates is planted in the control
CONTROL = "control: planted records called members, without guard"
# Trainings of one attack; gradients of single records come on top.
TRAININGS = ATTACKER.shadows + ATTACKER.replays + 1
_MAIN = "joint"
# The measures, the one that the verdict rests on first.
_WORDS = {
    _MAIN: "members called members (all candidates at once)",
    "shadow": "members called members (shadow trainings)",
    "drop": "members called members (fall of the loss)",
}


class Membership:
    """Members and as many others; the half that looks most like members is called so."""

    name = "membership"
    title = "who took part: records behind the update, told from others of the same site"
    knows = (
        "a list of candidates of whom half took part, the training plan, the guard's treatment, "
        "and records of its own"
    )
    worth = 0.8
    seconds = 0.6
    wanted = 256
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It needs enough members, others, records of its own, and gradients of one record."""
        if setting.records < FEWEST:
            return f"it takes at least {FEWEST} records behind an update"
        if mixes(subject.model):
            return "the model mixes the records of a batch (BatchNorm)"
        if not taken_apart(subject):
            return TOGETHER
        spare = len(subject.held_out) - setting.records
        own = spare if subject.public is None else len(subject.public)
        if spare < 0 or own < setting.records:
            return "too few held-out or public records to stand beside the members"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Score members and others, and see how many of each are in the upper half."""
        raw_and_honest = case.sent_back.decided is None and case.setting.server == HONEST
        deadline.require(TRAININGS * (1 + raw_and_honest) * case.seconds)
        loop, members = loop_of(case, deadline), len(behind)
        others, own = _others(case.subject, members, generator)
        suspects = Suspects(behind.plus(others), members, own)
        seen = observed(case, loop)
        upper = _called(loop, seen, case.received, suspects, generator)
        tallies = tuple(
            _tally(measure, upper[name][:members], upper[name][members:])
            for name, measure in _WORDS.items()
        )
        control = _control(loop, case, suspects, generator) if raw_and_honest else None
        return Finding(tallies, control=control)


def mixes(model: nn.Module) -> bool:
    """Whether a layer mixes the records of a batch, so that none of them has a gradient."""
    return any(isinstance(part, _MIXING) for part in model.modules())


@functools.lru_cache(maxsize=1)
def taken_apart(subject: Subject) -> bool:
    """Whether torch gives the loss and the gradient of one record at a time, tried on two."""
    loop, two = Loop(subject.model, subject.loss, subject.rate), subject.train.take(torch.arange(2))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            loop.losses(subject.start, two)
            loop.gradients(subject.start, two)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def loop_of(case: Case, deadline: Deadline) -> Loop:
    """The site's training as its server prescribed it; the order of batches is not in it.

    Where the time is up it ends with OutOfTimeError: half a replay says nothing.
    """
    epochs = case.setting.epochs
    return Loop(
        case.model,
        case.subject.loss,
        case.subject.rate,
        epochs=max(1, epochs),
        batch=case.subject.batch if epochs else None,
        before=deadline.require,
    )


def observed(case: Case, loop: Loop) -> Observed:
    """The update with all figures of its treatment but a bound on single values.

    Values under such a bound are as they were; what it cut off others is one more error of the
    replay.
    """
    decided = case.sent_back.decided
    if decided is None:
        return raw(loop, case.sent, case.received)
    recipes = {
        name: replace(recipe, max_abs=math.inf) for name, recipe in decided.done.recipes.items()
    }
    unbounded = replace(decided, done=replace(decided.done, recipes=recipes))
    return sanitized(loop, case.sent, case.delta, unbounded)


def _control(loop: Loop, case: Case, suspects: Suspects, generator: torch.Generator) -> Tally:
    """Plant records among members and others alike, train anew, and see which are called in."""
    members = suspects.cohort
    count = max(1, members // PLANTED)
    planted = outlying(suspects.data, 2 * count, generator)
    kept = torch.arange(members - count)
    inside = suspects.data.take(kept).plus(planted.take(torch.arange(count)))
    outside = suspects.data.take(members + kept).plus(planted.take(count + torch.arange(count)))
    local = loop.train(case.sent, inside, generator)
    mixed = Suspects(inside.plus(outside), members, suspects.own)
    upper = _called(loop, raw(loop, case.sent, local), local, mixed, generator)[_MAIN]
    return _tally(CONTROL, upper[members - count : members], upper[-count:])


def _others(subject: Subject, count: int, generator: torch.Generator) -> tuple[Records, Records]:
    """Held-out records to stand beside the members, and records of the server's own."""
    held_out = subject.held_out
    order = torch.randperm(len(held_out), generator=generator)
    own = subject.public or held_out.take(order[count:])
    chosen = held_out.take(order[:count])
    return chosen, own


def _called(
    loop: Loop, seen: Observed, final: State, suspects: Suspects, generator: torch.Generator
) -> dict[str, Tensor]:
    """Who is in the upper half by each attack, [candidates] of 0 or 1.

    Candidates with equal scores are taken in an order that is drawn, or who comes first would be
    told for nothing.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the faster attentions take no records one by one
        scores = membership(loop, [seen], final, suspects, attacker=ATTACKER, generator=generator)
    shuffled = torch.randperm(len(suspects.data), generator=generator)
    found = {}
    for name in _WORDS:
        ranked = scores[name][shuffled].argsort(descending=True, stable=True)
        found[name] = torch.zeros(len(shuffled))
        found[name][shuffled[ranked[: suspects.cohort]]] = 1.0
    return found


def _tally(measure: str, members: Tensor, others: Tensor) -> Tally:
    """Shares of both that are called members; chance calls as many of the one as of the other."""
    values, chances = tuple(members.tolist()), tuple(others.tolist())
    return Tally(measure, values, chances, margin=MARGIN, beside=OTHERS)
