"""Calibration: what the detectors say of this site's ordinary rounds, kept and watched.

A site's scores come from its own log, which holds the very numbers that the rules of its policy
looked at, or from folders that it names. What is made of them is a threshold with a stated rate of
false alarms (`sentinel.detection.conformal`), which people may put into the policy; nothing here
changes a policy, and no rule reads what is kept here.
"""

from sentinel.calibration.advice import Advice, advise
from sentinel.calibration.drift import Drift, drift_of
from sentinel.calibration.gather import (
    Gathered,
    Which,
    from_globals,
    from_log,
    from_updates,
    is_promised,
    require_no_promise,
)
from sentinel.calibration.kept import Calibration, Kept, keep, read_calibration, write_calibration

__all__ = [
    "Advice",
    "Calibration",
    "Drift",
    "Gathered",
    "Kept",
    "Which",
    "advise",
    "drift_of",
    "from_globals",
    "from_log",
    "from_updates",
    "is_promised",
    "keep",
    "read_calibration",
    "require_no_promise",
    "write_calibration",
]
