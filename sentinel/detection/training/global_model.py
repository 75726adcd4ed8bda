"""Train the learned part of the inspection, and measure the whole of it.

The detector sees the statistics of single layers of honest models, and nothing else. The rules have
no training; the evaluation runs both together, on other runs and on crafted models.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from pyod.models.iforest import IForest

from sentinel.detection.bundle import GLOBAL_MODEL, load_detector
from sentinel.detection.inspection import inspect_global_model
from sentinel.detection.layers import layers_of
from sentinel.detection.training.export import to_onnx, write_bundle
from sentinel.detection.training.table import said, table
from sentinel.detection.weights import STATISTICS, STATISTICS_VERSION, layer_statistics

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from sentinel.detection.bundle import Detector
    from sentinel.detection.training.recipe import Recipe

CEILING = 0.3  # what the learned part alone may say: below every refusal
ALARM = 0.5


class Run(Protocol):
    """An honest run."""

    @property
    def kind(self) -> str:
        """What is special about it."""

    @property
    def module(self) -> nn.Module:
        """The architecture."""

    @property
    def states(self) -> Sequence[Mapping[str, Tensor]]:
        """Global models, oldest first."""


class Crafted(Protocol):
    """A crafted model."""

    @property
    def family(self) -> str:
        """Letter of the family."""

    @property
    def variant(self) -> str:
        """Which recipe."""

    @property
    def module(self) -> nn.Module:
        """The architecture."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What the server sends."""


# (family, variant) -> suspicion, verdict, and suspicion from the state alone
Caught = dict[tuple[str, str], list[tuple[float, str, float]]]


@dataclass
class Figures:
    """What was measured; the card is written from it."""

    honest: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    alarmed_runs: int = 0
    crafted: Caught = field(default_factory=dict)
    harder: Caught = field(default_factory=dict)
    layers: int = 0


@dataclass(frozen=True, slots=True)
class ModelCorpus:
    """What is trained and measured on.

    Attributes:
        honest: runs to train on.
        test: other runs, to count false alarms on.
        crafted: crafted models, to count detections on.
        harder: variants that the rules were not made for, counted apart.
    """

    honest: Iterable[Run]
    test: Iterable[Run]
    crafted: Iterable[Crafted]
    harder: Iterable[Crafted]


def train_global_model(recipe: Recipe, corpus: ModelCorpus, folder: Path) -> Figures:
    """Train, measure and write the bundle `global-model`.

    Args:
        recipe: its numbers.
        corpus: honest runs and crafted models.
        folder: where the bundle goes.

    Returns:
        What was measured.
    """
    vectors = np.array(list(_vectors(corpus.honest)), dtype=np.float32)
    fitted = IForest(n_estimators=recipe.trees, random_state=recipe.seed, n_jobs=1).fit(vectors)
    model = to_onnx(fitted, len(STATISTICS))
    manifest = {
        "name": GLOBAL_MODEL,
        "feature_version": STATISTICS_VERSION,
        "features": STATISTICS,
        "detector": recipe.detector,
        "seed": recipe.seed,
        "knots": _knots(fitted.decision_scores_),
    }
    figures = Figures(layers=len(vectors))
    with tempfile.TemporaryDirectory() as draft:
        write_bundle(Path(draft) / GLOBAL_MODEL, manifest, model, "", "")
        detector = load_detector(GLOBAL_MODEL, folder=Path(draft))
    measure_honest(figures, corpus.test, detector)
    measure_crafted(figures.crafted, corpus.crafted, detector)
    measure_crafted(figures.harder, corpus.harder, detector)
    write_bundle(folder, manifest, model, card(recipe, figures), recipe.text(GLOBAL_MODEL))
    return figures


def _vectors(runs: Iterable[Run]) -> Iterator[list[float]]:
    for run in runs:
        for state in run.states:
            for layer in layers_of(state):
                generator = torch.Generator().manual_seed(0)
                yield layer_statistics(layer, generator).vector()


def _knots(scores: Sequence[float]) -> list[tuple[float, float]]:
    """Map the honest median to 0, the honest 99th percentile to .1 and beyond all honest to .3."""
    middle, high, most = (float(np.quantile(scores, level)) for level in (0.5, 0.99, 1.0))
    margin = most - middle
    return [
        (middle, 0.0),
        (max(high, middle + 1e-6), 0.1),
        (max(most, high + 2e-6) + 1e-6, 0.15),
        (most + 0.5 * margin + 3e-6, CEILING),
    ]


def measure_honest(figures: Figures, runs: Iterable[Run], detector: Detector) -> None:
    """Inspect every round of every run with its history, with and without the architecture."""
    for run in runs:
        history = None
        worst = 0.0
        for state in run.states:
            found = inspect_global_model(state, history, run.module, detector=detector)
            history = found.history
            seen = 1.0 if found.unhealthy else found.suspicion
            figures.honest.setdefault(run.kind, []).append(seen)
            worst = max(worst, seen)
        figures.runs[run.kind] = figures.runs.get(run.kind, 0) + 1
        figures.alarmed_runs += worst >= ALARM


def measure_crafted(caught: Caught, models: Iterable[Crafted], detector: Detector) -> None:
    """Inspect every crafted model as a first round, with and without the architecture."""
    for crafted in models:
        found = inspect_global_model(crafted.state, None, crafted.module, detector=detector)
        alone = inspect_global_model(crafted.state, detector=detector)
        seen = (found.suspicion, found.verdict.value, alone.suspicion)
        caught.setdefault((crafted.family, crafted.variant), []).append(seen)


def card(recipe: Recipe, figures: Figures) -> str:
    """Write the card."""
    everything = [value for values in figures.honest.values() for value in values]
    parts = [
        CARD_HEAD.format(layers=figures.layers, runs=recipe.honest_runs, trees=recipe.trees),
        "## Honest models\n",
        _alarms(figures, everything),
        table(("kind", "runs", "rounds", "alarms", "largest suspicion"), _honest_rows(figures)),
        "## Crafted models\n",
        CRAFTED_HEAD,
        table(CRAFTED_COLUMNS, _crafted_rows(figures.crafted)),
        _families(figures.crafted),
        "## Variants that the rules were not made for\n",
        HARDER_HEAD,
        table(CRAFTED_COLUMNS, _crafted_rows(figures.harder)),
        CARD_TAIL,
    ]
    return "\n".join(parts)


def _alarms(figures: Figures, everything: Sequence[float]) -> str:
    rounds = said(sum(value >= ALARM for value in everything), len(everything))
    runs = said(figures.alarmed_runs, sum(figures.runs.values()))
    return (
        f"False alarms (suspicion of .5 or more, or unhealthy): {rounds} rounds; {runs} runs; in "
        f"brackets the 95 % Wilson interval. Largest suspicion: {max(everything):.2f}.\n"
    )


def _honest_rows(figures: Figures) -> Iterator[tuple[str, ...]]:
    for kind, values in figures.honest.items():
        alarms = sum(value >= ALARM for value in values)
        runs = figures.runs[kind]
        yield kind, str(runs), str(len(values)), str(alarms), f"{max(values):.2f}"


def _crafted_rows(caught: Caught) -> Iterator[tuple[str, ...]]:
    for (family, variant), values in caught.items():
        scores = [score for score, _, _ in values]
        verdicts = [verdict for _, verdict, _ in values]
        common = max(sorted(set(verdicts)), key=verdicts.count)
        yield (
            family,
            variant,
            said(sum(score >= ALARM for score in scores), len(scores)),
            f"{min(scores):.2f}",
            f"{common} ({verdicts.count(common)})",
            said(sum(alone >= ALARM for _, _, alone in values), len(values)),
        )


def _families(caught: Caught) -> str:
    lines = []
    for family in sorted({family for family, _ in caught}):
        scores = [
            seen[0] for (other, _), rows in caught.items() if other == family for seen in rows
        ]
        lines.append(f"- family {family}: {said(sum(s >= ALARM for s in scores), len(scores))}")
    return "Together:\n\n" + "\n".join(lines) + "\n"


CRAFTED_COLUMNS = (
    "family",
    "variant",
    "detected",
    "least suspicion",
    "verdict",
    "from the state alone",
)

HARDER_HEAD = (
    "Whether each of these still leaks was not measured: mixing and jitter cost the attacker\n"
    "records too.\n"
)

CARD_HEAD = """# global-model

Written by `sentinel detectors train global-model`; every figure below was measured in that run.

What is arithmetic and what is learned: verdict and alarm come from named rules
(`sentinel/detection/rules.py`) over statistics of each layer, of the change against earlier rounds,
and of one forward and one backward pass of synthetic probes. The learned part is an Isolation
Forest (pyod, {trees} trees) over the same statistics of {layers} layers of {runs} honest runs; it
adds at most .3 to the suspicion and raises no alarm by itself.

Trained on synthetic tasks only: dense nets, LeNet, strided and normalised convolutional nets and a
small residual net, from several kinds of first values, at several stages, plain, pruned, noised,
in half precision, trained too fast, on one class, rolled back.
"""

CRAFTED_HEAD = """Each is inspected as the first round, without history: once with the architecture
at hand, once from the state alone. Detected: suspicion of .5 or more.
"""

CARD_TAIL = """## Limits

- Crafted models and honest runs above use the same small architectures as the training. Others,
  transformers among them, are measured by `sentinel detectors evaluate global-model`.
- Only the textbook attacks and the variants in the tables are measured here, each as a first round.
  Attacks spread over rounds, attacks in a running federation, traps for tokens and learned attacks
  (the whole net trained to leak) are measured by that command as well.
- Rounds of one run resemble one another: read the count of runs, not only of rounds.
- An attack that keeps to one layer type without a bias, or hides behind an unusual activation, has
  no rule here. Sanitizing must not depend on this detector.
"""
