"""Transparent convolutions show a later layer the image, and per-client kernels keep sums apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.corpus import Net, Task
from sentinel.stress.layers import layer_inputs
from sentinel.stress.passive.tabular import EXACT, nearest
from sentinel.stress.servers.convolutions import client_columns, separated
from sentinel.stress.servers.raw import gradient_of, guesses, viewed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lenet() -> nn.Module:
    return nets.drawn(lambda: nets.lenet(256, 10), seeded(1))


def test_pass_through_lets_a_later_layer_see_the_image_itself() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    image = torch.rand(2, 1, 8, 8, generator=seeded())
    crafted = servers.pass_through(model, servers.copied(model.state_dict()))
    arrived = layer_inputs(model, crafted, image, "3")
    assert torch.equal(arrived[:, :64], image.flatten(1))
    rows = nets.mlp(13, 4, 1)
    with pytest.raises(MisuseError, match="convolution"):
        servers.pass_through(rows, rows.state_dict())


def test_loki_reads_each_client_out_of_the_sum_that_hides_it_from_other_attacks() -> None:
    """Three clients of eight; secure aggregation shows the server their sum alone."""
    model = lenet()
    state = servers.copied(model.state_dict())
    task = Task(Net("lenet", lenet, (1, 28, 28), 10), seeded(2))
    sample, _ = task.draw(512)
    batches = [task.draw(8) for _ in range(3)]
    sent = [
        servers.loki(model, state, generator=seeded(), client=client, clients=3, sample=sample)
        for client in range(3)
    ]
    found = [gradient_of(model, one, batch, "7") for one, batch in zip(sent, batches, strict=True)]
    total = {
        name: torch.stack([one.values[name] for one in found]).sum(0) for name in found[0].values
    }
    read = 0
    for client, (one, gradient) in enumerate(zip(sent, found, strict=True)):
        columns = client_columns(model, state, client, 3)
        rows = gradient.inputs[:, torch.cat(columns[1:])]
        seen = separated(viewed(model, one, total, "7"), columns)
        read += int((nearest(guesses(seen), rows) < EXACT).sum())
    assert read >= 0.6 * 24


def test_loki_writes_a_client_s_image_into_its_own_channels_and_no_others() -> None:
    model = lenet()
    state = servers.copied(model.state_dict())
    images = torch.rand(4, 1, 28, 28, generator=seeded(3))
    for client in range(3):
        crafted = servers.loki(model, state, generator=seeded(), client=client, clients=3)
        arrived = layer_inputs(model, crafted, images, "7")
        columns = client_columns(model, state, client, 3)
        mine = torch.cat(columns)
        others = torch.ones(400, dtype=torch.bool)
        others[mine] = False
        assert not arrived[:, others].any()
        assert (arrived[:, columns[0]] == 1).all()
        pooled = nn.functional.max_pool2d(images, 2)[:, :, 2:-2, 2:-2]
        shown = nn.functional.max_pool2d(pooled, 2).flatten(1)
        assert torch.allclose(arrived[:, columns[1]], 500 * shown, rtol=1e-5)


def test_loki_needs_two_channels_for_each_client_and_a_bias_for_the_constant() -> None:
    model = lenet()
    with pytest.raises(MisuseError, match="two channels of the narrowest convolution"):
        servers.loki(model, model.state_dict(), generator=seeded(), clients=4)
    bare = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 26 * 26, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    with pytest.raises(MisuseError, match="convolutions with a bias"):
        servers.loki(bare, bare.state_dict(), generator=seeded())
