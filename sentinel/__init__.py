"""Gradient Sentinel: the agent at a hospital's door in federated learning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentinel.errors import MisuseError, PolicyError, RoundRefused, SentinelError, Withheld
    from sentinel.guard import Guard, connect
    from sentinel.policy import Policy
    from sentinel.round import Round

_HOMES = {
    "Guard": "sentinel.guard",
    "MisuseError": "sentinel.errors",
    "Policy": "sentinel.policy",
    "PolicyError": "sentinel.errors",
    "Round": "sentinel.round",
    "RoundRefused": "sentinel.errors",
    "SentinelError": "sentinel.errors",
    "Withheld": "sentinel.errors",
    "connect": "sentinel.guard",
}

__all__ = [
    "Guard",
    "MisuseError",
    "Policy",
    "PolicyError",
    "Round",
    "RoundRefused",
    "SentinelError",
    "Withheld",
    "connect",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load a public name when it is first used: `sentinel policy check` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sentinel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
