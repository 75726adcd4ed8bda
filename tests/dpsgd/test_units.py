"""Grouping, sampling and the loader: who comes into a batch, and with which records."""

from __future__ import annotations

import uuid
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sentinel.dpsgd.loader import PrivateLoader, pieces
from sentinel.dpsgd.sampling import Rate, draw
from sentinel.dpsgd.units import Units
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from sentinel.dpsgd.loader import Piece

IDS = ["c", "a", "b", "a", "c", "a"]


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        np.array(IDS),
        [3, 1, 2, 1, 3, 1],
        np.array([3, 1, 2, 1, 3, 1]),
        torch.tensor([3, 1, 2, 1, 3, 1]),
        list(torch.tensor([3, 1, 2, 1, 3, 1])),
        [(x, 1) for x in IDS],
        [x.encode() for x in IDS],
        [uuid.UUID(int=ord(x)) for x in IDS],
        np.array(IDS, dtype=object),
    ],
    ids=lambda ids: f"{type(ids).__name__} of {type(ids[0]).__name__}",
)
def test_records_are_grouped_by_any_kind_of_id(ids) -> None:
    units = Units.grouped(ids, 6, cap=16)
    groups = [
        sorted(units.records[begin:end].tolist())
        for begin, end in zip(units.starts, units.starts[1:], strict=False)
    ]
    assert sorted(groups) == [[0, 4], [1, 3, 5], [2]]


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        ([1, 2], "lengths differ"),
        ([1, 2, None], "without an id"),
        ([1, 2, float("nan")], "without an id"),
        (["a", "b", ""], "without an id"),
        ("abc", "single text"),
        ({0: "a", 1: "a", 2: "b"}, r"\[ids\[i\] for i in range\(len\(dataset\)\)\]"),
        ({0: "a", 1: "a", 2: "b"}.keys(), "is a dict_keys"),
        ({0: "a", 1: "a", 2: "b"}.values(), "is a dict_values"),
        ({"a", "b", "c"}, "is a set"),
        ([[1], [2], [3]], "can be compared"),
        ([0.5, 1.5, 2.5], "decimal numbers and booleans are none"),
        ([1.0, 2.0, 3.0], "whole numbers or texts"),
        (list(torch.tensor([0.5, 1.5, 2.5])), "decimal numbers"),
        ([np.float32(0.1), np.float32(0.2), np.float32(0.1)], "decimal numbers"),
        ([1j, 2j, 1j], "can be compared"),
        ([True, False, True], "booleans are none"),
        (list(np.array([True, False, True])), "booleans are none"),
        (torch.tensor([True, False, True]), "whole numbers or texts"),
        ([b"a", b"b", b""], "without an id"),
        ([("a", 1), ("b", None), ("a", 1)], "without an id"),
        ([("a", 1.5), ("b", 2.5), ("a", 1.5)], "decimal numbers"),
        (list(torch.ones(3, 2)), "can be compared"),
        (list(np.ones((3, 2))), "can be compared"),
        ([object(), object(), object()], "can be compared"),
        ([71, "71", 72], "several types"),
        (["71", 71, 72], "several types"),
        ([b"71", "71", "72"], "several types"),
        ([("71", 1), (71, 1), (71, 1)], "several types"),
        ([71, Decimal(71), 72], "several types"),
        (np.array([71, "71", 72], dtype=object), "several types"),
        (np.zeros((3, 1)), "one-dimensional"),
        (np.array([0.5, 1.5, 2.5]), "whole numbers or texts"),
    ],
)
def test_ids_that_do_not_say_whose_a_record_is_are_refused(ids, word) -> None:
    with pytest.raises(MisuseError, match=word) as caught:
        Units.grouped(ids, 3, cap=16)
    assert "71" not in str(caught.value)


def test_whole_numbers_of_any_width_are_one_type() -> None:
    ids = [1, np.int64(1), np.uint8(1), torch.tensor(1), 2]
    assert len(Units.grouped(ids, 5, cap=16)) == 2


def test_an_id_is_in_no_message() -> None:
    with pytest.raises(MisuseError) as caught:
        Units.grouped(["patient-4711", "patient-4712"], 3, cap=16)
    assert "4711" not in str(caught.value)


def test_a_unit_comes_with_all_its_records_side_by_side(fixed_entropy) -> None:
    units = Units.grouped(IDS, 6, cap=16)
    drawn = units.take(np.array([0, 1]), fixed_entropy(1))
    assert drawn.records.tolist() == [0, 4, 1, 3, 5]
    assert drawn.slots.tolist() == [0, 0, 1, 1, 1]
    assert (drawn.units, drawn.left_out) == (2, 0)


def test_of_a_unit_above_the_cap_every_subset_is_as_likely(fixed_entropy) -> None:
    units = Units.grouped([0] * 4, 4, cap=2)
    entropy = fixed_entropy(2)
    seen = Counter(tuple(units.take(np.array([0]), entropy).records.tolist()) for _ in range(1200))
    assert len(seen) == 6
    assert all(150 < times < 255 for times in seen.values())  # 200 expected, 13 the deviation
    assert units.take(np.array([0]), entropy).left_out == 2


def test_every_unit_comes_in_by_a_coin_of_its_own(fixed_entropy) -> None:
    """Rates, and no more or less company than independent coins have."""
    units = Units.grouped([row // 3 for row in range(120)], 120, cap=3)
    rate, entropy = Rate(10, 50), fixed_entropy(3)
    draws = [draw(units, rate, entropy) for _ in range(2000)]
    sizes = np.array([one.units for one in draws])
    assert sizes.mean() == pytest.approx(40 * 0.2, abs=0.25)
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.15)  # a fixed size would have 0
    first = np.array([0 in one.records for one in draws])
    second = np.array([3 in one.records for one in draws])
    assert first.mean() == pytest.approx(0.2, abs=0.04)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.0, abs=0.09)
    assert np.corrcoef(first[1:], first[:-1])[0, 1] == pytest.approx(0.0, abs=0.09)


def test_the_rate_is_of_public_figures_and_not_of_how_many_there_are() -> None:
    rate = Rate(32, 12_000)
    assert rate.probability == 32 / 12_000
    assert rate.steps == 375
    assert (rate.sampling, Rate(5, 5).sampling) == ("poisson", "none")


def test_a_full_batch_holds_every_unit(fixed_entropy) -> None:
    drawn = draw(Units.single(7), Rate(5, 5), fixed_entropy(4))
    assert drawn.records.tolist() == list(range(7))


def test_nobody_gives_an_empty_batch(fixed_entropy) -> None:
    drawn = draw(Units.single(0), Rate(1, 5), fixed_entropy(4))
    assert (drawn.units, drawn.records.tolist()) == (0, [])


def test_pieces_hold_whole_units_and_all_of_them(fixed_entropy) -> None:
    units = Units.grouped([row // 3 for row in range(30)], 30, cap=3)
    drawn = units.take(np.arange(10), fixed_entropy(5))
    parts = pieces(drawn, 8)
    assert [len(part.records) for part in parts] == [6, 6, 6, 6, 6]
    assert [part.last for part in parts] == [False] * 4 + [True]
    assert [record for part in parts for record in part.records] == drawn.records.tolist()
    assert all(part.rows.tolist() == [0, 0, 0, 1, 1, 1] for part in parts)
    assert [len(part.records) for part in pieces(drawn, None)] == [30]


class Picture(NamedTuple):
    """A record with names."""

    pixels: torch.Tensor
    label: int


class Pictures(Dataset):
    """Records in a dict, with everything that a record may hold."""

    def __len__(self) -> int:
        """Four."""
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of them."""
        return {
            "picture": Picture(torch.full((2, 2), 1.0 + index), index),
            "weight": np.float32(index + 0.5),
            "who": f"patient {index}",
            "row": np.ones(3) * index,
        }


def loader(
    data: Any, rate: Rate, units: Units, entropy: Any, seen: list[Piece], **options: Any
) -> PrivateLoader:
    return PrivateLoader(
        DataLoader(data, batch_size=2, **options),
        units,
        rate,
        entropy,
        most=None,
        on_epoch=lambda _: None,
        on_piece=lambda piece, _: seen.append(piece),
    )


def test_an_epoch_has_as_many_batches_as_the_public_figures_say(fixed_entropy) -> None:
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40))
    seen: list[Piece] = []
    made = loader(data, Rate(8, 50), Units.single(40), fixed_entropy(6), seen)
    batches = list(made)
    assert len(batches) == len(made) == 6
    for piece, (x, y) in zip(seen, batches, strict=True):
        assert y.tolist() == piece.records
        assert x[:, 0].tolist() == piece.records
    assert made.dataset is data


@pytest.mark.parametrize("workers", [0, 2])
def test_records_are_collated_as_the_loops_own_loader_does(fixed_entropy, workers) -> None:
    seen: list[Piece] = []
    made = loader(
        Pictures(), Rate(2, 4), Units.single(4), fixed_entropy(7), seen, num_workers=workers
    )
    for _ in range(4):
        for batch in made:
            records = seen[-1].records
            assert batch["picture"].label.tolist() == (records or [0])
            assert batch["picture"].pixels[:, 0, 0].tolist() == ([r + 1.0 for r in records] or [0])
            assert batch["who"] == ([f"patient {record}" for record in records] or [""])
    assert len({len(piece.records) for piece in seen}) > 1


def test_an_empty_batch_comes_as_a_blank_record(fixed_entropy) -> None:
    seen: list[Piece] = []
    made = loader(Pictures(), Rate(1, 4), Units.single(0), fixed_entropy(8), seen)
    batch = next(iter(made))
    assert not batch["picture"].pixels.any()
    assert (batch["picture"].label.tolist(), batch["who"]) == ([0], [""])
    assert not batch["row"].any()
    assert seen[0].rows.tolist() == [-1]


def test_a_record_that_cannot_be_blanked_is_refused(fixed_entropy) -> None:
    class Odd(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> object:
            return object()

    with pytest.raises(MisuseError, match="Convert the records"):
        loader(Odd(), Rate(1, 1), Units.single(1), fixed_entropy(9), [])
