"""Statistics of many layers at a time: those of each alone, whatever their size, form and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sentinel.detection import History, Kind, inspect_global_model
from sentinel.detection.inspection import SEED
from sentinel.detection.layers import Layer, layers_of
from sentinel.detection.weights import (
    DEAD,
    DRAWN,
    LOUD,
    PARALLEL,
    QUANTILE,
    STATISTICS,
    layer_statistics,
    weighed,
)
from sentinel.errors import MisuseError
from sentinel.terms import Verdict

SHAPES = ((40, 60), (24, 12), (16, 8, 3, 3), (1300, 20), (1100, 50), (6, 40), (3, 40), (40, 3))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(*, biased: bool = True) -> dict[str, Tensor]:
    """Layers of many shapes, three of each: as drawn, with still rows, and with parallel rows."""
    generator, found = seeded(0), {}
    for place, shape in enumerate(SHAPES):
        for kind in range(3):
            weight = torch.randn(shape, generator=generator) * 0.1
            if kind == 1:
                weight[: shape[0] // 3] = 0.0
            if kind == 2:
                weight[: shape[0] // 2] = weight[0]
                weight[-6:] *= 20.0 if shape[0] > 20 else 1.0
            found[f"{place}.{kind}.weight"] = weight
            if biased:
                found[f"{place}.{kind}.bias"] = torch.randn(shape[0], generator=generator)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_measured_together_have_the_statistics_of_each_alone(
    dtype: torch.dtype, *, biased: bool
) -> None:
    layers = layers_of({name: value.to(dtype) for name, value in state(biased=biased).items()})
    for layer, found in zip(layers, weighed(layers, SEED), strict=True):
        alone = layer_statistics(layer, seeded(SEED)).vector()
        assert found.statistics.vector() == pytest.approx(alone, abs=1e-5), layer.name


def middle(values: Tensor) -> float:
    return float(values.median())


def quartiles(values: Tensor) -> float:
    return float(values.quantile(0.75) - values.quantile(0.25))


def plain(layer: Layer) -> dict[str, float]:
    """Those statistics that need no draw, straight from their definitions in float64."""
    weight = layer.weight.double().reshape(layer.units, -1)
    norms = weight.norm(dim=1)
    alive = norms > 1e-6 * norms.max()
    rows = weight[alive]
    found = {
        "zero_rows": 1.0 - float(alive.double().mean()),
        "row_gain": math.log10(norms.max() / middle(norms[alive])),
        "entry_gain": math.log10(weight.abs().max() / middle(norms[alive])),
        "top_row": float(norms.max() ** 2 / norms.square().sum()),
        "scale": math.log10(middle(norms[alive])),
    }
    lengths = norms[norms > LOUD * middle(norms[alive])].log()
    alike = len(lengths) >= 4 and lengths.std(correction=0) < DRAWN / math.sqrt(layer.inputs)
    found["loud_rows"] = len(lengths) / layer.units if alike else 0.0
    if len(rows) <= 256 and layer.inputs >= 8 and len(rows) >= 8:
        root = math.sqrt(layer.inputs)
        balance = rows.sum(1) / rows.abs().sum(1)
        away = (balance - middle(balance)).abs()
        uneven = ((rows < 0).sum(1) - layer.inputs / 2).abs()
        found |= {
            "sign_balance": middle(uneven) / (root / 2),
            "sum_balance": middle(away) * root / 1.25,
            "sum_centre": middle(balance),
            "filled": middle((rows != 0).double().mean(1)),
        }
    if layer.inputs <= 32 and len(rows) <= 1024 and min(layer.inputs, len(rows)) >= 4:
        units = rows / rows.norm(dim=1, keepdim=True)
        most = int(((units @ units.T).abs() > PARALLEL).sum(1).max())
        found["parallel"] = most / len(rows) if most > 1 else 0.0
        shares = torch.linalg.svdvals(units).square() / len(rows)
        found["gathered"] = float(shares.square().sum())
    if layer.bias is not None:
        ratio = layer.bias.double() / norms.clamp_min(1e-6 * norms.max())
        found |= {
            "bias_centre": min(max(middle(ratio[alive]), -1e3), 1e3),
            "bias_width": min(quartiles(ratio[alive]) / 1.349 * math.sqrt(layer.inputs), 1e3),
            "quantile_rows": float((ratio < QUANTILE).double().mean()),
            "dead_rows": float((ratio < DEAD).double().mean()),
            "lit_rows": float((ratio > -DEAD).double().mean()),
            "bias_range": math.log10(1.0 + layer.bias.abs().max()),
        }
    return found


def test_statistics_are_what_their_definitions_say() -> None:
    layers = layers_of(state())
    seen: set[str] = set()
    for layer, found in zip(layers, weighed(layers, SEED), strict=True):
        expected = plain(layer)
        measured = dict(zip(STATISTICS, found.statistics.vector(), strict=True))
        assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        size = layer.weight.double().norm() / math.sqrt(layer.units)
        assert found.size == pytest.approx(float(size), rel=1e-5)
        seen |= expected.keys()
    assert set(STATISTICS) - seen == {"offset_spread", "scan", "copied_scan", "mirror", "mirrored"}


@pytest.mark.parametrize("slab", [1, 50, 900])
def test_statistics_do_not_depend_on_the_pieces_that_are_read(
    slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer for layer in layers_of(state()) if layer.units < 100]
    whole = weighed(layers, SEED)
    monkeypatch.setattr("sentinel.detection.stack.SLAB", slab)
    monkeypatch.setattr("sentinel.detection.weights.BLOCK", 7)
    for one, other in zip(whole, weighed(layers, SEED), strict=True):
        assert one.statistics.vector() == pytest.approx(other.statistics.vector(), abs=1e-5)


def test_a_parallel_half_is_seen_in_few_directions_and_in_a_sample() -> None:
    parts = state()
    layers = layers_of(parts)
    found = dict(zip([layer.name for layer in layers], weighed(layers, SEED), strict=True))
    for place in ("0", "2", "4"):
        assert found[f"{place}.0.weight"].statistics.parallel == 0.0
        share = found[f"{place}.2.weight"].statistics.parallel
        assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_layer_that_is_not_finite_is_told_from_those_measured_with_it(value: float) -> None:
    parts = state()
    parts["0.1.weight"][39, 59] = value
    layers = layers_of(parts)
    found = weighed(layers, SEED)
    assert [layer.name for layer, one in zip(layers, found, strict=True) if one is None] == [
        "0.1.weight"
    ]
    with pytest.raises(MisuseError, match="finite"):
        layer_statistics(layers[1], seeded(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e3, 1e18, 1e20, 1e30])
def test_a_model_whose_squares_leave_float32_is_unhealthy(size: float, dtype: torch.dtype) -> None:
    huge = {name: value.to(dtype) * size for name, value in state(biased=False).items()}
    found = inspect_global_model(huge)
    assert found.verdict is Verdict.UNHEALTHY
    assert found.unhealthy


@pytest.mark.parametrize("size", [1e20, 1e30, 1e200])
def test_one_huge_layer_is_magnification(size: float) -> None:
    parts = {name: value.double() for name, value in state().items() if ".0." in name}
    parts["0.0.weight"] = parts["0.0.weight"] * size
    found = inspect_global_model(parts)
    assert found.verdict is Verdict.MAGNIFICATION
    assert Kind.LARGE_LAYER in {finding.kind for finding in found.findings}
    assert found.suspicion > 0.9


@pytest.mark.parametrize("names", [("v",), ("v", "0.0.weight"), ("0.0.weight", "3.1.weight")])
def test_every_entry_that_is_not_finite_is_found(names: tuple[str, ...]) -> None:
    parts = state() | {"v": torch.ones(3)}
    for name in names:
        parts[name].view(-1)[-1] = math.nan
    found = inspect_global_model(parts)
    assert {sorted(parts)[finding.layer] for finding in found.findings} == set(names)
    assert found.verdict is Verdict.UNHEALTHY


def test_a_broken_state_without_layers_is_unhealthy() -> None:
    assert inspect_global_model({"v": torch.tensor([1.0, math.nan])}).unhealthy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_values_are_not_taken_for_broken_ones(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    found = inspect_global_model({"v": torch.full((4,), largest, dtype=dtype)})
    assert not found.unhealthy


def test_inspection_writes_nothing_and_does_not_mind_how_memory_is_laid_out() -> None:
    parts = state()
    before = {name: value.clone() for name, value in parts.items()}
    laid = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in parts.items()
    }
    assert inspect_global_model(parts) == inspect_global_model(laid)
    assert all(torch.equal(before[name], parts[name]) for name in parts)


def test_the_history_of_an_inspection_is_that_of_the_state() -> None:
    parts = state()
    (inspected,) = inspect_global_model(parts).history.scales
    assert History.of(parts).scales[0] == pytest.approx(inspected, abs=1e-5)


def test_kernels_feed_those_that_take_up_their_channels_and_one_unit_feeds_none() -> None:
    parts = {
        "a.weight": torch.ones(32, 1, 3, 3),
        "b.weight": torch.ones(24, 32, 1, 1),
        "c.weight": torch.ones(1, 24, 1, 1),
        "d.weight": torch.ones(10, 48, 1, 1),
        "e.weight": torch.ones(7, 10, 1, 1),
    }
    feeds = {layer.name[0]: layer.feeds for layer in layers_of(parts)}
    assert feeds == {"a": True, "b": True, "c": False, "d": True, "e": False}


@pytest.mark.parametrize(
    ("shape", "depthwise"),
    [
        ((8, 1, 3, 3), True),
        ((8, 1, 7, 7), True),
        ((8, 1, 28, 28), False),
        ((8, 2, 3, 3), False),
        ((8, 1, 31), True),
        ((8, 1, 33), False),
        ((8, 1, 3, 3, 3), True),
        ((8, 1), False),
    ],
)
def test_small_kernels_over_one_channel_are_depthwise(
    shape: tuple[int, ...], *, depthwise: bool
) -> None:
    (layer,) = layers_of({"a.weight": torch.ones(shape)})
    assert layer.depthwise is depthwise


def test_a_layer_feeds_those_whose_inputs_are_its_units_and_never_itself() -> None:
    parts = {
        "a.weight": torch.ones(8, 5),
        "b.weight": torch.ones(3, 8),
        "c.weight": torch.ones(7, 7),
        "d.weight": torch.ones(4, 2, 3, 3),
        "e.weight": torch.ones(6, 64),
    }
    feeds = {layer.name[0]: layer.feeds for layer in layers_of(parts)}
    assert feeds == {"a": True, "b": False, "c": False, "d": True, "e": False}
