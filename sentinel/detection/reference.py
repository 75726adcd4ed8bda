"""Reference: what updates of this very model look like, learned from synthetic rounds.

Absolute features mean one thing on one architecture and the opposite on another. So every feature
is expressed relative to the model at hand: 0 is an ordinary round (many records, or several local
epochs), 1 a round of a single record. Which features tell the two apart, on which tensor, is
measured in the same synthetic rounds, and they are weighted by it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from sentinel.detection.features import (
    FEATURE_VERSION,
    FEATURES,
    Measured,
    update_features,
)
from sentinel.detection.history import structure_of
from sentinel.detection.rounds import Spec, drawn_labels, local_round, measured_leakage
from sentinel.detection.synthetic import fitting_shape, records, twin, vocabulary
from sentinel.durable import replace_file
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    Vector = NDArray[np.float64]

SEED = 7
PATIENCE = 120.0  # seconds for all synthetic rounds of a model, once per architecture
SLOW = 0.02  # seconds per record below which a model is quick, whatever a first call costs
MANY = 64  # records from which a round is ordinary
OUTSIDERS = 64  # records that no round uses
LEAST_GAP = 0.03  # between ordinary and single, in units of the feature; less is rounding
LEAST_WEIGHT = 1.0  # gap over scatter below which a feature tells nothing on a tensor
MOST_WEIGHT = 5.0
DIVERGED = 10.0  # largest change of a weight in one synthetic round; NaN is not below it either
NOISE = 0.02  # least scatter that is assumed, so that a constant feature is not trusted blindly

GROUPS: dict[str, tuple[str, ...]] = {
    "rank": ("tail_1", "tail_4", "tail_16", "rank", "unexplained"),
    "twins": ("twins",),
    "gaps": ("faint_rows", "faint", "faint_columns"),
    "shape": ("row_spread", "column_spread", "flatness", "peak", "spread"),
}
RELATIVE: tuple[str, ...] = (*GROUPS, "all")  # the names of what the detector sees
_MEMBERS = [[FEATURES.index(name) for name in names] for names in GROUPS.values()]

LARGE = 1_000_000  # parameters from which synthetic rounds are few: seconds, not minutes
# Rounds by role, and how many of each: one record, few, and the ordinary ones in two modes.
Specs = tuple[tuple[Spec, int], ...]
SINGLE: Specs = ((Spec(1, 1), 6),)
FEW: Specs = (
    (Spec(2, 2), 3),
    (Spec(4, 4), 3),
    (Spec(8, 8), 3),
)
ORDINARY: tuple[Specs, ...] = (
    ((Spec(64, 64), 5), (Spec(128, 128), 3)),  # one step
    ((Spec(64, 16, 2), 5), (Spec(128, 32, 2), 3)),  # federated averaging
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor's features lie in one mode.

    Attributes:
        ordinary: median of each feature over ordinary rounds.
        gap: what a single record adds to it.
        weight: how well the feature tells revealing from ordinary rounds, 0 where it does not.
    """

    ordinary: Vector
    gap: Vector
    weight: Vector


@dataclass(frozen=True, slots=True)
class Reference:
    """What updates of one model look like.

    Attributes:
        places: tensor name -> one place per mode.
        floor: share of records that linear read-out took from ordinary synthetic rounds, in the
            worse mode: a model crafted to leak does so however many records there are.
        sharpness: "reference" where it was built from the model at hand, else "generic".
    """

    places: Mapping[str, tuple[Place, ...]]
    floor: float
    sharpness: Literal["reference", "generic"] = "reference"

    def relative(self, measured: Sequence[Measured]) -> tuple[list[list[Vector]], list[Vector]]:
        """Express features relative to this model.

        Returns:
            Per measured tensor one pair of vectors for each mode in which it tells anything, and
            the same for the update as a whole: where the update lies, and where a typical round
            of one record would, [2, relative], in the order of `RELATIVE`.
        """
        per_tensor: list[list[Vector]] = []
        pulls = np.zeros((len(ORDINARY), len(FEATURES)))
        weights = np.zeros((len(ORDINARY), len(FEATURES)))
        for entry in measured:
            vectors = []
            for mode, place in enumerate(self.places.get(entry.names[0], ())):
                pull, weight = _pull(np.asarray(entry.vector), place)
                pulls[mode] += pull
                weights[mode] += weight
                if weight.any():
                    vectors.append(_pair(pull, weight))
            per_tensor.append(vectors)
        told = [mode for mode in range(len(ORDINARY)) if weights[mode].any()]
        return per_tensor, [_pair(pulls[mode], weights[mode]) for mode in told]


def _pull(vector: Vector, place: Place) -> tuple[Vector, Vector]:
    """Position between ordinary and single, weighted; and the weights."""
    weight = np.minimum(place.weight, MOST_WEIGHT) ** 2
    gap = np.where(place.weight > 0, place.gap, 1.0)
    return weight * np.clip((vector - place.ordinary) / gap, -1.0, 1.5), weight


def _pair(pull: Vector, weight: Vector) -> Vector:
    """Where the update lies, and where one record would: at 1 wherever there is weight."""
    return np.stack([_grouped(pull, weight), _grouped(weight, weight)])


def _grouped(pull: Vector, weight: Vector) -> Vector:
    """Weighted means within each group of features, and over all of them; the calm side is 0."""
    means = [_mean(pull[members], weight[members]) for members in _MEMBERS]
    return np.array([max(mean, 0.0) for mean in (*means, _mean(pull, weight))])


def _mean(pull: Vector, weight: Vector) -> float:
    total = float(weight.sum())
    return float(pull.sum()) / total if total > 0.0 else 0.0


def build_reference(
    model: nn.Module,
    global_state: Mapping[str, Tensor],
    *,
    sample: Sequence[int] | None = None,
    folder: Path | None = None,
    patience: float = PATIENCE,
) -> Reference:
    """Build the reference of a model from synthetic rounds.

    Args:
        model: the architecture; never run and never changed.
        global_state: the public global model.
        sample: shape of one input, without the batch; found by trying where left out.
        folder: where references are kept, by digest of the architecture; none where left out.
        patience: seconds that the synthetic rounds may take, judged by a first one.

    Returns:
        The reference; the same for the same arguments.

    Raises:
        MisuseError: the model cannot be copied, takes none of the shapes that were tried, or is so
            large that the rounds would take longer than `patience`.

    Guarantees:
        No record is read. The global random generators are as they were.
    """
    cache = None if folder is None else folder / f"reference-{_digest(model, global_state)}.json"
    if cache is not None and (kept := _read(cache)) is not None:
        return kept
    copied = twin(model, global_state)
    generator = torch.Generator().manual_seed(SEED)
    shape = None if copied is None else fitting_shape(copied, generator, sample)
    if copied is None or shape is None:
        msg = (
            "no reference can be built for this model: it could not be copied, or it takes none "
            "of the inputs that were tried; say `sample=` (the shape of one input) or score "
            "without a reference"
        )
        raise MisuseError(msg)
    _require_patience(copied, shape, patience)
    reference = _build(copied, shape, generator)
    if cache is not None:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(cache, _written(reference))
    return reference


def _require_patience(module: nn.Module, shape: Sequence[int], patience: float) -> None:
    """Time one round of two records, and refuse where all rounds would take too long."""
    generator = torch.Generator().manual_seed(SEED)
    inside = records(2, shape, generator, tokens=vocabulary(module))
    start = time.perf_counter()
    local_round(module, inside, torch.zeros(2, dtype=torch.int64), Spec(2, 2))
    seconds = (time.perf_counter() - start) / 2
    passes = sum(
        spec.records * spec.epochs * repeats
        for specs in (SINGLE, FEW, *ORDINARY)
        for spec, repeats in _fewer(specs, _is_large(module))
    )
    if seconds * passes > patience and seconds > SLOW:
        msg = (
            f"the synthetic rounds of this model would take about {seconds * passes:.0f} seconds, "
            f"more than the {patience:.0f} allowed; give more `patience`, or score without a "
            "reference"
        )
        raise MisuseError(msg)


def _digest(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """SHA-256 over what the model is made of, without any value."""
    text = json.dumps([FEATURE_VERSION, RELATIVE, repr(model), structure_of(state)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(module: nn.Module, shape: Sequence[int], generator: torch.Generator) -> Reference:
    large = _is_large(module)
    single = list(_rounds(module, shape, _fewer(SINGLE, large), generator))
    few = list(_rounds(module, shape, _fewer(FEW, large), generator))
    modes = [list(_rounds(module, shape, _fewer(mode, large), generator)) for mode in ORDINARY]
    leaks = [[leak for _, leak in mode if leak is not None] for mode in modes]
    return Reference(
        places=places(_features(single), _features(few), [_features(mode) for mode in modes]),
        floor=max((float(np.mean(mode)) for mode in leaks if mode), default=0.0),
    )


def _is_large(module: nn.Module) -> bool:
    return sum(value.numel() for value in module.parameters()) > LARGE


def _features(rounds: Sequence[tuple[Features, float | None]]) -> list[Features]:
    return [features for features, _ in rounds]


def _fewer(specs: Specs, large: bool) -> Specs:  # noqa: FBT001  # private
    """For a large model: fewer repeats, and of the ordinary rounds only the smallest size."""
    if not large:
        return specs
    most = max(specs[0][0].records, MANY // 8)
    return tuple((spec, min(count, 3)) for spec, count in specs if spec.records <= most)


Features = dict[str, list[float]]


def _rounds(
    module: nn.Module,
    shape: Sequence[int],
    specs: Specs,
    generator: torch.Generator,
) -> Iterator[tuple[Features, float | None]]:
    """Yield features and measured leakage of synthetic rounds, in order; diverged ones not."""
    tokens = vocabulary(module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for spec, repeats in specs:
        for _ in range(repeats):
            inside = records(spec.records, shape, generator, tokens=tokens)
            outside = records(OUTSIDERS, shape, generator, tokens=tokens)
            labels = drawn_labels(module, inside, generator, likely=spec.records >= MANY)
            deltas = _finite_round(module, inside, labels, spec)
            if deltas is None:
                continue
            found = {entry.names[0]: entry.vector for entry in update_features(deltas, generator)}
            yield found, measured_leakage(module, state, deltas, inside, outside)


def _finite_round(
    module: nn.Module, inside: Tensor, labels: Tensor, spec: Spec
) -> dict[str, Tensor] | None:
    """Train, more and more gently where it diverges; None where it always does."""
    for gentler in (1.0, 0.1, 0.01):
        milder = replace(spec, rate=spec.rate * gentler)
        deltas = local_round(module, inside, labels, milder)
        if all(bool(delta.abs().amax() < DIVERGED) for delta in deltas.values() if delta.numel()):
            return deltas
    return None


def places(
    single: Sequence[Features], few: Sequence[Features], modes: Sequence[Sequence[Features]]
) -> dict[str, tuple[Place, ...]]:
    """Locate each tensor's features between ordinary and revealing rounds.

    Args:
        single: tensor name -> features of each round of a single record.
        few: the same for rounds of few records.
        modes: the same for ordinary rounds, by mode.

    Returns:
        Tensor name -> one place per mode; a tensor that moved in too few rounds is left out.
    """
    found = {}
    for name in sorted({name for features in single for name in features}):
        alone = _stacked(single, name)
        revealing = _stacked([*single, *few], name)
        if len(alone) > 1:
            many = [_stacked(mode, name) for mode in modes]
            found[name] = tuple(_place(revealing, alone, mode) for mode in many)
    return found


def _stacked(rounds: Sequence[Features], name: str) -> Vector:
    return np.array([features[name] for features in rounds if name in features])


def _place(few: Vector, single: Vector, many: Vector) -> Place:
    if len(many) <= 2:  # noqa: PLR2004  # no spread can be told: the mode says nothing
        nothing = np.zeros(len(FEATURES))
        return Place(nothing, nothing, nothing)
    ordinary = np.median(many, axis=0)
    gap = np.median(single, axis=0) - ordinary
    scatter = np.sqrt(many.var(axis=0) + 0.5 * few.var(axis=0) + NOISE**2)
    weight = (few - ordinary).mean(axis=0) * np.sign(gap) / scatter
    told = (np.abs(gap) > LEAST_GAP) & (weight > LEAST_WEIGHT)
    return Place(ordinary, gap, np.where(told, np.minimum(weight, MOST_WEIGHT), 0.0))


def _written(reference: Reference) -> bytes:
    rows = {
        name: [[p.ordinary.tolist(), p.gap.tolist(), p.weight.tolist()] for p in found]
        for name, found in reference.places.items()
    }
    return json.dumps({"floor": reference.floor, "places": rows}, allow_nan=False).encode()


def _read(path: Path) -> Reference | None:
    """Return a kept reference; None where there is none that can be used: it is built again."""
    try:
        data = json.loads(path.read_bytes())
        found = {
            str(name): tuple(Place(*np.asarray(rows, dtype=np.float64)) for rows in modes)
            for name, modes in data["places"].items()
        }
        floor = float(data["floor"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    fitting = all(
        len(modes) == len(ORDINARY)
        and all(np.isfinite(p.weight).all() and p.gap.shape == (len(FEATURES),) for p in modes)
        for modes in found.values()
    )
    return Reference(found, floor) if fitting and 0.0 <= floor <= 1.0 else None
