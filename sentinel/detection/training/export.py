"""From a pyod detector to an ONNX graph with one input and one output, and to a bundle on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pyod.models.knn import KNN
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType

from sentinel.detection.bundle import (
    ANOMALY,
    CARD,
    INPUT,
    MANIFEST,
    MODEL,
    RECIPE,
    Manifest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OPSETS = {"": 17, "ai.onnx.ml": 3}
LIBRARIES = ("numpy", "onnx", "pyod", "scikit-learn", "skl2onnx", "torch")


def to_onnx(fitted: Any, features: int) -> bytes:  # noqa: ANN401  # pyod has no types
    """Convert a fitted pyod detector.

    Args:
        fitted: a pyod IForest, OCSVM or LOF (their sklearn estimator is converted), or a KNN with
            the mean distance (a graph of its own).
        features: width of its input.

    Returns:
        A graph from `features` [n, features] to `anomaly` [n, 1] or [n]: larger is stranger, as in
        pyod.
    """
    graph = _neighbours(fitted) if isinstance(fitted, KNN) else _converted(fitted, features)
    onnx.checker.check_model(graph)
    return bytes(graph.SerializeToString())


def _neighbours(fitted: KNN) -> Any:  # noqa: ANN401  # onnx has no types
    """Mean distance to the k nearest points: [n, 1, f] - [1, m, f], squared, k smallest."""
    points = np.asarray(fitted.tree_.data, dtype=np.float32)
    nodes = [
        helper.make_node("Unsqueeze", [INPUT, "one"], ["lifted"]),
        helper.make_node("Sub", ["lifted", "points"], ["apart"]),
        helper.make_node("ReduceSumSquare", ["apart"], ["squares"], axes=[2], keepdims=0),
        helper.make_node("TopK", ["squares", "k"], ["nearest", "places"], largest=0),
        helper.make_node("Sqrt", ["nearest"], ["distances"]),
        helper.make_node("ReduceMean", ["distances"], [ANOMALY], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "neighbours",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, points.shape[1]])],
        [helper.make_tensor_value_info(ANOMALY, TensorProto.FLOAT, [None])],
        [
            numpy_helper.from_array(points[None], "points"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "one"),
            numpy_helper.from_array(np.array([fitted.n_neighbors], dtype=np.int64), "k"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS[""])])
    model.ir_version = 8  # the oldest that holds this opset: every onnxruntime since 1.20 opens it
    return model


def _converted(fitted: Any, features: int) -> Any:  # noqa: ANN401  # pyod has no types
    graph = convert_sklearn(
        fitted.detector_,
        initial_types=[(INPUT, FloatTensorType([None, features]))],
        target_opset=OPSETS,
    )
    scores = next(output.name for output in graph.graph.output if output.name.startswith("score"))
    # scikit-learn's score falls with strangeness; pyod turns its sign.
    graph.graph.name = ANOMALY  # otherwise random: the same training would give other bytes
    graph.graph.node.append(helper.make_node("Neg", [scores], [ANOMALY]))
    del graph.graph.output[:]
    graph.graph.output.append(
        helper.make_tensor_value_info(ANOMALY, TensorProto.FLOAT, [None, None])
    )
    return graph


def library_versions() -> dict[str, str]:
    """Return the versions of everything that shaped the detector."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def write_bundle(
    folder: Path, manifest: Mapping[str, Any], model: bytes, card: str, recipe: str
) -> Manifest:
    """Write a bundle; the manifest last, so that a torn bundle does not load.

    Args:
        folder: where it goes; made where it is missing.
        manifest: all of the manifest but `files` and `libraries`.
        model: the ONNX graph.
        card: what it was trained on, measured figures, limits.
        recipe: what reproduces it.

    Returns:
        The manifest, checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {MODEL: model, CARD: card.encode(), RECIPE: recipe.encode()}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    text = json.dumps(
        {**manifest, "schema_version": 1, "libraries": library_versions(), "files": files},
        indent=2,
        sort_keys=True,
    )
    checked = Manifest.model_validate_json(text)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return checked
