"""The layers an attack needs are found by type, and a model without them is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sentinel.errors import MisuseError
from sentinel.stress import layers, nets

SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lenet() -> nn.Module:
    return nets.drawn(lambda: nets.lenet(32, 3), seeded())


def test_linear_layers_inside_an_attention_are_not_attacked() -> None:
    """No activation follows them, so none of their neurons is ever silent."""
    model = nets.TextTransformer(3, width=16, hidden=32, depth=2)
    assert layers.linear_layers(model, model.state_dict()) == [
        "blocks.0.feed.0",
        "blocks.0.feed.2",
        "blocks.1.feed.0",
        "blocks.1.feed.2",
        "head",
    ]
    assert layers.attention_layers(model) == ["blocks.0.attention", "blocks.1.attention"]


def test_a_pair_is_the_first_layer_and_the_first_later_one_of_its_width() -> None:
    model = lenet()
    assert layers.attacked_pair(model, model.state_dict()) == ("7", "9")
    assert layers.has_pair(model, model.state_dict())
    alone = nets.resnet18(3, 8)
    assert not layers.has_pair(alone, alone.state_dict())
    with pytest.raises(MisuseError, match="two fully connected layers in a row"):
        layers.attacked_pair(alone, alone.state_dict())


def test_the_last_normalisation_before_the_head_is_found_where_there_is_one() -> None:
    for norm in (nets.batch_norm, nets.group_norm):
        model = nets.resnet18(3, 8, norm=norm)
        assert layers.last_norm(model, model.state_dict(), 64) == "11.bn2"
    assert layers.last_norm(lenet(), lenet().state_dict(), 32) is None


def test_layer_inputs_leaves_the_model_and_its_mode_alone() -> None:
    model = lenet().train()
    before = layers.copied(model.state_dict())
    inputs = layers.layer_inputs(model, before, torch.rand(3, 1, 28, 28, generator=seeded()), "7")
    assert inputs.shape == (3, 400)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_submodule("7")._forward_pre_hooks


def test_a_layer_that_no_forward_pass_reaches_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(13, 4), nn.Linear(13, 4)

        def forward(self, rows: Tensor) -> Tensor:
            return self.used(rows)

    model = Idle()
    with pytest.raises(MisuseError, match="not reached"):
        layers.layer_inputs(model, model.state_dict(), SAMPLE, "idle")
