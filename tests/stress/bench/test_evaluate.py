"""The protocol in one process, small: every part gives rows, and again the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sentinel.stress.bench.evaluate import FULL, QUICK, SIZES, Task, evaluate, perform, tasks
from sentinel.stress.bench.honest import KINDS
from sentinel.stress.bench.nets import net
from sentinel.stress.bench.seen import CraftedRow, HonestRow

pytestmark = pytest.mark.usefixtures("one_thread")

MLP = net("mlp-8-32-2")
SMALL = replace(
    QUICK,
    name="small",
    kinds=tuple(replace(kind, nets=(MLP,), rounds=3) for kind in KINDS[10:12]),
    quota=1,
    learned=1,
    nets=(MLP,),
    besieged=(MLP,),
    rounds=22,
    costly=(MLP,),
)


def test_the_whole_protocol_gives_rows_of_every_sort_and_again_the_same() -> None:
    told: list[tuple[int, int]] = []
    seen = evaluate(SMALL, 3, step=lambda done, total: told.append((done, total)))
    assert {row.kind for row in seen.honest} == {"server momentum", "FedProx"}
    assert len({row.run for row in seen.honest}) == 2
    assert {row.family for row in seen.crafted} >= set("ABEFG")
    assert seen.sieges
    assert seen.costs[0].parameters == 8 * 32 + 32 + 32 * 2 + 2
    assert 0.0 < seen.costs[0].alone[0] <= seen.costs[0].alone[1]
    assert told[-1] == (len(tasks(SMALL)) + 1,) * 2
    for task in (Task("honest", 1), Task("crafted", family="A"), Task("crafted", family="G")):
        again = perform(SMALL, 3, None, task)
        kept = seen.honest if task.what == "honest" else seen.crafted
        assert [row for row in kept if same(row, task)] == [numbered(row) for row in again]


def same(row: HonestRow | CraftedRow, task: Task) -> bool:
    """Whether a row is of this task."""
    if isinstance(row, CraftedRow):
        return row.family == task.family
    return row.kind == SMALL.kinds[task.part].name


def numbered(row: HonestRow | CraftedRow) -> HonestRow | CraftedRow:
    """The row of a chunk, with the number that its run has among all."""
    return replace(row, run=1) if isinstance(row, HonestRow) else row


def test_the_full_form_has_what_the_protocol_asks_for() -> None:
    assert FULL.quota >= 381
    assert FULL.learned >= 40
    assert FULL.share == 1.0
    assert FULL.kinds == KINDS
    assert SIZES["full"] is FULL
