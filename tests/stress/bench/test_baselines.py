"""Each baseline catches what it was made for."""

from __future__ import annotations

import pytest
import torch

from sentinel.stress import servers
from sentinel.stress.bench.baselines import (
    BASELINES,
    CEILING,
    baselines,
    d_snr,
    duplicate_rows,
    effective_rank,
    t_snr,
)
from sentinel.stress.bench.crafted import ground_of
from sentinel.stress.bench.nets import net
from sentinel.stress.layers import loaded
from sentinel.stress.nets import lenet, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(1.0)
    assert effective_rank(torch.ones(6, 8)) == pytest.approx(1 / 6, abs=1e-6)


def test_duplicate_rows_of_known_matrices() -> None:
    assert duplicate_rows(torch.eye(5)) == 0.0
    rows = torch.cat([torch.eye(5), 2 * torch.eye(5)[:1]])
    assert duplicate_rows(rows) == pytest.approx(2 / 6)


def test_d_snr_is_the_largest_record_by_the_sum_of_the_others() -> None:
    """One linear layer, squared error: gradients are proportional to the records' sizes."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    records = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]])
    labels = torch.zeros(3, dtype=torch.long)
    assert d_snr(model, records, labels) == pytest.approx(9 / 5)


def test_t_snr_of_a_kernel_that_passes_one_pixel() -> None:
    model = lenet(16, 4)
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].weight[0, 0, 2, 2] = 1.0
        model[0].weight[0, 0, 0, 0] = 0.01
    assert t_snr(model) == pytest.approx(100.0)
    assert 0.0 < t_snr(mlp(8, 16, 2)) < 1.0


def test_fishing_shows_in_d_snr_and_binning_in_its_rows() -> None:
    where = ground_of(net("mlp-20-96-3"), 2, 5)
    records, labels = where.site.draw(64)
    aimed_at = (labels == 0).nonzero()[:1, 0]
    chosen = torch.cat([aimed_at, (labels != 0).nonzero()[:7, 0]])  # one record of the class
    batch = records[chosen], labels[chosen]

    def scores(name: str) -> dict[str, float]:
        craft = servers.recipe(name).craft(where.elsewhere)
        state = craft(where.module, where.honest, generator=seeded())
        return baselines(where.module, where.net, state, batch, seeded())

    honest = baselines(where.module, where.net, where.honest, batch, seeded())
    assert tuple(honest) == BASELINES
    assert honest["duplicate rows"] == 0.0
    binned = scores("binning-mean")
    assert binned["duplicate rows"] > 0.9
    assert binned["effective rank"] > honest["effective rank"]
    assert scores("fishing-class")["D-SNR, true records"] > 5 * honest["D-SNR, true records"]


def test_what_is_not_finite_is_the_ceiling() -> None:
    where = ground_of(net("mlp-8-32-2"), 0, 5)
    state = {name: value * 1e30 for name, value in where.honest.items()}
    scores = baselines(where.module, where.net, state, where.site.draw(8), seeded())
    assert all(0.0 <= value <= CEILING for value in scores.values())


def test_the_model_is_not_touched() -> None:
    where = ground_of(net("mlp-8-32-2"), 0, 5)
    before = {name: value.clone() for name, value in where.module.state_dict().items()}
    twin = loaded(where.module, where.honest)
    baselines(where.module, where.net, where.honest, where.site.draw(8), seeded())
    assert all(value.equal(before[name]) for name, value in where.module.state_dict().items())
    assert all(value.grad is None for value in twin.parameters())
