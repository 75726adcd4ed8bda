"""Genotypes: how many minor alleles each person has, read out of the update and searched for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.attacks.rows import Rows, guesses_at_rows
from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.lab.replay import require_time, unreplayable
from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.genotypes import Panel, agreements, called
from sentinel.stress.passive.relaxation import Relaxation, relax

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

MOST = 32  # people behind an update that are searched together
MARGIN = 0.02  # share of the genotypes that counts as nothing
SEARCH = Relaxation(restarts=2, iterations=120, hardness=(10.0,))


class Genotypes:
    """Every guess of the read-out and of the search, rounded to 0, 1 or 2."""

    name = "genotypes"
    title = "genotypes, read out of the first layer's update or searched for"
    knows = (
        "labels, batches, learning rate, the guard's treatment, and the frequency of each allele"
    )
    worth = 0.9
    seconds = 3.0
    wanted = 16
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It takes genotypes, and a model that can be read or replayed."""
        if subject.kind is not Kind.GENOTYPES:
            return "the records are no genotypes"
        if len(subject.held_out) < setting.records:
            return "too few held-out people to stand beside those behind the update"
        if Rows().misfit(subject, setting) is None:
            return None
        if setting.records > MOST:
            return f"a search for more than {MOST} people at once finds none"
        return unreplayable(subject)

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Guess, and count right genotypes beside those of held-out people."""
        panel, people = _panel(case.subject), behind.inputs
        parts, cut = [], False
        if Rows().misfit(case.subject, case.setting) is None:
            parts.append(called(guesses_at_rows(case)))
        if len(behind) <= MOST and unreplayable(case.subject) is None:
            try:
                require_time(case.training, people, SEARCH, deadline)
            except OutOfTimeError:
                if not parts:
                    raise
                cut = True
            else:
                parts.append(relax(case.training, case.seen, panel.table(), SEARCH, generator).best)
        guesses = torch.cat(parts)
        right = agreements(guesses, people, panel).double() / people.shape[1]
        others = torch.split(case.subject.held_out.inputs, len(people))
        apart = torch.cat(
            [agreements(guesses, part, panel) for part in others if len(part) == len(people)]
        )
        chances = (apart.double() / people.shape[1]).tolist()
        whole = tuple(float(share == 1.0) for share in right.tolist())
        return Finding(
            (
                Tally("genotypes right", tuple(right.tolist()), tuple(chances), margin=MARGIN),
                Tally(
                    "people with every genotype right",
                    whole,
                    tuple(float(share == 1.0) for share in chances),
                ),
            ),
            _exhibits(guesses, people, right, panel),
            cut=cut,
        )


@functools.lru_cache(maxsize=1)
def _panel(subject: Subject) -> Panel:
    return Panel.learnt((subject.public or subject.held_out).inputs)


def _exhibits(guesses: Tensor, people: Tensor, right: Tensor, panel: Panel) -> tuple[Exhibit, ...]:
    """A few people, each with the guess that suits best."""
    known = torch.cat([guesses, panel.guess()[None]])
    return tuple(
        Exhibit(
            people[at],
            known[int((known == people[at]).sum(1).argmax())],
            float(right[at]),
            at,
        )
        for at in exhibited(right)
    )
