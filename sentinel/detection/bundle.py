"""Bundles: a trained detector as a folder of model.onnx, manifest.json, card.md and recipe.toml.

Rules, all of them enforced when a bundle is loaded; anything else withholds:

- The manifest is strict: every key known, every value of its type.
- Every file that the manifest names is there and has the digest that the manifest says.
- The feature version and the names of the features are those of this code.
- The model is run from the very bytes that were digested, on the CPU, many vectors at a time.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import onnxruntime
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sentinel.crew import share_out
from sentinel.detection.clues import CLUES
from sentinel.detection.features import FEATURE_VERSION
from sentinel.detection.weights import STATISTICS, STATISTICS_VERSION
from sentinel.errors import MisuseError, Withheld
from sentinel.paths import bundled
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Vectors = Sequence[Sequence[float]] | NDArray[np.float64]

MOST_AT_ONCE = 256  # vectors that one thread hands to the model
UPDATE_SENSITIVITY: Final = "update-sensitivity"
GLOBAL_MODEL: Final = "global-model"
MODEL, MANIFEST, CARD, RECIPE = "model.onnx", "manifest.json", "card.md", "recipe.toml"

EXPECTED: dict[str, tuple[int, tuple[str, ...]]] = {
    UPDATE_SENSITIVITY: (FEATURE_VERSION, CLUES),
    GLOBAL_MODEL: (STATISTICS_VERSION, STATISTICS),
}


class Manifest(BaseModel):
    """What a bundle says about itself.

    Attributes:
        schema_version: of the manifest.
        name: of the detector.
        feature_version: of the code that computes what the model is fed with.
        features: their names, in the order of the model's input.
        detector: the pyod detector behind the model.
        seed: of its training.
        libraries: versions of what trained it.
        files: SHA-256 of every file of the bundle but this one.
        knots: (anomaly, value): the monotone piecewise linear map from the model's output.
        generic_knots: the same for updates that are scored without a reference.
        floor: least score without a reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: int = Field(ge=1, le=1)
    name: str
    feature_version: int
    features: tuple[str, ...]
    detector: str
    seed: int
    libraries: dict[str, str]
    files: dict[str, str]
    knots: tuple[tuple[float, float], ...] = Field(min_length=2)
    generic_knots: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 1.0))
    floor: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for knots in (self.knots, self.generic_knots):
            xs, ys = [knot[0] for knot in knots], [knot[1] for knot in knots]
            rising = len(xs) > 1 and xs == sorted(set(xs)) and ys == sorted(ys)
            if not rising or not 0.0 <= ys[0] <= ys[-1] <= 1.0:
                msg = "knots must rise, from 0 to 1"
                raise ValueError(msg)
        return self


@dataclass(frozen=True, slots=True)
class Detector:
    """A loaded bundle.

    Attributes:
        manifest: what the bundle says about itself.
        digest: SHA-256 of the manifest, which names the digests of all else; public.
    """

    manifest: Manifest
    digest: str
    _session: Any  # onnxruntime has no types

    def anomaly(self, vectors: Sequence[Sequence[float]]) -> list[float]:
        """Return the model's anomaly score of each vector; larger is stranger.

        Raises:
            Withheld: DETECTOR_UNAVAILABLE, where the model gives no number.
        """
        return self._scored(vectors, ANOMALY)

    def leakage(self, vectors: Vectors) -> list[float]:
        """Return the leakage that the model estimates for each vector, as it is.

        Raises:
            Withheld: DETECTOR_UNAVAILABLE, where the model gives no number.
        """
        return self._scored(vectors, LEAKAGE)

    def generic(self, vectors: Vectors) -> list[float]:
        """Return what the manifest's map for updates without a reference makes of it, 0 to 1."""
        return [interpolated(x, self.manifest.generic_knots) for x in self.leakage(vectors)]

    def _scored(self, vectors: Vectors, output: str) -> list[float]:
        batch = np.asarray(vectors, dtype=np.float32).reshape(-1, len(self.manifest.features))
        pieces = np.array_split(batch, math.ceil(len(batch) / MOST_AT_ONCE) or 1)
        found = share_out(pieces, lambda: functools.partial(self._run, output))
        scores = [score for piece in found for score in piece]
        if not all(math.isfinite(score) for score in scores):
            raise _unavailable(self.manifest.name, "gives no finite score")
        return scores

    def _run(self, output: str, batch: NDArray[np.float32]) -> list[float]:
        scores = self._session.run([output], {INPUT: batch})[0]
        return list(map(float, scores.ravel().tolist()))

    def calibrated(self, vectors: Sequence[Sequence[float]]) -> list[float]:
        """Return what the manifest's map makes of each vector's anomaly score, 0 to 1."""
        return [interpolated(score, self.manifest.knots) for score in self.anomaly(vectors)]


INPUT, ANOMALY, LEAKAGE = "features", "anomaly", "leakage"
OUTPUTS: dict[str, set[str]] = {
    UPDATE_SENSITIVITY: {ANOMALY, LEAKAGE},
    GLOBAL_MODEL: {ANOMALY},
}
_at = itemgetter(0)


def interpolated(value: float, knots: Sequence[tuple[float, float]]) -> float:
    """Return the piecewise linear map through rising knots, constant beyond both ends."""
    place = bisect.bisect_right(knots, value, key=_at)
    if place == 0:
        return knots[0][1]
    if place == len(knots):
        return knots[-1][1]
    (left, low), (right, high) = knots[place - 1], knots[place]
    return low + (high - low) * (value - left) / (right - left)


def load_detector(name: str, *, folder: Path | None = None) -> Detector:
    """Load a detector.

    Args:
        name: "update-sensitivity" or "global-model".
        folder: the folder that holds the bundles; the shipped ones where left out.

    Raises:
        MisuseError: no detector has that name.
        Withheld: DETECTOR_UNAVAILABLE: missing, damaged, or made for other features.
    """
    if name not in EXPECTED:
        msg = f"no detector is called {name!r}; there are {', '.join(EXPECTED)}"
        raise MisuseError(msg)
    place = (folder or bundled("detectors")) / name
    try:
        seen = tuple(_as_it_lies(place / file) for file in (MANIFEST, MODEL, CARD, RECIPE))
    except OSError as error:
        raise _unavailable(name, "is missing or its files cannot be read") from error
    return _loaded(name, place, seen)


def _as_it_lies(path: Path) -> tuple[int, ...]:
    """What is another number as soon as a file is written to, replaced or touched."""
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=8)
def _loaded(name: str, place: Path, _seen: tuple[tuple[int, ...], ...]) -> Detector:
    """Read and check a bundle; done once, as long as its files lie as they did.

    What is kept is what was checked, so nobody who gets at the files later can change it.
    """
    try:
        text = (place / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(text)
        files = {file: (place / file).read_bytes() for file in manifest.files if _plain(file)}
    except (OSError, ValidationError) as error:
        raise _unavailable(name, "is missing or its manifest cannot be read") from error
    _check(name, manifest, files)
    session = _session(files[MODEL], name)
    return Detector(manifest, hashlib.sha256(text).hexdigest(), session)


def _plain(file: str) -> bool:
    return file in (MODEL, CARD, RECIPE)


def _check(name: str, manifest: Manifest, files: dict[str, bytes]) -> None:
    version, features = EXPECTED[name]
    if set(manifest.files) != {MODEL, CARD, RECIPE}:
        raise _unavailable(name, "must name exactly its model, card and recipe")
    for file, digest in manifest.files.items():
        if hashlib.sha256(files[file]).hexdigest() != digest:
            raise _unavailable(name, f"is damaged: {file} has another digest than the manifest")
    if manifest.name != name:
        raise _unavailable(name, "was put in the place of another detector")
    if manifest.feature_version != version or manifest.features != features:
        raise _unavailable(name, f"was trained for other features than version {version}")


def _unavailable(name: str, problem: str) -> Withheld:
    return Withheld(
        Reason.DETECTOR_UNAVAILABLE,
        f"The detector {name!r} {problem}; install gradient-sentinel again, or train it with "
        f"`sentinel detectors train {name}`.",
    )


def _session(model: bytes, name: str) -> Any:  # noqa: ANN401  # onnxruntime has no types
    """Open the model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise _unavailable(name, "cannot be opened by onnxruntime") from error
    missing = OUTPUTS[name] - {output.name for output in session.get_outputs()}
    if missing:
        raise _unavailable(name, f"has no output called {min(missing)}")
    return session
