"""What a release shows: how full its bound was, and which of the possible plans made it."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch

from sentinel.adaptive import fill_of, shown
from sentinel.terms import Action, Plan, Treatment


def plan_of(**treatments: Treatment) -> Plan:
    return Plan(Action.RELEASE, treatments, (), ())


def released(
    update: torch.Tensor, treatment: Treatment, generator: torch.Generator
) -> torch.Tensor:
    """The update as it leaves: noised, masked, rescaled."""
    out = update + treatment.noise_std * torch.randn(update.shape, generator=generator)
    mask = torch.rand(update.shape, generator=generator) < treatment.keep
    return out * mask / treatment.keep


def vector(count: int, norm: float, seed: int = 0) -> torch.Tensor:
    update = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return update * (norm / update.norm())


def fill(delta: torch.Tensor, *plans: Plan, used: float = 1.0) -> tuple[float, float]:
    parts = shown({}, {"w": delta}, ["w"], deltas=True)
    found = fill_of(parts, plans, used, {})
    assert found is not None
    return found.value, found.blur


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("deltas", [False, True])
def test_what_left_is_measured_and_left_alone(dtype: torch.dtype, deltas: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Over several pieces, in any layout; nothing that will leave is written to."""
    change = torch.zeros(300, 400)
    change[5, 7], change[299, 399] = 3.0, -2.0
    base = {"w": torch.ones(300, 400, dtype=dtype)}
    out = {"w": (change if deltas else change + 1).to(dtype).t().contiguous().t()}
    before = out["w"].clone()
    found = shown(base, out, ["w"], deltas=deltas)["w"]
    assert (found.values, found.present, found.energy, found.fourth) == (120_000, 2, 13.0, 97.0)
    assert torch.equal(out["w"], before)
    assert torch.equal(base["w"], torch.ones(300, 400, dtype=dtype))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize("norm", [0.2, 1.0])
def test_the_fill_is_unbiased_and_its_blur_is_right(ratio: float, keep: float, norm: float) -> None:
    """Mean over 300 releases within 4 standard errors; spread as said, and no more than doubled."""
    treatment = Treatment(noise_std=ratio * 2.0 / math.sqrt(400), keep=keep)
    generator = torch.Generator().manual_seed(1)
    update = vector(400, 2.0 * norm)
    looks = [
        fill(released(update, treatment, generator), plan_of(w=treatment), used=2.0)
        for _ in range(300)
    ]
    values = [value for value, _ in looks]
    error = stdev(values) / math.sqrt(len(values))
    assert fmean(values) == pytest.approx(norm**2, abs=4 * error + 1e-6)
    said = math.sqrt(fmean(blur for _, blur in looks))
    assert stdev(values) <= said * 1.15 + 1e-6
    assert said <= stdev(values) * 2 + 1e-6 or ratio == 0.0 or norm < 1.0


@pytest.mark.parametrize("truth", [0, 1, 2])
def test_the_plan_is_told_from_the_released_values(truth: int) -> None:
    """Of those that a score may have led to, without being told which."""
    plans = [
        plan_of(w=Treatment(noise_std=0.1)),
        plan_of(w=Treatment(noise_std=0.2)),
        plan_of(w=Treatment(noise_std=0.2, keep=0.5)),
    ]
    generator = torch.Generator().manual_seed(truth)
    out = released(vector(5000, 0.5), plans[truth].treatments["w"], generator)
    assert fill(out, *plans) == fill(out, plans[truth])


def test_sparse_updates_without_noise_are_not_taken_for_masked_ones() -> None:
    """Rows of an embedding that no record touched did not change."""
    update = vector(1000, 0.5)
    update[300:] = 0.0
    plans = [plan_of(w=Treatment()), plan_of(w=Treatment(keep=0.25))]
    value, blur = fill(update, *plans)
    assert value == pytest.approx(float(update.norm() ** 2))
    assert blur == 0.0


def test_noise_lost_in_the_last_digit_is_not_taken_for_a_mask() -> None:
    """Of float32 weights near 1, noise of 1e-7 leaves a third as they are."""
    base = torch.ones(10_000)
    out = base + 1e-7 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    parts = shown({"w": base}, {"w": out}, ["w"], deltas=False)
    assert parts["w"].present < 9_000
    whole = [plan_of(w=Treatment(noise_std=1e-7)), plan_of(w=Treatment(noise_std=1e-7, keep=0.25))]
    assert fill_of(parts, whole, 1e-5, {}) == fill_of(parts, whole[:1], 1e-5, {})


def test_a_tensor_that_was_withheld_leaves_the_fill_unknown() -> None:
    """Its part of the norm is not seen; a guess would lower the bound."""
    stays = Treatment(action=Action.WITHHOLD)
    plans = [plan_of(a=Treatment(), b=Treatment()), plan_of(a=Treatment(), b=stays)]
    out = {"a": vector(100, 0.5), "b": torch.zeros(100)}
    noisy = [
        plan_of(a=Treatment(noise_std=0.1), b=Treatment(noise_std=0.1)),
        plan_of(a=Treatment(noise_std=0.1), b=stays),
    ]
    parts = shown({}, {**out, "a": out["a"] + 0.1 * vector(100, 10.0, 3)}, ["a", "b"], deltas=True)
    assert fill_of(parts, noisy, 1.0, {}) is None
    assert fill_of(parts, plans[1:], 1.0, {}) is None


def test_nothing_is_seen_where_nothing_is() -> None:
    empty = shown({}, {"w": torch.zeros(0)}, ["w"], deltas=True)
    assert fill_of(empty, [plan_of(w=Treatment())], 1.0, {}) is None
    assert fill_of({}, [plan_of()], 1.0, {}) is None
    full = shown({}, {"w": torch.ones(3)}, ["w"], deltas=True)
    assert fill_of(full, [], 1.0, {}) is None


def test_a_tied_tensor_gets_the_strictest_that_any_of_its_names_asks_for() -> None:
    plan = plan_of(w=Treatment(noise_std=0.1), tied=Treatment(noise_std=0.3))
    parts = shown({}, {"w": vector(500, 1.0)}, ["w"], deltas=True)
    alone = fill_of(parts, [plan_of(w=Treatment(noise_std=0.3))], 1.0, {})
    assert fill_of(parts, [plan], 1.0, {"tied": "w"}) == alone
