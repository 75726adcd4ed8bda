"""Ours: the real release path, Guard.round to release, under two policies."""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path

from judging import Claims, NotApplicable, Refused
from odd_inputs import Case, Settings, State

import sentinel
from sentinel.errors import MisuseError, Withheld
from sentinel.terms import Reason
from sentinel.update import model_digest

NOISE_RATIO = 2.0  # as shipped: policies/baseline.toml
NOISE_MULTIPLIER = 0.2  # little, so that the update can be found under the noise

NO_PROMISE = """
schema = 1
name = "no-promise"
[limits]
statistics = "{statistics}"
[[rule]]
id = "baseline"
max_norm = {bound}
noise_ratio = {noise_ratio}
keep = {keep}
{extra}
"""
SITE_PROMISE = """
schema = 1
name = "site-promise"
[privacy]
unit = "site"
epsilon = 1000.0
adjacency = "add-or-remove"
delta = 1e-5
clip_norm = {bound}
noise_multiplier = {noise_multiplier}
{extra}
[limits]
statistics = "{statistics}"
[[rule]]
id = "baseline"
keep = {keep}
"""
POLICIES = {"no-promise": NO_PROMISE, "site-promise": SITE_PROMISE}
ODD = {
    Settings.BOUND_ZERO: {"bound": "0.0"},
    Settings.BOUND_NAN: {"bound": "nan"},
    Settings.NO_NOISE: {"noise_ratio": "0.0", "noise_multiplier": "0.0"},
    Settings.FREE_SENSITIVITY: {"extra": "sensitivity = 1e-4"},
    Settings.SHARE_OUT_OF_RANGE: {"keep": "1.5"},
    Settings.STATISTICS_AS_PARAMETERS: {"statistics": "as-parameters"},
}


def claims(policy: str, case: Case) -> Claims:
    """Bound and noise of the policy for the states of the case."""
    if policy == "site-promise":
        return Claims(1.0, NOISE_MULTIPLIER)
    base, _ = case.make()
    statistics = case.settings is Settings.STATISTICS_AS_PARAMETERS
    names = [
        name
        for name, value in base.items()
        if value.is_floating_point() and (statistics or "running_" not in name)
    ]
    size = sum(base[name].numel() for name in names if name not in case.tied[1:])
    return Claims(1.0, NOISE_RATIO / math.sqrt(max(1, size)))


def run(policy: str, case: Case) -> State:
    """One release in a fresh site; asked again with another local state, the same bytes.

    Raises:
        Refused: withheld on purpose, with the reason code.
    """
    if policy == "no-promise" and case.settings is Settings.NO_NOISE:
        raise NotApplicable
    base, local = case.make()
    ordinary = {"bound": "1.0", "keep": "1.0", "statistics": "withhold", "extra": ""}
    figures = ordinary | {
        "noise_ratio": str(NOISE_RATIO),
        "noise_multiplier": str(NOISE_MULTIPLIER),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.toml"
        path.write_text(POLICIES[policy].format(**figures | ODD.get(case.settings, {})))
        path.chmod(0o600)
        try:
            guard = sentinel.Guard(path, Path(folder) / "site", alerts=io.StringIO())
            out = _released(guard, base, local)
        except MisuseError as error:
            raise Refused(type(error).__name__) from error
        except Withheld as error:
            if error.reason in {Reason.INTERNAL_ERROR, Reason.STORAGE_FAILED}:
                raise
            raise Refused(error.reason) from error
        if model_digest(_released(guard, base, base)) != model_digest(out):
            raise AssertionError("asked again, other bytes came out")
    return out


def _released(guard: sentinel.Guard, base: State, local: State) -> State:
    with guard.round(0, base) as rnd:
        pass
    return rnd.release(local)
