"""Pictures: Inverting Gradients with its settings tuned, and the estimate with a public prior."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.images import BATCH, LONE
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.prior import ImagePrior, fit_prior
from sentinel.stress.passive.reidentify import match_within_class, ranked_first
from sentinel.stress.ssim import WINDOW, ssim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

COMPONENTS = 60  # directions per class of the prior, where there are enough public pictures
DECOYS = 99  # a picture is to be found among so many others of its class
MARGIN = 0.02  # mean SSIM over the class mean that counts as nothing
_FEWEST = 8  # directions below which a prior is not worth fitting
_COSTS = {"search": 1.3, "product": 2.5}  # in units of one update and its derivative


class Pictures:
    """Every picture attacker, and the best of them: in the attacker's favour."""

    name = "pictures"
    title = "pictures, rebuilt from the update by search and with a prior of public pictures"
    knows = "labels, batches and learning rate, and every figure of the guard's treatment"
    worth = 1.0
    seconds = 6.0
    wanted = 4

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It takes grey pictures from 0 to 1, at least 11 pixels wide."""
        del setting
        if subject.kind is not Kind.IMAGE:
            return "the records are no pictures"
        inputs = subject.train.inputs
        if inputs.shape[1] != 1 or min(inputs.shape[2:]) < WINDOW:
            return f"it takes grey pictures [N, 1, H, W] of at least {WINDOW} pixels a side"
        if float(inputs.min()) < 0.0 or float(inputs.max()) > 1.0:
            return "it takes pixels from 0 to 1"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Rebuild, match to the truth within each class, and compare with the class mean."""
        scale = _yardstick(case.subject)
        labels = behind.labels.long()
        best: Tensor | None = None
        found: list[float] = []
        cut = False
        for guesses, shortened in _guesses(case, generator, deadline):
            cut |= shortened
            matched = match_within_class(guesses, behind.inputs, labels)
            alike = ssim(matched, behind.inputs)
            first = ranked_first(guesses, behind.inputs, labels, _decoys(case.subject), scale)
            found.append(first.count.hits)
            if best is None or alike.mean() > ssim(best, behind.inputs).mean():
                best = matched
        assert best is not None  # noqa: S101 - the first attacker always ends
        alike = ssim(best, behind.inputs)
        return Finding(
            (_similarity(alike, scale, behind), _first(max(found), labels, case.subject)),
            _exhibits(best, behind.inputs, alike),
            cut=cut,
        )


def _guesses(
    case: Case, generator: torch.Generator, deadline: Deadline
) -> Iterator[tuple[Tensor, bool]]:
    """The pictures of each attacker that fits into the time, and whether others did not."""
    shape = case.subject.train.inputs.shape[1:]
    size = (int(shape[1]), int(shape[2]))
    pace, prior = _pace(case, shape), _prior(case.subject)
    searches = _searches(case, prior)
    fitting = [search for search in searches if _cost(search, pace) <= deadline.left]
    if not fitting:  # a search that is cut short says nothing
        raise OutOfTimeError
    for number, search in enumerate(fitting, start=1):
        if isinstance(search, Estimation):
            assert prior is not None  # noqa: S101 - `_searches` gives none without it
            guesses = most_likely(case.training, case.seen, prior, search, generator)
        else:
            guesses = match_direction(case.training, case.seen, search, size, generator)
        late = deadline.passed and number < len(fitting)
        yield guesses, late or len(fitting) < len(searches)
        if late:
            return


def _searches(case: Case, prior: ImagePrior | None) -> list[Matching | Estimation]:
    """What is tried, the attacker that suits the treatment first."""
    with_prior: list[Matching | Estimation] = [] if prior is None else [*BATCH.estimates.values()]
    lone = case.setting.records == 1
    plain: list[Matching | Estimation] = [LONE] if lone else [*BATCH.searches.values()]
    noisy = case.sent_back.std > 0.0
    if noisy and lone:
        plain = [replace(LONE, total_variation=0.1, smoothing=1.5, iterations=200)]
    return plain[:1] + with_prior if lone and not noisy else with_prior + plain


def _cost(search: Matching | Estimation, pace: float) -> float:
    """About how many seconds a search takes."""
    if isinstance(search, Estimation):
        return pace * _COSTS["product"] * search.rounds * search.products
    return pace * _COSTS["search"] * search.restarts * search.iterations


def _pace(case: Case, shape: torch.Size) -> float:
    """Seconds that one update and its derivative take here; the first is slow, so the second."""
    inputs = torch.full((len(case.training.labels), *shape), 0.5, requires_grad=True)
    begun = 0.0
    for _ in range(2):
        begun = time.monotonic()
        torch.autograd.grad(case.training.update(inputs).square().sum(), inputs)
    return max(time.monotonic() - begun, 1e-5)


@functools.lru_cache(maxsize=4)
def _prior(subject: Subject) -> ImagePrior | None:
    """What the public pictures say; None where there are too few of a class."""
    if subject.public is None:
        return None
    labels = subject.public.labels.long()
    most = int(labels.bincount(minlength=subject.classes).min()) - 1
    if most < _FEWEST:
        return None
    return fit_prior(subject.public.inputs, labels, min(COMPONENTS, most // 2))


@functools.lru_cache(maxsize=4)
def _yardstick(subject: Subject) -> ImagePrior:
    """The class means: of public pictures, else of held-out ones. Only to score by."""
    known = _prior(subject)
    if known is not None:
        return known
    labels = subject.held_out.labels.long()
    means = []
    for label in range(subject.classes):
        own = subject.held_out.inputs[labels == label]
        means.append(own.mean(0) if len(own) else subject.held_out.inputs.mean(0))
    return ImagePrior(torch.stack(means), torch.zeros(subject.classes, 1, means[0].numel()))


@functools.lru_cache(maxsize=4)
def _decoys(subject: Subject) -> tuple[Tensor, ...]:
    labels = subject.held_out.labels.long()
    found = tuple(
        subject.held_out.inputs[labels == label][:DECOYS] for label in range(subject.classes)
    )
    if any(len(own) == 0 for own in found):
        raise MisuseError("Every class needs a held-out record, to find a picture among.")
    return found


def _similarity(alike: Tensor, scale: ImagePrior, behind: Records) -> Tally:
    means = ssim(scale.means[behind.labels.long()], behind.inputs)
    return Tally(
        "likeness of the pictures (SSIM, 1 is identical)",
        tuple(alike.tolist()),
        tuple(means.tolist()),
        paired=True,
        margin=MARGIN,
    )


def _first(hits: float, labels: Tensor, subject: Subject) -> Tally:
    """The true picture ranks first among the decoys of its class."""
    decoys = _decoys(subject)
    chances = tuple(1.0 / (1 + len(decoys[label])) for label in labels.tolist())
    values = tuple(1.0 if index < hits else 0.0 for index in range(len(labels)))
    return Tally("true picture found first among others of its class", values, chances)


def _exhibits(guesses: Tensor, pictures: Tensor, alike: Tensor) -> tuple[Exhibit, ...]:
    return tuple(
        Exhibit(pictures[at], guesses[at], float(alike[at]), at) for at in exhibited(alike)
    )
