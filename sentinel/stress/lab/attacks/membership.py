"""Membership: was this record behind the update?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.membership import Attacker, Suspects, membership
from sentinel.stress.inference.observed import raw, sanitized
from sentinel.stress.lab.finding import Finding, Tally

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.inference.observed import Observed
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

FEWEST = 8  # members under which a share says nothing
MARGIN = 0.05  # difference of the shares that counts as nothing
OTHERS = "others called members"
_MIXING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ATTACKER = Attacker(points=3, shadows=8)
# The measures, the one that the verdict rests on first.
_WORDS = {
    "joint": "members called members (all candidates at once)",
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
    seconds = 0.5
    wanted = 256

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It needs enough members, others, records of its own, and gradients of one record."""
        if setting.records < FEWEST:
            return f"it takes at least {FEWEST} records behind an update"
        if any(isinstance(part, _MIXING) for part in subject.model.modules()):
            return "the model mixes the records of a batch (BatchNorm)"
        spare = len(subject.held_out) - setting.records
        own = spare if subject.public is None else len(subject.public)
        if spare < 0 or own < setting.records:
            return "too few held-out or public records to stand beside the members"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Score members and others, and see how many of each are in the upper half."""
        del deadline  # one update takes about a second
        members = len(behind)
        others, own = _others(case.subject, members, generator)
        data = behind.plus(others)
        epochs = case.setting.epochs
        loop = Loop(
            case.model,
            case.subject.loss,
            case.subject.rate,
            epochs=max(1, epochs),
            batch=case.subject.batch if epochs else None,
        )
        scores = membership(
            loop,
            [_observed(case, loop)],
            case.received,
            Suspects(data, members, own),
            attacker=ATTACKER,
            generator=generator,
        )
        return Finding(tuple(_told(words, scores[name], members) for name, words in _WORDS.items()))


def _others(subject: Subject, count: int, generator: torch.Generator) -> tuple[Records, Records]:
    """Held-out records to stand beside the members, and records of the server's own."""
    held_out = subject.held_out
    order = torch.randperm(len(held_out), generator=generator)
    own = subject.public or held_out.take(order[count:])
    chosen = held_out.take(order[:count])
    return chosen, own


def _observed(case: Case, loop: Loop) -> Observed:
    if case.sent_back.decided is None:
        return raw(loop, case.sent, case.received)
    return sanitized(loop, case.sent, case.delta, case.sent_back.decided)


def _told(measure: str, scores: Tensor, members: int) -> Tally:
    """Who is in the upper half; chance puts as many others there as members."""
    upper = torch.zeros(len(scores))
    upper[scores.argsort(descending=True)[:members]] = 1.0
    values, chances = upper[:members].tolist(), upper[members:].tolist()
    return Tally(measure, tuple(values), tuple(chances), margin=MARGIN, beside=OTHERS)
