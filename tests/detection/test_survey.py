"""Features of many tensors at a time: the same as of each alone, asked for once, in few pieces."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, linalg
from torch.utils._python_dispatch import TorchDispatchMode

from sentinel.detection import score_update
from sentinel.detection.features import FEATURES, update_features
from sentinel.detection.survey import (
    COMPANY,
    FAINT,
    FLOOR,
    MOST_ROWS,
    MOST_VALUES,
    SKETCH,
    TWIN,
)
from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

Shape = tuple[int, ...]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(shape: Shape, seed: int, records: int = 4) -> tuple[Tensor, Tensor]:
    """The update of a layer by some records: of its weight, and of its bias."""
    generator = seeded(seed)
    signals = torch.randn(shape[0], records, generator=generator)
    rows = torch.randn(records, math.prod(shape[1:]), generator=generator)
    return (signals @ rows).view(shape), signals.sum(1)


def share(values: Tensor) -> float:
    return max(math.log10(max(float(values), 1e-30)), FLOOR)


def spread(energy: Tensor) -> float:
    """Log10 of the participation ratio as a share."""
    return -math.log10(float((energy / energy.sum()).square().sum()) * len(energy))


def moments(values: Tensor) -> dict[str, float]:
    sizes = values.abs().flatten() / values.square().mean().sqrt()
    return {
        "flatness": math.log10(sizes.mean()),
        "peak": math.log10(sizes.max()),
        "spread": -math.log10(sizes.pow(4).mean()),
        "faint": float((sizes < FAINT).double().mean()),
    }


def outside(sketch: Tensor, top: int) -> float:
    """Share of the energy outside so many fixed random directions of the smaller side."""
    side = sketch if len(sketch) >= sketch.shape[1] else sketch.T
    size = side.shape[1]
    turn = linalg.qr(torch.randn(size, size, generator=seeded(size), dtype=torch.float64))[0]
    basis, values, _ = linalg.svd(side @ turn[:, :top], full_matrices=False)
    basis = basis[:, values > 1e-9 * values.max()]
    rest = side - basis @ (basis.T @ side)
    return share(rest.square().sum() / side.square().sum())


def company(rows: Tensor, bias: Tensor) -> dict[str, float]:
    """How near guesses at records are to one another, pair by pair."""
    told = bias.abs() > FAINT * bias.abs().max()
    guesses = rows[told] / bias[told][:, None]
    if len(guesses) < 2:
        return {}
    apart = (guesses[:, None] - guesses[None]).norm(dim=2).fill_diagonal_(math.inf).amin(1)
    near = apart / guesses.norm(dim=1)
    aside = apart / (guesses - guesses.median(0).values).norm(dim=1).clamp_min(1e-15)
    found = {name: float((near < most).double().mean()) for name, most in COMPANY.items()}
    found["aside_30"] = float((aside < 0.3).double().mean())
    logs = {"close": near, "aside": aside}
    return found | {
        name: float(values.clamp(3e-3, 10.0).log10().mean()) for name, values in logs.items()
    }


def plain(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> list[float]:
    """The features of one matrix, straight from their definitions in float64."""
    matrix = weight.double().reshape(len(weight), -1)
    rows, columns = matrix.shape
    sketch = matrix
    if columns > SKETCH:
        drawn = torch.randn(columns, SKETCH, generator=generator) / math.sqrt(SKETCH)
        sketch = matrix @ drawn.double()
    energy = matrix.square().sum(1)
    loud = energy.sqrt() > FAINT * energy.max().sqrt()
    sample = matrix[energy.topk(min(rows, MOST_ROWS, max(8, MOST_VALUES // columns))).indices]
    across = sample.square().sum(0)
    shares = linalg.svdvals(sketch).square()
    shares = shares / shares.sum()
    found = moments(sample) | {
        "rank": -math.log10(float(shares.square().sum())),
        "faint_rows": 1.0 - float(loud.double().mean()),
        "row_spread": spread(energy),
        "column_spread": spread(across),
        "faint_columns": float((across.sqrt() <= FAINT * across.max().sqrt()).double().mean()),
    }
    for top in (1, 4, 16):
        found[f"tail_{top}"] = outside(sketch, top) if top < min(rows, columns) else 0.0
    if bias is not None:
        direction = bias.double() / bias.double().norm()
        found["unexplained"] = share(1 - (direction @ matrix).square().sum() / energy.sum())
        beside = math.sqrt(sketch.shape[1]) * bias.double()[:, None]
        sketch = torch.cat([sketch, beside], dim=1)
        places = energy.topk(min(rows, MOST_ROWS)).indices
        found |= company(sketch[places][:, :-1], bias.double()[places])
    chosen = sketch[energy.topk(min(rows, MOST_ROWS)).indices]
    chosen = chosen[loud[energy.topk(min(rows, MOST_ROWS)).indices]]
    units = chosen / chosen.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).abs().fill_diagonal_(0.0)
    found["twins"] = float((cosines.amax(1) > 1 - TWIN).double().mean()) if len(units) > 1 else 0.0
    return [found.get(name, 0.0) for name in FEATURES]


BLURRED = (*COMPANY, "aside_30", "close", "aside")  # distances are taken in float32


SHAPES: tuple[Shape, ...] = (
    (40, 60),
    (33, 33),
    (16, 8, 3, 3),
    (8, 3, 3, 3),
    (700, 40),
    (5000, 40),
    (4200, 9),
    (20, 600),
    (4, 33),
    (1, 50),
    (50, 1),
    (1, 1),
)


def update(change: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Tensor]:
    """Layers of many shapes, three of each, two of them with a bias; and some that are zero."""
    deltas = {}
    for place, shape in enumerate(SHAPES):
        for copy in range(3):
            weight, bias = layer(shape, 10 * place + copy)
            deltas[f"{copy}.{place:02}.weight"] = weight
            if copy:
                deltas[f"{copy}.{place:02}.bias"] = bias
    deltas["0.05.still.weight"] = torch.zeros(40, 60)
    deltas["1.05.still.weight"], deltas["1.05.still.bias"] = torch.zeros(40, 60), torch.zeros(40)
    return {name: change(value) for name, value in deltas.items()}


def one_by_one(deltas: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, list[float]]:
    return {
        name: plain(deltas[name], deltas.get(name.replace("weight", "bias")), generator)
        for name in sorted(deltas)
        if name.endswith("weight") and deltas[name].any()
    }


def require_alike(deltas: Mapping[str, Tensor], within: float = 1e-5) -> None:
    expected = one_by_one(deltas, seeded(1))
    found = {entry.names[0]: entry.vector for entry in update_features(deltas, seeded(1))}
    assert list(found) == list(expected)
    for name, vector in found.items():
        blurred = [within if key not in BLURRED else max(within, 0.02) for key in FEATURES]
        for value, meant, most in zip(vector, expected[name], blurred, strict=True):
            assert value == pytest.approx(meant, abs=most), name


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_measured_together_have_the_features_of_each_alone(dtype: torch.dtype) -> None:
    # What 16 bits leave beside a low rank is close to the floor: the sketch is summed in float32.
    within = 1e-5 if dtype in {torch.float64, torch.float32} else 5e-3
    require_alike(update(lambda value: value.to(dtype)), within)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("group", [1, 5000])
def test_sketches_are_drawn_in_the_order_of_the_names_however_the_work_is_cut(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentinel.detection.features.GROUP", group)
    require_alike(update())


@pytest.mark.parametrize("slab", [SKETCH, 100, 7000])
def test_features_do_not_depend_on_the_pieces_that_are_read(
    slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentinel.detection.stack.SLAB", slab)
    deltas = update(lambda value: value.double())
    require_alike({name: value for name, value in deltas.items() if name[2:5] != "05."})


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e20])
def test_layers_of_odd_size_among_usual_ones_keep_their_features(size: float) -> None:
    deltas = update()
    for name in deltas:
        if name.startswith("1."):
            deltas[name] *= size
    require_alike(deltas, within=1e-4)


def test_a_weight_that_vanishes_beside_its_bias_has_finite_features() -> None:
    weight, bias = layer((40, 60), 0)
    (entry,) = update_features({"a.weight": weight * 1e-25, "a.bias": bias * 1e20}, seeded(1))
    assert all(math.isfinite(value) for value in entry.vector)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_float64_sizes_whose_squares_leave_float64_are_measured(size: float) -> None:
    weight, bias = layer((40, 60), 0)
    deltas = {"a.weight": weight.double(), "a.bias": bias.double()}
    (one,) = update_features(deltas, seeded(1))
    (other,) = update_features({name: size * value for name, value in deltas.items()}, seeded(1))
    assert one.vector == pytest.approx(other.vector, abs=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["2.00.weight", "1.03.bias", "0.10.weight"])
def test_of_many_tensors_the_one_that_is_not_finite_is_named(name: str) -> None:
    deltas = update()
    deltas[name].view(-1)[-1] = math.nan
    with pytest.raises(Withheld, match=name) as raised:
        update_features(deltas, seeded(1))
    assert raised.value.reason is Reason.NOT_FINITE


class Computed(Mapping[str, Tensor]):
    """Differences that are computed whenever they are asked for."""

    def __init__(self, deltas: Mapping[str, Tensor]) -> None:
        """Keep the parts."""
        self._deltas = deltas
        self.shapes = {name: delta.shape for name, delta in deltas.items()}
        self.asked: list[str] = []
        self.most = self._alive = 0

    def __getitem__(self, name: str) -> Tensor:
        """Compute one, and note how many values are alive."""
        self.asked.append(name)
        values = self._deltas[name].clone()
        count = values.numel()
        self._alive += count
        self.most = max(self.most, self._alive)
        weakref.finalize(values, self._gone, count)
        return values

    def _gone(self, count: int) -> None:
        self._alive -= count

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Count the names."""
        return len(self.shapes)


def test_each_difference_is_computed_once_and_few_are_alive_at_a_time(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentinel.detection.features.GROUP", 1 << 16)
    deltas = {f"{place:02}": layer((200, 300), place)[0] for place in range(40)}
    deltas |= {f"bias{place}": layer((50, 2), place)[1] for place in range(40)}
    computed = Computed(deltas)
    assert update_features(computed, seeded(1)) == update_features(deltas, seeded(1))
    assert sorted(computed.asked) == sorted(deltas)
    assert computed.most <= (threads + 1) * 60_000


@pytest.mark.usefixtures("threads")
def test_a_difference_that_cannot_be_computed_ends_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sentinel.detection.features.GROUP", 1)

    class Broken(Computed):
        def __getitem__(self, name: str) -> Tensor:
            if name == "07":
                raise Withheld(Reason.NOT_FINITE, "changed meanwhile")
            return super().__getitem__(name)

    deltas = {f"{place:02}": layer((40, 60), place)[0] for place in range(20)}
    with pytest.raises(Withheld, match="changed meanwhile"):
        update_features(Broken(deltas), seeded(1))


def test_a_tensor_scores_the_same_alone_and_among_hundreds() -> None:
    deltas = {f"{place:03}.weight": layer((20, 30), place, 8)[0] for place in range(300)}
    together = score_update(deltas).per_tensor
    for name in ("000.weight", "137.weight", "299.weight"):
        alone = score_update({name: deltas[name]}).per_tensor[name]
        assert together[name] == pytest.approx(alone, abs=1e-5)


class Made(TorchDispatchMode):
    """Notes the largest memory of its own that any operation made."""

    largest = 0

    def __torch_dispatch__(  # torch's name
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what came out."""
        del types
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return out


def test_a_large_vector_is_measured_in_pieces_without_a_copy_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sentinel.detection.stack.SLAB", 1 << 14)
    vector = torch.randn(1 << 20, generator=seeded(0)).half()
    made = Made()
    with made:
        (entry,) = update_features({"v": vector}, seeded(1))
    assert 0 < made.largest <= vector.nbytes / 8
    found = dict(zip(FEATURES, entry.vector, strict=True))
    expected = moments(vector.double())
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
