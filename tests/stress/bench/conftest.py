"""Fixtures of the bench's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sentinel.stress.bench.baselines import BASELINES
from sentinel.stress.bench.figures import Seen
from sentinel.stress.bench.seen import CraftedRow, HonestRow

if TYPE_CHECKING:
    from collections.abc import Sequence


def honest(
    suspicion: float, *, run: int = 0, number: int = 0, broken: bool = False, other: float = 0.0
) -> HonestRow:
    """One honest round, of which every baseline says `other`."""
    scores = dict.fromkeys(BASELINES, other)
    return HonestRow(
        "plain",
        "net",
        run,
        number,
        suspicion,
        "honest",
        unhealthy=False,
        broken=broken,
        baselines=scores,
    )


def crafted(  # noqa: PLR0913 - one free choice each, by keyword
    suspicion: float,
    *,
    family: str = "A",
    leaks: bool = True,
    verdict: str = "binning",
    wrapper: str = "plain",
    other: float = 0.0,
) -> CraftedRow:
    """One crafted model, of which every baseline says `other`."""
    scores = dict.fromkeys(BASELINES, other)
    return CraftedRow(
        family,
        "recipe",
        wrapper,
        "net",
        "first round",
        leaks,
        0.8,
        0.2,
        suspicion,
        suspicion,
        verdict,
        scores,
    )


@pytest.fixture
def seen() -> Seen:
    """A thousand honest rounds of ten runs, two of them loud, and models of two families."""
    rounds: Sequence[HonestRow] = [
        honest(0.6 if index in {5, 6} else index / 10_000, run=index // 100, number=index % 100)
        for index in range(1000)
    ]
    models = [crafted(0.9) for _ in range(8)]
    models += [crafted(0.55, verdict="honest"), crafted(0.05), crafted(0.0, leaks=False)]
    models += [crafted(0.9, family="C", verdict="magnification", wrapper="mixed", other=1.0)] * 2
    models += [crafted(0.1, family="C", wrapper="mixed", other=1.0)] * 2
    return Seen(rounds, models)
