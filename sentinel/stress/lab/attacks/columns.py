"""Columns: whole rows of a table, searched with a softmax over the levels of each category."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.lab.replay import require_time, unreplayable
from sentinel.stress.lab.setting import HONEST
from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.columns import MOST_LEVELS, Column, Table, matched
from sentinel.stress.passive.relaxation import Relaxation, relax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

MOST = 32  # records behind an update that are searched together
MARGIN = 0.05  # share of the columns that counts as nothing
SEARCH = Relaxation(restarts=4, iterations=150, step=0.1, hardness=(5.0, 20.0))


class Columns:
    """The search that explains the update best, and the pool of the better restarts."""

    name = "columns"
    title = "whole rows of a table, searched for by replaying the training with several restarts"
    knows = "labels, batches, learning rate, the guard's treatment, and how common each value is"
    worth = 0.5
    seconds = 3.0
    wanted = 16
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It takes a table, few records, and a model that can be replayed."""
        if subject.kind is not Kind.TABLE:
            return "the records are no table"
        if setting.server != HONEST:
            return "what malicious servers send is made for the read-out of `rows`"
        if setting.records > MOST:
            return f"a search for more than {MOST} rows at once finds none"
        if len(subject.held_out) < setting.records:
            return "too few held-out records to stand beside those behind the update"
        return unreplayable(subject)

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Search, and count whole rows and single columns beside those of held-out records."""
        require_time(case.training, behind.inputs, SEARCH, deadline)
        table, others = _table(case.subject), _others(case.subject, len(behind))
        pool = relax(case.training, case.seen, table, SEARCH, generator)
        sets = (pool.best, pool.rows)
        guesses, hits = _luckiest(sets, behind.inputs, table)
        apart = torch.cat([_luckiest(sets, part, table)[1] for part in others])
        return Finding(
            (
                _tally("whole rows right, column by column", hits.all(1), apart.all(1)),
                _tally("columns right", hits, apart, MARGIN),
            ),
            _exhibits(guesses, behind.inputs, hits, table),
        )


@functools.lru_cache(maxsize=1)
def _table(subject: Subject) -> Table:
    """What public records teach about each column, else held-out ones; the loader's categories."""
    rows = (subject.public or subject.held_out).inputs
    named = set(subject.categorical)
    return Table(
        tuple(
            Column.learnt(rows[:, at : at + 1], len(rows) if at in named else MOST_LEVELS)
            for at in range(rows.shape[1])
        )
    )


def _luckiest(sets: Sequence[Tensor], rows: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """The guesses that suit these rows best, and their hits; chance gets the same choice."""
    found = [(guesses, matched(guesses, rows, table)) for guesses in sets]
    return max(found, key=lambda one: int(one[1].sum()))


def _others(subject: Subject, count: int) -> list[Tensor]:
    """Held-out rows in batches of as many as are behind the update."""
    parts = torch.split(subject.held_out.inputs, count)
    return [part for part in parts if len(part) == count]


def _tally(measure: str, hits: Tensor, apart: Tensor, margin: float = 0.0) -> Tally:
    """Of each record: whether its whole row is right, [N], or the share of it that is, [N, C]."""
    values, chances = (part.double().view(len(part), -1).mean(1).tolist() for part in (hits, apart))
    return Tally(measure, tuple(values), tuple(chances), margin=margin)


def _exhibits(guesses: Tensor, rows: Tensor, hits: Tensor, table: Table) -> tuple[Exhibit, ...]:
    """A few records, each with the guess that suits it best."""
    suits = table.right(guesses[:, None], rows[None]).sum(-1)
    shares = hits.double().mean(1)
    return tuple(
        Exhibit(rows[at], guesses[int(suits[:, at].argmax())], float(shares[at]), at)
        for at in exhibited(shares)
    )
