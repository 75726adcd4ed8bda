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
    FEWER,
    Measured,
    update_features,
)
from sentinel.detection.history import structure_of
from sentinel.detection.rounds import Spec, drawn_labels, local_round, measured_leakage
from sentinel.detection.synthetic import (
    Columns,
    ModelError,
    fitting_shape,
    foreign,
    is_uninitialised,
    records,
    twin,
    vocabulary,
)
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
_FEWER = np.array([FEWER[name] for name in FEATURES])
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


@dataclass(frozen=True, slots=True)
class Mode:
    """One ordinary way to train.

    Attributes:
        ordinary: rounds of many records.
        single: rounds of one record, trained alike.
        raw: on columns that nobody scaled; only for models of plain rows.
    """

    ordinary: Specs
    single: Specs = SINGLE
    raw: bool = False


BASE: tuple[Mode, ...] = (
    Mode(((Spec(64, 64), 5), (Spec(128, 128), 3))),  # one step
    Mode(((Spec(64, 16, 2), 5), (Spec(128, 32, 2), 3))),  # federated averaging
)
ADAM = Mode(
    ((Spec(64, 16, 2, 1e-3, adam=True), 4), (Spec(128, 32, 3, 1e-3, adam=True), 4)),
    ((Spec(1, 1, 1, 1e-3, adam=True), 3), (Spec(1, 1, 4, 1e-3, adam=True), 3)),
)
RAW = (
    Mode(((Spec(64, 32, 2, 1e-3), 4), (Spec(128, 32, 3, 1e-3), 4)), raw=True),
    replace(ADAM, raw=True),
)
MODES: tuple[Mode, ...] = (*BASE, ADAM, *RAW)
# Modes beyond the first two only excuse an update that they explain: not far on their calm side,
# and nearer to their ordinary rounds than to one record's.
OVERSHOOT = 0.2
NEARER = 0.5


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
        found: list[dict[int, Vector]] = [{} for _ in measured]
        pulls = np.zeros((len(MODES), len(FEATURES)))
        weights = np.zeros((len(MODES), len(FEATURES)))
        beyond = np.zeros(len(MODES))
        own = [self.places.get(entry.names[0], ()) for entry in measured]
        for mode in range(max(map(len, own), default=0)):
            here = [index for index, places in enumerate(own) if mode < len(places)]
            vectors = np.array([measured[index].vector for index in here])
            pull, weight = _pull(vectors, [own[index][mode] for index in here])
            pulls[mode], weights[mode] = pull.sum(axis=0), weight.sum(axis=0)
            beyond[mode] = -np.minimum(pull, 0.0).sum()
            pairs = _pair(pull, weight)
            for row in np.flatnonzero(weight.any(axis=1)):
                found[here[row]][mode] = pairs[row]
        fits = beyond <= OVERSHOOT * weights.sum(axis=1)
        fits &= [_is_nearer(*rows) for rows in zip(pulls, weights, strict=True)]
        fits[: len(BASE)] = True
        told = [mode for mode in range(len(MODES)) if weights[mode].any() and fits[mode]]
        return [list(pairs.values()) for pairs in found], list(_pair(pulls[told], weights[told]))


def _pull(vectors: Vector, places: Sequence[Place]) -> tuple[Vector, Vector]:
    """Positions between ordinary and single, weighted; and the weights: [tensors, features]."""
    told = np.array([place.weight for place in places])
    weight = np.minimum(told, MOST_WEIGHT) ** 2
    gap = np.where(told > 0, np.array([place.gap for place in places]), 1.0)
    ordinary = np.array([place.ordinary for place in places])
    return weight * np.clip((vectors - ordinary) / gap, -1.0, 1.5), weight


def _pair(pull: Vector, weight: Vector) -> Vector:
    """Where updates lie, and where one record would: at 1 wherever there is weight; [..., 2, k]."""
    return np.stack([_grouped(pull, weight), _grouped(weight, weight)], axis=-2)


def _is_nearer(pull: Vector, weight: Vector) -> bool:
    """Whether an update is nearer to ordinary rounds, by all features and by its rank alone."""
    place = _grouped(pull, weight)
    return bool(max(place[RELATIVE.index("rank")], place[RELATIVE.index("all")]) <= NEARER)


def _grouped(pull: Vector, weight: Vector) -> Vector:
    """Weighted means within each group of features, and over all of them; the calm side is 0."""
    means = [_mean(pull[..., members], weight[..., members]) for members in _MEMBERS]
    return np.maximum(np.stack([*means, _mean(pull, weight)], axis=-1), 0.0)


def _mean(pull: Vector, weight: Vector) -> Vector:
    total = weight.sum(axis=-1)
    return np.asarray(pull.sum(axis=-1) / np.where(total > 0.0, total, 1.0))  # 0 without weight


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
        MisuseError: the model cannot be copied, takes none of the shapes that were tried, raises
            an exception of its own, or is so large that the rounds would take longer than
            `patience`.

    Guarantees:
        No record is read. The global random generators are as they were.
    """
    try:
        return _kept_or_built(model, global_state, sample, folder, patience)
    except ModelError as error:
        msg = (
            "no reference can be built for this model: it could not be copied, takes none of the "
            "inputs that were tried, or fails on them; say `sample=` (the shape of one input) or "
            "score without a reference"
        )
        raise MisuseError(msg) from error


def _kept_or_built(
    model: nn.Module,
    state: Mapping[str, Tensor],
    sample: Sequence[int] | None,
    folder: Path | None,
    patience: float,
) -> Reference:
    if any(map(is_uninitialised, state.values())):
        msg = "the global state has entries without a shape"
        raise ModelError(msg)
    cache = None if folder is None else folder / f"reference-{_digest(model, state)}.json"
    if cache is not None and (kept := _read(cache)) is not None:
        return kept
    copied = twin(model, state)
    generator = torch.Generator().manual_seed(SEED)
    shape = None if copied is None else fitting_shape(copied.module, generator, sample)
    if copied is None or shape is None:
        msg = "there is no copy, or no input that it takes"
        raise ModelError(msg)
    _require_patience(copied.module, shape, patience)
    reference = _renamed(_build(copied.module, shape, generator), copied.names)
    if cache is not None:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(cache, _written(reference))
    return reference


def _renamed(reference: Reference, names: Mapping[str, str]) -> Reference:
    """Name the tensors as the global state does, so that its updates find them."""
    places = {names.get(own, own): found for own, found in reference.places.items()}
    return replace(reference, places=places)


def _require_patience(module: nn.Module, shape: Sequence[int], patience: float) -> None:
    """Time one round of two records, and refuse where all rounds would take too long."""
    generator = torch.Generator().manual_seed(SEED)
    inside = records(2, shape, generator, tokens=vocabulary(module))
    start = time.perf_counter()
    local_round(module, inside, torch.zeros(2, dtype=torch.int64), Spec(2, 2))
    seconds = (time.perf_counter() - start) / 2
    passes = sum(
        spec.records * spec.epochs * repeats
        for specs in (SINGLE, FEW, *(specs for m in MODES for specs in (m.single, m.ordinary)))
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
    with foreign():
        shown = repr(model)
    text = json.dumps([FEATURE_VERSION, RELATIVE, repr(MODES), shown, structure_of(state)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(module: nn.Module, shape: Sequence[int], generator: torch.Generator) -> Reference:
    large = _is_large(module)

    def rounds(specs: Specs, columns: Columns | None = None) -> list[Round]:
        return list(_rounds(module, shape, _fewer(specs, large), generator, columns))

    single, few = rounds(SINGLE), rounds(FEW)
    found = []
    for mode in MODES:
        if mode in BASE:
            found.append((single, few, rounds(mode.ordinary)))
        elif not mode.raw:
            found.append((rounds(mode.single), [], rounds(mode.ordinary)))
        elif _is_row(module, shape):
            columns = Columns.drawn(shape[0], generator)
            found.append((rounds(mode.single, columns), [], rounds(mode.ordinary, columns)))
        else:
            found.append(([], [], []))
    leaks = [[leak for _, leak in many if leak is not None] for _, _, many in found[: len(BASE)]]
    return Reference(
        places=places([(_features(a), _features(b), _features(c)) for a, b, c in found]),
        floor=max((float(np.mean(mode)) for mode in leaks if mode), default=0.0),
    )


def _is_row(module: nn.Module, shape: Sequence[int]) -> bool:
    return len(shape) == 1 and vocabulary(module) is None


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
Round = tuple[Features, float | None]


def _rounds(
    module: nn.Module,
    shape: Sequence[int],
    specs: Specs,
    generator: torch.Generator,
    columns: Columns | None = None,
) -> Iterator[tuple[Features, float | None]]:
    """Yield features and measured leakage of synthetic rounds, in order; diverged ones not."""
    tokens = vocabulary(module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for spec, repeats in specs:
        for _ in range(repeats):
            if columns is None:
                inside = records(spec.records, shape, generator, tokens=tokens)
                outside = records(OUTSIDERS, shape, generator, tokens=tokens)
            else:
                inside = columns.draw(spec.records, generator)
                outside = columns.draw(OUTSIDERS, generator)
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
    modes: Sequence[tuple[Sequence[Features], Sequence[Features], Sequence[Features]]],
) -> dict[str, tuple[Place, ...]]:
    """Locate each tensor's features between ordinary and revealing rounds.

    Args:
        modes: per mode tensor name -> features of each round of a single record, of few records
            and of many.

    Returns:
        Tensor name -> one place per mode; a tensor that moved in too few rounds is left out.
    """
    found = {}
    for name in sorted({name for features in modes[0][0] for name in features}):
        if len(_stacked(modes[0][0], name)) > 1:
            found[name] = tuple(
                _place(_stacked([*alone, *few], name), _stacked(alone, name), _stacked(many, name))
                for alone, few, many in modes
            )
    return found


def _stacked(rounds: Sequence[Features], name: str) -> Vector:
    return np.array([features[name] for features in rounds if name in features])


def _place(few: Vector, single: Vector, many: Vector) -> Place:
    if len(many) <= 2 or len(single) <= 1:  # noqa: PLR2004  # no spread can be told: says nothing
        nothing = np.zeros(len(FEATURES))
        return Place(nothing, nothing, nothing)
    ordinary = np.median(many, axis=0)
    gap = np.median(single, axis=0) - ordinary
    scatter = np.sqrt(many.var(axis=0) + 0.5 * few.var(axis=0) + NOISE**2)
    weight = (few - ordinary).mean(axis=0) * _FEWER / scatter
    told = (gap * _FEWER > LEAST_GAP) & (weight > LEAST_WEIGHT)
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
        len(modes) == len(MODES)
        and all(np.isfinite(p.weight).all() and p.gap.shape == (len(FEATURES),) for p in modes)
        for modes in found.values()
    )
    return Reference(found, floor) if fitting and 0.0 <= floor <= 1.0 else None
