"""Policy files: what may leave, how it is treated, and when nothing may."""

from sentinel.policy.decide import Opening, decide, let_out, refuses, unmatched
from sentinel.policy.schema import Policy
from sentinel.policy.store import LoadedPolicy, load_policy

__all__ = [
    "LoadedPolicy",
    "Opening",
    "Policy",
    "decide",
    "let_out",
    "load_policy",
    "refuses",
    "unmatched",
]
