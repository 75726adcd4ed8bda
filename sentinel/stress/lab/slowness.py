"""Slowness: how long this model takes, beside those that the attacks' seconds are estimates of."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.exchange import Site

if TYPE_CHECKING:
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.subject import Subject

USUAL = 0.05  # seconds that a step takes with those models, on a busy machine
RECORDS = 32  # in the step
_TRIALS = 2  # the first is slow
_SHARE = 0.1  # of the time left, after which there is no second


def slowness_of(subject: Subject, deadline: Deadline) -> float:
    """How many times longer than usual a step of training takes here; 1 where it takes less.

    Args:
        subject: model and records.
        deadline: of the test.
    """
    records = subject.train.take(torch.arange(min(RECORDS, len(subject.train))))
    site, early = Site(subject, torch.Generator(), deadline), deadline.share(_SHARE)
    quickest = math.inf
    for _ in range(_TRIALS):
        begun = time.monotonic()
        try:
            site.trained(subject.start, records, (torch.arange(len(records)),))
        except Exception:  # noqa: BLE001 - the site's own model; every attack will say so
            return 1.0
        quickest = min(quickest, time.monotonic() - begun)
        if early.passed:
            break
    return max(1.0, quickest / USUAL)
