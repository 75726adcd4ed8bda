"""A slow model stays within its time, and an end that is asked for comes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import Deadline, OutOfTimeError, Stop
from sentinel.stress.lab.exchange import Site, raw
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.lab.plan import make_plan
from sentinel.stress.lab.result import NO_TIME, Result
from sentinel.stress.lab.runner import Options, run_lab
from sentinel.stress.lab.servers import SERVERS, trains
from sentinel.stress.lab.setting import HONEST, Setting, Stage
from sentinel.stress.lab.slowness import slowness_of
from sentinel.stress.lab.utility import learned

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.stress.lab.subject import Subject

SECONDS = 0.1  # that a pass through the slow model takes


class Passing(nn.Module):
    """Does something at each pass once the test has begun, and counts the passes."""

    def __init__(self, then: Callable[[int], None]) -> None:
        """`then` is called with the number of each pass."""
        super().__init__()
        self.passes, self._then = 0, then
        self.begun = False

    def __deepcopy__(self, memo: object) -> Passing:
        """Copies of the model count here as well."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map as if it were not there."""
        if self.begun:
            self.passes += 1
            self._then(self.passes)
        return x


def passing(table: Subject, then: Callable[[int], None]) -> tuple[Subject, Passing]:
    """The table's records, with a model that does something at each pass."""
    watch = Passing(then)
    net = nn.Sequential(watch, nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    data = {"train": table.train, "held_out": table.held_out}
    subject = subject_of(net, data, torch.Generator().manual_seed(0), "passing")
    watch.begun = True
    return subject, watch


@pytest.fixture
def slow(table) -> tuple[Subject, Passing]:
    return passing(table, lambda _: time.sleep(SECONDS))


def nothing_is_unsaid(result: Result) -> bool:
    """Whether every attack and every malicious server was tried, or is listed."""
    said = {row.item.attack for row in result.rows}
    said |= {row.item.setting.server for row in result.rows}
    listed = " ".join(one.what for one in result.skipped)
    names = (*ATTACKS, *(name for name in SERVERS if name != HONEST))
    return all(name in said or name in listed for name in names)


@pytest.mark.parametrize("curves", [True, False])
def test_a_slow_model_stays_within_its_time(slow, plain, curves) -> None:
    """Its federation alone would take a minute, and its malicious servers as long."""
    begun = time.monotonic()
    result = run_lab(slow[0], plain(), Options(seconds=6.0, curves=curves))
    assert time.monotonic() - begun < 6.0 + 10.0
    assert result.rows
    assert result.partial
    assert nothing_is_unsaid(result)


def test_a_training_that_would_not_end_in_time_is_given_up_at_once(slow) -> None:
    subject, watch = slow
    site = Site(subject, torch.Generator().manual_seed(0), Deadline.after(20 * SECONDS))
    with pytest.raises(OutOfTimeError):
        site.update(Setting(records=128, epochs=100), SERVERS[HONEST])
    assert watch.passes == 1
    assert math.isfinite(slowness_of(subject, Deadline.after(600.0)))


def test_the_training_of_the_later_stage_ends_with_the_time(slow) -> None:
    subject, watch = slow
    site = Site(subject, torch.Generator().manual_seed(0), Deadline.after(0.0))
    with pytest.raises(OutOfTimeError):
        site.stage(Stage.LATER)
    assert watch.passes == 0


def test_a_federation_that_would_not_end_in_time_is_given_up_after_a_part(slow, tmp_path) -> None:
    subject, watch = slow
    limit = Deadline.after(20 * SECONDS)
    assert learned(subject, None, tmp_path, 0, 3, limit, limit) is None
    assert watch.passes <= 4  # two epochs of 45 records in steps of 32


def test_a_slow_model_is_seen_to_be_slow_and_its_items_are_planned_to_take_longer(
    table, slow, plain
) -> None:
    ample = Deadline.after(600.0)
    slowness = slowness_of(slow[0], ample)
    assert slowness > SECONDS / 0.05
    usual, long = (
        make_plan(table, plain(), (), 60.0, torch.Generator(), slowness=one) for one in (1, 20)
    )
    assert long.core < usual.core
    assert len(long.items) == len(usual.items)
    assert long.items[0].seconds > 2 * usual.items[0].seconds


def test_servers_that_have_no_turn_before_the_time_is_up_are_listed(table, plain) -> None:
    over = Deadline.after(0.0)
    plan = make_plan(table, plain(), (), 60.0, torch.Generator(), deadline=over)
    late = {one.what for one in plan.skipped if one.why == NO_TIME and one.of_time}
    assert late == {f"server {name}" for name in SERVERS if name != HONEST and not trains(name)}
    assert {item.setting.server for item in plan.items} == {HONEST}


@pytest.mark.parametrize("name", ["membership", "columns"])
def test_an_attack_that_half_done_says_nothing_is_not_begun_where_it_does_not_fit(
    slow, name
) -> None:
    subject, watch = slow
    site = Site(subject, torch.Generator().manual_seed(0))
    update = site.update(Setting(records=16), SERVERS[HONEST])
    case = site.case(update, raw(update))
    before = watch.passes
    with pytest.raises(OutOfTimeError):
        ATTACKS[name].run(case, update.behind, torch.Generator(), Deadline.after(5 * SECONDS))
    assert watch.passes <= before + 2  # to see how long one takes


def test_an_attack_on_members_ends_where_its_time_does(slow) -> None:
    """Where the training was no measure of it."""
    subject, watch = slow
    site = Site(subject, torch.Generator().manual_seed(0))
    update = site.update(Setting(records=16), SERVERS[HONEST])
    case = site.case(update, raw(update))
    object.__setattr__(case, "seconds", 0.0)
    before = watch.passes
    with pytest.raises(OutOfTimeError):
        ATTACKS["membership"].run(
            case, update.behind, torch.Generator(), Deadline.after(5 * SECONDS)
        )
    assert watch.passes <= before + 7


def test_ctrl_c_while_the_plan_is_made_leaves_everything_listed_as_not_tried(table, plain) -> None:
    def pressed(_: int) -> None:
        raise KeyboardInterrupt

    subject, watch = passing(table, pressed)
    result = run_lab(subject, plain(), Options(seconds=600.0))
    assert watch.passes == 1
    assert result.interrupted
    assert result.rows == ()
    assert nothing_is_unsaid(result)
    assert {one.why for one in result.skipped} == {NO_TIME}


@pytest.mark.parametrize("passes", [2, 40])
def test_an_end_that_was_asked_for_comes_though_the_interrupt_was_swallowed(
    table, plain, passes
) -> None:
    stop = Stop()

    def swallowed(at: int) -> None:
        stop.asked = at >= passes

    subject, watch = passing(table, swallowed)
    result = run_lab(subject, plain(), Options(seconds=600.0), stop=stop)
    assert watch.passes >= passes
    assert result.interrupted
    assert result.seconds < 60.0
    assert nothing_is_unsaid(result)


def test_nothing_is_left_of_a_deadline_or_its_shares_once_the_end_is_asked_for() -> None:
    stop = Stop()
    deadline = Deadline.after(600.0, stop)
    part = deadline.share(0.5).before(deadline)
    part.require(100.0)
    stop.asked = True
    assert deadline.passed
    assert part.passed
    assert part.left == 0.0
    with pytest.raises(OutOfTimeError):
        part.require()


def test_curves_are_of_a_condition_under_which_the_attack_did_not_fail(table, plain) -> None:
    """Batch normalisation cannot be trained on one record."""
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    whole = (table.train.inputs, table.train.labels.long())
    subject = subject_of(net, whole, torch.Generator().manual_seed(0), "mixing")
    result = run_lab(subject, plain(), Options(("labels",), seconds=10.0))
    assert result.rows[0].error == "ValueError"
    assert result.curves.item.setting.records > 1


def test_curves_that_cannot_be_drawn_are_listed_and_the_rest_is_told(
    table, plain, monkeypatch
) -> None:
    def failing(*_: object) -> None:
        raise ValueError("Mrs Smith")

    monkeypatch.setattr("sentinel.stress.lab.runner.draw_curves", failing)
    result = run_lab(table, plain(), Options(("rows",), seconds=5.0))
    assert result.rows
    assert result.curves is None
    why = next(one.why for one in result.skipped if "curves" in one.what)
    assert "ValueError" in why
    assert "Smith" not in why
