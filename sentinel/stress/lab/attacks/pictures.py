"""Pictures: Inverting Gradients with its settings tuned, and the estimate with a public prior."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.dlg import Descent, match_distance
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
    from sentinel.stress.passive.local_training import LocalTraining
    from sentinel.stress.records import Records

    _Search = Matching | Estimation | Descent

COMPONENTS = 60  # directions per class of the prior, where there are enough public pictures
DECOYS = 99  # a picture is to be found among so many others of its class
MARGIN = 0.02  # mean SSIM over the class mean that counts as nothing
# Exact where the net is smooth in its input, such as with sigmoids; of no use elsewhere.
SHARP = Descent(iterations=100, restarts=2)
GREY = 0.5
_EDGED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool2d)
_FEWEST = 8  # directions below which a prior is not worth fitting
_COSTS = {
    "search": 1.3,
    "product": 2.5,
    "descent": 1.6,
}  # in units of one update and its derivative


class Pictures:
    """Every picture attacker, and the best of them: in the attacker's favour."""

    name = "pictures"
    title = "pictures, rebuilt from the update by search and with a prior of public pictures"
    knows = "labels, batches, the whole training plan, and every figure of the guard's treatment"
    worth = 1.0
    seconds = 6.0
    wanted = 6
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It takes pictures, at least 11 pixels wide, and every class among the held-out ones."""
        del setting
        if subject.kind is not Kind.IMAGE:
            return "the records are no pictures"
        if min(subject.train.inputs.shape[2:]) < WINDOW:
            return f"it takes pictures of at least {WINDOW} pixels a side"
        counts = subject.held_out.labels.long().bincount(minlength=subject.classes)
        if int(counts.min()) == 0:
            return "every class needs a held-out record, to find a picture among"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Rebuild, match to the truth within each class, and compare with the class mean."""
        case.require_replay(deadline)
        scale = yardstick(case.subject)
        behind = case.subject.pixels.pictures(behind)
        labels = behind.labels.long()
        best: Tensor | None = None
        hits, cut = 0, False
        for found_ones, shortened in _guesses(case, generator, deadline):
            guesses = found_ones.nan_to_num(GREY)  # a replay that diverges leaves no picture
            cut |= shortened
            matched = match_within_class(guesses, behind.inputs, labels)
            alike = ssim(matched, behind.inputs)
            if best is None or alike.mean() > ssim(best, behind.inputs).mean():
                # One attacker's hits stand beside one's chance, not the luckiest of several.
                first = ranked_first(guesses, behind.inputs, labels, _decoys(case.subject), scale)
                best, hits = matched, first.count.hits
        assert best is not None  # noqa: S101 - the first attacker always ends
        alike = ssim(best, behind.inputs)
        return Finding(
            (similarity(alike, scale, behind), _first(hits, labels, case.subject)),
            _exhibits(best, behind.inputs, alike),
            cut=cut,
        )


def _guesses(
    case: Case, generator: torch.Generator, deadline: Deadline
) -> Iterator[tuple[Tensor, bool]]:
    """The pictures of each attacker that fits into the time, and whether others did not."""
    shape = case.subject.train.inputs.shape[1:]
    pace, prior = pace_of(case, shape), prior_of(case.subject)
    searches, training = _searches(case, prior), in_pixels(case)
    fitting = [search for search in searches if _cost(search, pace) <= deadline.left]
    if not fitting:  # a search that is cut short says nothing
        raise OutOfTimeError
    for number, search in enumerate(fitting, start=1):
        if isinstance(search, Estimation):
            assert prior is not None  # noqa: S101 - `_searches` gives none without it
            guesses = most_likely(training, case.seen, prior, search, generator)
        elif isinstance(search, Descent):
            found = match_distance(training, case.seen, search, tuple(shape), generator)
            guesses = found.pictures
        else:
            guesses = match_direction(training, case.seen, search, tuple(shape), generator)
        late = deadline.passed and number < len(fitting)
        yield guesses, late or len(fitting) < len(searches)
        if late:
            return


def _searches(case: Case, prior: ImagePrior | None) -> list[_Search]:
    """What is tried, the attacker that suits the treatment first."""
    with_prior: list[_Search] = [] if prior is None else [*BATCH.estimates.values()]
    noisy = case.sent_back.std > 0.0
    if case.setting.records == 1:
        plain = lone_search(noisy=noisy)
        sharp = [SHARP] if smooth(case.model) else []
        return [*with_prior, plain] if noisy else [plain, *with_prior, *sharp]
    return [*with_prior, *BATCH.searches.values()]


def in_pixels(case: Case) -> LocalTraining:
    """The site's training, of pixels from 0 to 1: the plan and its normalisation are public."""
    return case.subject.pixels.replayed(case.training)


def smooth(model: nn.Module) -> bool:
    """Whether no layer has an edge, as far as its modules show: what `SHARP` needs."""
    return not any(isinstance(part, _EDGED) for part in model.modules())


def lone_search(*, noisy: bool) -> Matching:
    """Settings of the first-order search for one picture."""
    return replace(LONE, total_variation=0.1, smoothing=1.5, iterations=200) if noisy else LONE


def _cost(search: _Search, pace: float) -> float:
    """About how many seconds a search takes."""
    if isinstance(search, Estimation):
        return pace * _COSTS["product"] * search.rounds * search.products
    if isinstance(search, Descent):
        return pace * _COSTS["descent"] * search.restarts * search.iterations
    return pace * _COSTS["search"] * search.restarts * search.iterations


def pace_of(case: Case, shape: torch.Size) -> float:
    """Seconds that one update and its derivative take here; the first is slow, so the second."""
    inputs = torch.full((len(case.training.labels), *shape), GREY, requires_grad=True)
    training, begun = in_pixels(case), 0.0
    for _ in range(2):
        begun = time.monotonic()
        torch.autograd.grad(training.update(inputs).square().sum(), inputs)
    return max(time.monotonic() - begun, 1e-5)


@functools.lru_cache(maxsize=1)
def prior_of(subject: Subject) -> ImagePrior | None:
    """What the public pictures say; None where there are too few of a class."""
    if subject.public is None:
        return None
    public = subject.pixels.pictures(subject.public)
    labels = public.labels.long()
    most = int(labels.bincount(minlength=subject.classes).min()) - 1
    if most < _FEWEST:
        return None
    return fit_prior(public.inputs, labels, min(COMPONENTS, most // 2))


@functools.lru_cache(maxsize=1)
def yardstick(subject: Subject) -> ImagePrior:
    """The class means: of public pictures, else of held-out ones. Only to score by."""
    known = prior_of(subject)
    if known is not None:
        return known
    held_out = subject.pixels.pictures(subject.held_out)
    labels = held_out.labels.long()
    means = []
    for label in range(subject.classes):
        own = held_out.inputs[labels == label]
        means.append(own.mean(0) if len(own) else held_out.inputs.mean(0))
    return ImagePrior(torch.stack(means), torch.zeros(subject.classes, 1, means[0].numel()))


@functools.lru_cache(maxsize=1)
def _decoys(subject: Subject) -> tuple[Tensor, ...]:
    held_out = subject.pixels.pictures(subject.held_out)
    labels = held_out.labels.long()
    return tuple(held_out.inputs[labels == label][:DECOYS] for label in range(subject.classes))


def similarity(alike: Tensor, scale: ImagePrior, behind: Records) -> Tally:
    """How alike guesses are to the pictures [N], beside the mean pictures of their classes."""
    means = ssim(scale.means[behind.labels.long()], behind.inputs)
    return Tally(
        "likeness of the pictures (SSIM, 1 is identical)",
        tuple(alike.tolist()),
        tuple(means.tolist()),
        paired=True,
        margin=MARGIN,
    )


def _first(hits: int, labels: Tensor, subject: Subject) -> Tally:
    """The true picture ranks first among the decoys of its class."""
    decoys = _decoys(subject)
    chances = tuple(1.0 / (1 + len(decoys[label])) for label in labels.tolist())
    values = tuple(1.0 if index < hits else 0.0 for index in range(len(labels)))
    return Tally("true picture found first among others of its class", values, chances)


def _exhibits(guesses: Tensor, pictures: Tensor, alike: Tensor) -> tuple[Exhibit, ...]:
    return tuple(
        Exhibit(pictures[at], guesses[at], float(alike[at]), at) for at in exhibited(alike)
    )
