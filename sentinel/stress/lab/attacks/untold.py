"""Untold: pictures, to a server that knows only what it prescribed and what it received.

The attack `pictures` is given labels and the order of the batches, as the strongest attacker is.
This one finds labels for itself: of a lone picture they are searched with it, of several they are
counted off the last layer. Batches are drawn as the site might have drawn them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.attacks.labels import Labels, probes_of
from sentinel.stress.lab.attacks.pictures import (
    GREY,
    SHARP,
    Pictures,
    in_pixels,
    lone_search,
    pace_of,
    prior_of,
    similarity,
    smooth,
    yardstick,
)
from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.finding import Exhibit, Finding, exhibited
from sentinel.stress.lab.setting import HONEST
from sentinel.stress.passive.dlg import match_distance
from sentinel.stress.passive.estimate import Estimation
from sentinel.stress.passive.fedavg import LocalLoop, Simulation, match_loop, most_likely_loop
from sentinel.stress.passive.inversion import Matching, match_jointly
from sentinel.stress.passive.labels import count_labels
from sentinel.stress.passive.reidentify import match_within_class
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

WITH_PRIOR = Estimation()
BLIND = Simulation(Matching(iterations=60, total_variation=3.0, smoothing=1.5))
_PRODUCTS, _STEPS = 2.5, 1.6  # what a product and a step cost, in units of one update


class Untold:
    """The best of what it tries: in the attacker's favour."""

    name = "untold"
    title = "pictures, rebuilt by a server that is told neither labels nor the order of batches"
    knows = "the whole training plan, and every figure of the guard's treatment"
    worth = 0.4
    seconds = 5.0
    wanted = 6
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """Pictures, classes, and a condition under which labels or order are of any use."""
        if (why := Pictures().misfit(subject, setting)) is not None:
            return why
        if setting.server != HONEST or (setting.records > 1 and setting.epochs == 0):
            return "it is tried on single pictures and local epochs, at an honest server"
        if setting.records > 1:
            return Labels().misfit(subject, setting)
        return _hard(subject)

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Rebuild, match to the truth, and compare with the mean picture of the true class."""
        case.require_replay(deadline)
        shape = tuple(case.subject.train.inputs.shape[1:])
        behind = case.subject.pixels.pictures(behind)
        if _cost(case, shape) > deadline.left:
            raise OutOfTimeError
        if case.setting.records == 1:
            found = _lone(case, shape, generator)
        else:
            found = [_several(case, shape, generator)]
        anyone = torch.zeros(len(behind), dtype=torch.long)  # no guess is of a known class
        matched = [match_within_class(one.nan_to_num(GREY), behind.inputs, anyone) for one in found]
        best = max(matched, key=lambda one: float(ssim(one, behind.inputs).mean()))
        alike = ssim(best, behind.inputs)
        return Finding(
            (similarity(alike, yardstick(case.subject), behind),),
            tuple(
                Exhibit(behind.inputs[at], best[at], float(alike[at]), at)
                for at in exhibited(alike)
            ),
        )


def _lone(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """One picture and its label, searched together."""
    noisy, classes = case.sent_back.std > 0.0, _outputs(case)
    search, training = lone_search(noisy=noisy), in_pixels(case)
    found = [match_jointly(training, case.seen, search, shape, classes, generator).pictures]
    if not noisy and smooth(case.model):
        sharp = match_distance(training, case.seen, SHARP, shape, generator, classes=classes)
        found.append(sharp.pictures)
    return found


def _several(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Pictures with labels as counted, in batches as the site might have drawn them."""
    counts = count_labels(case.training, case.seen, probes=probes_of(case))
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    training = replace(in_pixels(case), labels=labels)
    loop = LocalLoop(case.setting.epochs, case.subject.batch)
    prior = prior_of(case.subject)
    if prior is None or int(labels.max()) >= len(prior.means):
        return match_loop(training, case.seen, loop, BLIND, shape, generator)
    return most_likely_loop(training, case.seen, loop, prior, WITH_PRIOR, generator)


def _outputs(case: Case) -> int:
    """Outputs of the model."""
    with torch.no_grad():
        answers = case.model(torch.zeros(2, *case.subject.train.inputs.shape[1:]))
    return int(answers.shape[1])


def _hard(subject: Subject) -> str | None:
    """Why labels cannot be searched, as a sentence; None where they can."""
    if subject.train.labels.is_floating_point():
        return "it takes a model with an output for each class; this one has one output"
    try:
        soft = torch.full((2, subject.classes), 1.0 / subject.classes)
        subject.loss(torch.zeros_like(soft), soft)
    except Exception as error:  # noqa: BLE001 - the site's own loss; the text may hold values
        return f"the loss takes no probabilities in the place of labels ({type(error).__name__})"
    return None


def _cost(case: Case, shape: tuple[int, ...]) -> float:
    """About how many seconds it takes."""
    one = pace_of(case, torch.Size(shape))
    if case.setting.records == 1:
        steps = lone_search(noisy=case.sent_back.std > 0.0).iterations
        return one * _STEPS * (steps + SHARP.restarts * SHARP.iterations)
    if prior_of(case.subject) is None:
        return one * _STEPS * case.setting.epochs * BLIND.matching.iterations
    return one * _PRODUCTS * WITH_PRIOR.rounds * WITH_PRIOR.products
