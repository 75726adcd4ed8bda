"""Edges of the adaptive bound that its docstrings name, and that no other test is about."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.adaptive import Bound, Memory, Seen, fill_of, shown, sketch
from sentinel.adaptive.sketch import WIDTH
from sentinel.bounds import possible_plans
from sentinel.policy.parsing import parse_toml
from sentinel.policy.schema import Policy
from sentinel.terms import Action, AutoNorm, Evidence, Plan, Treatment

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS = AutoNorm(0.1, 10.0)
PLAIN = 'schema = 1\nname = "p"\n[[rule]]\nid = "all"\nmax_norm = 1.0\n'
LEAKY = '[[rule]]\nid = "leaky"\nwhen = { sensitivity = 0.5 }\nmax_norm = 0.5\n'
STAYS = '[[rule]]\nid = "stays"\nwhen = { sensitivity = 0.7 }\naction = "withhold-update"\n'


class Paper:
    """Keeps a text in memory."""

    def __init__(self) -> None:
        """Empty."""
        self.text: str | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """There is nobody else."""
        yield

    def read(self) -> str | None:
        """The text."""
        return self.text

    def write(self, text: str) -> None:
        """Replace it."""
        self.text = text


def looked(number: int, model: list[float]) -> Seen:
    return Seen(f"{number:064x}", number, "0" * 64, 0.7, 0.0, tuple(model), 1000)


@pytest.mark.parametrize(
    "values",
    [
        lambda _: math.nan,
        lambda _: math.inf,
        lambda at: (-1) ** at * 1.7e308,
        lambda at: (-1) ** (at // 2) * 1e200 * (1 + at % 3),
    ],
    ids=["NaN", "Inf", "largest", "squares beyond float64"],
)
def test_the_steps_of_a_global_model_that_is_not_sound_count_as_none(values) -> None:
    """The bound, and what is kept of it on disk, are those of a model that was not seen."""
    bounds, texts = [], []
    for crafted in (True, False):
        memory = Memory(paper := Paper())
        for number in range(6):
            model = [values(number + at) if crafted else math.nan for at in range(WIDTH)]
            memory.learn({"r": LIMITS}, {"r": looked(number, model)}, {"r": 1.0})
        bounds.append(memory.norms({"r": LIMITS}))
        texts.append(paper.text)
    assert bounds[0] == bounds[1]
    assert texts[0] == texts[1]


def test_a_step_is_known_again_two_rounds_after_an_unsound_model() -> None:
    bound = Bound.fresh(LIMITS)
    for number, value in enumerate([1.0, 2.0, math.nan, 3.0, 4.0]):
        bound = bound.after(looked(number, [value] * WIDTH), 1.0, LIMITS)
        assert bool(bound.step) is (number in {1, 4})


def test_a_0d_tensor_is_one_value() -> None:
    found = shown({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, ["w"], deltas=False)["w"]
    assert (found.values, found.present, found.energy, found.fourth) == (1, 1, 4.0, 16.0)
    assert sorted(map(abs, sketch({"w": torch.tensor(3.0)}, ["w"]))) == [0.0] * (WIDTH - 1) + [3.0]


def test_nothing_is_measured_of_an_empty_tensor() -> None:
    found = shown({}, {"w": torch.zeros(0, 4)}, ["w"], deltas=True)["w"]
    assert (found.values, found.present, found.energy, found.fourth) == (0, 0, 0.0, 0.0)
    assert sketch({"w": torch.zeros(0, 4)}, ["w"]) == sketch({}, []) == (0.0,) * WIDTH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_are_added_up_in_float64(dtype: torch.dtype) -> None:
    """300 squares of 1.5 leave the whole numbers that bfloat16 has; float16 has no 300 * 60^4."""
    tensor = torch.full((300,), 60.0, dtype=dtype)
    found = shown({}, {"w": tensor}, ["w"], deltas=True)["w"]
    assert (found.energy, found.fourth) == (300 * 60.0**2, 300 * 60.0**4)
    assert sketch({"w": tensor}, ["w"]) == sketch({"w": tensor.double()}, ["w"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_what_is_not_finite_gives_no_fill(bad: float, noise: float) -> None:
    released = {"w": torch.tensor([bad, 1.0])}
    parts = shown({}, released, ["w"], deltas=True)
    assert not math.isfinite(parts["w"].energy)
    plan = Plan(Action.RELEASE, {"w": Treatment(noise_std=noise)}, (), ())
    assert fill_of(parts, [plan], 1.0, {}) is None
    assert not all(map(math.isfinite, sketch(released, ["w"])))


def plans(text: str) -> list[Plan]:
    policy = parse_toml(text.encode(), "policy.toml", Policy)
    found = []
    for score in (0.0, 0.6, 1.0):
        evidence = Evidence({"w": 10}, score, 0.0, 0.0, unhealthy=False)
        found.append(possible_plans(policy, evidence))
    assert found[0] == found[1] == found[2]  # the score has no part in it
    return found[0]


def test_without_a_rule_on_the_score_one_plan_is_possible() -> None:
    assert [plan.bounds[0].max_norm for plan in plans(PLAIN)] == [1.0]


def test_plans_above_a_score_that_withholds_are_none() -> None:
    found = plans(PLAIN + LEAKY + STAYS)
    assert [min(bound.max_norm for bound in plan.bounds) for plan in found] == [1.0, 0.5]


def test_a_policy_that_lets_nothing_out_has_no_plan() -> None:
    closed = PLAIN + '[[rule]]\nid = "closed"\naction = "withhold-update"\n'
    assert plans(closed) == []
