"""Every craft keeps the architecture, depends on its generator alone, and refuses in sentences."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import RECIPES, WRAPPERS, Craft, Public, Recipe

NAMES = [recipe.name for recipe in RECIPES]
BOTH = [*NAMES, *(f"{name}:qbi" for name in WRAPPERS)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net_for(recipe: Recipe) -> nn.Module:
    """The smallest net that has what the recipe needs."""
    if recipe.family == "D":
        return nets.drawn(
            lambda: nets.VisionTransformer(3, width=16, hidden=32, depth=1), seeded(1)
        )
    if recipe.name in {"loki", "trap-weights-identity"}:
        return nets.drawn(lambda: nets.lenet(32, 3), seeded(1))
    return nets.drawn(lambda: nets.mlp(784, 32, 3), seeded(1))


def setting(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Craft]:
    wrapper, _, inner = name.rpartition(":")
    recipe = servers.recipe(inner)
    model = net_for(recipe).to(dtype)
    sample = torch.rand(40, 1, 28, 28, generator=seeded(2)).to(dtype)
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear):
        sample = sample.flatten(1)
    craft = recipe.craft(Public(sample, torch.arange(40) % 3, 8))
    if recipe.name.startswith("learned"):
        craft = functools.partial(craft, steps=3)
    return model, WRAPPERS[wrapper](craft) if wrapper else craft


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_crafted_model_has_the_names_shapes_and_dtypes_of_the_honest_one(
    name: str, dtype: torch.dtype
) -> None:
    model, craft = setting(name, dtype)
    state = servers.copied(model.state_dict())
    before = servers.copied(state)
    crafted = craft(model, state, generator=seeded())
    described = [(key, value.shape, value.dtype) for key, value in state.items()]
    assert [(key, value.shape, value.dtype) for key, value in crafted.items()] == described
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in state)
    assert any(not torch.equal(crafted[key], state[key]) for key in state)
    assert all(value.isfinite().all() for value in crafted.values())


@pytest.mark.parametrize("name", BOTH)
def test_crafting_is_fixed_by_its_generator_and_leaves_the_global_one_alone(name: str) -> None:
    model, craft = setting(name)
    state = servers.copied(model.state_dict())
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = craft(model, state, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again = craft(model, state, generator=seeded())
    assert all(torch.equal(first[key], again[key]) for key in state)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("identity")])
def test_a_model_without_the_layer_an_attack_needs_is_refused_with_a_sentence(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 2, bias=False))
    craft = servers.recipe(name).craft(Public(torch.rand(40, 1, 6, 6), batch=8))
    with pytest.raises(MisuseError, match=r"needs a torch\.nn\.Linear"):
        craft(model, servers.copied(model.state_dict()), generator=seeded())


def test_one_craft_after_another_bends_what_the_first_has_bent() -> None:
    model = nets.drawn(lambda: nets.lenet(32, 3), seeded(1))
    state = servers.copied(model.state_dict())
    both = servers.then(servers.pass_through, servers.trap_weights)
    crafted = both(model, state, generator=seeded())
    alone = servers.trap_weights(model, state, generator=seeded())
    assert torch.equal(crafted["7.weight"], alone["7.weight"])
    assert torch.equal(crafted["0.weight"], servers.pass_through(model, state)["0.weight"])


def test_a_craft_that_learns_is_not_bent_since_it_would_learn_of_another_model() -> None:
    search = servers.Search(sample=torch.rand(40, 5))
    for bend in (*WRAPPERS.values(), lambda craft: servers.then(craft, servers.honest)):
        with pytest.raises(MisuseError, match="cannot be bent"):
            bend(search)


def test_the_honest_craft_changes_nothing() -> None:
    model = nets.drawn(lambda: nets.mlp(5, 4, 2), seeded(1))
    sent = servers.honest(model, model.state_dict(), generator=seeded())
    assert all(torch.equal(sent[key], value) for key, value in model.state_dict().items())
