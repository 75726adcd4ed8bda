"""Crafted models carry what they leak, and the walk stops at its quota."""

from __future__ import annotations

import pytest
import torch

from sentinel.stress import servers
from sentinel.stress.bench.crafted import Variant, craft, crafted_models, ground_of, variants
from sentinel.stress.bench.nets import net
from sentinel.stress.bench.seen import Known, crafted_rows, siege_rows

pytestmark = pytest.mark.usefixtures("one_thread")

MLP, VIT = net("mlp-20-96-3"), net("vit-32")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_binning_leaks_and_an_honest_model_in_its_place_does_not() -> None:
    where = ground_of(MLP, 1, 3)
    made = craft(Variant(servers.recipe("binning-mean"), "plain"), where, seeded())
    assert made is not None
    assert made.leaks
    assert made.leak.share > made.leak.honest_share
    nothing = servers.measure(where.module, where.honest, where.honest, [where.site.draw(32)])
    assert not nothing.is_attack


def test_what_does_not_fit_is_no_model() -> None:
    variant = Variant(servers.recipe("token-bins"), "plain")
    assert craft(variant, ground_of(MLP, 0, 3), seeded()) is None
    assert craft(variant, ground_of(VIT, 0, 3), seeded()) is not None


def test_every_recipe_and_wrapper_has_its_turn() -> None:
    every = [one for family in "ABCDEFG" for one in variants(family)]
    assert {one.recipe.name for one in every} == {one.name for one in servers.RECIPES}
    assert {one.wrapper for one in every} == {"plain", *servers.WRAPPERS}


def test_the_walk_stops_when_enough_leak() -> None:
    made = list(crafted_models("A", 3, 1, (MLP,)))
    assert sum(one.leaks for one in made) == 3
    assert made[-1].leaks


def test_a_ground_has_as_many_rounds_behind_it_as_it_says() -> None:
    where = ground_of(MLP, 6, 3)
    assert len(where.past) == 6
    assert where.setting == "running federation"
    assert not where.past[-1]["0.weight"].equal(where.honest["0.weight"])


def test_rows_hold_what_the_detector_said() -> None:
    rows = crafted_rows(crafted_models("A", 2, 1, (MLP,)), 1, Known())
    assert sum(row.leaks for row in rows) == 2
    for row in rows:
        assert 0.0 <= row.suspicion <= 1.0
        assert row.family == "A"
        assert row.net == MLP.name


def test_a_server_that_turns_is_seen_in_its_first_crafted_round() -> None:
    rows = siege_rows(MLP, 26, 1)
    found = {row.recipe: row for row in rows}
    assert found["binning-mean"].warned
    assert found["binning-mean"].trained == 0
    assert not found["binning-mean"].late
    assert found["scan"].sent == 4
