"""From a pyod detector to an ONNX graph with one input and one output, and to a bundle on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pyod.models.iforest import IForest
from pyod.models.knn import KNN
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble._iforest import _average_path_length

from sentinel.detection.bundle import (
    ANOMALY,
    CARD,
    INPUT,
    LEAKAGE,
    MANIFEST,
    MODEL,
    RECIPE,
    Manifest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from sklearn.ensemble import ExtraTreesRegressor, IsolationForest

OPSETS = {"": 17, "ai.onnx.ml": 3}
LIBRARIES = ("numpy", "onnx", "pyod", "scikit-learn", "skl2onnx", "torch")


def to_onnx(fitted: Any, features: int) -> bytes:  # noqa: ANN401  # pyod has no types
    """Convert a fitted pyod detector.

    Args:
        fitted: a pyod OCSVM or LOF (their sklearn estimator is converted), an IForest, or a KNN
            with the mean distance (graphs of their own: few nodes, and so many times faster).
        features: width of its input.

    Returns:
        A graph from `features` [n, features] to `anomaly` [n, 1] or [n]: larger is stranger, as in
        pyod.
    """
    own = {KNN: _neighbours, IForest: _forest}.get(type(fitted))
    graph = _converted(fitted, features) if own is None else own(fitted)
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
    constants: dict[str, NDArray[Any]] = {
        "points": points[None],
        "one": np.array([1], dtype=np.int64),
        "k": np.array([fitted.n_neighbors], dtype=np.int64),
    }
    return _model("neighbours", nodes, constants, points.shape[1], [None])


def _forest(fitted: IForest) -> Any:  # noqa: ANN401  # onnx has no types
    """2^(- mean length of the paths / expected length) less the offset, as in scikit-learn."""
    forest = fitted.detector_
    expected = len(forest.estimators_) * float(_average_path_length([forest.max_samples_])[0])
    nodes = [
        helper.make_node(
            "TreeEnsembleRegressor",
            [INPUT],
            ["lengths"],
            domain="ai.onnx.ml",
            n_targets=1,
            **_trees(forest),
        ),
        helper.make_node("Mul", ["lengths", "expected"], ["exponents"]),
        helper.make_node("Pow", ["two", "exponents"], ["strangeness"]),
        helper.make_node("Add", ["strangeness", "offset"], [ANOMALY]),
    ]
    constants = {
        "expected": np.array([-1.0 / expected], dtype=np.float32),
        "two": np.array([2.0], dtype=np.float32),
        "offset": np.array([forest.offset_], dtype=np.float32),
    }
    return _model("forest", nodes, constants, forest.n_features_in_, [None, 1])


def _trees(forest: IsolationForest) -> dict[str, Any]:
    """Lists over the nodes of all trees; a leaf weighs the length of its path."""
    grown, weights = [], []
    for one, chosen in zip(forest.estimators_, forest.estimators_features_, strict=True):
        tree = one.tree_
        depths = np.asarray(tree.compute_node_depths())  # the root's is 1
        grown.append((tree, chosen))
        weights.append(depths - 1.0 + _average_path_length(tree.n_node_samples))
    return _nodes(grown, weights)


def _nodes(
    grown: list[tuple[Any, NDArray[Any]]], weights: list[NDArray[Any]]
) -> dict[str, list[Any]]:
    """Lists over the nodes of all trees.

    Args:
        grown: trees, each with the places of its features among the columns.
        weights: of each node, where it is a leaf.
    """
    branches: dict[str, list[Any]] = {f"nodes_{name}": [] for name in _BRANCH}
    leaves: dict[str, list[Any]] = {f"target_{name}": [] for name in _LEAF}
    for number, ((tree, chosen), weight) in enumerate(zip(grown, weights, strict=True)):
        for node, (left, right) in enumerate(
            zip(tree.children_left, tree.children_right, strict=True)
        ):
            is_leaf = left == right
            row = (
                number,
                node,
                "LEAF" if is_leaf else "BRANCH_LEQ",
                0 if is_leaf else int(chosen[tree.feature[node]]),
                0.0 if is_leaf else _rounded_down(tree.threshold[node]),
                0 if is_leaf else int(left),
                0 if is_leaf else int(right),
            )
            for name, value in zip(branches, row, strict=True):
                branches[name].append(value)
            if is_leaf:
                for name, value in zip(leaves, (number, node, 0, float(weight[node])), strict=True):
                    leaves[name].append(value)
    return {**branches, **leaves}


_BRANCH = ("treeids", "nodeids", "modes", "featureids", "values", "truenodeids", "falsenodeids")
_LEAF = ("treeids", "nodeids", "ids", "weights")


def _rounded_down(threshold: float) -> float:
    """Largest float32 not above: a float32 input is on the same side of both."""
    near = np.float32(threshold)
    return float(near if near <= threshold else np.nextafter(near, np.float32(-np.inf)))


def _model(
    name: str,
    nodes: list[Any],
    constants: Mapping[str, NDArray[Any]],
    features: int,
    answer: list[int | None],
) -> Any:  # noqa: ANN401  # onnx has no types
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, features])],
        [helper.make_tensor_value_info(ANOMALY, TensorProto.FLOAT, answer)],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    sets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=sets)
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


def with_forest(
    plain: bytes, forest: ExtraTreesRegressor, features: int, places: list[int]
) -> bytes:
    """Join a detector's graph and a forest that sees more into one graph.

    Args:
        plain: a graph of `to_onnx`; it sees the columns `places`, none of them below 0.
        forest: fitted on all columns and the detector's anomaly after them.
        features: how many columns there are.
        places: what the detector sees.

    Returns:
        A graph from `features` [n, features] to `anomaly` and to `leakage` [n, 1]: the forest's.
    """
    graph = onnx.load_from_string(plain)
    for node in graph.graph.node:
        node.input[:] = ["located" if name == INPUT else name for name in node.input]
    gather = helper.make_node("Gather", [INPUT, "columns"], ["chosen"], axis=1)
    lift = helper.make_node("Max", ["chosen", "nothing"], ["located"])
    graph.graph.node.insert(0, lift)
    graph.graph.node.insert(0, gather)
    graph.graph.node.append(helper.make_node("Reshape", [ANOMALY, "upright"], ["strange"]))
    graph.graph.node.append(helper.make_node("Concat", [INPUT, "strange"], ["joined"], axis=1))
    graph.graph.node.append(
        helper.make_node(
            "TreeEnsembleRegressor",
            ["joined"],
            [LEAKAGE],
            domain="ai.onnx.ml",
            n_targets=1,
            **_averages(forest),
        )
    )
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(places, dtype=np.int64), "columns"),
            numpy_helper.from_array(np.zeros(1, dtype=np.float32), "nothing"),
            numpy_helper.from_array(np.array([-1, 1], dtype=np.int64), "upright"),
        ]
    )
    del graph.graph.input[:]
    shape = [None, features]
    graph.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    graph.graph.output.append(helper.make_tensor_value_info(LEAKAGE, TensorProto.FLOAT, [None, 1]))
    onnx.checker.check_model(graph)
    return bytes(graph.SerializeToString())


def _averages(forest: ExtraTreesRegressor) -> dict[str, Any]:
    """Lists over the nodes of all trees; a leaf weighs its share of the mean over the trees."""
    grown = [(tree.tree_, np.arange(forest.n_features_in_)) for tree in forest.estimators_]
    share = 1.0 / len(grown)
    return _nodes(grown, [share * tree.value[:, 0, 0] for tree, _ in grown])


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
