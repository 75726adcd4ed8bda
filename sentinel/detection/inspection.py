"""Inspection of a global model before anybody trains on it: structure, weights, behaviour.

Cheap first. It reads the global model, its public history and synthetic probes; never a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sentinel.detection import moves, rules
from sentinel.detection.attention import attention_findings
from sentinel.detection.behaviour import behaviour_findings
from sentinel.detection.bundle import GLOBAL_MODEL, Detector, load_detector
from sentinel.detection.history import History, Places, Shape, structure_of
from sentinel.detection.layers import Layer, layers_of
from sentinel.detection.rules import Finding, Kind
from sentinel.detection.stack import largest
from sentinel.detection.synthetic import is_uninitialised
from sentinel.detection.weights import SEED, LayerStatistics, Weighed, weighed
from sentinel.errors import MisuseError
from sentinel.terms import Verdict


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a global model.

    Attributes:
        suspicion: 0 to 1, that the model was crafted to leak. Honest models stay below .3.
        verdict: what the model is taken for.
        findings: every rule that found something, strongest first.
        unhealthy: whether the model is broken (not finite, or diverged).
        history: to be given as `previous` in the next round.
        probed: whether the behaviour on synthetic probes was looked at.
    """

    suspicion: float
    verdict: Verdict
    findings: tuple[Finding, ...]
    unhealthy: bool
    history: History
    probed: bool = False


def inspect_global_model(
    state: Mapping[str, Tensor],
    previous: History | Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    *,
    sample: tuple[int, ...] | None = None,
    detector: Detector | None = None,
) -> Inspection:
    """Inspect a global model.

    Args:
        state: names to dense tensors, as received.
        previous: the history of an earlier inspection, or the global state of an earlier round.
        model: the architecture; with it, one forward pass of synthetic probes is run on a copy.
        sample: shape of one input, without the batch; found by trying where left out.
        detector: the learned part; the shipped bundle where left out.

    Returns:
        The inspection. A model that holds values which are not finite is not looked at further.

    Raises:
        MisuseError: `state` or `previous` is no state dict.
        Withheld: DETECTOR_UNAVAILABLE.

    Guarantees:
        The model, its gradients, its training mode and the global random generators are untouched.
        The same arguments give the same inspection. Nothing in it depends on any record.
    """
    _require_state(state, "state")
    history = _history(previous)
    learned = detector or load_detector(GLOBAL_MODEL)
    structure = structure_of(state)
    changed = [] if history is None else _structure_findings(history, structure)
    layers = layers_of(state)
    measured, broken = _measured(state, layers)
    if broken:
        kept = history or History(structure)
        return _inspection([*changed, *broken], 0.0, kept, probed=False)
    statistics = [seen.statistics for seen in measured]
    places = Places.of([(seen.size, seen.trace, seen.statistics.bias_centre) for seen in measured])
    young = set() if history is None or changed else history.young()
    findings = [*changed, *_weight_findings(state, layers, statistics, young)]
    if history is not None and history.scales and not changed:
        indices = [layer.index for layer in layers]
        findings += rules.jump_findings(indices, history.scales[-1], places.scales)
        findings += moves.move_findings(indices, history, places)
        findings += moves.scan_findings(indices, history, places, statistics)
    behaved = None
    if model is not None and not changed:
        behaved = behaviour_findings(model, state, sample=sample, generator=_generator())
        findings += behaved or []
    unusual, odd = _learned(layers, statistics, learned)
    following = (history or History(structure)).joined(structure, places)
    return _inspection([*findings, *odd], unusual, following, probed=behaved is not None)


def _require_state(state: object, what: str) -> None:
    if not isinstance(state, Mapping) or not state:
        msg = f"{what} must be a non-empty state dict (names to tensors)"
        raise MisuseError(msg)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            msg = f"{what} must map names to tensors; an entry is something else"
            raise MisuseError(msg)
        if is_uninitialised(value):
            msg = f"{what} has an entry without a shape; run the lazy model on one input first"
            raise MisuseError(msg)


def _history(previous: History | Mapping[str, Tensor] | None) -> History | None:
    if previous is None or isinstance(previous, History):
        return previous
    _require_state(previous, "previous")
    return History.of(previous)


def _structure_findings(history: History, structure: tuple[Shape, ...]) -> list[Finding]:
    if structure == history.structure:
        return []
    pinned = {entry[0]: entry for entry in history.structure}
    arrived = {entry[0]: entry for entry in structure}
    names = sorted(pinned.keys() | arrived.keys())
    return [
        Finding(Kind.STRUCTURE, index)
        for index, name in enumerate(names)
        if pinned.get(name) != arrived.get(name)
    ]


def _measured(
    state: Mapping[str, Tensor], layers: list[Layer]
) -> tuple[list[Weighed], list[Finding]]:
    """What every layer is like; or the entries that are not finite, and then nothing else."""
    own = {layer.index for layer in layers}
    broken = {
        index
        for index, name in enumerate(sorted(state))
        if index not in own and state[name].is_floating_point() and not _finite(state[name])
    }
    if broken:
        broken |= {layer.index for layer in layers if not _finite(layer.weight)}
    else:
        seen = weighed(layers, SEED)
        fine = [one for one in seen if one is not None]
        if len(fine) == len(layers):
            return fine, []
        broken = {layers[place].index for place, one in enumerate(seen) if one is None}
    return [], [Finding(Kind.NOT_FINITE, index) for index in sorted(broken)]


def _finite(value: Tensor) -> bool:
    """Whether all values are finite; a finite sum tells in one pass."""
    total = value.detach().sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or math.isfinite(largest(value))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _weight_findings(
    state: Mapping[str, Tensor],
    layers: list[Layer],
    statistics: list[LayerStatistics],
    young: set[int],
) -> list[Finding]:
    """Return what the weights show; rows of a layer that grew from zero are parallel at first."""
    found = [
        finding
        for place, (layer, seen) in enumerate(zip(layers, statistics, strict=True))
        for finding in rules.layer_findings(layer, seen)
        if not (place in young and finding.kind is Kind.PARALLEL_ROWS)
    ]
    found += attention_findings(layers, statistics, found)
    return [*found, *rules.model_findings(layers, statistics), *rules.norm_findings(state)]


def _learned(
    layers: list[Layer], statistics: list[LayerStatistics], detector: Detector
) -> tuple[float, list[Finding]]:
    """Let the anomaly detector look at every layer; return the strongest, and where it was."""
    if not layers:
        return 0.0, []
    scores = detector.calibrated([seen.vector() for seen in statistics])
    worst = max(range(len(scores)), key=scores.__getitem__)
    ceiling = max(knot[1] for knot in detector.manifest.knots)
    if scores[worst] < 0.9 * ceiling:
        return scores[worst], []
    return scores[worst], [Finding(Kind.UNUSUAL, layers[worst].index, scores[worst])]


def _inspection(
    findings: list[Finding], unusual: float, history: History, *, probed: bool
) -> Inspection:
    ranked = sorted(findings, key=lambda finding: -finding.strength)
    ruled = [finding for finding in ranked if finding.kind is not Kind.UNUSUAL]
    suspicion = rules.suspicion_of(ruled, unusual)
    unhealthy = any(rules.VERDICTS[found.kind] is Verdict.UNHEALTHY for found in ranked)
    verdict = rules.verdict_of(ranked, suspicion)
    return Inspection(suspicion, verdict, tuple(ranked), unhealthy, history, probed)
