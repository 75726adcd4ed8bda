"""Transformers: traps behind transparent attention are named, honest zeros pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.detection import Kind, inspect_global_model
from sentinel.stress import nets, servers
from sentinel.stress.bench import nets as bench
from sentinel.stress.layers import copied
from sentinel.stress.servers import stealth
from sentinel.terms import Verdict


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(name: str) -> nn.Module:
    if name == "pictures":
        return nets.drawn(lambda: nets.VisionTransformer(3, depth=3), seeded(1))
    return nets.drawn(lambda: nets.TextTransformer(2), seeded(1))


@pytest.mark.parametrize("name", ["pictures", "words"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_bins_for_tokens_are_named_a_transformer_trap(name: str, share: float) -> None:
    model = net(name)
    craft = servers.token_bins
    if share < 1.0:
        craft = stealth.among_honest(craft, share)
    crafted = craft(model, model.state_dict(), generator=seeded(2))
    for at_hand in (model, None):
        found = inspect_global_model(crafted, None, at_hand)
        assert found.verdict is Verdict.TRANSFORMER_TRAP
        assert found.suspicion > 0.8


@pytest.mark.parametrize("name", ["text-32", "vit-32"])
def test_a_feed_forward_layer_three_times_as_wide_is_told_from_joined_projections(
    name: str,
) -> None:
    known = next(one for one in bench.NETS if one.name == name)
    model = known.fresh(seeded(1))
    crafted = servers.token_bins(model, model.state_dict(), generator=seeded(2))
    assert inspect_global_model(crafted, None, model).verdict is Verdict.TRANSFORMER_TRAP


def separate(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same net with query, key and value as layers of their own."""
    found = {}
    for name, value in state.items():
        if "in_proj" not in name:
            found[name] = value
            continue
        for part, kind in zip(value.chunk(3), ("query", "key", "value"), strict=True):
            found[name.replace("in_proj_", f"{kind}.")] = part
    return found


def test_query_key_and_value_of_their_own_are_attention_too() -> None:
    model = net("words")
    crafted = servers.token_bins(model, model.state_dict(), generator=seeded(2))
    found = inspect_global_model(separate(crafted))
    assert found.verdict is Verdict.TRANSFORMER_TRAP
    assert inspect_global_model(separate(model.state_dict())).verdict is Verdict.HONEST


def test_bins_in_a_net_without_attention_are_no_transformer_trap() -> None:
    model = nets.drawn(lambda: nets.mlp(30, 64, 64, 2), seeded(1))
    crafted = servers.binning(model, model.state_dict(), generator=seeded(2))
    assert inspect_global_model(crafted).verdict is Verdict.BINNING


@pytest.mark.parametrize("blocks", ["all", "one"])
def test_residuals_that_start_at_zero_pass_in_all_blocks_and_in_one(blocks: str) -> None:
    model = net("pictures")
    state = copied(model.state_dict())
    for name, value in state.items():
        if "out_proj" in name and (blocks == "all" or ".1." in name):
            value.zero_()
    found = inspect_global_model(state, None, model)
    assert found.suspicion < 0.5
    assert (Kind.OPEN_ATTENTION in {one.kind for one in found.findings}) == (blocks == "one")
