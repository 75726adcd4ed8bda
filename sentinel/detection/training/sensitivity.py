"""Train the update-sensitivity detector, and measure it with each architecture left out.

The label is measured leakage: what linear read-out takes from a synthetic round
(`sentinel/detection/readout.py`). A pyod detector sees ordinary rounds only and says how far an
update lies outside them; a forest learns leakage from the clues, with a reference and without; all
are joined with what leaked from the rehearsals that an update resembles, and mapped to leakage by a
monotone curve.
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
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from sentinel.detection.bundle import UPDATE_SENSITIVITY, load_detector
from sentinel.detection.clues import CLUES, RELATIVE, clues, resembling
from sentinel.detection.features import FEATURE_VERSION, update_features
from sentinel.detection.readout import EXACT
from sentinel.detection.reference import MANY, build_reference
from sentinel.detection.rehearsal import DIVERGED, with_noise
from sentinel.detection.rounds import Readable, Spec, local_round
from sentinel.detection.sensitivity import joined
from sentinel.detection.training.export import to_onnx, with_forest, write_bundle
from sentinel.detection.training.sensitivity_card import FEW, Figures, card
from sentinel.detection.training.table import said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from sentinel.detection.training.recipe import Recipe

    Vector = NDArray[np.float64]

TIGHTEN, WITHHOLD = 0.5, 0.9  # from which the shipped policies do so
OUTSIDERS = 64
SOME = 0.0  # leakage above which some record can be read
LEAF = 10  # rounds in a leaf of the forest
FOLDS = 4  # groups of architectures left out together, where many fits are compared
ONE_STEP = tuple(
    Spec(count, count, 1, 0.1)
    for count in (1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 64, 128, 256)
)
AVERAGED = (
    Spec(1, 1, 4, 0.07),
    Spec(2, 2, 2, 0.07),
    Spec(4, 4, 3, 0.07),
    Spec(8, 8, 5, 0.07),
    Spec(16, 8, 2, 0.07),
    Spec(32, 8, 2, 0.07),
    Spec(50, 16, 2, 0.07),
    Spec(64, 64, 3, 0.07),
    Spec(100, 32, 2, 0.07),
    Spec(200, 32, 2, 0.07),
    Spec(6, 3, 2, 0.03, momentum=0.9),
    Spec(80, 16, 2, 0.03, momentum=0.9),
)
# Only many records: on few, Adam's signs defeat read-out, so that the label would say nothing.
ADAPTIVE = (
    Spec(64, 32, 2, 1e-3, adam=True),
    Spec(100, 32, 3, 1e-3, adam=True),
    Spec(200, 32, 2, 1e-3, adam=True),
)
ALIKE = (8, 64, 100)  # sizes of the rounds that are also tried with records of one label
NOISES = (0.05, 0.2, 0.5, 1.0, 2.0)  # norm of the noise / norm of the update, in turn


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

    def draw_alike(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records of one label, and labels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled synthetic round.

    Attributes:
        name: of the architecture.
        kind: of the task.
        site: number of the model: rounds of one are compared with one another.
        spec: how it was trained.
        noise: norm of the noise over that of the update.
        leakage: measured.
        exact: the same where only 1 % off counts as read.
        known: clues with the reference of the model.
        unknown: clues without.
    """

    name: str
    kind: str
    site: int
    spec: Spec
    noise: float
    leakage: float
    exact: float
    known: Vector
    unknown: Vector

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
    samples = [sample for number, site in enumerate(sites) for sample in _samples(site, number)]
    figures = Figures(samples=len(samples), models=len({sample.site for sample in samples}))
    _compare(figures, samples, recipe)
    tried = _left_out(samples, recipe, [[name] for name in _names(samples)])
    knots = _knots(tried.joint, samples)
    generic = _knots(tried.generic, samples)
    scores = np.interp(tried.joint, *np.array(knots).T)
    _measure_nets(figures, samples, tried)
    _measure_reliability(figures, samples, scores, np.interp(tried.generic, *np.array(generic).T))
    _measure_curve(figures, samples, scores)
    _measure_false(figures, samples, scores)
    fitted = _Fitted.of(samples, recipe)
    manifest = {
        "name": UPDATE_SENSITIVITY,
        "feature_version": FEATURE_VERSION,
        "features": CLUES,
        "detector": recipe.detector,
        "seed": recipe.seed,
        "knots": knots,
        "generic_knots": generic,
    }
    model = fitted.graph()
    with tempfile.TemporaryDirectory() as draft:  # the graph must open before it is shipped
        write_bundle(Path(draft) / UPDATE_SENSITIVITY, manifest, model, "", "")
        _check_graph(load_detector(UPDATE_SENSITIVITY, folder=Path(draft)), fitted, samples)
    write_bundle(folder, manifest, model, card(recipe, figures), recipe.text(UPDATE_SENSITIVITY))
    return figures


def _samples(site: Site, number: int) -> Iterator[Sample]:
    """Yield labelled rounds of one site; diverged ones are left out, as the guard refuses them."""
    state = site.module.state_dict()
    reference = build_reference(site.module, state, sample=site.shape)
    generator = torch.Generator().manual_seed(5)
    outside, _ = site.draw(OUTSIDERS)
    turn = number
    for spec in (*ONE_STEP, *AVERAGED, *ADAPTIVE):
        for alike in (False, True) if spec.records in ALIKE else (False,):
            turn += 1
            inside, labels = (site.draw_alike if alike else site.draw)(spec.records)
            rate = spec.rate * (1.0 if spec.adam else site.pace)
            actual = replace(spec, records=len(inside), rate=rate)
            deltas = local_round(site.module, inside, labels, actual)
            if not all(bool(delta.abs().amax() < DIVERGED) for delta in deltas.values()):
                continue
            readable = Readable.of(site.module, inside, outside)
            for noise in (0.0,) if alike else (0.0, NOISES[turn % len(NOISES)]):
                noised = with_noise(deltas, noise, generator)
                leak = readable.leakage(state, noised)
                exact = readable.leakage(state, noised, EXACT)
                measured = update_features(noised, generator)
                if leak is not None and exact is not None and measured:
                    seen = clues(measured, reference), clues(measured, None)
                    yield Sample(site.name, site.kind, number, spec, noise, leak, exact, *seen)


DETECTORS: dict[str, Callable[[Recipe], Any]] = {
    "IForest": lambda recipe: IForest(n_estimators=recipe.trees, random_state=recipe.seed),
    "OCSVM": lambda _: OCSVM(nu=0.05, gamma=1.0),
    "LOF": lambda _: LOF(n_neighbors=30, novelty=True),
    "KNN": lambda _: KNN(n_neighbors=10, method="mean"),
    "ECOD": lambda _: ECOD(),
    "HBOS": lambda _: HBOS(),
}
ENSEMBLE = "mean of the six, each in its standard deviations"
_PLACES = [CLUES.index(name) for name in RELATIVE]


def _places(seen: Vector) -> Vector:
    """What the pyod detector sees of clues [n, clues]: the graph does the same."""
    return np.maximum(seen[:, _PLACES], 0.0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A detector of ordinary rounds and a forest."""

    detector: Any  # pyod has no types
    forest: Any  # nor has scikit-learn

    @classmethod
    def of(cls, samples: Sequence[Sample], recipe: Recipe) -> _Fitted:
        """Fit both; every architecture weighs alike in the forest, with and without reference."""
        forest = ExtraTreesRegressor(
            recipe.trees, min_samples_leaf=LEAF, max_features=0.4, random_state=recipe.seed
        )
        names = [sample.name for sample in samples]
        counts = {name: names.count(name) for name in set(names)}
        weights = np.array([1.0 / counts[name] ** 0.5 for name in names] * 2)
        detector = _detector(samples, recipe, recipe.detector)
        rows = np.concatenate([_known(samples), _unknown(samples)])
        leaks = np.array([sample.leakage for sample in samples] * 2)
        return cls(
            detector,
            forest.fit(_widened(detector, rows), leaks, sample_weight=weights / weights.mean()),
        )

    def leakage(self, seen: Vector) -> Vector:
        """What the forest makes of clues [n, clues] and their anomaly."""
        return np.asarray(self.forest.predict(_widened(self.detector, seen)))

    def graph(self) -> bytes:
        """Return both as one ONNX graph."""
        plain = to_onnx(self.detector, len(RELATIVE))
        return with_forest(plain, self.forest, len(CLUES), _PLACES)


def _widened(detector: Any, seen: Vector) -> Vector:  # noqa: ANN401  # pyod has no types
    """Clues and, after them, how anomalous they are: what the forest sees, [n, clues + 1]."""
    strange = detector.decision_function(_places(seen))
    return np.column_stack([seen, strange]).astype(np.float32)


def _known(samples: Sequence[Sample]) -> Vector:
    return np.array([sample.known for sample in samples])


def _unknown(samples: Sequence[Sample]) -> Vector:
    return np.array([sample.unknown for sample in samples])


def _detector(samples: Sequence[Sample], recipe: Recipe, name: str) -> Any:  # noqa: ANN401  # pyod has no types
    """Fit on ordinary rounds alone: many records, no noise, little leakage, scaled columns."""
    chosen = [s for s in samples if s.ordinary and not s.noise and s.kind != "raw"]
    return DETECTORS[name](recipe).fit(_places(_known(chosen)))


@dataclass(frozen=True, slots=True)
class _Tried:
    """Estimates for every round by what was fitted without its architecture, [samples] each."""

    forest: Vector
    anomaly: Vector
    alike: Vector
    joint: Vector
    generic: Vector


def _names(samples: Sequence[Sample]) -> list[str]:
    return sorted({sample.name for sample in samples})


def _left_out(samples: Sequence[Sample], recipe: Recipe, groups: Sequence[Sequence[str]]) -> _Tried:
    """Estimate each group of architectures by what was fitted on the others."""
    forest, anomaly, generic = (np.zeros(len(samples)) for _ in range(3))
    for group in groups:
        chosen = np.array([sample.name in group for sample in samples])
        outside = [sample for sample in samples if sample.name in group]
        fitted = _Fitted.of([s for s in samples if s.name not in group], recipe)
        forest[chosen] = fitted.leakage(_known(outside))
        generic[chosen] = fitted.leakage(_unknown(outside))
        anomaly[chosen] = fitted.detector.decision_function(_places(_known(outside)))
    alike = np.array([resembling(sample.known) or 0.0 for sample in samples])
    joint = [joined(*row) for row in zip(forest, generic, alike, strict=True)]
    return _Tried(forest, anomaly, alike, np.array(joint), generic)


def _compare(figures: Figures, samples: Sequence[Sample], recipe: Recipe) -> None:
    """Compare detectors, their ensemble, and the parts of the score, by groups left out."""
    names = _names(samples)
    groups = [names[start :: min(FOLDS, len(names))] for start in range(min(FOLDS, len(names)))]
    plain: dict[str, Vector] = {name: np.zeros(len(samples)) for name in (*DETECTORS, ENSEMBLE)}
    for group in groups:
        chosen = np.array([sample.name in group for sample in samples])
        inside = [sample for sample in samples if sample.name not in group]
        seen = _places(_known([sample for sample in samples if sample.name in group]))
        for name in DETECTORS:
            fitted = _detector(inside, recipe, name)
            scores = fitted.decision_function(seen)
            plain[name][chosen] = scores
            spread = float(np.std(fitted.decision_scores_)) or 1.0
            plain[ENSEMBLE][chosen] += (scores - np.mean(fitted.decision_scores_)) / spread
    figures.detectors += [(name, *_quality(samples, scores)) for name, scores in plain.items()]
    tried = _left_out(samples, recipe, groups)
    parts = {
        "what leaked from the rehearsals it resembles": tried.alike,
        f"anomaly ({recipe.detector})": tried.anomaly,
        "forest over clues and anomaly, with a reference": tried.forest,
        "forest, without": tried.generic,
        "joined (the score)": tried.joint,
    }
    figures.parts += [(name, *_quality(samples, scores)) for name, scores in parts.items()]


def _knots(values: Vector, samples: Sequence[Sample], most: int = 24) -> list[tuple[float, float]]:
    """Fit the monotone map to leakage on architectures left out, and thin it to a few knots."""
    leaks = np.array([sample.leakage for sample in samples])
    chosen = np.array([sample.kind != "raw" for sample in samples])
    values, leaks = values[chosen], leaks[chosen]
    curve = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(values, leaks)
    places = np.unique(np.quantile(values, np.linspace(0.0, 1.0, most)))
    mapped = np.maximum.accumulate(curve.predict(places))
    return [(float(x), float(min(y, 1.0))) for x, y in zip(places, mapped, strict=True)]


def _check_graph(detector: Any, fitted: _Fitted, samples: Sequence[Sample]) -> None:  # noqa: ANN401
    """Stop where the graph does not say what the detector and the forest say."""
    rows = np.concatenate([_known(samples[::7]), _unknown(samples[::7])])
    pairs = (
        (detector.anomaly(rows.tolist()), fitted.detector.decision_function(_places(rows))),
        (detector.leakage(rows.tolist()), fitted.leakage(rows)),
    )
    if not all(np.allclose(said_, meant, atol=1e-4) for said_, meant in pairs):
        msg = "the exported graph and the trained detector differ; use the pinned libraries"
        raise RuntimeError(msg)


def _quality(samples: Sequence[Sample], scores: Vector) -> tuple[float, float, float, float]:
    """Mean and least over architectures of Spearman with leakage, and of the AUROC."""
    found = [_net_quality(samples, scores, name)[:2] for name in _names(samples)]
    ranks, areas = np.array(found).T
    return (
        float(np.nanmean(ranks)),
        float(np.nanmin(ranks)),
        float(np.nanmean(areas)),
        float(np.nanmin(areas)),
    )


def _net_quality(
    samples: Sequence[Sample], scores: Vector, name: str
) -> tuple[float, float, float, float, float]:
    """Figures of one architecture, each a mean over its models (scaled columns, no noise).

    Returns:
        Spearman with leakage; AUROC of some record read; the same where only 1 % off counts; AUROC
        of few against many records in one step; Spearman that leakage itself would have with its
        ties broken at random.
    """
    fit = [s.name == name and s.kind != "raw" and not s.noise for s in samples]
    chosen = np.flatnonzero(fit).tolist()
    rows = []
    for site in dict.fromkeys(samples[i].site for i in chosen):
        own = [i for i in chosen if samples[i].site == site]
        inside, values = [samples[i] for i in own], scores[own]
        leaks = np.array([s.leakage for s in inside])
        exact = np.array([s.exact for s in inside])
        judged = np.array([s.one_step and (s.spec.records <= FEW or s.ordinary) for s in inside])
        few = np.array([s.spec.records <= FEW for s in inside])
        jitter = 1e-9 * np.random.default_rng(site).standard_normal(len(leaks))
        rows.append(
            (
                spearman(values, leaks),
                _area(leaks > SOME, values),
                _area(exact > SOME, values),
                _area(few[judged], values[judged]),
                spearman(leaks + jitter, leaks) if np.ptp(leaks) else np.nan,
            )
        )
    table = np.array(rows)
    told = np.isfinite(table)
    means = np.where(told, table, 0.0).sum(0) / np.maximum(told.sum(0), 1)
    rank, some, exact, few, ceiling = np.where(told.any(0), means, np.nan).tolist()
    return rank, some, exact, few, ceiling


def _area(positive: NDArray[np.bool_], scores: Vector) -> float:
    return float(roc_auc_score(positive, scores)) if 0 < positive.sum() < len(scores) else np.nan


def spearman(left: Vector, right: Vector) -> float:
    """Return the rank correlation, ties at their mean rank; 0 where the left is constant.

    NaN where the right one is: there is nothing to be ranked.
    """
    first, second = _ranks(left), _ranks(right)
    if np.ptp(second) == 0:
        return np.nan
    return 0.0 if np.ptp(first) == 0 else float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Vector) -> Vector:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts - 1) / 2
    return np.asarray(middle[inverse], dtype=np.float64)


def _measure_nets(figures: Figures, samples: Sequence[Sample], tried: _Tried) -> None:
    for name in _names(samples):
        sharp = _net_quality(samples, tried.joint, name)
        pooled = _net_quality(samples, tried.generic, name)
        figures.nets.append((name, *sharp, *pooled[:2]))


def _measure_reliability(
    figures: Figures, samples: Sequence[Sample], scores: Vector, generic: Vector
) -> None:
    """Mean measured leakage by the score, in tenths."""
    leaks = np.array([sample.leakage for sample in samples])
    for step in range(10):
        row = []
        for values in (scores, generic):
            tenth = np.minimum((values * 10.0).astype(int), 9) == step
            row += [str(int(tenth.sum())), f"{leaks[tenth].mean():.2f}" if tenth.any() else "-"]
        figures.reliability.append((f"{step / 10:.1f} to {(step + 1) / 10:.1f}", *row))


def _measure_curve(figures: Figures, samples: Sequence[Sample], scores: Vector) -> None:
    """Mean measured leakage and score for each kind of round, and for one record under noise."""
    leaks = np.array([sample.leakage for sample in samples])

    def add(label: str, chosen: NDArray[np.bool_]) -> None:
        if chosen.any():
            low, high = (float(np.quantile(scores[chosen], level)) for level in (0.1, 0.9))
            figures.curve.append((label, float(leaks[chosen].mean()), low, high))

    for spec in dict.fromkeys((*ONE_STEP, *AVERAGED, *ADAPTIVE)):
        steps = "one step" if spec.epochs == 1 else f"{spec.epochs} epochs of {spec.batch}"
        extra = f"{', Adam' if spec.adam else ''}{', momentum' if spec.momentum else ''}"
        same = np.array([sample.spec == spec and not sample.noise for sample in samples])
        add(f"{spec.records} records, {steps}{extra}", same)
    for noise in NOISES:
        one = [s.spec.records == 1 and s.noise == noise for s in samples]
        add(f"1 record, noise of {noise:g} times its norm", np.array(one))


def _measure_false(figures: Figures, samples: Sequence[Sample], scores: Vector) -> None:
    """Count ordinary rounds that the shipped thresholds would tighten or withhold, by kind."""
    for kind in dict.fromkeys(sample.kind for sample in samples):
        for adam, what in ((False, "SGD"), (True, "Adam")):
            clean = [s.kind == kind and s.spec.adam == adam and not s.noise for s in samples]
            chosen = np.array(clean)
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
