"""Every figure and option in docs/budget.md is what the code says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import typer

from sentinel.cli import budget
from sentinel.privacy import DpSgdEvent, GaussianEvent, Promise, PromisedEvent, by_accountant
from sentinel.privacy.accounting import EXACT
from sentinel.privacy.loss import LOSS
from sentinel.privacy.renyi import RENYI
from sentinel.terms import Adjacency, Unit

TEXT = (Path(__file__).parent.parent.parent / "docs" / "budget.md").read_text()
FLAT = " ".join(TEXT.split())
ADD, REPLACE = Adjacency.ADD_OR_REMOVE, Adjacency.REPLACE


def site(z: float, **slack: float) -> GaussianEvent:
    return GaussianEvent(unit=Unit.SITE, adjacency=REPLACE, noise_multiplier=z, **slack)


def training(z: float, rate: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(
        unit=Unit.PATIENT,
        adjacency=ADD,
        noise_multiplier=z,
        sampling="poisson" if rate < 1 else "none",
        sampling_rate=rate,
        steps=steps,
        log_ratio=0.0,
        mass=0.0,
    )


def epsilons(
    event: PromisedEvent, times: int, unit: Unit, adjacency: Adjacency
) -> dict[str, float]:
    return by_accountant({event: times}, Promise(unit, adjacency, 8.0, 1e-5))


@pytest.mark.parametrize(
    ("row", "event", "times", "unit", "adjacency"),
    [
        ("site, noise 1, one release", site(1.0), 1, Unit.SITE, ADD),
        ("site, noise 1, one release", site(1.0), 1, Unit.SITE, REPLACE),
        ("site, noise 20, 100 releases", site(20.0), 100, Unit.SITE, REPLACE),
        ("the same 100 releases, for a patient", site(20.0), 100, Unit.PATIENT, ADD),
        (
            "patient, noise 1.1, rate 0.01, 4000 steps",
            training(1.1, 0.01, 4000),
            1,
            Unit.PATIENT,
            ADD,
        ),
        (
            "patient, noise 1.1, rate 0.01, 4000 steps",
            training(1.1, 0.01, 4000),
            1,
            Unit.PATIENT,
            REPLACE,
        ),
        ("patient, noise 1, rate 1/8, 8 steps", training(1.0, 1 / 8, 8), 1, Unit.PATIENT, ADD),
        ("five such rounds", training(1.0, 1 / 8, 8), 5, Unit.PATIENT, ADD),
    ],
)
def test_the_table_of_accountants(row, event, times, unit, adjacency) -> None:
    found = epsilons(event, times, unit, adjacency)
    columns = [f"{found[name]:.3f}" if name in found else "" for name in (EXACT, RENYI, LOSS)]
    line = " ".join(f"| {row} | {adjacency} | {' | '.join(columns)} |".split())
    assert line in FLAT


def test_the_figures_in_sentences() -> None:
    assert f"epsilon {epsilons(training(1.1, 1.0, 40), 1, Unit.PATIENT, ADD)[EXACT]:.1f}" in FLAT
    poisson = epsilons(training(1.1, 0.01, 4000), 1, Unit.PATIENT, ADD)[LOSS]
    assert f"cost {poisson:.2f}." in FLAT
    ideal = epsilons(site(1.0), 1, Unit.SITE, ADD)[EXACT]
    drawn = epsilons(site(1.0, log_ratio=1e-4, mass=1e-25), 1, Unit.SITE, ADD)[EXACT]
    assert f"epsilon {ideal:.5f} becomes {drawn:.4f}." in FLAT
    for epsilon, factor in ((1, "2.7"), (4, "55"), (8, "2981")):
        assert round(math.exp(epsilon), 1 if epsilon == 1 else 0) == float(factor)
        assert factor in FLAT


@pytest.mark.parametrize("command", ["show", "forecast"])
def test_the_options_are_those_of_the_command(command: str) -> None:
    told = TEXT.split(f"| option of `budget {command}` | |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `(--[a-z-]+)", told, re.MULTILINE))
    group = typer.main.get_command(budget.app)
    options = {option for parameter in group.commands[command].params for option in parameter.opts}
    assert named == options - {"--help"}
