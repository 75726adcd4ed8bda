"""Transformer traps read single tokens out of a batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.layers import layer_inputs
from sentinel.stress.servers import measure

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGES = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randint(200, (300, 16), generator=torch.Generator().manual_seed(1))
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "vit": (lambda: nets.VisionTransformer(3, width=32, depth=2), IMAGES),
    "text": (lambda: nets.TextTransformer(3, width=32), TEXTS),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NETS)
def test_token_bins_read_tokens_where_the_honest_model_gives_away_none(name: str) -> None:
    """128 to 136 tokens of eight records in 256 bins, through a GELU."""
    build, records = NETS[name]
    model = nets.drawn(build, seeded(2))
    state = servers.copied(model.state_dict())
    crafted = servers.token_bins(model, state, generator=seeded(), sample=records[8:])
    leak = measure(model, state, crafted, [(records[:8], torch.arange(8) % 3)])
    assert leak.honest_share < 0.02
    assert leak.share > 0.3


def test_a_transparent_attention_passes_each_token_as_it_came() -> None:
    """What reaches the first feed-forward layer of a token depends on that token alone."""
    model = nets.drawn(NETS["text"][0], seeded(2))
    crafted = servers.transparent_attention(model, model.state_dict())
    other = TEXTS[:2].clone()
    other[:, 1:] = (other[:, 1:] + 1) % 200
    for state, same in ((crafted, True), (model.state_dict(), False)):
        firsts = [
            layer_inputs(model, state, texts, "blocks.0.feed.0").view(2, 16, -1)[:, 0]
            for texts in (TEXTS[:2], other)
        ]
        assert torch.allclose(*firsts, atol=1e-6) is same


def test_attention_behind_the_bins_stays_since_it_carries_the_tokens_to_the_head() -> None:
    model = nets.drawn(NETS["vit"][0], seeded(2))
    state = model.state_dict()
    crafted = servers.token_bins(model, state, generator=seeded())
    name = "blocks.{}.attention.out_proj.weight"
    assert not crafted[name.format(0)].any()
    assert torch.equal(crafted[name.format(1)], state[name.format(1)])


def test_an_attention_of_one_s_own_making_is_found_by_its_class_s_name() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            queries, keys, values = self.qkv(x).chunk(3, -1)
            mapped: torch.Tensor = self.proj((queries @ keys.mT).softmax(-1) @ values)
            return mapped

    model = nn.Sequential(SelfAttention(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    crafted = servers.token_bins(model, model.state_dict(), generator=seeded())
    assert not crafted["0.proj.weight"].any()
    assert not crafted["0.proj.bias"].any()
    assert torch.equal(crafted["0.qkv.weight"], model.state_dict()["0.qkv.weight"])
    assert torch.linalg.matrix_rank(crafted["1.weight"]) == 1


def test_a_net_without_attention_is_refused() -> None:
    model = nets.mlp(13, 8, 2)
    with pytest.raises(MisuseError, match="needs an attention layer"):
        servers.token_bins(model, model.state_dict(), generator=seeded())
