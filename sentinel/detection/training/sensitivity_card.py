"""The card of the update-sensitivity bundle: what was measured, in words and tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sentinel.detection.reference import MANY
from sentinel.detection.sensitivity import BLIND
from sentinel.detection.training.table import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.detection.training.recipe import Recipe

FEW = 8
Quality = tuple[str, float, float, float, float]


@dataclass
class Figures:
    """What was measured; the card is written from it."""

    detectors: list[Quality] = field(default_factory=list)
    parts: list[Quality] = field(default_factory=list)
    nets: list[tuple[str, float, float, float, float, float, float, float]] = field(
        default_factory=list
    )
    reliability: list[tuple[str, ...]] = field(default_factory=list)
    curve: list[tuple[str, float, float, float]] = field(default_factory=list)
    false: list[tuple[str, str, str, str]] = field(default_factory=list)
    samples: int = 0
    models: int = 0


QUALITY = ("Spearman", "least", "AUROC", "least")


def card(recipe: Recipe, figures: Figures) -> str:
    """Write the card."""
    words = {"detector": recipe.detector, "trees": recipe.trees, "few": FEW, "many": MANY}
    head = CARD_HEAD.format(samples=figures.samples, models=figures.models, **words)
    return "\n".join([head, *_sections(recipe, figures), CARD_TAIL.format(blind=BLIND)])


def _sections(recipe: Recipe, figures: Figures) -> Iterator[str]:
    yield "## Left-out architectures\n"
    yield NETS_HEAD.format(few=FEW, many=MANY)
    yield table(NETS, (_row(row, 2) for row in figures.nets))
    yield "## Choice of the detector\n"
    yield CHOICE_HEAD
    yield table(("pyod detector alone", *QUALITY), (_row(row, 3) for row in figures.detectors))
    yield "## What the score is made of\n"
    yield PARTS_HEAD.format(detector=recipe.detector)
    yield table(("part", *QUALITY), (_row(row, 3) for row in figures.parts))
    yield "## Reliability\n"
    yield RELIABILITY_HEAD
    yield table(RELIABILITY, figures.reliability)
    yield "## Score by kind of round\n"
    yield CURVE_HEAD
    yield table(
        ("round", "mean measured leakage", "score, 10th percentile", "90th percentile"),
        (_row(row, 2) for row in figures.curve),
    )
    yield "## False tightenings\n"
    yield FALSE_HEAD
    yield table(
        ("task, optimizer", "many at or above .5", "many at .9", "one record at .9"), figures.false
    )


def _row(row: tuple[str, *tuple[float, ...]], digits: int) -> list[str]:
    name, *values = row
    return [name, *("-" if math.isnan(value) else f"{value:.{digits}f}" for value in values)]


NETS = (
    "architecture",
    "Spearman",
    "AUROC, some record read",
    "the same within 1 %",
    "AUROC, few against many",
    "Spearman of leakage with itself, ties at random",
    "generic Spearman",
    "generic AUROC",
)
RELIABILITY = ("score", "rounds", "mean leakage", "rounds, generic", "mean leakage, generic")

NETS_HEAD = """Rounds of plain SGD and momentum, and of many records with Adam, without noise, on
scaled columns. Each figure is a mean over the models of an architecture (kinds of task, training
stages): rounds of one model are ranked among one another, since that is what a site sees. Detector
and forest were fitted without the architecture. "Some record read" counts every round of which
linear read-out took anything beyond chance, down to a few records of 256; "few against many" is 1
to {few} records against {many} and more in one step. Most large rounds leak nothing: where leakage
itself, its ties broken at random, has a low rank correlation with itself, so has any score that is
never the same twice. "Generic" is without a reference. The aims are .9 and .98.
"""

CHOICE_HEAD = """Groups of architectures left out in turn; plain anomaly of where the update lies
between ordinary rounds and one record; Spearman with measured leakage and AUROC of some record
read; mean and least over architectures.
"""

PARTS_HEAD = """The same measure for the parts and for what they make together: the geometric mean
of what the forest makes of clues and anomaly ({detector}) and of what leaked from the rehearsals,
and once more of that and of the forest without a reference.
"""

RELIABILITY_HEAD = """All rounds, noised ones and unscaled columns too; detector and forest fitted
without the architecture, the map on all.
"""

CURVE_HEAD = """All architectures together, each scored by what was fitted without it.
"""

FALSE_HEAD = """Rounds of 64 and more records that the shipped policies would tighten (.5) or
withhold (.9), and rounds of one record that they would withhold, with the Wilson interval at 95 %;
each architecture scored by what was fitted without it. "raw" are table columns that nobody scaled,
"rare" labels of which about 3 % are positive, "flat" images as plain rows, "dark" mostly black
ones. One record that gives next to no gradient scores low and is counted here as missed.
"""

CARD_HEAD = """# update-sensitivity

Written by `sentinel detectors train update-sensitivity`; every figure below was measured in that
run.

What the score estimates: the share of the records behind an update that linear read-out of the
first dense layer that moved gives away (of its rows, one per place, where its input is a sequence),
or of an embedding where that is more. A record counts as read where some guess (a row of the weight
update over its bias update, a difference of neighbouring rows over theirs, the largest singular
direction) is nearer to the layer's input than 30 % of that input's distance from the average
record; a text counts as read where the words that moved and its own differ in at most 30 % of
both. What is met by chance, measured on records that were not used, is taken off, and what is not
two standard errors beyond chance is 0. It does not estimate what inversion by optimisation would
recover, nor read-out that knows how Adam steps: from few records, Adam's rounds are in no figure.

How: a few dozen to a few hundred rehearsals of known size run through the very model (the
reference), and what leaks from each is measured. The update is compared with them: what leaked from
the six that it resembles most; where it lies between ordinary rehearsals ({many} and more records)
and those of one record, and how anomalous that is, judged by {detector} (pyod), which saw ordinary
rounds only. A forest of {trees} trees learns leakage from all of that and from absolute features,
such as how many of a server's guesses have another one close by. What it says with the reference
and what the rehearsals say are joined (their geometric mean), and that with what it says of
absolute features alone (once more); a monotone curve maps this to leakage. Without a reference the
forest alone scores, on absolute features.

Trained and measured on {samples} synthetic rounds of {models} models.
"""

CARD_TAIL = """## Limits

- Measured on synthetic tasks and the small architectures above. A transformer's dense layers see
  one row per place, and there the score tells little (see its row).
- Whether the one record of a large round that is read is in it or not, the update shows only
  through a few units: the AUROC of "some record read" is lost there, not between few and many.
- Where two outputs share one dense layer, or pooling leaves few features, the update holds little
  that tells few records from many: see the least figures above.
- Where nothing tells few records from many, the score is {blind} and says nothing (sharpness
  "blind"). That is below the .5 at which the shipped policies tighten, and no sign of safety.
- Models without an embedding and without a dense layer that has a bias are in none of these
  figures. Their reference counts one record as read, up to eight by their share, and more as not.
- On an update that carries noise at a useful privacy budget the score sees the noise: it falls, as
  linear read-out does, but it is no measurement of what a patient attacker could still average out.
- A low score is no promise. Only a privacy promise in the policy is one.
"""
