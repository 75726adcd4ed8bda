"""Replays: whether a site's training can be run under many guesses at once, and how fast."""

from __future__ import annotations

import copy
import functools
import time
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.local_training import LocalTraining
from sentinel.stress.passive.restarts import Restarts
from sentinel.stress.passive.text import from_shares

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.passive.relaxation import Relaxation

_TRIED = 2  # guesses in a trial, and records in each


@functools.lru_cache(maxsize=1)
def unreplayable(subject: Subject) -> str | None:
    """Why no search with many restarts can be run on this model, as a sentence; None where it can.

    Layers that draw random numbers, such as dropout, cannot be run for several guesses at once.
    """
    few = subject.train.take(torch.arange(_TRIED))
    training = LocalTraining(
        copy.deepcopy(subject.model),
        subject.start,
        few.labels,
        (torch.arange(_TRIED),),
        subject.rate,
        loss=subject.loss,
    )
    inputs = few.inputs
    try:
        if subject.kind is Kind.TEXT:
            training = from_shares(training, torch.arange(1))
            inputs = torch.ones(_TRIED, few.inputs.shape[1])
        _pace(training, inputs.expand(_TRIED, *inputs.shape))
    except Exception as error:  # noqa: BLE001 - the site's own model; the text may hold values
        return f"the model cannot be replayed for several guesses at once ({type(error).__name__})"
    return None


def require_time(
    training: LocalTraining, inputs: Tensor, search: Relaxation, deadline: Deadline
) -> None:
    """Refuse a search that does not fit into the time: cut short it would say nothing.

    Args:
        training: what is replayed.
        inputs: a guess at all of its records, [N, ...].
        search: settings.
        deadline: until when it must be through.

    Raises:
        OutOfTimeError: it does not fit.
    """
    deadline.require()
    stages = len(search.hardness) + 1
    one = _pace(training, inputs.expand(search.restarts, *inputs.shape))
    deadline.require(stages * search.iterations * one)


def _pace(training: LocalTraining, guesses: Tensor) -> float:
    """Seconds of one update of every guess and its derivative; the first is slow, so the second."""
    begun = 0.0
    for _ in range(2):
        begun = time.monotonic()
        varied = guesses.clone().requires_grad_()
        updates = Restarts(training, len(guesses)).updates(varied)
        torch.autograd.grad(updates.square().sum(), varied)
    return time.monotonic() - begun
