"""Property: do most of the patients behind an update have it, or lack it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.inference.property import classify, lopsided, read, simulated
from sentinel.stress.lab.attacks.membership import loop_of, mixes, observed
from sentinel.stress.lab.finding import Finding, Tally
from sentinel.stress.lab.setting import LOPSIDED

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.inference.property import Cohorts
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

SHADOWS = 48  # groups that the attacker makes, half of them of each kind
MOST_VALUES = 1 << 27  # of all shadow updates together, in memory
FEWEST = 8  # records in a group
COIN = 0.5
# The measures, the one that the verdict rests on first.
_TOLD = "updates told to come from a group with the property, or without it"
_BEYOND = "the same beyond what counts of the labels tell"


class Property:
    """A classifier of updates that the attacker trained on groups of its own."""

    name = "property"
    title = "a property of most patients behind the update, as the loader names it (such as sex)"
    knows = (
        "records of its own with and without the property, the training plan, the guard's treatment"
    )
    worth = 0.7
    seconds = 0.4
    wanted = 16
    of_groups = True

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It needs records of its own whose property is known, and memory for their updates."""
        del setting
        if mixes(subject.model):
            return "the model mixes the records of a batch (BatchNorm)"
        own = _own(subject)
        if own is None:
            return "the loader names the property of neither public nor held-out records"
        if _size(own) < FEWEST:
            return "too few public or held-out records have the property, or too few lack it"
        parameters = sum(part.numel() for part in subject.model.parameters())
        if parameters * SHADOWS > MOST_VALUES:
            return f"the model has {parameters:,} parameters, too many for a classifier of updates"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Tell which way the group leans; the yardsticks are a coin and the labels' counts."""
        deadline.require(SHADOWS * case.seconds)
        own = _own(case.subject)
        assert own is not None  # noqa: S101 - `misfit` refuses it
        assert own.flags is not None  # noqa: S101 - as above
        assert behind.flags is not None  # noqa: S101 - a lopsided update is made of flagged records
        loop = loop_of(case, deadline)
        size = min(len(behind), _size(own))
        shadows = lopsided(
            own, own.flags, size=size, share=LOPSIDED, count=SHADOWS, generator=generator
        )
        updates = simulated(loop, case.sent, shadows, generator)
        if not bool(torch.isfinite(updates).all()):  # what was sent cannot be trained on
            told = int(torch.randint(2, (), generator=generator))
        else:
            told = int(read(updates, shadows.answers, [observed(case, loop)])[0])
        true = int(behind.flags.double().mean() > COIN)
        right = float(told == true)
        counted = float(_by_labels(shadows, behind, case.subject.classes) == true)
        return Finding(
            (
                Tally(_TOLD, (right,), (COIN,), of="updates"),
                Tally(_BEYOND, (right,), (counted,), paired=True, of="updates"),
            )
        )


def _own(subject: Subject) -> Records | None:
    """Records with flags that the attacker has: public ones, else held-out ones."""
    for part in (subject.public, subject.held_out):
        if part is not None and part.flags is not None:
            return part
    return None


def _size(own: Records) -> int:
    """Records in the largest group that can be drawn, whichever way it leans."""
    assert own.flags is not None  # noqa: S101 - `_own` gives no others
    having = int(own.flags.sum())
    return int(min(having, len(own) - having) / LOPSIDED)


def _by_labels(shadows: Cohorts, behind: Records, classes: int) -> int:
    """Which way the group leans, to somebody who knows how many have each label, and no more."""
    counts = behind.labels.long().bincount(minlength=classes).double()
    asked: Tensor = (counts / counts.sum())[None]
    return int(
        classify(shadows.label_shares(classes), shadows.answers, asked, torch.zeros(classes))[0]
    )
