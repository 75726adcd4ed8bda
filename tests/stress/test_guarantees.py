"""Edges of the audit's statistics that their docstrings name, and that no other test is about."""

from __future__ import annotations

import math

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.stress.inference.one_run import Guesses, count, guess, lower_bound, p_value


def test_infinite_scores_are_the_highest_and_the_lowest() -> None:
    scores = torch.tensor([0.0, math.inf, 1.0, -math.inf, 2.0])
    assert guess(scores, 2).tolist() == [0, 1, 0, -1, 0]


def test_no_guess_at_all_is_nothing_to_count() -> None:
    with pytest.raises(MisuseError, match="at least one guess"):
        count(torch.zeros(4, dtype=torch.int8), torch.tensor([True, False, True, False]))


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("made", [1, 10, 300])
def test_all_right_is_as_likely_as_every_coin_alone(epsilon: float, made: int) -> None:
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert p_value(Guesses(500, made, made), epsilon, 0.0) == pytest.approx(chance**made)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf])
def test_a_confidence_or_delta_that_is_no_probability_is_refused(bad: float) -> None:
    found = [Guesses(10, 4, 3)]
    with pytest.raises(MisuseError, match="between 0 and 1"):
        lower_bound(found, 0.0, confidence=bad)
    with pytest.raises(MisuseError, match="from 0 to 1"):
        lower_bound(found, bad)
