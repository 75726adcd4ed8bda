"""Pictures and rows come out of one update together, and each half helps or does not: measured."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel import Guard
from sentinel.demo import cohorts, xray_data
from sentinel.demo.xray_hospital import initialise
from sentinel.stress.passive.columns import Recovery, Table, recovery
from sentinel.stress.passive.joint import (
    JointSearch,
    Known,
    Pair,
    TwoBranches,
    recover,
    together,
)
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.released import let_out
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("known_noise", "one_thread")
COHORT = cohorts.load("cleveland")
PICTURES = xray_data.load()
QUICK = JointSearch(iterations=150, total_variation=5e-3, hardness=())


class _Round:
    """Chest X-rays, each paired at random with a row of the heart table: no patient has both."""

    def __init__(self, patients: int, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(COHORT), generator=self.draw)
        shown = torch.randperm(len(PICTURES.hospital.labels), generator=self.draw)[:patients]
        self.pair = Pair(PICTURES.hospital.images[shown], COHORT.rows[order[:patients]])
        labels = PICTURES.hospital.labels[shown]
        self.table = Table.learnt(COHORT.rows[order[100:200]])
        self.others = COHORT.rows[order[200:]]
        net = TwoBranches(COHORT.rows.shape[1])
        initialise(net, self.draw)
        start = {name: value.clone() for name, value in net.state_dict().items()}
        whole = (torch.arange(patients),)
        self.training = together(LocalTraining(net, start, labels, whole, 1.0), 28)
        classes = torch.stack([PICTURES.public.of_class(label).mean(0) for label in (0, 1)])
        self.mean = classes[labels]

    @property
    def raw(self) -> Tensor:
        return self.training.update(self.pair.packed(), differentiable=False)

    def noised(self, ratio: float) -> Seen:
        std = ratio * float(self.raw.norm()) / math.sqrt(self.raw.numel())
        return Seen(
            self.raw + std * torch.randn(self.raw.shape, generator=self.draw), noise_std=std
        )

    def attacked(
        self, seen: Seen, search: JointSearch = QUICK, known: Known | None = None
    ) -> tuple[float, Recovery]:
        """SSIM of the pictures, and what of the rows is right."""
        given = Known() if known is None else known
        draw = torch.Generator().manual_seed(1)  # the same start, whatever is known
        found = recover(self.training, seen, self.table, 28, search, draw, given)
        alike = float(ssim(found.pictures, self.pair.pictures).mean())
        return alike, recovery(found.rows, self.pair.rows, self.others, self.table)


def test_the_packed_net_answers_as_the_net_of_two_inputs() -> None:
    one = _Round(3, 0)
    net = one.training.model
    apart = net(one.pair.pictures, one.pair.rows)
    packed = one.training.forward(net, dict(net.named_parameters()), one.pair.packed())
    assert torch.allclose(apart, packed, atol=1e-6)


@pytest.mark.slow
def test_a_raw_gradient_gives_picture_and_row_away_together() -> None:
    """The rows of three patients, and of two a picture nearer than the mean of its class."""
    rounds = [_Round(1, seed) for seed in (0, 1, 2)]
    search = JointSearch(iterations=300, hardness=())
    found = [one.attacked(Seen(one.raw), search) for one in rounds]
    means = [float(ssim(one.mean, one.pair.pictures).mean()) for one in rounds]
    rows = found[0][1] + found[1][1] + found[2][1]
    assert rows.accuracy >= 0.9
    assert rows.accuracy > rows.accuracy_by_marginals + 0.3
    assert sum(alike > mean for (alike, _), mean in zip(found, means, strict=True)) >= 2


@pytest.mark.slow
def test_the_row_helps_the_picture() -> None:
    """Given the row, the same search finds better pictures than without it."""
    alone = helped = 0.0
    for seed in (0, 1, 2):
        one = _Round(1, seed)
        alone += one.attacked(Seen(one.raw))[0] / 3
        helped += one.attacked(Seen(one.raw), known=Known(rows=one.pair.rows))[0] / 3
    assert helped >= alone


def test_a_half_that_is_known_stays_as_it_is() -> None:
    one = _Round(2, 4)
    short = JointSearch(iterations=3, hardness=())
    draw = torch.Generator().manual_seed(0)
    for known in (Known(rows=one.pair.rows), Known(pictures=one.pair.pictures)):
        found = recover(one.training, Seen(one.raw), one.table, 28, short, draw, known)
        assert (found.rows is known.rows) == (known.rows is not None)
        assert torch.equal(found.pictures, one.pair.pictures) == (known.pictures is not None)


def test_the_shipped_policy_leaves_neither_picture_nor_row(tmp_path: Path) -> None:
    """Searched in small steps from the public mean of each class, which no noise takes away."""
    one = _Round(32, 5)
    guard = Guard("chest-xray", tmp_path, unsafe_skip_inspection=True, alerts=io.StringIO())
    seen = let_out(guard, 1, one.training, one.pair.packed(), patients=32)
    assert seen.noise_std > 0.0
    search = JointSearch(40, pixel_step=0.005, total_variation=0.3, smoothing=1.0, hardness=())
    alike, rows = one.attacked(seen, search, Known(start=one.mean))
    mean = float(ssim(one.mean, one.pair.pictures).mean())
    assert mean - 0.15 <= alike <= mean + 0.02
    assert rows.rows.hits == 0
    assert rows.over_others.high <= 0.12  # 32 rows can say no more
    assert rows.accuracy <= rows.accuracy_of_others + 0.05
