"""Edges of the mechanisms that their docstrings name, and that no other test is about."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentinel.chunks import sum_of_squares
from sentinel.errors import Withheld
from sentinel.mechanism import (
    GaussianMechanism,
    Recipe,
    add_noise_,
    clip_factor,
    grid_step,
    prepare,
    rounding_reach,
    transform,
    treat_all,
)
from sentinel.source import Held
from sentinel.terms import Action, NormBound, Plan, Reason, Treatment
from sentinel.update import Role, Update

from .moves import moved_by


@pytest.mark.parametrize("squares", [[1e308, 1e308], [1.7e308] * 20, [math.inf, 1.0]])
def test_a_norm_beyond_float64_is_refused(squares: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clip_factor(squares, 1.0)


@given(scales=st.lists(st.integers(1, 2**23 - 1), min_size=1, max_size=40))
def test_the_smallest_steps_of_float32_break_no_bound_of_2_to_the_minus_100(
    scales: list[int],
) -> None:
    """Subnormal values beside one that is large enough to be clipped."""
    tensor = torch.tensor([2.0**-99, *(scale * 2.0**-149 for scale in scales)])
    tensor.mul_(clip_factor([sum_of_squares(tensor)], 2.0**-100))
    assert 0.0 < math.sqrt(sum_of_squares(tensor)) <= 2.0**-100


def test_a_norm_of_2_to_the_100_bounds_becomes_nothing() -> None:
    assert clip_factor([2.0**200], 1.0) == 0.0
    assert clip_factor([2.0**198], 1.0) > 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_grid_without_a_bound_or_with_no_noise_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        grid_step(bad, 10, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        grid_step(1.0, 10, bad)


def test_a_grid_needs_one_finite_figure() -> None:
    with pytest.raises(ValueError, match="one of them finite"):
        grid_step(math.inf, 10)
    assert grid_step(math.inf, 10, 1.0) == 2.0**-10
    assert grid_step(1.0, 10, math.inf) == grid_step(1.0, 10) == grid_step(1.0, 10, 1e9)


def test_the_grid_of_no_values_is_that_of_one() -> None:
    assert grid_step(1.0, 0, 2.0) == grid_step(1.0, 1, 2.0)
    assert rounding_reach(0.25, 0) == 0.0


def test_without_a_grid_nothing_is_moved() -> None:
    assert rounding_reach(0.0, 1000) == 0.0


@given(
    max_norm=st.floats(1e-12, 1e12),
    coordinates=st.integers(1, 10**10),
    std=st.floats(1e-12, 1e12),
)
def test_the_noise_is_always_as_many_steps_wide_as_its_tables_go(
    max_norm: float, coordinates: int, std: float
) -> None:
    step = grid_step(max_norm, coordinates, std)
    assert math.frexp(step)[0] == 0.5
    assert 2.0**10 <= std / step <= 2.0**46
    small = rounding_reach(step, coordinates) <= 2.0**-12 * max_norm
    assert small or step <= std * 2.0**-45


@given(values=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=50))
def test_no_vector_is_moved_further_than_the_reach(values: list[int]) -> None:
    """Thirds of a step, and halves, which move the furthest."""
    step = 2.0**-6
    tensor = torch.tensor(values, dtype=torch.float64) * step / 6
    moved = tensor - (tensor / step).round() * step
    assert float(moved.norm()) <= rounding_reach(step, len(values)) * (1 + 1e-12)
    furthest = torch.full((len(values),), step / 2, dtype=torch.float64)
    assert float(furthest.norm()) == pytest.approx(rounding_reach(step, len(values)))


class Dry:
    """Entropy that must not be asked for any."""

    def fill(self, _: memoryview) -> None:
        """Fail."""
        pytest.fail("entropy was drawn")

    def branch(self) -> Dry:
        """Another."""
        return self


def sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: sum_of_squares(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_promise_without_noise_or_bound_treats_nothing(bad: float) -> None:
    tensors = {"a": torch.ones(3)}
    for mechanism in (GaussianMechanism(bad, 1.0), GaussianMechanism(1.0, bad)):
        with pytest.raises(ValueError, match=r"above 0|wide"):
            mechanism.apply(moved_by(tensors), Dry())
    assert tensors["a"].tolist() == [1.0] * 3


def test_a_promise_on_what_cannot_be_measured_draws_nothing() -> None:
    tensors = {name: torch.tensor([1e154], dtype=torch.float64) for name in "ab"}
    with pytest.raises(ValueError, match="not finite"):
        GaussianMechanism(1.0, 1.0).apply(moved_by(tensors), Dry())


def test_a_promise_on_what_grew_since_it_was_measured_gives_nothing(fixed_entropy) -> None:
    tensors = {"a": torch.ones(1000)}
    deltas = moved_by(tensors)
    tensors["a"].mul_(1e3)
    with pytest.raises(Withheld) as caught:
        GaussianMechanism(1.0, 1.0).apply(deltas, fixed_entropy(1))
    assert caught.value.reason is Reason.LOCAL_MODEL_CHANGED


@pytest.mark.parametrize("tensors", [{}, {"none": torch.zeros(0, 3)}], ids=["none", "empty"])
def test_what_has_no_values_needs_no_draws(tensors: dict[str, torch.Tensor]) -> None:
    made, squares = GaussianMechanism(1.0, 1.0).apply(moved_by(tensors), Dry())
    assert {name: made[name].shape for name in made} == {n: t.shape for n, t in tensors.items()}
    assert squares == dict.fromkeys(tensors, 0.0)
    recipes = dict.fromkeys(tensors, Recipe(std=1.0, step=2.0**-20, keep=0.5))
    assert treat_all(Held(tensors), recipes, Dry())[1] == squares
    add_noise_(torch.zeros(0), 1.0, 2.0**-20, Dry())


def test_a_0d_tensor_is_one_coordinate_and_gets_one_draw(fixed_entropy) -> None:
    for make in (
        lambda t: treat_all(Held({"": t}), {"": Recipe(std=1.0, step=2.0**-20)}, fixed_entropy(1)),
        lambda t: GaussianMechanism(8.0, 0.125).apply(moved_by({"": t}), fixed_entropy(1)),
    ):
        (one, squares), (row, _) = make(torch.tensor(3.0)), make(torch.tensor([3.0]))
        assert one[""].shape == ()
        assert float(one[""]) == float(row[""]) != 3.0
        assert squares[""] == pytest.approx(float(one[""]) ** 2)
    alone, row = torch.tensor(3.0), torch.tensor([3.0])
    add_noise_(alone, 1.0, 2.0**-20, fixed_entropy(1))
    add_noise_(row, 1.0, 2.0**-20, fixed_entropy(1))
    assert float(alone) == float(row) != 3.0


def test_noise_of_no_width_leaves_the_tensor_as_it_is() -> None:
    tensor = torch.tensor([0.1, math.nan])
    add_noise_(tensor, 0.0, 2.0**-20, Dry())
    assert float(tensor[0]) == float(torch.tensor(0.1))


@pytest.mark.parametrize(
    ("std", "step"),
    [(1.0, 0.3), (1.0, 0.0), (1.0, math.nan), (1.0, 2.0**-9), (1.0, 2.0**-47), (math.inf, 0.5)],
)
def test_noise_on_a_grid_that_it_has_no_tables_for_is_refused(std: float, step: float) -> None:
    tensor = torch.ones(5)
    with pytest.raises(ValueError, match=r"power of two|wide"):
        add_noise_(tensor, std, step, Dry())
    assert tensor.tolist() == [1.0] * 5


def test_values_that_are_not_finite_stay_so_and_spoil_no_other(fixed_entropy) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0])
    recipe = Recipe(std=1e-3, step=2.0**-20)
    made, squares = treat_all(Held({"": values}), {"": recipe}, fixed_entropy(2))
    clean = treat_all(Held({"": values.nan_to_num(0.0, 0.0, 0.0)}), {"": recipe}, fixed_entropy(2))
    assert torch.equal(made[""][3:], clean[0][""][3:])
    assert torch.equal(made[""][:3].nan_to_num(7.0), values[:3].nan_to_num(7.0))
    assert not math.isfinite(squares[""])
    assert math.isfinite(clean[1][""])
    add_noise_(values, 1e-3, 2.0**-20, fixed_entropy(2))
    assert torch.equal(values.nan_to_num(7.0), made[""].nan_to_num(7.0))


def test_a_tensor_that_is_not_contiguous_is_refused_whole() -> None:
    tensor = torch.ones(4, 6).t()
    with pytest.raises(RuntimeError, match="view"):
        add_noise_(tensor, 1.0, 2.0**-20, Dry())
    assert torch.equal(tensor, torch.ones(6, 4))


def test_what_was_treated_is_not_written_to(fixed_entropy) -> None:
    tensor = torch.linspace(-1, 1, 1000)
    before = tensor.clone()
    for recipe in (Recipe(), Recipe(0.5, 0.5, 1e-3, 2.0**-20, 0.5)):
        made, _ = treat_all(Held({"": tensor}), {"": recipe}, fixed_entropy(1))
        assert torch.equal(made[""], before) is (recipe == Recipe())
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_meets_no_bound(bad: float) -> None:
    deltas = {"a": torch.tensor([bad]), "b": torch.zeros(0)}
    update = Update(Held(deltas), sums(deltas), {}, deltas, dict.fromkeys(deltas, Role.PARAMETER))
    treatments = dict.fromkeys(deltas, Treatment())
    plan = Plan(Action.RELEASE, treatments, (NormBound(frozenset(deltas), 1.0),), ())
    with pytest.raises(ValueError, match="not finite"):
        prepare(update, plan, base_std=0.0)


def test_nothing_is_clipped_of_an_update_of_zeros() -> None:
    deltas = {"a": torch.zeros(3), "none": torch.zeros(0), "stays": torch.zeros(2)}
    update = Update(Held(deltas), sums(deltas), {}, deltas, dict.fromkeys(deltas, Role.PARAMETER))
    treatments = dict.fromkeys(deltas, Treatment(noise_std=0.5)) | {
        "stays": Treatment(Action.WITHHOLD)
    }
    plan = Plan(Action.RELEASE, treatments, (NormBound(frozenset(deltas), 1e-6),), ())
    prepared = prepare(update, plan, base_std=0.0)
    assert prepared.noised == prepared.released == {"a", "none"}
    assert not prepared.clipped
    assert {recipe.std for recipe in prepared.recipes.values()} == {0.5}


@pytest.mark.parametrize(
    "bad",
    [{"std": math.nan}, {"std": -1.0}, {"max_abs": math.nan}, {"max_abs": -1.0}]
    + [{"factor": factor} for factor in (math.nan, -0.1, 1.1)],
)
def test_a_recipe_that_would_do_less_than_asked_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Recipe(**bad)


@pytest.mark.parametrize("std", [math.nan, -1.0])
def test_noise_that_is_no_width_is_refused_and_the_tensor_stays(std: float, fixed_entropy) -> None:
    tensor = torch.ones(5)
    with pytest.raises(ValueError, match="must be"):
        add_noise_(tensor, std, 2.0**-20, fixed_entropy(0))
    assert torch.equal(tensor, torch.ones(5))


def test_a_plan_whose_noise_is_no_number_is_refused() -> None:
    deltas = {"w": torch.ones(3)}
    base = {"w": torch.zeros(3)}
    update = Update(Held(deltas), {"w": 3.0}, {}, base, {"w": Role.PARAMETER})
    plan = Plan(
        Action.RELEASE,
        {"w": Treatment(noise_std=math.nan)},
        (NormBound(frozenset({"w"}), 1.0),),
        (),
    )
    with pytest.raises(ValueError, match="must be"):
        prepare(update, plan, base_std=0.0)


def test_a_name_without_a_recipe_is_not_read(fixed_entropy) -> None:
    source = Held({"w": torch.ones(3), "other": torch.full((3,), math.nan)})
    made, squares = treat_all(source, {"w": Recipe()}, fixed_entropy(0))
    assert list(made) == list(squares) == ["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_tensor_without_a_recipe_nothing_leaves_in_either_form(fixed_entropy, dtype) -> None:
    """Not even noise: the global model's bits as weights, zeros as a delta."""
    base = {name: torch.linspace(-1, 1, 5).to(dtype) for name in ("goes", "stays")}
    local = {name: value + 1 for name, value in base.items()}
    treatments = {"goes": Treatment(noise_std=0.5), "stays": Treatment(Action.WITHHOLD)}
    plan = Plan(Action.RELEASE, treatments, (NormBound(frozenset(base), 1.0),), ())
    for kind, unchanged in (("weights", base["stays"]), ("delta", torch.zeros(5, dtype=dtype))):
        update = Update.from_states(base, local)
        prepared = prepare(update, plan, base_std=0.0)
        assert set(prepared.recipes) == {"goes"}
        out = transform(update, prepared, kind=kind, entropy=fixed_entropy(3))
        assert torch.equal(out["stays"], unchanged)
        assert out["stays"].data_ptr() not in (base["stays"].data_ptr(), local["stays"].data_ptr())
        assert not torch.equal(out["goes"], base["goes"] if kind == "weights" else unchanged)
