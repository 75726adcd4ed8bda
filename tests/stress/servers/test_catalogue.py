"""The catalogue names every family of attack, and says what each recipe needs."""

from __future__ import annotations

import inspect

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import RECIPES, WRAPPERS, Public


def test_every_family_of_the_catalogue_of_attacks_is_there() -> None:
    """A to G as recipes; H wraps any of them."""
    assert {recipe.family for recipe in RECIPES} == set("ABCDEFG")
    assert WRAPPERS.keys() == {
        "permuted",
        "scaled",
        "turned",
        "jittered",
        "mixed",
        "among-honest",
    }


def test_every_recipe_has_a_name_of_its_own_one_sentence_and_a_source() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert recipe.sentence.endswith(".")
        assert recipe.sentence.count(".") == 1
        assert any(character.isdigit() for character in recipe.source)
        assert set(recipe.needs) <= set(recipe.inputs) <= {"sample", "labels", "batch"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_s_inputs_are_arguments_of_its_function(recipe: servers.Recipe) -> None:
    arguments = inspect.signature(recipe.function).parameters
    assert set(recipe.inputs) <= arguments.keys()


def test_a_recipe_without_the_public_input_it_needs_says_so() -> None:
    with pytest.raises(MisuseError, match="isolation needs public sample"):
        servers.recipe("isolation").craft()
    with pytest.raises(MisuseError, match="no malicious server is called 'robin'"):
        servers.recipe("robin")


def test_public_inputs_reach_the_craft() -> None:
    model = nets.drawn(lambda: nets.mlp(13, 32, 2), torch.Generator().manual_seed(1))
    sample = 5 + torch.randn(50, 13, generator=torch.Generator().manual_seed(2))
    sent = [
        servers.recipe("qbi").craft(public)(
            model, model.state_dict(), generator=torch.Generator().manual_seed(3)
        )
        for public in (Public(sample, batch=8), Public(sample, batch=25), Public(batch=8))
    ]
    assert sent[0]["0.bias"].std() > 1
    assert (sent[1]["0.bias"] < sent[0]["0.bias"]).all()
    assert sent[2]["0.bias"].std() == 0
