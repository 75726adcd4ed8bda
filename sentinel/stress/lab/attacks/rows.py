"""Rows: records read out of the update of the first fully connected layer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.layers import attacked_pair, layer_inputs
from sentinel.stress.passive.tabular import (
    EXACT,
    NEAR,
    Sanitizer,
    guess_rows,
    guess_rows_untold,
    nearest,
    read_mixtures,
    view,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

_YARDSTICK = 256  # held-out records that the guesses are measured against


class Rows:
    """The read-out with averaged neurons, neighbouring bins and the rank-one matched filter."""

    name = "rows"
    title = "whole records, read out of the first layer's update"
    knows = "the model it sent, and how much noise the guard added"
    worth = 1.0
    seconds = 0.05
    wanted = 96
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It needs two fully connected layers in a row, the first on the records themselves."""
        del setting
        return _unread(subject)

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Guess rows, and count those that are records behind the update."""
        del generator, deadline  # nothing random, and done in a moment
        pixels, shape = case.subject.pixels, behind.inputs.shape[1:]
        guesses = guesses_at_rows(case)
        guesses = pixels.to_pixels(guesses.view(len(guesses), *shape)).flatten(1)
        behind = pixels.pictures(behind)
        held_out = pixels.to_pixels(case.subject.held_out.inputs[:_YARDSTICK])
        errors = nearest(guesses, behind.inputs.flatten(1))
        others = nearest(guesses, held_out.flatten(1))
        return Finding(
            (
                _within("records read closely (error under 30 %)", errors, others, NEAR),
                _within("records read exactly (error under 1 %)", errors, others, EXACT),
            ),
            _exhibits(guesses, behind.inputs, errors),
        )


@functools.lru_cache(maxsize=1)
def _unread(subject: Subject) -> str | None:
    """Why the first layer gives no rows, as a sentence; None where it does."""
    try:
        first, _ = attacked_pair(subject.model, subject.start)
    except MisuseError as error:
        return str(error)
    few = subject.train.inputs[:2]
    if not few.is_floating_point():
        return "records of tokens reach no layer as they are"
    reached = layer_inputs(subject.model, subject.start, few, first)
    if reached.shape != few.flatten(1).shape or not torch.equal(reached, few.flatten(1)):
        return "the first fully connected layer does not take the records as they are"
    return None


def guesses_at_rows(case: Case) -> Tensor:
    """All guesses of the read-out, told of the treatment and untold, [guesses, features]."""
    seen = view(case.sent, case.received, *attacked_pair(case.model, case.sent))
    back = case.sent_back
    told = Sanitizer(back.std / back.keep)  # the kept are x 1/keep
    guesses = [guess_rows(seen, told)]
    if case.secret is not None:
        guesses.append(read_mixtures(seen, told, case.secret))
    if back.std > 0.0:
        guesses.append(guess_rows_untold(seen))
    return torch.cat(guesses)


def _within(measure: str, errors: Tensor, others: Tensor, limit: float) -> Tally:
    hits, chance = ((part < limit).double().tolist() for part in (errors, others))
    return Tally(measure, tuple(hits), tuple(chance))


def _exhibits(guesses: Tensor, inputs: Tensor, errors: Tensor) -> tuple[Exhibit, ...]:
    """A few records, each with its closest guess."""
    if len(guesses) == 0:
        return ()
    shown = []
    for index in exhibited(-errors):
        record = inputs[index].double()
        closest = (guesses - record.flatten()).square().sum(1).argmin()
        guess = guesses[closest].view(record.shape)
        shown.append(Exhibit(record, guess, max(0.0, 1.0 - float(errors[index])), index))
    return tuple(shown)
