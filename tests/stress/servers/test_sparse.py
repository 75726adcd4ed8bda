"""Under sparse activation each neuron fires for few records, so that some fire alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Module:
    return nets.drawn(lambda: nets.mlp(*widths), seeded(sum(widths)))


def test_trap_weights_fire_for_fewer_records_than_an_honest_layer_does() -> None:
    model = mlp(200, 100, 1)
    state = servers.copied(model.state_dict())
    rows = torch.rand(64, 200, generator=seeded(1))  # as pixels: from 0 to 1
    crafted = servers.trap_weights(model, state, generator=seeded())
    fired = (rows @ crafted["0.weight"].T + crafted["0.bias"] > 0).float().mean()
    honest = (rows @ state["0.weight"].T + state["0.bias"] > 0).float().mean()
    negative = crafted["0.weight"].clamp(max=0).sum(1)
    positive = crafted["0.weight"].clamp(min=0).sum(1)
    assert torch.allclose(positive, -0.95 * negative, rtol=1e-4)
    assert fired < 0.6 * honest


def test_a_smaller_positive_half_fires_for_fewer_records() -> None:
    model = mlp(200, 100, 1)
    rows = torch.rand(64, 200, generator=seeded(1))
    fired = []
    for shrink in (0.99, 0.95, 0.8):
        crafted = servers.trap_weights(model, model.state_dict(), generator=seeded(), shrink=shrink)
        fired.append(float((rows @ crafted["0.weight"].T > 0).float().mean()))
    assert fired[0] > fired[1] > fired[2]


def test_trap_weights_with_a_sample_fire_for_about_one_record_of_a_batch_each() -> None:
    model = mlp(200, 100, 1)
    rows = torch.rand(3000, 200, generator=seeded(1))
    sent = servers.trap_weights(
        model, model.state_dict(), generator=seeded(), sample=rows[:2000], batch=16
    )
    fired = 16 * (rows[2000:] @ sent["0.weight"].T > 0).float().mean(0)
    assert fired.mean() == pytest.approx(1.0, rel=0.2)
    assert fired.min() > 0.2
    assert fired.max() < 3
    with pytest.raises(MisuseError, match="at least one batch of 16 rows"):
        servers.trap_weights(
            model, model.state_dict(), generator=seeded(), sample=rows[:15], batch=16
        )


def test_on_columns_around_zero_no_shape_of_a_row_makes_it_fire_for_few() -> None:
    """Without a bias the plane passes through the middle of the records: why traps fail there."""
    model = mlp(50, 200, 1)
    rows = torch.randn(2000, 50, generator=seeded(1))
    sent = servers.trap_weights(
        model, model.state_dict(), generator=seeded(), sample=rows, batch=16
    )
    fired = (rows @ sent["0.weight"].T > 0).float().mean(0)
    assert fired.min() > 0.4


@pytest.mark.parametrize("batch", [8, 64])
def test_qbi_rows_fire_for_about_one_record_of_a_batch(batch: int) -> None:
    model = mlp(50, 500, 1)
    crafted = servers.qbi(
        model, servers.copied(model.state_dict()), generator=seeded(), batch=batch
    )
    rows = torch.randn(2000, 50, generator=seeded(1))
    fired = (rows @ crafted["0.weight"].T + crafted["0.bias"] > 0).float().mean()
    assert fired * batch == pytest.approx(1.0, rel=0.2)


def test_qbi_with_a_sample_fires_for_one_of_a_batch_on_inputs_that_nobody_standardised() -> None:
    model = mlp(50, 500, 1)
    rows = torch.rand(3000, 50, generator=seeded(1)) ** 4
    fired = []
    for sample in (None, rows[:2000]):
        crafted = servers.qbi(
            model, model.state_dict(), generator=seeded(), batch=16, sample=sample
        )
        active = rows[2000:] @ crafted["0.weight"].T + crafted["0.bias"] > 0
        fired.append(16 * float(active.float().mean()))
    assert fired[0] < 0.2
    assert fired[1] == pytest.approx(1.0, rel=0.2)


def test_qbi_refuses_a_batch_of_one() -> None:
    model = mlp(13, 32, 1)
    with pytest.raises(MisuseError, match="at least 2 records"):
        servers.qbi(model, servers.copied(model.state_dict()), generator=seeded(), batch=1)


@pytest.mark.parametrize("craft", [servers.qbi, servers.trap_weights])
def test_a_last_layer_has_no_neurons_that_fire_and_is_refused(craft: servers.Craft) -> None:
    model = nets.resnet18(3, 8)
    with pytest.raises(MisuseError, match="two fully connected layers in a row"):
        craft(model, model.state_dict(), generator=seeded())
