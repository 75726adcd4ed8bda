"""A detector in a bundle says what the one that was trained says."""

import numpy as np
import onnxruntime
import pytest
from pyod.models.iforest import IForest
from pyod.models.knn import KNN

from sentinel.detection.bundle import ANOMALY, INPUT
from sentinel.detection.training.export import _rounded_down, to_onnx

COLUMNS = 6


def rows(count: int, *, seed: int) -> np.ndarray:
    """Some on a lattice, where values fall upon the thresholds themselves."""
    drawn = np.random.default_rng(seed).normal(size=(count, COLUMNS)).astype(np.float32)
    drawn[:, 0] = np.round(drawn[:, 0])
    return drawn


@pytest.mark.parametrize(
    "detector",
    [
        IForest(n_estimators=30, random_state=1),
        IForest(n_estimators=30, random_state=1, max_features=0.5, contamination=0.02),
        KNN(n_neighbors=5, method="mean"),
    ],
    ids=["forest", "forest of some columns", "neighbours"],
)
def test_the_graph_scores_as_the_fitted_detector(detector) -> None:
    fitted = detector.fit(rows(500, seed=0))
    asked = np.concatenate([rows(200, seed=0), 10 * rows(200, seed=1)])
    session = onnxruntime.InferenceSession(to_onnx(fitted, COLUMNS))
    found = session.run([ANOMALY], {INPUT: asked})[0].reshape(-1)
    assert found == pytest.approx(fitted.decision_function(asked), rel=1e-4, abs=1e-4)
    assert found[200:].mean() > found[:200].mean()


def test_a_threshold_is_not_rounded_past_an_input() -> None:
    third = np.float32(1 / 3)
    assert _rounded_down(float(third)) == third
    assert _rounded_down(np.nextafter(float(third), 0.0)) < third
    assert _rounded_down(np.nextafter(float(third), 1.0)) == third
