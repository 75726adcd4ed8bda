"""Leakage falls with noise, and utility is that of models that learned through the guard."""

from __future__ import annotations

from sentinel.stress.lab.curves import _leak, turns
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.knobs import Knob, Turned, turned
from sentinel.stress.lab.plan import Item
from sentinel.stress.lab.setting import Setting
from sentinel.stress.lab.utility import learned

SOON = Deadline.after(0.0)


def late() -> Deadline:
    """In ten minutes from now: a test is collected long before it runs."""
    return Deadline.after(600.0)


def test_leakage_falls_with_noise_on_the_same_records(table, plain, tmp_path) -> None:
    item = Item(Setting(records=1), "rows", 1)
    found = {}
    for noise in (0.0, 40.0):
        variant = turned(plain(norm=10.0), Turned(Knob.NOISE_RATIO, noise))
        found[noise], kept = _leak(table, variant, item, tmp_path / f"{noise}", 0, SOON, late())
        assert kept == 0
    assert found[0.0].mean == 1.0
    assert found[40.0].mean < 0.5


def test_too_much_noise_costs_utility(table, plain, tmp_path) -> None:
    """Six federations: what noise alone has made of a net is right by chance once in a while."""
    free = learned(table, None, tmp_path, 0, 6, late(), late())
    drowned = learned(table, plain(noise=500.0, norm=1.0), tmp_path, 0, 6, late(), late())
    assert free.metric == drowned.metric == "AUC"
    assert free.mean > drowned.mean + 0.1


def test_a_federation_that_is_not_through_is_left_out(table, tmp_path) -> None:
    assert learned(table, None, tmp_path, 0, 1, SOON, SOON) is None


def test_turns_begin_with_the_policy_and_the_ends_of_the_noise(plain) -> None:
    words = [turn.words for turn in turns(plain())]
    assert words[:2] == ["the policy as it is", "noise_ratio 0"]
    assert {"keep 0.1", "max_norm 0.025", "noise_ratio 20"} <= set(words)


def test_noise_on_each_value_is_turned_where_a_policy_has_it(plain) -> None:
    """Around its own value, since over a wide model it is far above every ratio that is tried."""
    words = [turn.words for turn in turns(plain(more="noise_multiplier = 2.0"))]
    own = [one for one in words if one.startswith("noise_multiplier")]
    assert own == ["noise_multiplier 0.2", "noise_multiplier 0.6", "noise_multiplier 6"]
    assert not any("multiplier" in turn.words for turn in turns(plain()))
