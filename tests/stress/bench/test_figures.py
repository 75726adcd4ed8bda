"""Figures are counts of rows: known rows give known figures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from sentinel.stress.bench import charts, figures
from sentinel.stress.bench.card import card
from sentinel.stress.bench.evaluate import QUICK
from sentinel.stress.bench.figures import Rate, Seen, caught, threshold
from sentinel.stress.bench.seen import HonestRow, SiegeRow


def test_a_threshold_lets_no_more_through_than_asked() -> None:
    scores = [0.1] * 95 + [0.5] * 4 + [0.9]
    assert threshold(scores, 0.01).cut == 0.5
    assert threshold(scores, 0.01).above == 1
    assert threshold(scores, 0.001).above == 0


def test_ties_at_the_cut_are_below_it() -> None:
    """Twenty rounds share one score: at 5 % none of them may be refused."""
    scores = [0.0] * 80 + [0.3] * 20
    assert threshold(scores, 0.05).cut == 0.3
    assert caught([0.3, 0.31], 0.3) == Rate(1, 2)


def test_a_rate_of_nothing_promises_nothing() -> None:
    assert (Rate(0, 0).low, Rate(0, 0).high) == (0.0, 1.0)
    assert math.isnan(Rate(0, 0).share)


def test_381_of_381_have_a_lower_bound_of_99_percent() -> None:
    assert Rate(381, 381).low >= 0.99
    assert Rate(370, 370).low < 0.99


def test_models_that_leak_nothing_are_in_no_rate(seen: Seen) -> None:
    family = figures.by_family(seen)[0]
    assert family.shipped == Rate(9, 10)
    assert family.harmless == 1
    assert family.verdicts == Rate(8, 9)


def test_the_rate_at_a_false_alarm_rate_uses_the_honest_rounds(seen: Seen) -> None:
    """At .1 % one of the two loud rounds may lie above, so the cut is the other's .6."""
    family = figures.by_family(seen)[0]
    assert family.at[0.001] == Rate(8, 10)
    assert family.at[0.05] == Rate(9, 10)


def test_the_worst_family_is_the_one_least_caught(seen: Seen) -> None:
    worst = figures.worst(seen, 0.001)
    assert worst is not None
    assert worst.name == "C"
    assert figures.hidden(seen, 0.001) == Rate(2, 4)


def test_false_alarms_are_counted_by_round_and_by_run(seen: Seen) -> None:
    everything = figures.quiet("all", seen.honest)
    assert everything.rounds == Rate(2, 1000)
    assert everything.runs == Rate(1, 10)
    assert [one.rounds.hits for one in figures.long_runs(seen)] == [2] + [0] * 9


def test_a_model_that_ran_away_is_no_false_alarm(seen: Seen) -> None:
    broken = [replace(row, broken=True) if row.suspicion > 0.5 else row for row in seen.honest]
    assert figures.quiet("all", broken).rounds == Rate(0, 998)


def test_unhealthy_is_an_alarm_where_the_model_is_not(seen: Seen) -> None:
    row: HonestRow = replace(seen.honest[0], unhealthy=True)
    assert row.alarm
    assert not replace(row, broken=True).alarm


def test_each_baseline_is_cut_on_its_own_scores(seen: Seen) -> None:
    """Every baseline says 1 of family C and 0 of all else: it catches all of C and none of A."""
    for one in figures.against(seen, 0.01)[1:]:
        assert one.families == {"A": Rate(0, 10), "C": Rate(4, 4)}


def test_it_is_said_where_a_baseline_is_ahead(seen: Seen) -> None:
    words = {one.family: one.word for one in figures.ahead(seen, 0.001)}
    assert words == {"A": "ahead", "C": "behind"}


@pytest.mark.parametrize("draw", [charts.curves_svg, charts.spread_svg])
def test_a_picture_is_well_formed(seen: Seen, draw: object) -> None:
    text = draw(seen)  # type: ignore[operator]
    root = ET.fromstring(text)  # noqa: S314 - made here
    assert root.tag.endswith("svg")
    assert "nan" not in text


def test_the_card_says_where_an_aim_is_missed(seen: Seen) -> None:
    sieges = [SiegeRow("A", "binning-mean", "net", 2, 0, warned=True, late=False)]
    text = card(replace(seen, sieges=sieges), QUICK, "0" * 64)
    assert "worst handcrafted family (C): 99 % caught at 0.1 % false alarms | 2 of 4" in text
    assert "49.0 points short" in text
    assert "level in C" in text  # at 1 % the cut lies low enough for both
    assert "by crafted round 1" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
