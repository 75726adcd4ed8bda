"""Train the update-sensitivity detector, and measure it with each architecture left out.

The label is measured leakage: what linear read-out of the first dense layer takes from a synthetic
round (`sentinel/detection/readout.py`). The detector itself sees ordinary rounds only; how far an
update lies outside them is mapped to leakage by a monotone curve.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from pyod.models.ecod import ECOD
from pyod.models.hbos import HBOS
from pyod.models.iforest import IForest
from pyod.models.knn import KNN
from pyod.models.lof import LOF
from pyod.models.ocsvm import OCSVM
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from sentinel.detection.bundle import UPDATE_SENSITIVITY, load_detector
from sentinel.detection.features import FEATURE_VERSION, FEATURES, Measured, update_features
from sentinel.detection.reference import (
    BASE,
    LEAST_GAP,
    LEAST_WEIGHT,
    RELATIVE,
    Place,
    Reference,
    build_reference,
)
from sentinel.detection.rounds import Spec, local_round, measured_leakage
from sentinel.detection.sensitivity import BLIND, LEAST_RANK, share_of_single
from sentinel.detection.training.export import to_onnx, write_bundle
from sentinel.detection.training.sensitivity_card import FEW, LIKE_ONE, MANY, Figures, card
from sentinel.detection.training.table import said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from sentinel.detection.training.recipe import Recipe

    Vector = NDArray[np.float64]

TIGHTEN, WITHHOLD = 0.5, 0.9  # from which the shipped policies do so
OUTSIDERS = 64
ONE_STEP = tuple(Spec(count, count, 1, 0.1) for count in (1, 1, 2, 4, 8, 16, 32, 64, 64, 128, 256))
AVERAGED = (
    Spec(1, 1, 4, 0.07),
    Spec(4, 4, 3, 0.07),
    Spec(8, 8, 5, 0.07),
    Spec(16, 8, 2, 0.07),
    Spec(32, 8, 2, 0.07),
    Spec(50, 16, 2, 0.07),
    Spec(100, 32, 2, 0.07),
    Spec(200, 32, 2, 0.07),
)


# Only many records: on a few, Adam's signs defeat read-out, so that the label would say nothing.
ADAPTIVE = (
    Spec(64, 32, 2, 1e-3, adam=True),
    Spec(100, 32, 3, 1e-3, adam=True),
    Spec(200, 32, 2, 1e-3, adam=True),
)


class Site(Protocol):
    """Somebody with a global model and records."""

    @property
    def name(self) -> str:
        """Of the architecture."""

    @property
    def kind(self) -> str:
        """Of the task."""

    @property
    def pace(self) -> float:
        """Factor on the learning rates of plain SGD."""

    @property
    def module(self) -> nn.Module:
        """Holds the global model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records and labels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled synthetic round."""

    name: str
    kind: str
    spec: Spec
    leakage: float
    measured: list[Measured]
    reference: Reference

    @property
    def one_step(self) -> bool:
        """Whether it is a single gradient."""
        spec = self.spec
        return spec.epochs == 1 and spec.batch == spec.records and not spec.adam

    @property
    def ordinary(self) -> bool:
        """Whether it has many records, whatever the steps."""
        return self.spec.records >= MANY


def train_sensitivity(recipe: Recipe, sites: Iterable[Site], folder: Path) -> Figures:
    """Train, measure and write the bundle `update-sensitivity`.

    Args:
        recipe: its numbers.
        sites: global models over several architectures, with records.
        folder: where the bundle goes.

    Returns:
        What was measured.
    """
    samples = [sample for site in sites for sample in _samples(site)]
    figures = Figures(samples=len(samples))
    for name in DETECTORS:
        anomalies = _left_out(samples, name, recipe, plain=True)
        figures.detectors.append((name, *_quality(samples, anomalies)))
    _measure_nets(figures, samples, recipe)
    fitted = _fit(samples, recipe.detector, recipe, [sample.reference for sample in samples])
    anomalies = _anomalies(fitted, samples, [sample.reference for sample in samples])
    knots = _map(anomalies, samples)
    scores = np.interp(anomalies, *np.array(knots).T)
    scores = np.where(np.isnan(anomalies), BLIND, scores)
    _measure_curve(figures, samples, scores)
    _measure_false(figures, samples, recipe)
    manifest = {
        "name": UPDATE_SENSITIVITY,
        "feature_version": FEATURE_VERSION,
        "features": RELATIVE,
        "detector": recipe.detector,
        "seed": recipe.seed,
        "knots": knots,
        "generic": _generic([sample.reference for sample in samples]),
    }
    model = to_onnx(fitted, len(RELATIVE))
    with tempfile.TemporaryDirectory() as draft:  # the graph must open before it is shipped
        write_bundle(Path(draft) / UPDATE_SENSITIVITY, manifest, model, "", "")
        detector = load_detector(UPDATE_SENSITIVITY, folder=Path(draft))
        _check_graph(detector.anomaly, fitted)
    write_bundle(folder, manifest, model, card(recipe, figures), recipe.text(UPDATE_SENSITIVITY))
    return figures


def _samples(site: Site) -> Iterator[Sample]:
    """Yield labelled rounds of one site; diverged ones are left out, as the guard refuses them."""
    state = site.module.state_dict()
    reference = build_reference(site.module, state, sample=site.shape)
    generator = torch.Generator().manual_seed(5)
    for spec in (*ONE_STEP, *AVERAGED, *ADAPTIVE):
        inside, labels = site.draw(spec.records)
        outside, _ = site.draw(OUTSIDERS)
        paced = spec if spec.adam else replace(spec, rate=spec.rate * site.pace)
        deltas = local_round(site.module, inside, labels, paced)
        if not all(bool(torch.isfinite(delta).all()) for delta in deltas.values()):
            continue
        leak = measured_leakage(site.module, state, deltas, inside, outside)
        measured = update_features(deltas, generator)
        if leak is not None and measured:
            yield Sample(site.name, site.kind, spec, leak, measured, reference)


DETECTORS: dict[str, Callable[[Recipe], Any]] = {
    "IForest": lambda recipe: IForest(n_estimators=recipe.trees, random_state=recipe.seed),
    "OCSVM": lambda _: OCSVM(nu=0.05, gamma=1.0),
    "LOF": lambda _: LOF(n_neighbors=30, novelty=True),
    "KNN": lambda _: KNN(n_neighbors=10, method="mean"),
    "ECOD": lambda _: ECOD(),
    "HBOS": lambda _: HBOS(),
}


def _vectors(samples: Sequence[Sample], references: Sequence[Reference]) -> list[Vector]:
    """Relative features of whole updates and of one record: per sample [modes, 2, features]."""
    pairs = zip(samples, references, strict=True)
    shape = (-1, 2, len(RELATIVE))
    return [
        np.reshape(reference.relative(sample.measured)[1], shape).astype(np.float32)
        for sample, reference in pairs
    ]


def _fit(
    samples: Sequence[Sample], name: str, recipe: Recipe, references: Sequence[Reference]
) -> Any:  # noqa: ANN401  # pyod has no types
    """Fit a detector on ordinary rounds of plain SGD on scaled records, in the modes made of such.

    In the other modes, and of other rounds, "ordinary" would come to mean everything.
    """
    chosen = [i for i, s in enumerate(samples) if s.ordinary and s.kind == "plain"]
    chosen = [i for i in chosen if not samples[i].spec.adam]
    vectors = _vectors([samples[i] for i in chosen], [references[i] for i in chosen])
    return DETECTORS[name](recipe).fit(
        np.concatenate([rows[: len(BASE)] for rows in vectors])[:, 0]
    )


def _anomalies(
    fitted: Any,  # noqa: ANN401  # pyod has no types
    samples: Sequence[Sample],
    references: Sequence[Reference],
    *,
    plain: bool = False,
) -> Vector:
    """Anomaly as a share of one record's, or plain, [samples]; the calmest mode, NaN for none."""
    vectors = _vectors(samples, references)
    if plain:  # some detectors score a batch as a whole: nothing else may be in it
        vectors = [rows[:, :1] for rows in vectors]
    width = vectors[0].shape[1]
    scores = fitted.decision_function(np.concatenate(vectors).reshape(-1, len(RELATIVE)))
    parts = np.split(scores.reshape(-1, width), np.cumsum([len(rows) for rows in vectors])[:-1])
    return np.array([min(map(_joined, part), default=np.nan) for part in parts])


def _joined(row: Vector) -> float:
    """Plain anomaly of one row; with a single record's beside it, the share of that."""
    return float(row[0]) if len(row) == 1 else share_of_single(float(row[0]), float(row[1]))


def _left_out(
    samples: Sequence[Sample],
    name: str,
    recipe: Recipe,
    *,
    generic: bool = False,
    plain: bool = False,
) -> Vector:
    """Anomaly of every sample by a detector that never saw its architecture."""
    result = np.zeros(len(samples))
    for net in sorted({sample.name for sample in samples}):
        inside = [sample for sample in samples if sample.name != net]
        outside = [sample for sample in samples if sample.name == net]
        fit_on = [sample.reference for sample in inside]
        score_on = [sample.reference for sample in outside]
        if generic:  # the detector is the same: only what the update is compared with differs
            pooled = _generic(fit_on)
            score_on = [_applied(pooled, sample) for sample in outside]
        fitted = _fit(inside, name, recipe, fit_on)
        chosen = np.array([sample.name == net for sample in samples])
        result[chosen] = _anomalies(fitted, outside, score_on, plain=plain)
    return result


def _generic(references: Sequence[Reference]) -> dict[str, list[float]]:
    """Pool the places of all matrices: per feature and mode ordinary value, gap and weight."""
    unique = list({id(reference): reference for reference in references}.values())
    pooled: dict[str, list[float]] = {name: [] for name in FEATURES}
    for mode in range(len(BASE)):
        found = [
            places[mode]
            for reference in unique
            for places in reference.places.values()
            if places[mode].weight.any()
        ]
        ordinary = np.median([place.ordinary for place in found], axis=0)
        gap = np.median([place.gap for place in found], axis=0)
        signed = np.array([place.weight * np.sign(place.gap) for place in found])
        weight = np.abs(signed.mean(axis=0))
        weight = np.where((np.abs(gap) > LEAST_GAP) & (weight > LEAST_WEIGHT), weight, 0.0)
        for index, name in enumerate(FEATURES):
            pooled[name] += [float(ordinary[index]), float(gap[index]), float(weight[index])]
    return pooled


def _applied(pooled: dict[str, list[float]], sample: Sample) -> Reference:
    rows = np.array([pooled[name] for name in FEATURES])
    modes = tuple(Place(*part.T) for part in np.split(rows, len(BASE), axis=1))
    return Reference(
        {m.names[0]: modes for m in sample.measured if m.rank >= LEAST_RANK}, 0.0, "generic"
    )


def _map(anomalies: Vector, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Fit the map; unscaled tables count only where they do not look like one record.

    Beyond, they would lower the score of true single records; they are false tightenings instead.
    """
    chosen = np.array([s.kind != "raw" for s in samples]) | (anomalies < LIKE_ONE)
    return _knots(anomalies[chosen], np.array([sample.leakage for sample in samples])[chosen])


def _knots(anomalies: Vector, leaks: Vector, most: int = 24) -> list[tuple[float, float]]:
    """Fit the monotone map from anomaly to leakage, and thin it to a few knots."""
    told = ~np.isnan(anomalies)
    anomalies, leaks = anomalies[told], leaks[told]
    curve = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(anomalies, leaks)
    places = np.unique(np.quantile(anomalies, np.linspace(0.0, 1.0, most)))
    values = np.maximum.accumulate(curve.predict(places))
    return [(float(x), float(min(y, 1.0))) for x, y in zip(places, values, strict=True)]


def _check_graph(anomaly: Callable[[Sequence[Sequence[float]]], list[float]], fitted: Any) -> None:  # noqa: ANN401  # pyod has no types
    """Stop where the graph does not say what the detector says."""
    probes = np.random.default_rng(0).uniform(-1, 1.5, (64, len(RELATIVE))).astype(np.float32)
    if not np.allclose(anomaly(probes.tolist()), fitted.decision_function(probes), atol=1e-4):
        msg = "the exported graph and the trained detector differ; use the pinned libraries"
        raise RuntimeError(msg)


def _quality(samples: Sequence[Sample], scores: Vector) -> tuple[float, float, float, float]:
    """Mean and least over architectures of Spearman with leakage, and of the AUROC."""
    ranks, areas = [], []
    for net in sorted({sample.name for sample in samples}):
        chosen = [index for index, sample in enumerate(samples) if sample.name == net]
        rank, area = _net_quality([samples[i] for i in chosen], scores[chosen])
        ranks.append(rank)
        areas.append(area)
    return float(np.mean(ranks)), min(ranks), float(np.mean(areas)), min(areas)


def _net_quality(samples: Sequence[Sample], scores: Vector) -> tuple[float, float]:
    """Spearman and AUROC; a blind score ranks in the middle, as its value does."""
    scores = np.where(np.isnan(scores), np.nanmedian(scores), scores)
    few = [s.one_step and s.spec.records <= FEW for s in samples]
    judged = [s.one_step and (s.spec.records <= FEW or s.ordinary) for s in samples]
    area = roc_auc_score(np.array(few)[judged], scores[judged])
    return spearman(scores, np.array([s.leakage for s in samples])), float(area)


def spearman(left: Vector, right: Vector) -> float:
    """Return the rank correlation, ties at their mean rank; 0 where one side is constant."""
    first, second = _ranks(left), _ranks(right)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Vector) -> Vector:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts - 1) / 2
    return np.asarray(middle[inverse], dtype=np.float64)


def _measure_nets(figures: Figures, samples: Sequence[Sample], recipe: Recipe) -> None:
    sharp = _left_out(samples, recipe.detector, recipe)
    pooled = _left_out(samples, recipe.detector, recipe, generic=True)
    for net in sorted({sample.name for sample in samples}):
        chosen = [index for index, sample in enumerate(samples) if sample.name == net]
        inside = [samples[i] for i in chosen]
        figures.nets.append(
            (net, *_net_quality(inside, sharp[chosen]), *_net_quality(inside, pooled[chosen]))
        )


def _measure_curve(figures: Figures, samples: Sequence[Sample], scores: Vector) -> None:
    """Mean measured leakage and score for each kind of round."""
    for spec in dict.fromkeys((*ONE_STEP, *AVERAGED, *ADAPTIVE)):
        chosen = np.array([sample.spec == spec for sample in samples])
        if chosen.any():
            leaks = np.array([sample.leakage for sample in samples])[chosen]
            steps = "one step" if spec.epochs == 1 else f"{spec.epochs} epochs of {spec.batch}"
            label = f"{spec.records} records, {steps}{', Adam' if spec.adam else ''}"
            low, high = (float(np.quantile(scores[chosen], level)) for level in (0.1, 0.9))
            figures.curve.append((label, float(leaks.mean()), low, high))


def _measure_false(figures: Figures, samples: Sequence[Sample], recipe: Recipe) -> None:
    """Count ordinary rounds that the shipped thresholds would tighten or withhold, by kind.

    Every architecture is scored by a detector and a map that were fitted without it.
    """
    scores = np.zeros(len(samples))
    for net in sorted({sample.name for sample in samples}):
        inside = [sample for sample in samples if sample.name != net]
        outside = [sample for sample in samples if sample.name == net]
        fitted = _fit(inside, recipe.detector, recipe, [sample.reference for sample in inside])
        known = _anomalies(fitted, inside, [sample.reference for sample in inside])
        knots = _map(known, inside)
        new = _anomalies(fitted, outside, [sample.reference for sample in outside])
        mapped = np.interp(new, *np.array(knots).T)
        scores[[sample.name == net for sample in samples]] = np.where(np.isnan(new), BLIND, mapped)
    for kind, what, chosen in _ordinary_kinds(samples):
        many = scores[chosen & np.array([sample.ordinary for sample in samples])]
        one = scores[chosen & np.array([sample.spec.records == 1 for sample in samples])]
        figures.false.append(
            (
                f"{kind}, {what}",
                said(int((many >= TIGHTEN).sum()), len(many)),
                said(int((many >= WITHHOLD).sum()), len(many)),
                said(int((one >= WITHHOLD).sum()), len(one)),
            )
        )


def _ordinary_kinds(
    samples: Sequence[Sample],
) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield kind of task, optimizer, and which samples they are."""
    for kind in dict.fromkeys(sample.kind for sample in samples):
        for adam, what in ((False, "SGD"), (True, "Adam")):
            yield kind, what, np.array([s.kind == kind and s.spec.adam == adam for s in samples])
