"""A loop's own collate function: it cannot move a row to another patient, whatever it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sentinel import MisuseError, Withheld
from sentinel.dpsgd.collate import ByUnit, UnitCollate

from .test_training import IDS, Site

if TYPE_CHECKING:
    from collections.abc import Callable

UNITS = [[0, 1, 2], [3], [4, 5]]
BLANK = (torch.zeros(2), torch.tensor(0))


class Numbers(Dataset):
    """Record i is ((i, -i), i)."""

    def __len__(self) -> int:
        """Six."""
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One of them."""
        return torch.tensor([index, -index]).float(), torch.tensor(index)


class Quick(Numbers):
    """The same, many at a time."""

    def __getitems__(self, indices: list[int]) -> tuple[Any, ...]:
        """Those."""
        return tuple(self[index] for index in indices)


def collated(collate: Callable[[list[Any]], Any], data: Dataset | None = None) -> Any:
    """The batch of all six records, three units."""
    return UnitCollate(collate, BLANK)(ByUnit(data or Numbers()).__getitems__(UNITS))


@pytest.mark.parametrize("data", [Numbers(), Quick()])
def test_a_function_that_keeps_the_order_gives_the_batch_as_before(data) -> None:
    x, y = collated(default_collate, data)
    whole = default_collate([data[index] for index in range(6)])
    assert torch.equal(x, whole[0])
    assert torch.equal(y, whole[1])


def test_sorting_stays_within_a_unit() -> None:
    _, y = collated(lambda records: default_collate(sorted(records, key=lambda r: -int(r[1]))))
    assert y.tolist() == [2, 1, 0, 3, 5, 4]


def test_mixing_stays_within_a_unit() -> None:
    def mix(records: list[Any]) -> Any:
        x, y = default_collate(records)
        return (x + x.flip(0)) / 2, y

    x, _ = collated(mix)
    assert x[:, 0].tolist() == [1.0, 1.0, 1.0, 3.0, 4.5, 4.5]


def drop(records: list[Any]) -> Any:
    return default_collate([record for record in records if int(record[1]) != 1] or [BLANK])


def repeat(records: list[Any]) -> Any:
    return default_collate([*records, records[0]])


def pad_to_longest(records: list[Any]) -> Any:
    return [torch.zeros(len(records), len(records))]


@pytest.mark.parametrize(
    ("collate", "word"),
    [
        (drop, "weight 0"),
        (repeat, "every record"),
        (pad_to_longest, "fixed length"),
        (lambda records: torch.tensor(len(records)), "every record"),
        (lambda records: {"n": len(records)}, "differs from patient to patient"),
        (lambda records: records[0][0] if len(records) > 1 else [1], "another form"),
        (lambda records: {str(len(records)): torch.zeros(len(records))}, "another form"),
        (lambda records: [torch.zeros(len(records))] * len(records), "another form"),
        (lambda _: object(), "object"),
    ],
)
def test_what_cannot_be_told_apart_by_unit_is_refused(collate, word) -> None:
    with pytest.raises(MisuseError, match=word):
        collated(collate)


class Pair(NamedTuple):
    """A batch with names."""

    x: torch.Tensor
    names: list[str]


def test_every_usual_form_is_joined() -> None:
    def rich(records: list[Any]) -> Any:
        x, y = default_collate(records)
        names = [f"record {int(one)}" for one in y]
        return {"pair": Pair(x, names), "row": y.numpy(), "kind": "x-ray", "none": None}

    batch = collated(rich)
    assert batch["pair"].x[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["pair"].names == [f"record {index}" for index in range(6)]
    assert isinstance(batch["row"], np.ndarray)
    assert batch["row"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (batch["kind"], batch["none"]) == ("x-ray", None)


def test_no_unit_is_a_blank_record() -> None:
    x, y = UnitCollate(default_collate, BLANK)([])
    assert (x.tolist(), y.tolist()) == ([[0.0, 0.0]], [0])


def private(tmp_path, collate, workers: int = 0) -> Site:
    """A site with several records for each patient, and a collate function of its own."""
    site = Site(tmp_path, unit="patient")
    site.wrap(patients=IDS)
    made = DataLoader(site.data, batch_size=20, collate_fn=collate, num_workers=workers)
    site.optimizer.state.clear()
    site.training.remove()
    del site.guard._private[site.model]
    site.model, site.optimizer, site.loader = site.guard.private(
        site.model, site.optimizer, made, patients=IDS
    )
    return site


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sorting_function_trains_and_releases(tmp_path, workers) -> None:
    site = private(
        tmp_path, lambda r: default_collate(sorted(r, key=lambda one: float(one[0][0]))), workers
    )
    site.release(steps=2)
    assert site.events[0].steps == 2


def test_a_filtering_function_ends_the_round_without_a_release(tmp_path) -> None:
    def keep_old(records: list[Any]) -> Any:
        old = [record for record in records if float(record[0][0]) > 0]
        return default_collate(old or [(torch.zeros(13), torch.zeros(1))])

    site = private(tmp_path, keep_old)
    with pytest.raises(MisuseError, match="weight 0"), site.round():
        site.train(9)
    assert not site.events


def test_a_data_set_that_drops_records_is_refused(tmp_path) -> None:
    """By its own way of giving many at a time."""
    site = Site(tmp_path)
    data = site.data

    class Dropping(Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Any:
            return data[index]

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [data[index] for index in indices[1:]] or [data[0]]

    site.data = Dropping()
    site.wrap()
    with site.round() as rnd, pytest.raises(MisuseError, match="other rows than the records"):
        site.train(5)
    with pytest.raises(Withheld, match="not from private training alone"):
        rnd.release()
