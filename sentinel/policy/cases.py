"""Policy test files: given evidence, what has to happen, and by which rules.

A test file lies beside its policy (`chest-xray.toml`, `chest-xray.test.toml`). It has to cover the
policy: each rule applies in at least one case, and each rule with `when` stays out of at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sentinel.policy.decide import KNOBS, decide, released_values, unit_stds
from sentinel.policy.fields import ActionWord, Glob, Identifier, Norm, Strict
from sentinel.policy.globs import EVERYTHING, matches
from sentinel.policy.parsing import parse_toml
from sentinel.terms import Evidence

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from sentinel.policy.decide import Knob
    from sentinel.policy.schema import Policy
    from sentinel.terms import Plan

_CLOSE = 1e-9  # relative; a ratio is turned into a standard deviation and back

Score = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**15)]


class Given(Strict):
    """The evidence of a case; what is left out is calm."""

    sensitivity: Score = 0.0
    suspicion: Score = 0.0
    budget_spent: Score = 0.0
    unhealthy: bool = False
    auto_norms: dict[Identifier, Norm] = Field(
        default={}, description='rule -> what its max_norm = "auto" has come to; else its start'
    )
    parameters: dict[str, Count] = Field(
        default={"weight": 1000, "bias": 10}, min_length=1, description="name -> number of values"
    )


class Expected(Strict):
    """What has to come out; what is left out is not looked at.

    `max_norm`, `max_abs`, `noise_ratio`, `noise_multiplier` and `keep` are the values in force for
    each released parameter that `match` names. A parameter has one noise, the larger of the two
    that rules ask for; `noise_ratio` and `noise_multiplier` both tell it, each in its own unit.
    """

    action: ActionWord
    rules: Annotated[tuple[Identifier, ...], Field(strict=False)] | None = None
    withheld: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    match: Annotated[tuple[Glob, ...], Field(strict=False, min_length=1)] = (EVERYTHING,)
    max_norm: float | None = None
    max_abs: float | None = None
    noise_ratio: float | None = None
    noise_multiplier: float | None = None
    keep: float | None = None


class Case(Strict):
    """One case: a name that says the fact, evidence, and what is expected."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    evidence: Given = Given()
    expect: Expected


class CaseFile(Strict):
    """A whole test file."""

    schema_version: int = Field(alias="schema", ge=1, le=1)
    cases: Annotated[tuple[Case, ...], Field(strict=False, min_length=1, max_length=10_000)] = (
        Field(alias="case")
    )


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of one case; it passed where `problems` is empty."""

    name: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaseReport:
    """What became of a test file.

    Attributes:
        results: one for each case, in file order.
        uncovered: what the cases leave untested, one sentence each; not empty is a failure.
    """

    results: tuple[CaseResult, ...]
    uncovered: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every case passed and every rule is covered."""
        return not self.uncovered and not any(result.problems for result in self.results)


def parse_cases(raw: bytes, source: str) -> tuple[Case, ...]:
    """Parse a test file.

    Raises:
        PolicyError: not a valid test file.
    """
    return parse_toml(raw, source, CaseFile).cases


def run_cases(policy: Policy, cases: Sequence[Case]) -> CaseReport:
    """Decide every case and compare; then look for rules that no case puts to the test."""
    plans = [decide(policy, _evidence(case.evidence)) for case in cases]
    results = tuple(
        CaseResult(case.name, tuple(_differences(policy, case, plan)))
        for case, plan in zip(cases, plans, strict=True)
    )
    return CaseReport(results, tuple(_uncovered(policy, plans)))


def _evidence(given: Given) -> Evidence:
    return Evidence(
        coordinates=dict(given.parameters),
        sensitivity=given.sensitivity,
        suspicion=given.suspicion,
        budget_spent=given.budget_spent,
        unhealthy=given.unhealthy,
        auto_norms=given.auto_norms,
    )


def _differences(policy: Policy, case: Case, plan: Plan) -> Iterator[str]:
    expect = case.expect
    for name in sorted(set(case.evidence.auto_norms) - set(policy.autos)):
        yield f'auto_norms: rule "{name}" has no max_norm = "auto"'
    if plan.action is not expect.action:
        yield f"action: expected {expect.action.word}, got {plan.action.word}"
    if expect.rules is not None and set(expect.rules) != set(plan.decided_by):
        yield f"rules: expected {_listed(expect.rules)}, got {_listed(plan.decided_by)}"
    kept = [name for name, treatment in plan.treatments.items() if treatment.action]
    if expect.withheld is not None and set(expect.withheld) != set(kept):
        yield f"withheld: expected {_listed(expect.withheld)}, got {_listed(kept)}"
    looked_at = [name for name in plan.treatments if name not in kept]
    looked_at = [name for name in looked_at if matches(expect.match, name)]
    knobs = (knob for knob in KNOBS if knob != "action")
    wanted = {knob: value for knob in knobs if (value := getattr(expect, knob)) is not None}
    if wanted and not looked_at:
        yield f"{_listed(wanted)}: no parameter is released that it could be read from"
    for name in looked_at:
        in_force = _in_force(policy, case, plan, name)
        for knob, value in wanted.items():
            if not math.isclose(in_force[knob], value, rel_tol=_CLOSE, abs_tol=0.0):
                yield f"{knob} of {name}: expected {value:g}, got {in_force[knob]:g}"


def _in_force(policy: Policy, case: Case, plan: Plan, name: str) -> dict[Knob, float]:
    """Read the knobs of one released parameter back out of the plan."""
    treatment = plan.treatments[name]
    released = released_values(plan, case.evidence.parameters)
    units = unit_stds(policy.resolved(case.evidence.auto_norms), released)
    return {
        "max_norm": min((b.max_norm for b in plan.bounds if name in b.names), default=math.inf),
        "max_abs": treatment.max_abs,
        "keep": treatment.keep,
        **{knob: treatment.noise_std / unit if unit else 0.0 for knob, unit in units.items()},
    }


def _uncovered(policy: Policy, plans: Sequence[Plan]) -> Iterator[str]:
    for rule in policy.rules:
        hits = sum(rule.id in plan.decided_by for plan in plans)
        if hits == 0:
            yield f'no case in which rule "{rule.id}" applies'
        elif rule.when is not None and hits == len(plans):
            yield f'no case in which rule "{rule.id}" does not apply'


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) if names else "none"
