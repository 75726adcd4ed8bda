"""Odd inputs: what a site's model, its training or its server may hand to whatever sanitizes.

Every case is a pair of states (global, local), or odd settings with an ordinary pair. Updates have
norm 10 unless the case is about size, so that a clip norm of 1 has something to do.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

State = dict[str, Any]
NORM = 10.0  # L2 norm of an ordinary update


class Wants(enum.Enum):
    """What has to become of an input."""

    LEAVES = "leaves, clipped"
    REFUSED = "is refused"
    EITHER = "is refused, or leaves clipped"


class Settings(enum.Enum):
    """What is odd about how the sanitizer was set up; each contestant says it in its own words."""

    ORDINARY = enum.auto()
    BOUND_ZERO = enum.auto()
    BOUND_NAN = enum.auto()
    SERVER_BOUND = enum.auto()  # the server sends 1e30 as clip norm
    NO_NOISE = enum.auto()
    FREE_SENSITIVITY = enum.auto()  # a sensitivity of 1e-4 beside a clip norm of 1
    SHARE_OUT_OF_RANGE = enum.auto()
    STATISTICS_AS_PARAMETERS = enum.auto()


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        id: stands in the document and in the names of tests.
        title: the input in words.
        make: the global and the local state.
        tied: names that are one tensor, which must come out equal.
        seeded: every global generator is seeded alike before each run.
        may_vanish: an update so long that nothing need be left of it but noise.
    """

    id: str
    title: str
    make: Callable[[], tuple[State, State]]
    wants: Wants = Wants.LEAVES
    settings: Settings = Settings.ORDINARY
    tied: tuple[str, ...] = ()
    seeded: bool = False
    may_vanish: bool = False


def ordinary() -> tuple[State, State]:
    """A layer of 2040 values, and an update of norm 10."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"layer.weight": (40, 50), "layer.bias": (40,)}
    base = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    change = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norm = sum(float(value.square().sum()) for value in change.values()) ** 0.5
    return base, {name: base[name] + change[name] * (NORM / norm) for name in base}


def beside(name: str, base: object, local: object) -> Callable[[], tuple[State, State]]:
    """The ordinary pair with one more entry."""

    def make() -> tuple[State, State]:
        before, after = ordinary()
        return before | {name: base}, after | {name: local}

    return make


def turned(change: Callable[[torch.Tensor], object]) -> Callable[[], tuple[State, State]]:
    """The ordinary pair, every local tensor handed over in another form of the same values."""

    def make() -> tuple[State, State]:
        before, after = ordinary()
        return before, {name: change(value) for name, value in after.items()}

    return make


def of_dtype(dtype: torch.dtype, factor: float = 1.0) -> Callable[[], tuple[State, State]]:
    """The ordinary pair in another dtype, the update `factor` times as long."""

    def make() -> tuple[State, State]:
        before, after = ordinary()
        return (
            {name: value.to(dtype) for name, value in before.items()},
            {n: (before[n] + factor * (after[n] - before[n])).to(dtype) for n in after},
        )

    return make


def spoiled(value: float, *, everywhere: bool = False) -> Callable[[], tuple[State, State]]:
    """The ordinary pair with one local value, or all of them, replaced."""

    def make() -> tuple[State, State]:
        before, after = ordinary()
        for tensor in after.values() if everywhere else [after["layer.weight"]]:
            (tensor if everywhere else tensor[3, 4:5]).fill_(value)
        return before, after

    return make


def filled(base: float, local: float, shape: tuple[int, ...] = (40, 50)) -> Callable[[], Any]:
    """One tensor of one value, and what it became."""
    return lambda: ({"weight": torch.full(shape, base)}, {"weight": torch.full(shape, local)})


def unchanged() -> tuple[State, State]:
    """A site that learned nothing."""
    before, _ = ordinary()
    return before, {name: value.clone() for name, value in before.items()}


def tied() -> tuple[State, State]:
    """Embedding and head are one tensor."""
    before, after = ordinary()
    old, new = before["layer.weight"], after["layer.weight"]
    return {"embed.weight": old, "head.weight": old}, {"embed.weight": new, "head.weight": new}


def overlapping() -> tuple[State, State]:
    """Two entries that share half of their memory."""
    before, after = (torch.cat([v.flatten() for v in state.values()]) for state in ordinary())
    return (
        {"left": before[:1500], "right": before[540:]},
        {"left": after[:1500], "right": after[540:]},
    )


def renamed(*names: str) -> Callable[[], tuple[State, State]]:
    """The ordinary pair under other names."""

    def make() -> tuple[State, State]:
        before, after = ordinary()
        return (
            dict(zip(names, before.values(), strict=True)),
            dict(zip(names, after.values(), strict=True)),
        )

    return make


def without_bias() -> tuple[State, State]:
    """The local state lacks an entry."""
    before, after = ordinary()
    return before, {"layer.weight": after["layer.weight"]}


def with_more() -> tuple[State, State]:
    """The local state has an entry that the server never sent: patients' rows, say."""
    before, after = ordinary()
    return before, after | {"cache.rows": torch.full((16,), 7.5)}


def reordered() -> tuple[State, State]:
    """The same names in another order."""
    before, after = ordinary()
    return before, dict(reversed(after.items()))


def variance_near_zero() -> tuple[State, State]:
    """Running statistics whose variance is about as small as the noise."""
    before, after = ordinary()
    small, same = torch.full((64,), 1e-3), torch.full((64,), 1.1e-3)
    return before | {"norm.running_var": small}, after | {"norm.running_var": same}


def statistics() -> tuple[State, State]:
    """Running mean and variance of a normalisation layer."""
    before, after = ordinary()
    start = {"norm.running_mean": torch.zeros(64), "norm.running_var": torch.ones(64)}
    end = {"norm.running_mean": torch.full((64,), 0.1), "norm.running_var": torch.full((64,), 1.1)}
    return before | start, after | end


def broadcast() -> tuple[State, State]:
    """A bias that fits by broadcasting, and is not the global model's."""
    before, after = ordinary()
    return before, after | {"layer.bias": after["layer.bias"][:1]}


def negated_view(value: torch.Tensor) -> torch.Tensor:
    """The same values behind torch's lazy minus sign."""
    return torch.complex(torch.zeros_like(value), -value).conj().imag


def backwards(value: torch.Tensor) -> np.ndarray:
    """A numpy array whose strides are negative."""
    return value.numpy()[::-1].copy()[::-1]


CASES = (
    Case("ordinary", "an ordinary update, norm 10", ordinary),
    # Scalars, counters, statistics.
    Case(
        "scalar-parameter",
        "0-d float parameter (temperature), 0 to 1234.5",
        beside("temperature", torch.tensor(0.0), torch.tensor(1234.5)),
    ),
    Case(
        "step-counter",
        "0-d integer buffer (`num_batches_tracked`), 0 to 4000",
        beside("norm.num_batches_tracked", torch.tensor(0), torch.tensor(4000)),
    ),
    Case(
        "integer-vector",
        "1-D integer buffer (counts per class)",
        beside("counts", torch.zeros(8, dtype=torch.int64), torch.arange(8) * 100),
    ),
    Case(
        "boolean-mask",
        "boolean buffer",
        beside("mask", torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)),
    ),
    Case("statistics", "running mean and variance", statistics),
    Case("variance-near-zero", "running variance smaller than the noise", variance_near_zero),
    Case(
        "variance-as-parameter",
        "the same, statistics treated as parameters",
        variance_near_zero,
        settings=Settings.STATISTICS_AS_PARAMETERS,
    ),
    Case(
        "infinite-statistic",
        "Inf in a running mean only",
        beside("norm.running_mean", torch.zeros(8), torch.full((8,), torch.inf)),
        Wants.EITHER,
    ),
    Case(
        "counter-as-float",
        "integer counter that comes back as a float",
        beside("norm.num_batches_tracked", torch.tensor(0), torch.tensor(4000.0)),
        Wants.EITHER,
    ),
    # Values.
    Case("nan", "one NaN", spoiled(torch.nan), Wants.REFUSED),
    Case("nan-everywhere", "all NaN", spoiled(torch.nan, everywhere=True), Wants.REFUSED),
    Case("infinity", "one Inf", spoiled(torch.inf), Wants.REFUSED),
    Case("nothing-learned", "an update of zero", unchanged),
    Case("negative-zero", "0.0 to -0.0", filled(0.0, -0.0)),
    Case("subnormal", "subnormal values, 0 to 1e-40", filled(0.0, 1e-40)),
    Case("large", "values of 1e20", filled(0.0, 1e20)),
    Case("huge", "values of 1e38, in range", filled(0.0, 1e38), may_vanish=True),
    Case(
        "too-huge",
        "a difference beyond float32 (-3e38 to 3e38)",
        filled(-3e38, 3e38),
        Wants.REFUSED,
    ),
    # Dtypes.
    Case("float64", "float64 model", of_dtype(torch.float64)),
    Case("float16-large", "float16, update of norm 40 000", of_dtype(torch.float16, 4000.0)),
    Case("bfloat16", "bfloat16 model", of_dtype(torch.bfloat16)),
    Case("float8", "float8 model", of_dtype(torch.float8_e4m3fn), Wants.EITHER),
    Case("wider-local", "local state in float64, global in float32", turned(torch.Tensor.double)),
    Case(
        "complex",
        "complex model",
        of_dtype(torch.complex64),
        Wants.EITHER,
    ),
    Case(
        "quantized",
        "quantized local tensors",
        turned(lambda value: torch.quantize_per_tensor(value, 0.01, 0, torch.qint8)),
        Wants.EITHER,
    ),
    Case("sparse", "sparse local tensors", turned(torch.Tensor.to_sparse), Wants.EITHER),
    Case("meta", "tensors without data", turned(lambda value: value.to("meta")), Wants.REFUSED),
    Case(
        "nested",
        "nested local tensors",
        turned(lambda value: torch.nested.nested_tensor(list(value))),
        Wants.EITHER,
    ),
    # Shapes and memory.
    Case("zero-size", "tensor of no values", beside("empty", torch.zeros(0, 5), torch.zeros(0, 5))),
    Case("one-value", "a model of one value", filled(0.0, 10.0, (1,))),
    Case("tied", "two names of one tensor", tied, tied=("embed.weight", "head.weight")),
    Case("overlapping", "two entries that share half of their memory", overlapping),
    Case("transposed", "transposed local tensors", turned(lambda v: v.t().contiguous().t())),
    Case(
        "expanded",
        "one value expanded to a tensor (stride 0)",
        beside("scale", torch.zeros(8), torch.ones(1).expand(8)),
    ),
    Case("negated-view", "lazily negated local tensors", turned(negated_view)),
    Case("negative-strides", "numpy arrays with negative strides", turned(backwards), Wants.EITHER),
    Case(
        "requires-grad",
        "local parameters that require gradients",
        turned(lambda value: torch.nn.Parameter(value.clone())),
    ),
    # Names and structure.
    Case("missing-entry", "local state lacks an entry", without_bias, Wants.REFUSED),
    Case("extra-entry", "local state has one entry more", with_more, Wants.EITHER),
    Case("other-shape", "a shape that fits by broadcasting only", broadcast, Wants.REFUSED),
    Case("other-order", "names in another order", reordered),
    Case("same-but-case", "names that differ in case only", renamed("Layer.w", "layer.w")),
    Case("odd-names", "names such as `../w` and `Gewicht ü/%`", renamed("../w", "Gewicht ü/%")),
    Case(
        "reserved-name", "an entry named `__metadata__`", renamed("w", "__metadata__"), Wants.EITHER
    ),
    Case("unprintable-name", "a name with a line break", renamed("w", "w\nb"), Wants.EITHER),
    Case("no-entries", "no entries at all", lambda: ({}, {}), Wants.EITHER),
    # Randomness and settings.
    Case("seeded", "training code seeds every global generator with 42", ordinary, seeded=True),
    Case(
        "server-clip-norm",
        "the server asks for a clip norm of 1e30",
        ordinary,
        settings=Settings.SERVER_BOUND,
    ),
    Case("bound-zero", "a clip bound of 0", ordinary, Wants.EITHER, settings=Settings.BOUND_ZERO),
    Case("bound-nan", "a clip bound of NaN", ordinary, Wants.REFUSED, settings=Settings.BOUND_NAN),
    Case(
        "no-noise",
        "settings that leave no noise, or endless noise",
        ordinary,
        Wants.REFUSED,
        settings=Settings.NO_NOISE,
    ),
    Case(
        "free-sensitivity",
        "a sensitivity of 1e-4 declared beside a clip norm of 1",
        ordinary,
        Wants.EITHER,
        settings=Settings.FREE_SENSITIVITY,
    ),
    Case(
        "share-out-of-range",
        "a share of values out of range",
        ordinary,
        Wants.REFUSED,
        settings=Settings.SHARE_OUT_OF_RANGE,
    ),
)
