"""Bundles: loaded by digest, and withheld when anything about them is wrong."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sentinel.detection import bundle, load_detector
from sentinel.errors import MisuseError, Withheld
from sentinel.paths import bundled
from sentinel.terms import Reason

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [bundle.UPDATE_SENSITIVITY, bundle.GLOBAL_MODEL]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(bundled("detectors"), tmp_path / "detectors")
    return tmp_path / "detectors"


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_bundles_load_and_speak(name: str) -> None:
    detector = load_detector(name)
    width = len(detector.manifest.features)
    scores = detector.calibrated(np.zeros((3, width)).tolist())
    assert len(scores) == 3
    assert len(set(scores)) == 1
    assert 0.0 <= scores[0] <= 1.0
    assert set(detector.manifest.libraries) >= {"pyod", "scikit-learn", "skl2onnx"}


@pytest.mark.parametrize("name", NAMES)
def test_many_vectors_are_judged_like_each_alone(name: str) -> None:
    detector = load_detector(name)
    width = len(detector.manifest.features)
    vectors = np.random.default_rng(0).random((2 * bundle.MOST_AT_ONCE + 3, width)).tolist()
    together = detector.anomaly(vectors)
    for place in (0, bundle.MOST_AT_ONCE - 1, bundle.MOST_AT_ONCE, len(vectors) - 1):
        assert together[place] == pytest.approx(detector.anomaly([vectors[place]])[0], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", [bundle.MODEL, bundle.CARD, bundle.RECIPE])
def test_a_changed_file_withholds(copied: Path, name: str, file: str) -> None:
    path = copied / name / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Withheld, match="damaged") as raised:
        load_detector(name, folder=copied)
    assert raised.value.reason is Reason.DETECTOR_UNAVAILABLE


@pytest.mark.parametrize("file", [bundle.MODEL, bundle.MANIFEST, bundle.CARD])
def test_a_missing_file_withholds(copied: Path, file: str) -> None:
    (copied / bundle.GLOBAL_MODEL / file).unlink()
    with pytest.raises(Withheld, match="missing"):
        load_detector(bundle.GLOBAL_MODEL, folder=copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feature_version", 99),
        ("features", ["x"]),
        ("name", "update-sensitivity"),
        ("knots", [[0.0, 1.0], [1.0, 0.0]]),
        ("knots", [[0.0, 0.0]]),
        ("files", {}),
        ("files", {"../secret": "0"}),
        ("unknown", 1),
    ],
)
def test_a_manifest_that_does_not_fit_withholds(copied: Path, key: str, value: object) -> None:
    path = copied / bundle.GLOBAL_MODEL / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(Withheld) as raised:
        load_detector(bundle.GLOBAL_MODEL, folder=copied)
    assert raised.value.reason is Reason.DETECTOR_UNAVAILABLE


def test_an_unknown_name_is_misuse() -> None:
    with pytest.raises(MisuseError, match="there are update-sensitivity, global-model"):
        load_detector("../elsewhere")


def test_the_map_is_linear_between_knots_and_flat_beyond() -> None:
    knots = [(0.0, 0.1), (1.0, 0.3), (2.0, 0.3), (4.0, 0.9)]
    places = [-5.0, 0.0, 0.5, 1.5, 3.0, 9.0]
    values = [bundle.interpolated(place, knots) for place in places]
    assert values == pytest.approx(np.interp(places, *np.array(knots).T).tolist())
