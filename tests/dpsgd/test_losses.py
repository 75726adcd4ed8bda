"""Losses that make one record's part depend on the others are refused where they can be seen."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sentinel import MisuseError

from .conftest import Clipper
from .test_training import Site, withheld

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WEIGHTS = torch.tensor([0.5, 1.0, 50.0])


def classes(tmp_path) -> Site:
    """A site with three classes, some of them unknown (-100)."""
    site = Site(tmp_path)
    x, y = site.data.tensors
    site.data = TensorDataset(x, (y[:, 0] * 2).long())
    torch.manual_seed(0)
    site.wrap(nn.Linear(13, 3))
    return site


def train(site: Site, loss_of: nn.Module, spoil: int | None = None) -> None:
    for x, y in site.loader:
        site.optimizer.zero_grad()
        if spoil is not None:
            y[0] = spoil
        loss_of(site.model(x), y).backward()
        site.optimizer.step()


class Logs(nn.Module):
    """NLLLoss of logits."""

    def __init__(self, loss: nn.Module) -> None:
        """Keep it."""
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return self.loss(logits.log_softmax(1), target=target)


@pytest.mark.parametrize(
    ("loss", "spoil"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHTS), None),
        (nn.CrossEntropyLoss(), -100),
        (Logs(nn.NLLLoss(weight=WEIGHTS)), None),
        (Logs(nn.NLLLoss(ignore_index=1)), 1),
    ],
)
def test_a_mean_over_weights_or_over_targets_that_count_is_refused(tmp_path, loss, spoil) -> None:
    site = classes(tmp_path)
    with site.round() as rnd, pytest.raises(MisuseError, match='reduction="none"'):
        train(site, loss, spoil)
    withheld(site, rnd)


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), nn.L1Loss(reduction="sum"), nn.HuberLoss(), nn.SmoothL1Loss(reduction="none")],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.filterwarnings("ignore:Using a target size")  # torch warns, and goes on
def test_a_loss_that_compares_everybody_with_everybody_is_refused(tmp_path, loss, named) -> None:
    site = Site(tmp_path)
    site.wrap()

    def lost(output: Tensor, target: Tensor) -> Tensor:
        flat = target.squeeze(1)  # (records,) beside (records, 1)
        return loss(input=output, target=flat) if named else loss(output, flat)

    def train_by() -> None:
        for x, y in site.loader:
            lost(site.model(x), y).mean().backward()
            site.optimizer.step()

    with site.round() as rnd, pytest.raises(MisuseError, match="everybody's target"):
        train_by()
    withheld(site, rnd)


def test_a_loss_by_value_with_targets_of_its_shape_passes(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap()
    with site.round() as rnd:
        for x, y in site.loader:
            nn.MSELoss()(site.model(x), y).backward()
            site.optimizer.step()
    rnd.release()
    assert len(site.events) == 1


def test_what_the_error_says_to_write_keeps_the_bound() -> None:
    """By brute force: one record of a heavy class moves the sum by no more than C."""
    torch.manual_seed(0)
    model, rows = nn.Linear(8, 3), 0.3 * torch.randn(33, 8)
    targets = torch.zeros(33, dtype=torch.long)
    targets[32] = 2
    clipper = Clipper(batch=32)

    def moved(loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
        sums = [
            clipper.sum(
                model, rows[:n], list(range(n)), loss=lambda o: loss_of(o, targets[: len(o)])
            ).values
            for n in (32, 33)
        ]
        return float((sums[1] - sums[0]).norm())

    def each(output: Tensor, target: Tensor) -> Tensor:
        lost = nn.functional.cross_entropy(output, target, reduction="none")
        return (WEIGHTS[target] * lost).mean()

    assert moved(each) <= 1.0
    assert moved(nn.CrossEntropyLoss(weight=WEIGHTS)) > 10.0  # why it is refused


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1),
    ],
)
def test_losses_that_are_plain_means_pass(tmp_path, loss) -> None:
    site = classes(tmp_path)
    with site.round() as rnd:
        train(site, loss)
    rnd.release()
    assert len(site.events) == 1


def test_no_loss_is_looked_at_outside_of_an_open_batch(tmp_path) -> None:
    """The hook that torch has for every module is taken off again, whatever way the round ends."""
    site = classes(tmp_path)
    gc.collect()  # what other tests left in the midst of a batch takes its hook along
    hooks = nn.modules.module._global_forward_hooks
    before = len(hooks)
    loss = nn.CrossEntropyLoss(weight=WEIGHTS)
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with site.round() as rnd:
        train(site, nn.CrossEntropyLoss())
        assert len(hooks) == before
        loss(logits, target)
    rnd.release()
    with pytest.raises(RuntimeError, match="stop"), site.round():  # noqa: PT012 - a loop fails in it
        for _ in site.loader:
            assert len(hooks) == before + 1
            with torch.no_grad():
                loss(logits, target)
            raise RuntimeError("stop")
    assert len(hooks) == before
    del rnd
