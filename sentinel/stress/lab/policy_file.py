"""Policy files written by the lab: a policy as TOML, with its evidence in comments."""

from __future__ import annotations

import datetime as dt
import json
import math
from typing import TYPE_CHECKING

from sentinel.policy.schema import FIGURES
from sentinel.terms import Action

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sentinel.policy.schema import Policy, Rule


def policy_toml(policy: Policy, comments: Iterable[str]) -> str:
    """Write a policy as a file that reads back as the same policy.

    Args:
        policy: with every figure finite.
        comments: lines that stand on top, without the sign.
    """
    lines = ["#:schema ./policy.schema.json", *(f"# {line}".rstrip() for line in comments)]
    top: dict[str, object] = {"schema": 1, "name": policy.name, "dataset": policy.dataset}
    if policy.expires is not None:
        top["expires"] = policy.expires
    lines += _entries(top)
    for name, part in (("privacy", policy.privacy), ("limits", policy.limits)):
        if part is not None:
            given = part.model_dump(exclude_unset=True, exclude_none=True)
            if given:
                lines += ["", f"[{name}]", *_entries(given)]
    for rule in policy.rules:
        lines += ["", "[[rule]]", *_entries(_rule(rule))]
    return "\n".join(lines) + "\n"


def _rule(rule: Rule) -> dict[str, object]:
    given: dict[str, object] = {"id": rule.id}
    if not rule.everywhere or len(rule.match) > 1:
        given["match"] = rule.match
    if rule.when is not None:
        given["when"] = rule.when.model_dump(exclude_none=True)
    if rule.action is not Action.RELEASE:
        given["action"] = rule.action.word
    return given | {name: value for name in FIGURES if (value := getattr(rule, name)) is not None}


def _entries(values: Mapping[str, object]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in values.items()]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value and _decimal(value) else repr(value)
    if isinstance(value, int | dt.date):
        return str(value)
    if isinstance(value, dict):
        inside = ", ".join(f"{name} = {_value(part)}" for name, part in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, tuple | list | frozenset):
        return f"[{', '.join(_value(part) for part in value)}]"
    return json.dumps(str(value))


def _decimal(value: float) -> bool:
    """Whether `:g` writes a number that TOML takes for a decimal one."""
    return math.isfinite(value) and any(sign in f"{value:g}" for sign in ".e")
