"""The runner goes through the real guard, keeps its time, and hides nothing that it skipped."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.policy.store import parse_policy
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.plan import (
    PATIENCE,
    PATIENT,
    Item,
    Skipped,
    leading,
    make_plan,
    most_lopsided,
)
from sentinel.stress.lab.result import BEYOND, DIVERGED, NO_TIME
from sentinel.stress.lab.runner import Options, run_lab
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.stress.lab.words import partial, verdict

FEW = """
schema = 1
name = "few"
[limits]
min_patients = 16
rounds_per_day = 1
[[rule]]
id = "baseline"
max_norm = 0.1
noise_ratio = 10.0
[[rule]]
id = "crafted-model"
when = { suspicion = 0.5 }
action = "refuse-round"
"""
ROWS = Options(attacks=("rows",), seconds=600.0, curves=False)  # each is stopped before


def test_raw_rows_are_read_noised_ones_are_not_and_thin_noise_is_called_a_leak(
    table, plain, stop_after
) -> None:
    strict = run_lab(table, plain(noise=40.0), ROWS, stop_after(1))
    first = strict.rows[0]
    assert first.item.setting == Setting(HONEST, records=1)
    assert first.raw.finding.tallies[1].mean == 1.0  # read exactly
    assert first.policy.released > 0
    assert first.policy.finding.main.mean == 0.0
    assert strict.leaks == ()
    loose = run_lab(table, plain(noise=0.01, norm=10.0), ROWS, stop_after(1))
    assert {row.item.setting.records for row, _ in loose.leaks} >= {1}


def test_the_time_is_kept_and_everything_planned_is_done_or_listed(table, plain) -> None:
    begun = time.monotonic()
    result = run_lab(table, plain(), Options(seconds=2.0))
    assert time.monotonic() - begun < 12.0  # an update that has begun is finished
    assert result.partial
    plan = make_plan(table, plain(), (), 2.0, torch.Generator())
    late = [one for one in result.skipped if one.why in {NO_TIME, BEYOND}]
    assert any(late)
    said = {row.item for row in result.rows}
    unsaid = [item for item in plan.items if item not in said]
    assert {f"{item.attack}: {item.setting.words}" for item in unsaid} <= {one.what for one in late}
    assert {one.what for one in plan.skipped} <= {one.what for one in result.skipped}


@pytest.mark.usefixtures("own_clock")
def test_the_plan_holds_what_fits_and_a_test_that_does_it_is_not_late(table, plain) -> None:
    """The more minutes, the more is planned; what is beyond them is partial all the same."""
    short, long = (make_plan(table, plain(), (), at, torch.Generator()) for at in (20.0, 600.0))
    assert 0 < short.core < len(short.items)
    assert long.core > short.core
    assert sum(item.seconds for item in short.items[: short.core]) <= 20.0
    result = run_lab(table, plain(), Options(("rows",), seconds=5.0, curves=False))
    assert NO_TIME not in {one.why for one in result.skipped}
    assert result.partial
    assert result.short


def test_what_was_dropped_for_want_of_time_makes_a_test_partial_and_nothing_else_does(
    table, plain, stop_after
) -> None:
    """However short the plan was made beforehand; what cannot be tried here is no part of it."""
    done = replace(run_lab(table, plain(), ROWS, stop_after(1)), interrupted=False)
    unfit = Skipped("pictures", "the records are no pictures")
    assert not replace(done, skipped=(unfit,)).partial
    assert partial(replace(done, skipped=(unfit,))) is None
    late = replace(done, skipped=(unfit, Skipped("rows: 8 records", BEYOND, of_time=True)))
    assert late.partial
    assert "1 of the things to try was left out for want of time" in partial(late)
    assert "--budget" in partial(late)


def test_servers_that_wait_for_more_time_are_dropped_for_it_where_an_attack_fits(
    table, plain
) -> None:
    def patient(attacks: tuple[str, ...], seconds: float) -> set[bool]:
        plan = make_plan(table, plain(), attacks, seconds, torch.Generator().manual_seed(0))
        return {one.of_time for one in plan.skipped if one.why == PATIENCE}

    assert patient(("rows",), 60.0) == {True}
    assert patient(("labels",), 60.0) == {False}  # one output
    assert patient(("rows",), PATIENT) == set()


def test_a_server_that_is_left_out_is_told_from_an_attack_that_is(table, plain) -> None:
    plan = make_plan(table, plain(), (), 60.0, torch.Generator().manual_seed(0))
    out = {one.what for one in plan.skipped if one.of_server}
    assert {"server loki", "server learned-neurons"} <= out
    assert all(what.startswith("server ") for what in out)
    assert any(one.what.startswith("pictures") for one in plan.skipped if not one.of_server)


def test_several_local_epochs_are_planned_with_the_time_of_all_their_steps() -> None:
    one, many = (Item(Setting(records=n, epochs=e), "pictures", 1) for n, e in ((32, 0), (128, 2)))
    assert many.seconds > 6 * one.seconds


def test_training_that_diverges_is_told_and_is_no_error_of_an_attack(
    table, plain, monkeypatch, stop_after
) -> None:
    monkeypatch.setattr("sentinel.stress.lab.runner.norm_of", lambda _: math.nan)
    result = run_lab(table, plain(), ROWS, stop_after(2))
    assert result.rows == ()
    assert DIVERGED in {one.why for one in result.skipped}


def test_a_few_updates_that_diverge_leave_the_rest_measured_and_nothing_partial(
    table, plain, monkeypatch, stop_after
) -> None:
    sizes = iter([math.nan, *[1.0] * 100])
    monkeypatch.setattr("sentinel.stress.lab.runner.norm_of", lambda _: next(sizes))
    first = run_lab(table, plain(), ROWS, stop_after(1)).rows[0]
    assert first.diverged == 1
    assert first.raw.updates == first.item.updates - 1
    assert not first.partial


def test_second_opinions_come_after_everything_else(table, plain) -> None:
    plan = make_plan(table, plain(), (), 600.0, torch.Generator().manual_seed(0))
    names = [item.attack for item in plan.items]
    assert "columns" in names
    assert set(names[names.index("columns") :]) == {"columns"}
    assert leading(plan.items, 2) == sum(
        item.setting in {plan.items[0].setting, Setting(HONEST, records=32)}
        for item in plan.items[: names.index("columns")]
    )


def test_groups_are_made_where_the_loader_names_a_property(table, plain, stop_after) -> None:
    having = torch.arange(len(table.train)) % 4 > 0
    flagged = replace(table.train, flags=having)
    subject = replace(table, train=flagged, held_out=replace(table.held_out, flags=None))
    assert most_lopsided(table.train) == 0
    assert most_lopsided(flagged) == int((~having).sum() / 0.8)
    plan = make_plan(subject, plain(), ("property",), 60.0, torch.Generator())
    assert plan.items == ()
    assert "neither public nor held-out" in plan.skipped[-1].why
    own = replace(subject, held_out=replace(table.held_out, flags=table.held_out.labels > 0))
    options = Options(("property",), 600.0, curves=False)
    row = run_lab(own, plain(), options, stop_after(1)).rows[0]
    assert row.item.setting.lopsided
    assert row.raw.updates == row.item.updates > 1


def test_only_small_updates_tried_is_not_called_a_policy_that_lets_nothing_out(
    table, stop_after
) -> None:
    result = run_lab(table, parse_policy(FEW.encode(), "few.toml"), ROWS, stop_after(1))
    assert not result.withheld_entirely
    assert result.inconclusive
    assert "Nothing can be said" in verdict(result)


def test_the_sites_own_state_is_never_opened_and_the_scratch_folder_goes(
    table, plain, stop_after
) -> None:
    before = set(Path("/dev/shm").glob("sentinel-stress-*"))  # noqa: S108 - only listed
    run_lab(table, plain(), ROWS, stop_after(1))
    assert not Path(os.environ["SENTINEL_STATE_DIR"]).exists()
    assert set(Path("/dev/shm").glob("sentinel-stress-*")) <= before  # noqa: S108 - as above


def test_withheld_updates_are_counted_and_shown_as_if_the_guard_had_been_fooled(
    table, stop_after
) -> None:
    """A limit of one round a day does not end the test either."""
    result = run_lab(table, parse_policy(FEW.encode(), "few.toml"), ROWS, stop_after(3))
    first = result.rows[0]
    assert first.policy.finding is None
    assert first.policy.kept == {"too-few-patients": first.item.updates}
    assert first.alone.released == first.item.updates > 1
    crafted = next(row for row in result.rows if row.item.setting.server != HONEST)
    assert set(crafted.policy.kept) == {"crafted-model"}
    assert crafted.alone.released > 0
    ample = next(row for row in result.rows if row.item.setting.records == 32)
    assert ample.policy.released == ample.item.updates


def test_ctrl_c_gives_what_there_is_marked_as_partial(table, plain, stop_after) -> None:
    result = run_lab(table, plain(), ROWS, stop_after(2))
    assert len(result.rows) == 2
    assert result.interrupted
    assert result.partial
    assert any(one.why == NO_TIME for one in result.skipped)


def test_an_attack_that_fails_is_told_by_type_alone(table, plain, monkeypatch, stop_after) -> None:
    class Failing(type(ATTACKS["rows"])):
        """Fails as a foreign attack may."""

        def run(self, *_: object) -> None:
            raise RuntimeError("Mrs Smith")

    monkeypatch.setitem(ATTACKS, "rows", Failing())
    result = run_lab(table, plain(), ROWS, stop_after(2))
    assert {row.error for row in result.rows} == {"RuntimeError"}
    assert result.partial
    assert "Smith" not in repr(result)
    assert "The attack rows failed: torch refused one of its steps" in partial(result)


def test_the_same_seed_attacks_the_same_records(table, plain, stop_after) -> None:
    one, two = (run_lab(table, plain(), ROWS, stop_after(1)) for _ in range(2))
    first, second = (result.rows[0].raw.finding.exhibits for result in (one, two))
    truths = {(each.update, each.index): each.truth for each in first}
    shared = [each for each in second if (each.update, each.index) in truths]  # time may be short
    assert shared
    assert all(torch.equal(each.truth, truths[each.update, each.index]) for each in shared)


def test_the_subject_is_as_it_was(table, plain, stop_after) -> None:
    before = {name: value.clone() for name, value in table.model.state_dict().items()}
    run_lab(table, plain(), ROWS, stop_after(2))
    assert all(torch.equal(v, before[name]) for name, v in table.model.state_dict().items())


def test_pictures_come_back_from_raw_updates_and_not_from_noise(images, plain, stop_after) -> None:
    options = Options(("pictures",), seconds=600.0, curves=False)
    first = run_lab(images, plain(noise=30.0, norm=0.05), options, stop_after(1)).rows[0]
    assert first.raw.finding.main.mean > 0.97
    assert first.raw.finding.tallies[1].mean == 1.0  # each found among the others of its class
    assert first.policy.finding.main.mean < first.raw.finding.main.mean - 0.01
    assert first.policy.finding.tallies[1].mean < 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("own_clock")
def test_curves_show_less_leakage_with_more_noise_beside_utility(table, plain) -> None:
    curves = run_lab(table, plain(), Options(("rows",), seconds=90.0)).curves
    assert curves.raw.mean == 1.0
    assert curves.utility.metric == "AUC"
    leaks = {point.turn.words: point.leak.mean for point in curves.points if point.leak}
    assert leaks["noise_ratio 0"] > 0.9
    assert leaks["noise_ratio 20"] < 0.2


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_private_training_is_sent_to_the_canaries(table, unit) -> None:
    promise = f'unit = "{unit}"\npatients = 1000\nepsilon = 8.0\ndelta = 1e-5\nclip_norm = 1.0\n'
    text = f'schema = 1\nname = "p"\n[privacy]\n{promise}noise_multiplier = 1.0\nbatch = 10\n'
    text += '[[rule]]\nid = "all"\n'
    with pytest.raises(MisuseError, match="canaries"):
        run_lab(table, parse_policy(text.encode(), "p.toml"), ROWS)


def test_an_unknown_attack_is_misuse(table, plain) -> None:
    with pytest.raises(MisuseError, match="no attack 'guess'"):
        run_lab(table, plain(), Options(("guess",)))
