"""Findings add up, and a gain counts only beyond chance."""

from __future__ import annotations

import math

import pytest
import torch

from sentinel.interval import Count, Interval, difference, wilson
from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited


def test_pooled_tallies_are_the_tally_of_all_records() -> None:
    both = Tally("m", (1.0, 0.0), (0.0,)) + Tally("m", (1.0,), (1.0, 0.0, 0.0))
    assert both.mean == pytest.approx(2 / 3)
    assert both.chance == pytest.approx(1 / 4)
    assert both.interval() == difference(Count(2, 3), Count(1, 4))


def test_a_gain_that_chance_explains_is_no_leak() -> None:
    chance = (1.0,) * 5 + (0.0,) * 45
    assert not Tally("m", (1.0, 0.0, 0.0, 0.0), chance).leaks(0.95)
    assert Tally("m", (1.0,) * 20, chance).leaks(0.95)


def test_a_paired_gain_within_the_margin_is_no_leak() -> None:
    values = tuple(0.71 + 0.001 * (i % 3) for i in range(30))
    assert not Tally("m", values, (0.70,) * 30, paired=True, margin=0.02).leaks(0.95)
    assert Tally("m", values, (0.70,) * 30, paired=True).leaks(0.95)


def test_one_record_alone_shows_nothing() -> None:
    tally = Tally("m", (0.9,), (0.5,), paired=True)
    assert tally.interval().low == -math.inf
    assert not tally.leaks(0.95)


def test_nothing_measured_is_no_leak_and_no_number() -> None:
    empty = Tally("m", (), ())
    assert math.isnan(empty.mean)
    assert not empty.leaks(0.95)


def test_the_worst_exhibit_of_pooled_findings_is_the_worst_of_all() -> None:
    def one(score: float, *, cut: bool = False) -> Finding:
        shown = Exhibit(torch.zeros(1), torch.zeros(1), score)
        return Finding((Tally("m", (score,), (0.0,)),), (shown,), cut=cut)

    pooled = one(0.2) + one(0.9, cut=True) + one(0.5)
    assert pooled.worst is not None
    assert pooled.worst.score == 0.9
    assert (pooled.updates, pooled.cut) == (3, True)


def test_the_record_hit_best_is_always_exhibited() -> None:
    assert exhibited(torch.tensor([0.1, 0.2, 0.0, 0.1, 0.0, 0.9])) == [0, 1, 2, 3, 5]
    assert exhibited(torch.tensor([0.5])) == [0]


def test_a_count_beside_a_chance_that_is_known_has_wilsons_interval() -> None:
    """Two coins told right are no leak, which Student's interval of two equal values would say."""
    coins = Tally("m", (1.0,) * 2, (0.5,) * 2)
    found = wilson(Count(2, 2))
    assert coins.interval() == Interval(found.low - 0.5, found.high - 0.5)
    assert not coins.leaks(0.95)
    clumped = Tally("m", (1.0,) * 3 + (0.0,) * 29, (0.01,) * 32)
    assert clumped.interval(0.996).low < 0.0 < wilson(Count(3, 32), confidence=0.996).low - 0.01
    assert Tally("m", (1.0,) * 16, (0.5,) * 16).leaks(0.95)


def test_controls_are_pooled_and_updates_without_one_add_nothing() -> None:
    def one(control: Tally | None) -> Finding:
        return Finding((Tally("m", (0.0,), (0.0,)),), control=control)

    planted = Tally("c", (1.0,), (0.0,))
    assert (one(planted) + one(None) + one(planted)).control == planted + planted
    assert (one(None) + one(None)).control is None
