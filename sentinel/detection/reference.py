"""Reference: what updates of this very model look like, learned from rehearsals.

Absolute features mean one thing on one architecture and the opposite on another. So synthetic
rounds of known size run through the model at hand, and what leaks from each is measured: an update
is placed between ordinary rounds (many records) and rounds of one record, and compared with the
rehearsals that it resembles most. Which features tell, on which tensor, is measured in them too.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import nn

from sentinel.detection.clues import ALIKE, GROUPS, UNKNOWN
from sentinel.detection.features import FEATURE_VERSION, FEATURES, FEWER, Measured
from sentinel.detection.history import structure_of
from sentinel.detection.layers import entry_name
from sentinel.detection.rehearsal import REHEARSED, Rehearsal, passes, rehearse
from sentinel.detection.rounds import Spec, local_round, reached
from sentinel.detection.synthetic import (
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
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    Vector = NDArray[np.float64]

FORMAT = 2  # of a kept reference; another one is built again
SEED = 7
PATIENCE = 120.0  # seconds for all rehearsals of a model, once per architecture
SLOW = 0.02  # seconds per record below which a model is quick, whatever a first call costs
MANY = 64  # records from which a round is ordinary
MOST_TENSORS = 48  # that are compared: those that tell most
LEAST_GAP = 0.03  # between ordinary and single, in units of the feature; less is rounding
LEAST_WEIGHT = 1.0  # gap over scatter below which a feature tells nothing on a tensor
MOST_WEIGHT = 5.0
NOISE = 0.02  # least scatter that is assumed, so that a constant feature is not trusted blindly
FARTHEST = 5.0  # scatters beyond which a feature is as far off as can be
NEIGHBOURS = 6  # rehearsals that an update is compared with
SHARP = 6  # power of the weights where only the features that tell best count
_FEWER = np.array([FEWER[name] for name in FEATURES])
_MEMBERS = [[FEATURES.index(name) for name in names] for names in GROUPS.values()]


@dataclass(frozen=True)
class Reference:
    """What updates of one model look like.

    Attributes:
        tensors: names of the tensors that are compared.
        read: weights of the dense layers with a bias in the order they are reached: the first one
            that moves is what a server reads.
        rounds: features of the rehearsals, [rounds, tensors, features]; NaN for a still tensor.
        leakage: measured in each, [rounds].
        records: behind each, [rounds].
        noise: of each over its update, [rounds].
        floor: share of the records that linear read-out took from rehearsals of many records, in
            the worst style and way to train: a model crafted to leak does so however many there
            are.
    """

    tensors: tuple[str, ...]
    read: tuple[str, ...]
    rounds: Vector
    leakage: Vector
    records: Vector
    noise: Vector
    floor: float
    _fitted: _Fitted = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Learn which features tell."""
        object.__setattr__(self, "_fitted", _Fitted.of(self))

    def relative(self, named: Mapping[str, Measured]) -> Vector:
        """Return where an update lies between ordinary rounds (0) and one of one record (1)."""
        fitted = self._fitted
        values = self._values(named)
        told = np.isfinite(values) & (fitted.told > 0.0)
        weight = np.where(told, fitted.told**2, 0.0)
        gap = np.where(told, fitted.gap, 1.0)
        place = np.where(told, np.clip((values - fitted.ordinary) / gap, -1.0, 1.5), 0.0)
        pull, total = (weight * place).sum(0), weight.sum(0)
        means = [_mean(pull[members], total[members]) for members in (*_MEMBERS, slice(None))]
        return np.array(means)

    def alike(self, named: Mapping[str, Measured], read: Measured | None) -> Vector:
        """Return what the rehearsals that an update resembles say, in the order of `LOCAL`."""
        away = self._fitted.standard(self._values(named))
        weight = self._fitted.weight
        only = np.zeros_like(weight)
        if read is not None and read.names[0] in self.tensors:
            place = self.tensors.index(read.names[0])
            only[place] = weight[place] ** 2
        return np.concatenate(
            [self._near(away, chosen) for chosen in (weight**2, weight**SHARP, only)]
        )

    def single(self, entry: Measured) -> float | None:
        """Return the leakage of the rehearsals that one tensor resembles; None where it is mute."""
        if entry.names[0] not in self.tensors:
            return None
        place = self.tensors.index(entry.names[0])
        only = np.zeros_like(self._fitted.weight)
        only[place] = self._fitted.weight[place] ** 2
        if only.max(initial=0.0) < LEAST_TOLD**2:
            return None
        values = np.full((len(self.tensors), len(FEATURES)), np.nan)
        values[place] = entry.vector
        return min(1.0, float(self._near(self._fitted.standard(values), only)[0]))

    def _values(self, named: Mapping[str, Measured]) -> Vector:
        nothing = [np.nan] * len(FEATURES)
        rows = [named[name].vector if name in named else nothing for name in self.tensors]
        return np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES))

    def _near(self, away: Vector, weight: Vector) -> Vector:
        """Means over the nearest rehearsals, the nearer the more; `UNKNOWN` without any weight."""
        total = float(weight.sum())
        if total <= 0.0 or not len(self.leakage):
            return np.full(len(ALIKE), UNKNOWN)
        chosen = weight.reshape(-1) > 0.0
        apart = self._fitted.rounds[:, chosen] - away.reshape(-1)[chosen]
        distance = (apart**2) @ weight.reshape(-1)[chosen] / total
        nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        near = distance[nearest]
        share = 1.0 / (near + 0.5 * near[0] + 1e-3)
        share /= share.sum()
        leaks = self.leakage[nearest]
        return np.array(
            [
                share @ leaks,
                np.log10(near[0] + 1e-6),
                leaks.min(),
                leaks.max(),
                share @ np.log2(self.records[nearest]),
                share @ np.log10(self.noise[nearest] + 0.01),
            ]
        )


LEAST_TOLD = 0.3  # rank correlation with leakage below which a tensor says nothing by itself


def _mean(pull: Vector, total: Vector) -> float:
    return float(pull.sum() / total.sum()) if total.sum() > 0.0 else UNKNOWN


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What is learned from the rehearsals; [tensors, features] each but the first.

    Attributes:
        rounds: the rehearsals in scatters from their mean, [rounds, tensors * features].
        centre: mean over the rehearsals.
        scale: scatter over them.
        weight: size of the rank correlation with leakage.
        ordinary: median over rounds of many records.
        gap: what a single record adds to it.
        told: how well the feature tells the two apart, 0 where it does not.
    """

    rounds: Vector
    centre: Vector
    scale: Vector
    weight: Vector
    ordinary: Vector
    gap: Vector
    told: Vector

    @classmethod
    def of(cls, reference: Reference) -> _Fitted:
        values = reference.rounds
        shape = values.shape[1:]
        moved = np.isfinite(values)
        count = np.maximum(moved.sum(0), 1)
        filled = np.where(moved, values, 0.0)
        centre = filled.sum(0) / count
        scatter = np.where(moved, values - centre, 0.0)
        scale = np.sqrt((scatter**2).sum(0) / count + NOISE**2)
        standard = np.clip(scatter / scale, -FARTHEST, FARTHEST).reshape(
            len(values), math.prod(shape)
        )
        clean = reference.noise == 0.0
        many = values[clean & (reference.records >= MANY)]
        one = values[clean & (reference.records == 1)]
        ordinary, gap, told = _gaps(one, many) if len(one) and len(many) else np.zeros((3, *shape))
        weight = np.abs(_correlations(standard, reference.leakage)).reshape(shape)
        return cls(standard, centre, scale, weight, ordinary, gap, told)

    def standard(self, values: Vector) -> Vector:
        away = np.clip((values - self.centre) / self.scale, -FARTHEST, FARTHEST)
        return np.where(np.isfinite(away), away, 0.0)


def _gaps(one: Vector, many: Vector) -> tuple[Vector, Vector, Vector]:
    """Ordinary value, gap to a single record, and how well it tells; 0 where a tensor was still."""
    known = np.isfinite(one).any(0) & np.isfinite(many).any(0)
    one, many = (np.where(known, rows, 0.0) for rows in (one, many))
    ordinary = np.nanmedian(many, axis=0)
    gap = np.nanmedian(one, axis=0) - ordinary
    scatter = np.sqrt(np.nanvar(many, axis=0) + 0.5 * np.nanvar(one, axis=0) + NOISE**2)
    weight = gap * _FEWER / scatter
    told = (gap * _FEWER > LEAST_GAP) & (weight > LEAST_WEIGHT)
    return ordinary, gap, np.where(told, np.minimum(weight, MOST_WEIGHT), 0.0)


def _correlations(columns: Vector, target: Vector) -> Vector:
    """Rank correlation of each column with the target; 0 where one is constant."""
    if not len(target):
        return np.zeros(columns.shape[1])
    left, right = _ranks(columns), _ranks(target[:, None])
    size = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.where(size > 0.0, (left * right).sum(0) / np.where(size > 0.0, size, 1.0), 0.0)


def _ranks(columns: Vector) -> Vector:
    """Ranks of each column less their mean, ties at their mean rank."""
    order = np.argsort(columns, axis=0, kind="stable")
    sorted_ = np.take_along_axis(columns, order, 0)
    count = len(columns)
    new = np.ones(columns.shape, dtype=bool)
    new[1:] = sorted_[1:] != sorted_[:-1]
    places = np.arange(count)[:, None]
    first = np.maximum.accumulate(np.where(new, places, 0), axis=0)
    ends = np.ones(columns.shape, dtype=bool)
    ends[:-1] = new[1:]
    last = np.minimum.accumulate(np.where(ends, places, count)[::-1], axis=0)[::-1]
    ranks = np.empty(columns.shape)
    np.put_along_axis(ranks, order, 0.5 * (first + last), 0)
    return np.asarray(ranks - 0.5 * (count - 1))


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
        patience: seconds that the rehearsals may take, judged by a first one.

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
        digest = architecture_digest(model, global_state)
        return kept_or_built(model, global_state, digest, folder, sample, patience)
    except ModelError as error:
        msg = (
            "no reference can be built for this model: it could not be copied, takes none of the "
            "inputs that were tried, or fails on them; say `sample=` (the shape of one input) or "
            "score without a reference"
        )
        raise MisuseError(msg) from error


def kept_or_built(  # noqa: PLR0913, PLR0917 - as `build_reference`, whose digest is known
    model: nn.Module,
    state: Mapping[str, Tensor],
    digest: str,
    folder: Path | None,
    sample: Sequence[int] | None = None,
    patience: float = PATIENCE,
) -> Reference:
    """Do what `build_reference` does, for an architecture of this digest.

    Raises:
        ModelError: the model cannot be copied, takes no input that was tried, or fails on it.
        MisuseError: the rehearsals would take longer than `patience`.
    """
    cache = None if folder is None else folder / f"reference-{digest}.json"
    if cache is not None and (kept := _read(cache)) is not None:
        return kept
    copied = twin(model, state)
    generator = torch.Generator().manual_seed(SEED)
    shape = None if copied is None else fitting_shape(copied.module, generator, sample)
    if copied is None or shape is None:
        msg = "there is no copy, or no input that it takes"
        raise ModelError(msg)
    _require_patience(copied.module, shape, patience)
    reference = _build(copied.module, shape, generator, copied.names)
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
    planned = seconds * passes(module, shape)
    if planned > patience and seconds > SLOW:
        msg = (
            f"the synthetic rounds of this model would take about {planned:.0f} seconds, "
            f"more than the {patience:.0f} allowed; give more `patience`, or score without a "
            "reference"
        )
        raise MisuseError(msg)


def architecture_digest(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over what the model is made of, without any value.

    Raises:
        ModelError: an entry has no shape yet.
    """
    if any(map(is_uninitialised, state.values())):
        msg = "the global state has entries without a shape"
        raise ModelError(msg)
    with foreign():
        shown = repr(model)
    text = json.dumps([FORMAT, FEATURE_VERSION, REHEARSED, shown, structure_of(state)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(
    module: nn.Module,
    shape: Sequence[int],
    generator: torch.Generator,
    names: Mapping[str, str],
) -> Reference:
    rehearsals = list(rehearse(module, shape, generator))
    with torch.no_grad():
        sample = records(2, shape, generator, tokens=vocabulary(module))
    read = [
        names.get(weight, weight)
        for name, part, _ in reached(module, sample)
        if isinstance(part, nn.Linear) and (weight := entry_name(name, "weight"))
    ]
    return learned(rehearsals, read, names)


def learned(
    rehearsals: Sequence[Rehearsal], read: Sequence[str], names: Mapping[str, str] | None = None
) -> Reference:
    """Learn a reference from rehearsals.

    Args:
        rehearsals: synthetic rounds of one model.
        read: weights of its dense layers with a bias, in the order they are reached.
        names: name in the copy that was rehearsed with -> name in the global state; alike where
            left out.

    Returns:
        A reference of the tensors that tell most.
    """
    seen = sorted({entry.names[0] for one in rehearsals for entry in one.measured})
    place = {name: index for index, name in enumerate(seen)}
    values = np.full((len(rehearsals), len(seen), len(FEATURES)), np.nan)
    for index, one in enumerate(rehearsals):
        for entry in one.measured:
            values[index, place[entry.names[0]]] = entry.vector
    leaks = np.array([one.leaks for one in rehearsals], dtype=np.float64)
    counts = np.array([one.spec.records for one in rehearsals], dtype=np.float64)
    noise = np.array([one.noise for one in rehearsals], dtype=np.float64)
    renamed = [(names or {}).get(name, name) for name in seen]
    chosen = _telling(values, leaks, [name in read for name in renamed])
    kept = values[:, chosen].astype(np.float16)  # as it is kept on disk
    return Reference(
        tensors=tuple(renamed[index] for index in chosen),
        read=tuple(read),
        rounds=kept.astype(np.float64),
        leakage=leaks,
        records=counts,
        noise=noise,
        floor=_floor(rehearsals),
    )


def _floor(rehearsals: Sequence[Rehearsal]) -> float:
    """Mean leakage of rehearsals of many records, in the worst style and way to train."""
    found: dict[tuple[str, bool, bool], list[float]] = {}
    for one in rehearsals:
        if one.spec.records >= MANY and not one.noise:
            way = (one.style, one.spec.epochs == 1, one.spec.adam)
            found.setdefault(way, []).append(one.leaks)
    return max((float(np.mean(leaks)) for leaks in found.values()), default=0.0)


def _telling(values: Vector, leaks: Vector, read: Sequence[bool]) -> list[int]:
    """Places of the tensors that tell most, and of those that are read."""
    filled = np.where(np.isfinite(values), values, 0.0).reshape(len(values), -1)
    weight = _correlations(filled, leaks).reshape(values.shape[1:])
    order = np.argsort(-((weight**2).sum(1) + 100.0 * np.asarray(read)), kind="stable")
    return sorted(order[:MOST_TENSORS].tolist())


_ARRAYS = ("rounds", "leakage", "records", "noise")


def _written(reference: Reference) -> bytes:
    arrays = {name: getattr(reference, name) for name in _ARRAYS}
    arrays["rounds"] = np.ascontiguousarray(arrays["rounds"], dtype=np.float16)
    known = {"tensors": reference.tensors, "read": reference.read, "floor": reference.floor}
    return bytes(save_arrays(arrays, {"reference": json.dumps(known, allow_nan=False)}))


def _read(path: Path) -> Reference | None:
    """Return a kept reference; None where there is none that can be used: it is built again."""
    try:
        return _parsed(path.read_bytes())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def _parsed(data: bytes) -> Reference | None:
    size = int.from_bytes(data[:8], "little")
    known = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["reference"])
    arrays = {name: value.astype(np.float64) for name, value in load_arrays(data).items()}
    tensors, read = (tuple(map(str, known[name])) for name in ("tensors", "read"))
    count = len(arrays["leakage"])
    fitting = arrays["rounds"].shape == (count, len(tensors), len(FEATURES)) and all(
        arrays[name].shape == (count,) and np.isfinite(arrays[name]).all() for name in _ARRAYS[1:]
    )
    bounded = bool(((arrays["leakage"] >= 0.0) & (arrays["leakage"] <= 1.0)).all())
    floor = float(known["floor"])
    if not (fitting and bounded and (arrays["records"] >= 1.0).all() and 0.0 <= floor <= 1.0):
        return None
    rounds, leakage, counts, noise = (arrays[name] for name in _ARRAYS)
    return Reference(tensors, read, rounds, leakage, counts, noise, floor)
