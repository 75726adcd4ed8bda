"""Labels: which classes are behind an update, read from its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.stress.lab.finding import Finding, Tally
from sentinel.stress.passive.labels import Probes, count_labels, lone_label

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

MARGIN = 0.05  # share of the labels that counts as nothing: proportions are hardly a secret
_PROBES = 128  # public records that show the attacker usual embeddings


class Labels:
    """The sign of one record's class, or a least-squares count of several."""

    name = "labels"
    title = "diagnoses (labels) behind the update, counted from its last layer"
    knows = "the model it sent, the guard's treatment, and public records where there are any"
    worth = 0.6
    seconds = 0.05
    wanted = 1024  # an update is one value, whatever the records behind it
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It needs a last layer that is fully connected, and more than one class."""
        del setting
        if subject.train.labels.is_floating_point():
            return "it takes a model with an output for each class; this one has one output"
        if len(set(subject.train.labels.tolist())) < 2:  # noqa: PLR2004 - one class has no secret
            return "all records have one label"
        head = _head(subject.model)
        if head is None:
            return "labels are read off a torch.nn.Linear as last layer; this model has none"
        if subject.public is None and head.bias is None:
            return "without public records, labels are read off a last layer with a bias"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Count the labels; the yardstick knows how common each is, and nothing else."""
        del generator, deadline  # nothing random, and done in a moment
        true = behind.labels.long().bincount(minlength=case.subject.classes)
        usual = _usual(case.subject, len(behind))
        values, chances = _overlap(_guess(case), true), _overlap(usual, true)
        measure = "diagnoses of one record, or counts of them, that are right"
        tally = Tally(measure, (values,), (chances,), paired=True, margin=MARGIN, of="updates")
        return Finding((tally,))


def _head(model: nn.Module) -> nn.Linear | None:
    """The last fully connected layer."""
    return next((part for part in [*model.modules()][::-1] if isinstance(part, nn.Linear)), None)


def probes_of(case: Case) -> Probes | None:
    """Public records that show usual embeddings; without labels where some output has none."""
    known, head = case.subject.public, _head(case.model)
    if known is None or head is None:
        return None
    labels = known.labels[:_PROBES].long()
    whole = set(labels.tolist()) == set(range(head.out_features))
    return Probes(known.inputs[:_PROBES], labels if whole else None)


def _guess(case: Case) -> Tensor:
    probes = probes_of(case)
    if case.setting.records > 1:
        counts = count_labels(case.training, case.seen, probes=probes)
        return counts[: case.subject.classes]  # a model may have outputs that no label uses
    label = lone_label(case.training, case.seen, probes=probes)
    return torch.tensor([label]).bincount(minlength=case.subject.classes)


def _usual(subject: Subject, records: int) -> Tensor:
    """So many of each class as are usual at this site, rounded; [classes]."""
    counts = subject.held_out.labels.long().bincount(minlength=subject.classes).double()
    shares = counts / counts.sum() * records
    usual = shares.floor()
    rest = records - int(usual.sum())
    usual[(shares - usual).argsort(descending=True)[:rest]] += 1
    return usual.long()


def _overlap(guess: Tensor, true: Tensor) -> float:
    """Share of the records whose label the counts give."""
    return float(torch.minimum(guess, true).sum() / true.sum())
