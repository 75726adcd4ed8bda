"""Every row of the table of odd tensors, and the cast that keeps a bound."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentinel.errors import MisuseError, Withheld
from sentinel.source import Held
from sentinel.spans import Span
from sentinel.terms import Reason
from sentinel.update import Role, Update, model_digest, require_state, shares_storage

LOW = [torch.float16, torch.bfloat16]
NANS = (0x7FC00000, 0x7FC00001)  # two of the patterns that mean NaN


def update_of(base: dict, local: dict, **options: object) -> Update:
    return Update.from_states(base, local, **options)


def norm(update: Update) -> float:
    return math.sqrt(sum(update.squares.values()))


def given_back(update: Update, released: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """The update as a state dict, its deltas as they are."""
    assembly = update.assembly(released, **options)
    for name in released:
        values = update.deltas[name].double().view(-1).clone()
        assembly.put([Span(name, 0, values.numel())], values)
    return assembly.state()


def test_a_0d_parameter_is_a_parameter_of_one_value_inside_the_norm() -> None:
    update = update_of(
        {"w": torch.zeros(3), "logit_scale": torch.tensor(0.0)},
        {"w": torch.zeros(3), "logit_scale": torch.tensor(1234.5)},
    )
    assert update.deltas["logit_scale"].shape == ()
    assert norm(update) == pytest.approx(1234.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_buffers_go_back_as_the_global_values_and_are_not_in_the_norm(
    dtype: torch.dtype,
) -> None:
    base = {"w": torch.zeros(2), "seen": torch.zeros(4).to(dtype), "steps": torch.tensor(0)}
    local = {"w": torch.ones(2), "seen": torch.ones(4).to(dtype), "steps": torch.tensor(9000)}
    update = update_of(base, local)
    assert norm(update) == pytest.approx(math.sqrt(2))
    out = given_back(update, ["w"])
    assert torch.equal(out["seen"], base["seen"])
    assert out["steps"] == 0
    assert out["seen"].dtype == dtype


def test_normalisation_statistics_go_back_as_the_global_values() -> None:
    base = {"bn.weight": torch.ones(2), "bn.running_mean": torch.zeros(2)}
    local = {"bn.weight": torch.ones(2) * 2, "bn.running_mean": torch.full((2,), 7.0)}
    update = update_of(base, local)
    assert update.roles["bn.running_mean"] is Role.STATISTIC
    assert set(update.deltas) == {"bn.weight"}
    assert torch.equal(
        given_back(update, ["bn.weight"])["bn.running_mean"], base["bn.running_mean"]
    )


def test_a_floating_buffer_of_any_name_is_a_statistic_where_the_model_says_it_is_a_buffer() -> None:
    base, local = {"m.centre": torch.zeros(2)}, {"m.centre": torch.ones(2)}
    assert not update_of(base, local, buffers=["m.centre"]).deltas
    assert update_of(base, local).deltas


def test_statistics_as_parameters_leave_with_a_variance_above_zero() -> None:
    base = {"bn.running_var": torch.ones(3)}
    update = update_of(base, {"bn.running_var": torch.zeros(3)}, statistics_as_parameters=True)
    held = Held({"bn.running_var": torch.full((3,), -50.0)})
    out = given_back(replace(update, deltas=held), ["bn.running_var"])
    assert (out["bn.running_var"] > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_a_value_that_is_not_finite_is_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    base = {"fine": torch.zeros(2, dtype=dtype), "head.weight": torch.zeros(70_000, dtype=dtype)}
    local = {name: value.clone() for name, value in base.items()}
    local["head.weight"][69_999] = bad
    with pytest.raises(Withheld, match=r"'head\.weight'") as caught:
        update_of(base, local)
    assert caught.value.reason is Reason.NOT_FINITE
    assert str(bad) not in str(caught.value).replace("infinity", "")


def test_unknown_missing_and_reshaped_entries_are_refused_by_name() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for local, name in [
        ({**base, "c": torch.zeros(1)}, "'c'"),
        ({"a": torch.zeros(2)}, "'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(1, 2)}, "'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.int64)}, "'b'"),
        ({"a": torch.zeros(2), "b": [0.0, 0.0]}, "'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex64)}, "'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(2).to_sparse()}, "'b'"),
    ]:
        with pytest.raises(Withheld, match=name) as caught:
            update_of(base, local)
        assert caught.value.reason is Reason.STRUCTURE_MISMATCH


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_computed_in_float32_and_cast_at_the_end(dtype: torch.dtype) -> None:
    base = {"w": torch.full((1000,), 60_000.0, dtype=dtype)}
    local = {"w": -base["w"]}
    update = update_of(base, local)
    assert update.deltas["w"].dtype == torch.float32
    assert norm(update) == pytest.approx(120_000 * math.sqrt(1000), rel=0.01)  # no fp16 overflow
    assert given_back(update, ["w"])["w"].dtype == dtype


def test_float64_stays_float64() -> None:
    tiny = 1e-12
    update = update_of(
        {"w": torch.ones(1, dtype=torch.float64)}, {"w": torch.ones(1, dtype=torch.float64) + tiny}
    )
    assert update.deltas["w"].item() == pytest.approx(tiny, rel=1e-3)


def test_tied_weights_are_counted_once_and_leave_alike() -> None:
    shared = torch.ones(3)
    update = update_of(
        {"embed": torch.zeros(3), "head": torch.zeros(3)}, {"embed": shared, "head": shared}
    )
    assert norm(update) == pytest.approx(math.sqrt(3))
    assert update.aliases == {"head": "embed"}
    assert sum(update.coordinates.values()) == 3
    out = given_back(replace(update, deltas=Held({"embed": torch.full((3,), 0.5)})), ["embed"])
    assert torch.equal(out["embed"], out["head"])
    assert out["embed"].data_ptr() != out["head"].data_ptr()


def test_a_tied_weight_stays_where_one_of_its_names_is_withheld() -> None:
    shared = torch.ones(3)
    base = {"embed": torch.zeros(3), "head": torch.zeros(3), "w": torch.zeros(1)}
    local = {"embed": shared, "head": shared, "w": torch.ones(1)}
    for kept in ("embed", "head"):
        update = update_of(base, local, let_out=lambda names, kept=kept: set(names) - {kept})
        assert set(update.coordinates) == {"w"}


def test_storage_that_overlaps_in_part_stays_two_parameters() -> None:
    flat = torch.ones(6)
    update = update_of({"a": torch.zeros(4), "b": torch.zeros(4)}, {"a": flat[:4], "b": flat[2:]})
    assert set(update.deltas) == {"a", "b"}
    assert norm(update) == pytest.approx(math.sqrt(8))


def test_zero_size_and_all_zero_updates_work() -> None:
    base = {"none": torch.zeros(0, 3), "w": torch.ones(2)}
    update = update_of(base, {"none": torch.zeros(0, 3), "w": torch.ones(2)})
    assert norm(update) == 0.0
    out = given_back(update, ["none", "w"])
    assert out["none"].shape == (0, 3)
    assert torch.equal(out["w"], base["w"])


def test_a_transposed_parameter_is_read_by_its_values() -> None:
    local = torch.arange(6.0).view(2, 3).t()
    update = update_of({"w": torch.zeros(3, 2)}, {"w": local})
    assert torch.equal(update.deltas["w"], local)


def test_neither_state_is_written() -> None:
    base, local = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    update = update_of(base, local)
    update.deltas["w"].mul_(3)  # computed anew at each reading
    assert torch.equal(update.deltas["w"], torch.ones(2))
    out = given_back(update, ["w"])
    out["w"].add_(1)
    assert torch.equal(base["w"], torch.zeros(2))
    assert torch.equal(local["w"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@given(seed=st.integers(0, 2**32), scale=st.floats(1e-6, 1e3))
def test_without_noise_no_coordinate_of_the_received_difference_is_larger_than_the_delta(
    dtype: torch.dtype, seed: int, scale: float
) -> None:
    """Nearest rounding would make a difference of norm 1 into 1.03 in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(257, generator=generator).to(dtype)}
    local = {"w": (base["w"].double() + scale * torch.randn(257, generator=generator)).float()}
    update = update_of(base, local)
    before = update.deltas["w"].double().clone()
    received = given_back(update, ["w"])["w"].double() - base["w"].double()
    assert (received.abs() <= before.abs()).all()


def test_nearest_rounding_is_what_it_would_break() -> None:
    """The test above can fail: with noise the nearest value is taken, and the norm grows."""
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(4096, generator=generator).bfloat16()}
    change = torch.randn(4096, generator=generator)
    local = {"w": base["w"].float() + change / change.norm()}
    toward = given_back(update_of(base, local), ["w"])["w"].float() - base["w"].float()
    nearest = (
        given_back(update_of(base, local), ["w"], noised=["w"])["w"].float() - base["w"].float()
    )
    assert toward.norm() <= 1.0 < nearest.norm()


@pytest.mark.parametrize("noised", [[], ["w"]])
def test_a_value_beyond_the_range_of_the_dtype_becomes_its_largest(noised: list[str]) -> None:
    base = {"w": torch.zeros(1, dtype=torch.float16)}
    update = update_of(base, {"w": torch.full((1,), 1e6)})
    assert given_back(update, ["w"], noised=noised)["w"].item() == 65504.0


def test_a_delta_is_released_as_a_difference_and_zero_where_nothing_leaves() -> None:
    base = {"w": torch.ones(2), "head": torch.ones(2), "n": torch.tensor(3)}
    local = {"w": torch.full((2,), 1.5), "head": torch.zeros(2), "n": torch.tensor(9)}
    out = given_back(update_of(base, local), ["w"], kind="delta")
    assert torch.equal(out["w"], torch.full((2,), 0.5))
    assert torch.equal(out["head"], torch.zeros(2))
    assert out["n"] == 0


def test_a_digest_tells_names_dtypes_shapes_and_bytes_apart() -> None:
    one = {"a": torch.zeros(4), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": one["b"].clone(), "a": one["a"].clone()}
    assert model_digest(one) == model_digest(same)
    others = [
        {"a": torch.zeros(2, 2), "b": one["b"]},
        {"a": torch.zeros(4, dtype=torch.int32), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": one["b"]},
    ]
    assert len({model_digest(state) for state in [one, *others]}) == 5


def test_a_digest_follows_its_written_format() -> None:
    """SHA-256 over sorted, length-framed headers and little-endian bytes, computed by hand here."""
    expected = hashlib.sha256()
    for header, content in [
        (["n", "torch.int64", []], struct.pack("<q", 7)),
        (["w", "torch.float32", [2]], struct.pack("<2f", 1.0, -2.0)),
    ]:
        text = json.dumps(header).encode()
        expected.update(struct.pack("<Q", len(text)) + text + content)
    state = {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(7)}
    assert model_digest(state) == expected.hexdigest()


def test_shared_storage_is_seen_through_views() -> None:
    flat = torch.zeros(4)
    assert shares_storage({"a": flat[:2]}, {"b": flat[2:]})
    assert not shares_storage({"a": flat}, {"b": flat.clone()})
    assert not shares_storage({"a": torch.zeros(0)}, {"b": torch.zeros(0)})


@pytest.mark.parametrize("kind", ["weights", "delta"])
def test_what_goes_back_unchanged_is_contiguous(kind: str) -> None:
    """Tensors that are stored as they lie could not be written to disk."""
    base = {
        "conv": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "index": torch.arange(6).view(2, 3).t(),
        "w": torch.zeros(2),
    }
    update = update_of(base, {**base, "w": torch.ones(2)})
    out = given_back(update, ["w"], kind=kind)
    assert all(value.is_contiguous() for value in out.values())
    if kind == "weights":
        assert torch.equal(out["conv"], base["conv"])


def test_tensors_that_are_finite_one_by_one_and_not_together_are_refused() -> None:
    base = {name: torch.zeros(2, dtype=torch.float64) for name in "ab"}
    local = {name: torch.full((2,), 7e153, dtype=torch.float64) for name in "ab"}
    with pytest.raises(Withheld) as caught:
        update_of(base, local)
    assert caught.value.reason is Reason.NOT_FINITE


def test_a_name_that_cannot_be_printed_is_refused() -> None:
    state = {"a\ud800": torch.zeros(1)}
    with pytest.raises(Withheld) as caught:
        update_of(state, state)
    assert caught.value.reason is Reason.STRUCTURE_MISMATCH


@pytest.mark.parametrize("state", [None, {}, [], {1: torch.zeros(1)}, {"model": {}}])
def test_what_is_no_state_dict_is_misuse(state: object) -> None:
    with pytest.raises(MisuseError, match="state"):
        require_state(state, "global_state")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_stay_where_they_are() -> None:
    base = {"w": torch.zeros(3, device="cuda")}
    update = update_of(base, {"w": torch.ones(3, device="cuda")})
    assert given_back(update, ["w"])["w"].is_cuda


@pytest.mark.parametrize("kind", ["weights", "delta"])
def test_a_running_variance_that_is_not_positive_is_not_moved_by_more_than_its_delta(
    kind: str,
) -> None:
    """The server chose it; setting it right would show as a difference that no delta explains."""
    base = {"bn.running_var": torch.tensor([-5.0, 0.0, 2.0])}
    local = {"bn.running_var": torch.tensor([-5.0, 0.5, -9.0])}
    update = update_of(base, local, statistics_as_parameters=True)
    out = given_back(update, ["bn.running_var"], kind=kind)["bn.running_var"]
    moved = out - base["bn.running_var"] if kind == "weights" else out
    assert (
        moved.abs()
        <= update_of(base, local, statistics_as_parameters=True).deltas["bn.running_var"].abs()
    ).all()
    if kind == "weights":
        assert out[2] > 0


def test_an_entry_without_a_shape_or_without_data_is_refused() -> None:
    lazy = torch.nn.LazyLinear(2).state_dict()
    with pytest.raises(Withheld, match="run the model once") as caught:
        update_of(lazy, lazy)
    assert caught.value.reason is Reason.STRUCTURE_MISMATCH
    base = {"w": torch.zeros(2)}
    with pytest.raises(Withheld, match="has no data") as caught:
        update_of(base, {"w": torch.zeros(2, device="meta")})
    assert caught.value.reason is Reason.STRUCTURE_MISMATCH


def test_float64_in_one_of_the_states_is_enough() -> None:
    low, wide = {"w": torch.ones(1)}, {"w": torch.ones(1, dtype=torch.float64) + 1e-12}
    for base, local in [(low, wide), (wide, low)]:
        update = update_of(base, local)
        assert update.deltas["w"].dtype == torch.float64
        assert abs(update.deltas["w"].item()) == pytest.approx(1e-12, rel=1e-3)
        assert given_back(update, ["w"])["w"].dtype == base["w"].dtype


def test_held_deltas_are_used_up() -> None:
    """What carries noise is as large as the model; it is not held twice."""
    held = torch.full((3,), 0.5)
    update = replace(
        update_of({"w": torch.zeros(3)}, {"w": torch.ones(3)}), deltas=Held({"w": held})
    )
    assert given_back(update, ["w"])["w"].data_ptr() == held.data_ptr()


def test_values_of_several_tensors_are_settled_each_in_its_own_dtype_and_rounding() -> None:
    """One run over two dtypes, and over tensors that carry noise beside one that does not."""
    kinds = {"plain": torch.float16, "noised": torch.float16, "wide": torch.float32}
    base = {name: torch.ones(2, dtype=kind) for name, kind in kinds.items()}
    update = update_of(base, {name: value + 1 for name, value in base.items()})
    assembly = update.assembly(list(base), noised=["noised", "wide"])
    step = torch.finfo(torch.float16).eps
    run = [Span(name, 0, 2) for name in base]
    assembly.put(run, torch.tensor([0.75 * step, 0.5] * 3, dtype=torch.float64))
    found = {name: value[0].item() - 1 for name, value in assembly.state().items()}
    assert found == {"plain": 0.0, "noised": step, "wide": 0.75 * step}
    assert all(value[1].item() == 1.5 for value in assembly.state().values())


def test_values_under_a_name_that_is_not_released_are_not_taken() -> None:
    base = {"w": torch.zeros(3), "stays": torch.zeros(3)}
    assembly = update_of(base, {name: torch.ones(3) for name in base}).assembly(["w"])
    with pytest.raises(KeyError):
        assembly.put([Span("stays", 0, 3)], torch.ones(3, dtype=torch.float64))
    assert torch.equal(assembly.state()["stays"], base["stays"])


@pytest.mark.parametrize("kind", ["weights", "delta"])
def test_where_nothing_is_released_the_global_model_goes_back(kind: str) -> None:
    base = {"w": torch.ones(3), "n": torch.tensor(4)}
    out = given_back(update_of(base, {"w": torch.zeros(3), "n": torch.tensor(9)}), [], kind=kind)
    times = 1 if kind == "weights" else 0
    assert all(torch.equal(out[name], value * times) for name, value in base.items())


def test_a_digest_of_odd_tensors_is_that_of_their_bytes() -> None:
    """NaN by its bits, no values, one value, values that lie elsewhere, and no tensor at all."""

    def digest(value: torch.Tensor) -> str:
        return model_digest({"w": value})

    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in NANS)
    assert digest(quiet) == digest(quiet.clone()) != digest(other)
    assert model_digest({}) == hashlib.sha256().hexdigest()
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(3, 0))
    assert digest(torch.tensor(1.0)) != digest(torch.ones(1))
    rows = torch.arange(6.0).view(2, 3)
    assert digest(rows.t()) == digest(rows.t().contiguous()) != digest(rows)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
