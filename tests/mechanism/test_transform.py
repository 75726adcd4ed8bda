"""A plan is carried out in its order, every bound holds, and a promise's base is not weakened."""

from __future__ import annotations

import math

import pytest
import torch

from sentinel.chunks import sum_of_squares
from sentinel.mechanism import GaussianMechanism, Prepared, prepare, transform
from sentinel.source import Held
from sentinel.terms import Action, NormBound, Plan, Treatment
from sentinel.update import Role, Update

from .moves import moved_by


def run(
    deltas: dict,
    plan: Plan,
    entropy: object,
    aliases: dict | None = None,
    base_std: float = 0.0,
) -> Prepared:
    """Carry out a plan; `deltas` holds afterwards what leaves of them."""
    squares = {name: sum_of_squares(delta) for name, delta in deltas.items()}
    base = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    roles = dict.fromkeys(deltas, Role.PARAMETER)
    update = Update(Held(deltas), squares, aliases or {}, base, roles)
    prepared = prepare(update, plan, base_std=base_std)
    deltas.update(transform(update, prepared, kind="delta", entropy=entropy))
    return prepared


def plan_of(treatments: dict[str, Treatment], *bounds: NormBound) -> Plan:
    return Plan(Action.RELEASE, treatments, bounds, ())


def test_every_bound_holds_and_a_tensor_takes_the_smallest_factor(fixed_entropy) -> None:
    deltas = {"a": torch.full((100,), 1.0), "b": torch.full((100,), 1.0)}
    plan = plan_of(
        dict.fromkeys(deltas, Treatment()),
        NormBound(frozenset({"a", "b"}), 1.0),
        NormBound(frozenset({"b"}), 0.01),
    )
    done = run(deltas, plan, fixed_entropy(0))
    assert done.clipped
    assert deltas["b"].norm() <= 0.01
    assert 0.7 < deltas["a"].norm() <= 1.0


def test_max_abs_comes_before_the_clip(fixed_entropy) -> None:
    """One huge value is cut first; clipping first would have crushed all the others."""
    deltas = {"a": torch.tensor([1e6, 0.1, 0.1])}
    plan = plan_of({"a": Treatment(max_abs=0.1)}, NormBound(frozenset({"a"}), 10.0))
    run(deltas, plan, fixed_entropy(0))
    assert deltas["a"].tolist() == pytest.approx([0.1, 0.1, 0.1])


def test_the_bound_holds_before_the_noise_with_the_grid_counted_in(fixed_entropy) -> None:
    deltas = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50}
    bound = NormBound(frozenset({"a"}), 1.0)
    run(deltas, plan_of({"a": Treatment(noise_std=1e-9)}, bound), fixed_entropy(0))
    assert 0.999 < deltas["a"].double().norm() <= 1.0 + 1e-6


@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-2])
def test_noise_much_smaller_than_the_grid_of_the_bound_is_still_there(
    fixed_entropy, ratio: float
) -> None:
    """The grid is finer than the noise, however little of it is asked for."""
    deltas = {"a": torch.zeros(10_000)}
    std = ratio / 100
    done = run(
        deltas,
        plan_of({"a": Treatment(noise_std=std)}, NormBound(frozenset({"a"}), 1.0)),
        fixed_entropy(8),
    )
    assert done.noised == {"a"}
    assert deltas["a"].std().item() == pytest.approx(std, rel=0.05)


def test_noise_is_masked_and_rescaled_with_the_signal(fixed_entropy) -> None:
    deltas = {"a": torch.zeros(200_000)}
    plan = plan_of({"a": Treatment(noise_std=1.0, keep=0.25)}, NormBound(frozenset({"a"}), 1.0))
    done = run(deltas, plan, fixed_entropy(1))
    kept = deltas["a"][deltas["a"] != 0]
    assert done.noised == {"a"}
    assert kept.numel() / 200_000 == pytest.approx(0.25, abs=0.01)
    assert kept.std().item() == pytest.approx(4.0, rel=0.03)


def test_only_the_noise_that_is_missing_is_added(fixed_entropy) -> None:
    for wanted, total in [(0.5, 3.0), (5.0, 5.0)]:
        generator = torch.Generator().manual_seed(5)
        deltas = {"a": 3.0 * torch.randn(100_000, generator=generator)}
        run(deltas, plan_of({"a": Treatment(noise_std=wanted)}), fixed_entropy(2), base_std=3.0)
        assert deltas["a"].std().item() == pytest.approx(total, rel=0.02)


def test_the_stricter_treatment_of_a_tied_name_counts(fixed_entropy) -> None:
    deltas = {"embed": torch.ones(1000)}
    treatments = {"embed": Treatment(), "head": Treatment(noise_std=2.0)}
    bound = NormBound(frozenset({"head"}), 0.1)
    done = run(deltas, plan_of(treatments, bound), fixed_entropy(3), aliases={"head": "embed"})
    assert done.noised == {"embed"}
    assert done.clipped
    assert deltas["embed"].std().item() == pytest.approx(2.0, rel=0.1)
    treatments["head"] = Treatment(action=Action.WITHHOLD)
    assert not run(
        deltas, plan_of(treatments), fixed_entropy(3), aliases={"head": "embed"}
    ).released


def test_the_base_mechanism_clips_to_the_grid_and_adds_its_noise(fixed_entropy) -> None:
    deltas = {"a": torch.full((50_000,), 3.0), "b": torch.tensor(3.0)}
    mechanism = GaussianMechanism(clip_norm=2.0, noise_multiplier=0.5)
    noised, _ = mechanism.apply(moved_by(deltas), fixed_entropy(4))
    assert noised["a"].std().item() == pytest.approx(1.0, rel=0.02)
    expected = 2.0 / math.sqrt(50_001)
    assert noised["a"].mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("shape", ["one huge value", "dense", "many tensors", "within"])
@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 40.0])
def test_the_base_mechanism_moves_the_noise_by_no_more_than_the_clip_norm(
    fixed_entropy, shape: str, clip_norm: float
) -> None:
    """The same noise with and without the update: the distance is what the ledger charges for."""
    generator = torch.Generator().manual_seed(3)
    size = {"one huge value": 1e20, "within": 1e-6 * clip_norm}.get(shape, 1e4)
    deltas = {f"t{i}": torch.zeros(301, dtype=torch.float64) for i in range(5)}
    if shape == "one huge value":
        deltas["t2"][7] = size
    else:
        for delta in deltas.values():
            delta.copy_(size * torch.randn(301, generator=generator, dtype=torch.float64))
    raw = math.sqrt(sum(map(sum_of_squares, deltas.values())))
    nothing = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    mechanism = GaussianMechanism(clip_norm, noise_multiplier=1.0)
    noised, _ = mechanism.apply(moved_by(deltas), fixed_entropy(6))
    bare, _ = mechanism.apply(moved_by(nothing), fixed_entropy(6))
    moved = math.sqrt(sum(sum_of_squares(noised[name] - bare[name]) for name in deltas))
    assert moved <= clip_norm * (1 + 1e-12)
    assert moved >= 0.999 * min(raw, clip_norm) - clip_norm * 2**-11


def test_an_all_zero_update_still_gets_noise(fixed_entropy) -> None:
    deltas = {"a": torch.zeros(1000), "none": torch.zeros(0)}
    noised, _ = GaussianMechanism(1.0, 1.0).apply(moved_by(deltas), fixed_entropy(5))
    assert noised["a"].std().item() == pytest.approx(1.0, rel=0.1)


def test_a_tight_bound_on_one_tensor_leaves_the_grid_of_the_others_alone(fixed_entropy) -> None:
    """Enormous noise beside a tiny bound is still drawn: the grid is as coarse as it must be."""
    deltas = {"a": torch.full((100,), 5.0), "head": torch.full((100,), 5.0)}
    plan = plan_of(
        {"a": Treatment(noise_std=1e7), "head": Treatment(noise_std=1e7)},
        NormBound(frozenset({"a", "head"}), 100.0),
        NormBound(frozenset({"head"}), 1e-3),
    )
    done = run(deltas, plan, fixed_entropy(0))
    assert done.recipes["head"].step < done.recipes["a"].step
    assert done.recipes["head"].factor * 50.0 <= 1e-3
    assert deltas["head"].std().item() == pytest.approx(1e7, rel=0.3)


def test_many_small_tensors_share_draws_and_none_is_used_twice(fixed_entropy) -> None:
    deltas = {str(place): torch.zeros(37, dtype=torch.float64) for place in range(300)}
    treatments = {name: Treatment(noise_std=1.0 + (int(name) % 2)) for name in deltas}
    run(deltas, plan_of(treatments, NormBound(frozenset(deltas), 1.0)), fixed_entropy(1))
    everything = torch.cat(list(deltas.values()))
    assert everything.unique().numel() > 0.99 * everything.numel()
    for odd, std in ((0, 1.0), (1, 2.0)):
        drawn = torch.cat([value for name, value in deltas.items() if int(name) % 2 == odd])
        assert drawn.std().item() == pytest.approx(std, rel=0.05)
