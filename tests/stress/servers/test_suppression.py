"""Dead models for the others leave one client alone in the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import measure_sum
from sentinel.stress.servers.raw import gradient_of

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))
IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(4))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_suppression_leaves_nothing_of_this_client_but_the_spared_rows() -> None:
    model = nets.drawn(lambda: nets.mlp(13, 100, 1), seeded(1))
    state = servers.copied(model.state_dict())
    labels = torch.arange(40) % 2
    for spared, expected in ((0.0, 0), (0.1, 10)):
        crafted = servers.suppression(model, state, generator=seeded(), spared=spared)
        gradient = gradient_of(model, crafted, (SAMPLE, labels), "0").values["0.weight"]
        assert int((gradient.norm(dim=1) > 0).sum()) == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: nets.resnet18(3, 8),
        lambda: nets.resnet18(3, 8, norm=nets.group_norm),
        lambda: nets.densenet121(3, 4),
    ],
    ids=["resnet18-bn", "resnet18-gn", "densenet121"],
)
def test_without_two_dense_layers_the_last_normalisation_is_killed(
    build: Callable[[], nn.Module],
) -> None:
    model = nets.drawn(build, seeded(1))
    crafted = servers.suppression(model, model.state_dict(), generator=seeded())
    changed = [name for name, value in model.state_dict().items() if not value.equal(crafted[name])]
    assert len(changed) == 1
    last = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    values = gradient_of(model, crafted, (IMAGES, torch.arange(6) % 3), last).values
    assert not any(value.any() for name, value in values.items() if name != f"{last}.bias")


def test_in_a_sum_of_four_one_client_is_read_as_if_it_were_alone() -> None:
    model = nets.drawn(lambda: nets.mlp(13, 64, 1), seeded(1))
    state = servers.copied(model.state_dict())
    dead = servers.suppression(model, state, generator=seeded())
    batches = [
        (torch.randn(8, 13, generator=seeded(seed)), torch.arange(8) % 2) for seed in range(4)
    ]
    leak = measure_sum(model, state, state, dead, batches)
    alone = measure_sum(model, state, state, dead, batches[:1])
    assert leak.effective == pytest.approx(1.0)
    assert leak.alike == pytest.approx(1.0)
    assert leak.honest_effective > 3
    assert leak.read == alone.read > leak.honest_read


def test_a_net_without_a_layer_that_can_die_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
    with pytest.raises(MisuseError, match="batch or group normalisation"):
        servers.suppression(model, model.state_dict(), generator=seeded())
