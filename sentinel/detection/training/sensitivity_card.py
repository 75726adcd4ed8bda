"""The card of the update-sensitivity bundle: what was measured, in words and tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sentinel.detection.sensitivity import BLIND
from sentinel.detection.training.table import table

if TYPE_CHECKING:
    from sentinel.detection.training.recipe import Recipe

FEW, MANY = 8, 64
LIKE_ONE = 0.9  # anomaly, as a share of one record's, from which a round looks like one


@dataclass
class Figures:
    """What was measured; the card is written from it."""

    detectors: list[tuple[str, float, float, float, float]] = field(default_factory=list)
    nets: list[tuple[str, float, float, float, float]] = field(default_factory=list)
    curve: list[tuple[str, float, float, float]] = field(default_factory=list)
    false: list[tuple[str, str, str, str]] = field(default_factory=list)
    samples: int = 0


def card(recipe: Recipe, figures: Figures) -> str:
    """Write the card."""
    head = CARD_HEAD.format(
        samples=figures.samples, trees=recipe.trees, detector=recipe.detector, like_one=LIKE_ONE
    )
    return "\n".join(
        [
            head,
            "## Choice of the detector\n",
            CHOICE_HEAD.format(few=FEW, many=MANY),
            table(
                ("pyod detector", "Spearman", "least", "AUROC", "least"),
                ((name, *(f"{x:.3f}" for x in row)) for name, *row in figures.detectors),
            ),
            f"## {recipe.detector}, by architecture left out\n",
            "With a reference of the model at hand, and without (generic).\n",
            table(
                ("architecture", "Spearman", "AUROC", "generic Spearman", "generic AUROC"),
                ((name, *(f"{x:.3f}" for x in row)) for name, *row in figures.nets),
            ),
            "## Score by kind of round\n",
            "All architectures together, the map fitted on these same rounds.\n",
            table(
                ("round", "mean measured leakage", "score, 10th percentile", "90th percentile"),
                ((name, *(f"{x:.2f}" for x in row)) for name, *row in figures.curve),
            ),
            "## False tightenings\n",
            FALSE_HEAD,
            table(
                ("task, optimizer", "many at or above .5", "many at .9", "one record at .9"),
                figures.false,
            ),
            CARD_TAIL.format(blind=BLIND),
        ]
    )


CHOICE_HEAD = """Each architecture left out in turn: Spearman of anomaly with measured leakage, and
AUROC of one-step rounds of 1 to {few} records against {many} and more; mean and least over
architectures. The anomaly is taken plain here, since not every detector's has a zero.
"""

FALSE_HEAD = """Rounds of 64 and more records that the shipped policies would tighten (.5) or
withhold (.9), and rounds of one record that they would withhold; detector and map fitted without
the architecture, with the Wilson interval at 95 %. "raw" are table columns that nobody scaled,
"rare" labels of which about 3 % are positive, "flat" images as plain rows. One record that gives
next to no gradient scores low and is counted here as missed.
"""

CARD_HEAD = """# update-sensitivity

Written by `sentinel detectors train update-sensitivity`; every figure below was measured in that
run.

What the score estimates: the share of the records behind an update that linear read-out of the
first dense layer gives away. A record counts as read where some guess (a row of the weight update
over its bias update, a difference of neighbouring rows over theirs, the largest singular direction)
is nearer to the layer's input than 30 % of that input's distance from the average record; what is
met by chance, measured on records that were not used, is taken off. It does not estimate what
inversion by optimisation would recover.

How: content-free features of each tensor, placed between ordinary rounds (64 and more records, one
step or federated averaging) and rounds of one record of the same model (the reference: synthetic
rounds through the very model); joined by how well each tells the two apart; then {detector} (pyod,
{trees} trees where it is a forest), trained on ordinary rounds only (plain SGD, scaled records);
its anomaly as a share of what one record's would be on the same model; then a monotone map to
measured leakage. The reference also holds rounds with Adam and, for tables, of unscaled columns:
they excuse an update that they explain. Unscaled rounds that look like one record (from {like_one}
of its anomaly) are left out of the map, or true single records would score low; they are counted
as false tightenings below.
Trained and measured on {samples} synthetic rounds.
"""

CARD_TAIL = """## Limits

- Measured on synthetic tasks, SGD and Adam, and the architectures above; no transformer, no other
  adaptive optimizer, no update that was sanitized before.
- Where nothing tells few records from many, the score is {blind} and says nothing (sharpness
  "blind"). That is below the .5 at which the shipped policies tighten, and no sign of safety.
- Models without a dense layer that has a bias (autoencoders of convolutions, for one) are in none
  of these figures, since the leakage that the map is fitted to cannot be read there.
- On an update that carries noise at a useful privacy budget the score sees the noise: it falls, as
  linear read-out does, but it is no measurement of what a patient attacker could still average out.
- Where two outputs share one dense layer, or pooling leaves few features, the update holds little
  that tells few records from many: see the least figures above.
- A low score is no promise. Only a privacy promise in the policy is one.
"""
