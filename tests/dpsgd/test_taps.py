"""What goes through the model: every row of the batch, each at its place, and back again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sentinel import MisuseError
from sentinel.dpsgd.layers import require_along_records, require_separate
from sentinel.dpsgd.taps import OpenBatch

from .test_training import IDS, Site, layered, withheld

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


def patients(tmp_path: Path) -> Site:
    """A site with three records for each patient."""
    site = Site(tmp_path, unit="patient")
    site.wrap(patients=IDS)
    return site


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(x), y)


ODD: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: x[:1], "Not every record"),
    (lambda x: x[:-1], "Not every record"),
    (lambda x: x[torch.arange(len(x)) % 5 != 0], "another order|Not every record"),
    (lambda x: x[1:].clone() * 2, "Not every record"),
    (lambda x: x.flip(0), "another order"),
    (lambda x: x[torch.arange(len(x)).roll(1)], "another order"),
    (lambda x: x[torch.zeros(len(x), dtype=torch.long)], "some twice"),
    (lambda x: torch.cat([x, x[:1]]), "other records"),
]


@pytest.mark.parametrize(("change", "word"), ODD)
def test_rows_that_are_dropped_repeated_or_moved_are_withheld(tmp_path, change, word) -> None:
    """A patient's clip counts on each row being at its place."""
    site = patients(tmp_path)
    with pytest.raises(MisuseError, match=word), site.round():  # noqa: PT012 - a loop fails in it
        for x, y in site.loader:
            if len(x) > 2:
                loss_of(site.model, change(x), change(y)).backward()
                site.optimizer.step()
            else:
                site.step(x, y)
    assert not site.events


def test_a_step_on_part_of_a_batch_is_withheld_though_the_loop_swallows_the_error(tmp_path) -> None:
    site = patients(tmp_path)
    with site.round() as rnd:
        for x, y in site.loader:
            loss_of(site.model, x[:2], y[:2]).backward()
            with pytest.raises(MisuseError, match="weight 0"):
                site.optimizer.step()
            break
    withheld(site, rnd)


def test_a_batch_that_is_not_run_at_all_is_withheld(tmp_path) -> None:
    """To leave it out by its content would be a choice by the data."""
    site = patients(tmp_path)
    with site.round() as rnd:
        for _ in site.loader:
            with pytest.raises(MisuseError, match="Not every record"):
                site.optimizer.step()
            break
    withheld(site, rnd)


def test_a_part_without_a_backward_pass_is_withheld(tmp_path) -> None:
    site = patients(tmp_path)
    with site.round() as rnd:
        for x, y in site.loader:
            loss_of(site.model, x[:2], y[:2]).backward()
            loss_of(site.model, x[2:], y[2:])
            with pytest.raises(MisuseError, match="no backward pass"):
                site.optimizer.step()
            break
    withheld(site, rnd)


def test_a_label_that_is_missing_counts_by_weight_0_as_the_error_says(tmp_path) -> None:
    site = patients(tmp_path)
    x, y = (tensor.clone() for tensor in site.data.tensors)
    y[::4] = float("nan")
    site.data = TensorDataset(x, y)
    site.wrap(site.model, patients=IDS)
    with site.round() as rnd:
        for x, y in site.loader:
            lost = nn.functional.binary_cross_entropy_with_logits(
                site.model(x), y.nan_to_num(), reduction="none"
            )
            (lost * ~y.isnan()).mean().backward()
            site.optimizer.step()
    rnd.release()
    assert site.events[0].steps == len(site.loader)
    assert site.training.not_finite == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 0.01 * torch.randn(x.shape),
        lambda x: x.clone(),
        lambda x: x.double().float(),
        lambda x: x.mul_(2.0),
    ],
)
def test_rows_that_the_loop_changes_or_copies_in_their_order_pass(tmp_path, change) -> None:
    site = patients(tmp_path)
    with site.round() as rnd:
        for x, y in site.loader:
            loss_of(site.model, change(x), y).backward()
            site.optimizer.step()
    rnd.release()
    assert site.events[0].steps == len(site.loader)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_another_order_is_seen_whatever_the_rows_are_made_of(dtype) -> None:
    rows = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    with pytest.raises(MisuseError, match="another order"):
        OpenBatch(1, 3, (rows,)).call(rows[[2, 0, 1]])
    second = OpenBatch(1, 3, (rows,))
    second.call(rows[:1].clone())
    with pytest.raises(MisuseError, match="another order"):
        second.call(rows[[2, 1]])


def test_rows_with_nan_in_their_order_pass() -> None:
    rows = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    assert OpenBatch(1, 2, (rows,)).call(rows.clone()).rows == 2


class Reshaped(nn.Module):
    """Drops a dimension, so that dimension -2 is the records."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.mix = nn.Softmax(dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.mix(x)


@pytest.mark.parametrize("layer", [nn.Softmax(dim=-2), nn.Flatten(-2), nn.GLU(-2), Reshaped()])
def test_a_layer_that_works_along_the_records_is_refused_when_it_runs(tmp_path, layer) -> None:
    site = Site(tmp_path)
    site.wrap(layered(layer))
    with pytest.raises(MisuseError, match="dimension 0"), site.round():
        site.train(3)


class Named(nn.Softmax):
    """A softmax under another name."""


def test_a_subclass_works_along_what_its_parent_does(tmp_path) -> None:
    site = Site(tmp_path)
    with pytest.raises(MisuseError, match="dimension 0"):
        site.wrap(layered(Named(dim=0)))


def test_layers_that_compare_or_weigh_along_the_records_are_refused() -> None:
    with pytest.raises(MisuseError, match="dimension 0"):
        require_along_records(nn.Softmax2d(), 3)  # takes one picture, channels first
    require_along_records(nn.Softmax2d(), 4)
    with pytest.raises(MisuseError, match="dimension 0"):
        require_separate("similar", nn.CosineSimilarity(dim=0))
    attention = nn.MultiheadAttention(4, 2).requires_grad_(requires_grad=False)
    with pytest.raises(MisuseError, match="batch_first"):
        require_separate("attention", attention)
    require_separate("attention", nn.MultiheadAttention(4, 2, batch_first=True))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_of_somebody_else_is_refused(tmp_path, kind, late) -> None:
    """It might take the batch's mean off each record, or another factor into each gradient."""
    site, model = Site(tmp_path), layered(nn.ReLU())

    def hook(*_: object) -> None:
        """Do what it likes."""

    def add() -> None:
        getattr(model[0], f"register_{kind}_hook")(hook)

    if not late:
        add()
        with pytest.raises(MisuseError, match="has a hook"):
            site.wrap(model)
        return
    site.wrap(model)

    def train() -> None:
        add()
        site.train(1)

    with site.round(), pytest.raises(MisuseError, match="has a hook"):
        train()


def test_a_softmax_without_a_dimension_is_refused_where_torch_takes_the_records() -> None:
    unnamed = nn.Softmax()
    with pytest.raises(MisuseError, match="dimension 0"):
        require_along_records(unnamed, 3)
    require_along_records(unnamed, 2)


@pytest.mark.parametrize("layer", [nn.Softmax(dim=-1), nn.Flatten(), nn.LogSoftmax(dim=1)])
def test_layers_that_work_along_features_pass(tmp_path, layer) -> None:
    site = Site(tmp_path)
    site.wrap(layered(layer))
    site.release(steps=1)
    assert site.events


def interrupted(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_a_forward_pass_that_is_interrupted_leaves_the_model_whole(tmp_path) -> None:
    """Ctrl-C reaches no hook of torch: what stood aside is put back all the same."""
    site = Site(tmp_path)
    site.wrap()
    weight = site.model[0].weight
    site.model[0].forward = interrupted
    with pytest.raises(KeyboardInterrupt), site.round():
        site.train(1)
    del site.model[0].forward
    assert site.model[0].weight is weight
    assert len(list(site.model.parameters())) == 4
    site.release(steps=2)
    assert site.events[0].steps == 2


def test_an_interrupted_pass_that_the_loop_catches_can_be_run_again(tmp_path) -> None:
    """Also released as it is: what was done before stays done."""
    site = Site(tmp_path)
    site.wrap()
    weight = site.model[0].weight
    with site.round() as rnd:
        site.train(1)
        site.model[0].forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            site.train(1)
        del site.model[0].forward
    rnd.release()
    assert site.model[0].weight is weight
    assert site.events[0].steps == 1
