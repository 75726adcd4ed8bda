"""The pure parts of the benchmarks that set leakage beside utility."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sentinel.policy import load_policy
from sentinel.stress.inference.loop import Loop
from sentinel.terms import Action

if TYPE_CHECKING:
    from collections.abc import Callable

    Load = Callable[[str], Any]

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a benchmark as its command does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def figures(load: Load, leak: float, auc: float, spread: float = 0.001) -> Any:
    """Three seeds around a leakage and an AUC."""
    around = spread * values(-1.0, 0.0, 1.0)
    return load("trade_off").Figures(leak + around, auc - around.flip(0), values(0.8, 0.8, 0.8))


def test_less_leakage_at_the_same_utility_dominates(load: Load) -> None:
    trade_off = load("trade_off")
    weak, strong = figures(load, 0.4, 0.9), figures(load, 0.0, 0.9)
    assert trade_off.dominates(strong, weak)
    assert not trade_off.dominates(weak, strong)
    assert trade_off.verdict(weak, strong) == "dominated"
    assert trade_off.verdict(strong, weak) == "dominates"


def test_less_leakage_at_less_utility_dominates_neither_way(load: Load) -> None:
    weak, strong = figures(load, 0.4, 0.9), figures(load, 0.0, 0.7)
    assert load("trade_off").verdict(strong, weak) == "neither"
    assert load("trade_off").verdict(weak, strong) == "neither"


def test_a_difference_within_the_interval_dominates_nothing(load: Load) -> None:
    trade_off = load("trade_off")
    one = trade_off.Figures(values(0.0, 0.2, 0.1), values(0.9, 0.9, 0.9), values(0.8, 0.8, 0.8))
    other = trade_off.Figures(values(0.2, 0.1, 0.1), values(0.9, 0.9, 0.9), values(0.8, 0.8, 0.8))
    assert trade_off.verdict(one, other) == "neither"
    assert trade_off.verdict(one, one) == "neither"


def test_intervals_are_of_paired_differences(load: Load) -> None:
    """Seeds that differ much hide nothing that every seed shows."""
    trade_off, areas = load("trade_off"), values(0.6, 0.7, 0.9)
    one = trade_off.Figures(areas, areas, areas)
    better = trade_off.Figures(areas, areas + 0.01 + 0.0001 * values(0.0, 1.0, 2.0), areas)
    assert trade_off.dominates(better, one)
    leakage, area, accuracy = trade_off.advantages(better, one)
    assert (leakage.low, leakage.high) == (accuracy.low, accuracy.high) == (0.0, 0.0)
    assert 0.0098 < area.low < 0.0101 < area.high < 0.0104


def test_lead_is_one_for_nearer_guesses_and_zero_for_none(load: Load) -> None:
    lead = load("trade_off").lead
    assert lead(values(0.1, 0.2), values(0.3, 0.4, 0.5)) == 1.0
    assert lead(values(0.3, 0.4), values(0.1, 0.2)) == -1.0
    assert lead(values(torch.inf), values(torch.inf, torch.inf)) == 0.0  # no guess at all


def test_reduction_is_that_of_the_mean_above_the_floor(load: Load) -> None:
    reduction = load("trade_off").reduction
    before, after = values(0.9, 0.7), values(0.45, 0.35)
    share, ends = reduction(before, after)
    assert share == pytest.approx(0.5)
    assert (ends.low, ends.high) == pytest.approx((0.5, 0.5))  # each picture lost one half
    share, ends = reduction(before, after, values(0.3, 0.3))
    assert share == pytest.approx(1 - 0.2 / 1.0)
    assert ends.low < share < ends.high


def test_told_gives_mean_and_interval(load: Load) -> None:
    assert load("trade_off").told(values(0.2, 0.2), 1, 100.0) == "20.0 [20.0, 20.0]"


def test_the_largest_values_stay_as_they_are(load: Load) -> None:
    kept = load("defences").largest(values(0.1, -3.0, 2.0, 0.0, -0.5), 0.4)
    assert kept.tolist() == [0.0, -3.0, 2.0, 0.0, 0.0]


def test_what_is_left_out_is_lost_or_carried_over(load: Load) -> None:
    """With it carried over, two rounds of [2, 1] bring all of the second value but one round's."""
    door, net = load("claimed_utility").TopDoor, torch.nn.Linear(1, 1)
    sent = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    local = {"weight": torch.full((1, 1), 2.0), "bias": torch.full((1,), 1.5)}
    loop = Loop(net, torch.nn.functional.mse_loss, 0.1)
    for carries, second in ((False, (2.0, 0.0)), (True, (0.0, 3.0))):
        way = door(0.5, carries)
        first = way.leave("a", 0, sent, local, loop)
        assert (float(first["weight"]), float(first["bias"])) == (2.0, 0.0)
        again = way.leave("a", 1, sent, local, loop)
        assert (float(again["weight"]), float(again["bias"])) == second


def test_fixed_policies_hold_one_rule_that_always_applies(load: Load) -> None:
    policies, mixes = load("policies"), load("mixes")
    for match in mixes.matches(None).values():
        shipped = load_policy(match.shipped).policy
        found = list(policies.contestants(match, match.shipped, quick=False))
        assert [one.inspects for one in found].count(True) == 1
        assert len({one.name for one in found}) == len(found)
        for one in found[2:]:
            (rule,) = one.loaded.policy.rules
            assert rule.when is None
            assert rule.action is Action.RELEASE
            assert rule.max_norm == shipped.always[0].max_norm
        least = [one.loaded.policy.limits.min_patients for one in found[2:]]
        assert least == [None] * (len(found) - 3) + [shipped.limits.min_patients]


def test_every_kind_of_round_is_in_the_mix(load: Load) -> None:
    for match in load("mixes").matches(None).values():
        kinds = match.cycle
        assert any(kind.crafted for kind in kinds)
        assert {kind.records for kind in kinds if not kind.crafted} >= {None, 8, 1}


def test_what_a_policy_withholds_leaks_nothing_and_is_not_averaged(
    load: Load, tmp_path: Path
) -> None:
    """One cycle of the mix under a policy that no update satisfies, through its real guards."""
    policies, mixes = load("policies"), load("mixes")
    match = mixes.matches(None)["hearts"]
    nobody = policies.Contestant("none", policies.fixed({"max_norm": 0.1}, 10_000))
    ran, draw = policies.Ran(), match.draw(0)
    policies.federate(match, nobody, draw, 1, tmp_path, ran)
    assert ran.fates == {"too-few-patients": 4 * len(match.cycle)}
    assert ran.leaks == {"near": [0.0], "lead": [0.0], "told": [0.0]}
    assert ran.scores == [draw.score(draw.start)]


def test_a_picture_leaves_through_the_guard_thinned_out(load: Load) -> None:
    """What stays is 1 / keep times what it was; under a promise the noise is the budget's."""
    defences, claims = load("defences"), load("published_claims")
    scene = claims.Scene.of(1, quick=True)
    site, picture, raw = load("image_attacks").alone(scene.model, scene.data, 0)
    case = defences.Case(site, picture, 100)
    thinned = case.seen("keep 0.5")
    kept = thinned.values != 0
    assert 0.45 < float(kept[raw != 0].double().mean()) < 0.55
    assert torch.allclose(thinned.values[kept], 2 * raw[kept], rtol=1e-3, atol=1e-6)
    private = case.seen(f"epsilon {defences.EPSILON:g}")
    assert float(private.values.std()) == pytest.approx(private.noise_std, rel=0.05)
    assert private.noise_std > 10 * defences.CLIP_NORM
    assert torch.equal(site.update(picture, differentiable=False), raw)  # the model is not touched


@pytest.mark.parametrize(
    ("knobs", "ratio", "multiplier"), [("50:0.035", 50.0, None), ("x1.05:0.035", None, 1.05)]
)
def test_knobs_of_the_benchmark_of_membership_are_all_the_noise(
    load: Load, knobs: str, ratio: float | None, multiplier: float | None
) -> None:
    found = load("membership").with_knobs("tabular-ehr", knobs).policy.always
    asked = [(rule.noise_ratio, rule.noise_multiplier, rule.max_norm) for rule in found]
    assert asked == [(ratio, multiplier, 0.035)]


def test_a_site_whose_scores_rise_has_alarms_and_is_told_of_drift(load: Load) -> None:
    watched = load("site_calibration").watched
    calm = [0.1, 0.15, 0.2, 0.15] * 15
    rising = watched([*calm, *[0.3] * 20], 60, 1)
    assert (rising.rounds, rising.alarms, rising.roomy) == (20, 20, 20)
    assert rising.drift
    assert 0 < rising.before < 20
    barely = watched([*calm, *[0.25] * 20], 60, 1)
    assert (barely.alarms, barely.roomy) == (20, 0)
    steady = watched([*calm, *calm[:20]], 60, 1)
    assert (steady.alarms, steady.drift, steady.order) == (0, False, False)
