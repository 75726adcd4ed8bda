"""Every craft works on any module or says in a sentence why not; nothing else comes out."""

from __future__ import annotations

import functools
import re
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import RECIPES, WRAPPERS, Public, measure

if TYPE_CHECKING:
    from collections.abc import Callable


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain() -> nn.Sequential:
    model = nets.drawn(lambda: nets.mlp(13, 32, 3), seeded(1))
    assert isinstance(model, nn.Sequential)
    return model


class _Buffers(nn.Module):
    """Nothing in it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(13, 3))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.get_buffer("table")


class _Twice(nn.Module):
    """One layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(13, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, rows: Tensor) -> Tensor:
        inner = self.again(self.first(rows).relu()).relu()
        scores: Tensor = self.head(self.again(inner).relu())
        return scores


class _Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(13, 13), nn.Linear(13, 13), nn.Linear(13, 3)
        self.other.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.head(self.other(self.first(rows).relu()).relu())
        return scores


class _TiedHead(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 16), nn.Linear(16, 5)
        self.head.weight = self.words.weight

    def forward(self, texts: Tensor) -> Tensor:
        scores: Tensor = self.head(self.words(texts).mean(1))
        return scores


def nested() -> nn.Module:
    parts = list(plain())
    return nn.Sequential(nn.Sequential(nn.Sequential(parts[0]), parts[1]), nn.Sequential(parts[2]))


def transposed() -> nn.Module:
    model = plain()
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        assert not layer.weight.is_contiguous()
    return model


def compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, on import
        model = torch.compile(plain())
    assert isinstance(model, nn.Module)
    return model


def normed(place: int) -> nn.Module:
    model = plain()
    nn.utils.parametrizations.weight_norm(model[place])
    return model


def frozen() -> nn.Module:
    model = plain()
    model[0].requires_grad_(requires_grad=False)
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


ROWS = torch.randn(120, 13, generator=seeded(3))
IMAGES = torch.rand(120, 1, 28, 28, generator=seeded(3))
WORDS = torch.randint(5, (120, 6), generator=seeded(3))
Case = tuple["Callable[[], nn.Module]", Tensor, dict[str, str], str]
# Module, records, crafts that must work there with what they come to where that is sure, and a part
# of the sentence that refuses others.
ATTACKED = {"qbi": "reads", "fishing-class": "fishes", "seer": ""}
ODD: dict[str, Case] = {
    "nested": (nested, ROWS, ATTACKED, ""),
    "transposed": (transposed, ROWS, ATTACKED, ""),
    "float64": (lambda: plain().double(), ROWS.double(), ATTACKED, ""),
    "float16": (lambda: plain().half(), ROWS.half(), ATTACKED, ""),
    "bfloat16": (lambda: plain().bfloat16(), ROWS.bfloat16(), ATTACKED, ""),
    "compiled": (compiled, ROWS, ATTACKED, ""),
    "used twice": (_Twice, ROWS, {"qbi": "reads", "fishing-class": ""}, ""),
    "tied head": (_TiedHead, WORDS, {"fishing-class": ""}, "two fully connected layers in a row"),
    "tied pair": (_Tied, ROWS, {"fishing-class": ""}, "one shared weight"),
    "normed first": (lambda: normed(0), ROWS, {"fishing-class": ""}, "are parametrized: 0"),
    "normed last": (lambda: normed(2), ROWS, {}, "are parametrized: 2"),
    "no dense layer": (convolutional, IMAGES, {}, "needs a torch.nn.Linear"),
    "buffers": (_Buffers, ROWS, {}, "needs a torch.nn.Linear"),
    "bare": (lambda: nn.Linear(13, 3), ROWS, {}, "put it in a torch.nn.Sequential"),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(13, 3, bias=False)),
        ROWS,
        {},
        "needs a torch.nn.Linear layer with a bias",
    ),
}


def public(sample: Tensor) -> Public:
    return Public(sample[:80], torch.arange(80) % 3, 8)


def crafts(sample: Tensor) -> dict[str, servers.Craft]:
    """Every recipe, training cut short, and one of them behind each wrapper."""
    made = {recipe.name: recipe.craft(public(sample)) for recipe in RECIPES}
    for name in ("learned-neurons", "learned-dominance"):
        made[name] = functools.partial(made[name], steps=2)
    return made | {name: wrapper(made["qbi"]) for name, wrapper in WRAPPERS.items()}


@pytest.mark.parametrize("name", ODD)
def test_on_an_odd_module_a_craft_attacks_or_refuses_in_a_sentence(name: str) -> None:
    build, sample, expected, sentence = ODD[name]
    model = build()
    state = servers.copied(model.state_dict())
    batches = [(sample[start : start + 8], torch.arange(8) % 3) for start in range(80, 104, 8)]
    refusals: dict[str, str] = {}
    for craft, made in crafts(sample).items():
        try:
            sent = made(model, state, generator=seeded())
        except MisuseError as error:
            refusals[craft] = str(error)
            continue
        assert sent.keys() == state.keys()
        for key, value in sent.items():
            assert (value.shape, value.dtype) == (state[key].shape, state[key].dtype)
            assert value.isfinite().all(), (craft, key)
        if craft in expected:
            leak = measure(model, state, sent, batches)
            assert leak.reads or expected[craft] != "reads", craft
            assert leak.fishes or expected[craft] != "fishes", craft
    assert not expected.keys() & refusals.keys(), refusals
    assert all(re.search(r"\bneeds?\b", text) for text in refusals.values()), refusals
    assert any(sentence in text for text in refusals.values()) or not sentence


def test_a_weight_of_two_names_gets_what_the_craft_made_of_one() -> None:
    model = _TiedHead()
    sent = servers.fishing_class(model, model.state_dict(), generator=seeded())
    assert torch.equal(sent["words.weight"], sent["head.weight"])
    assert not torch.equal(sent["words.weight"], model.state_dict()["words.weight"])


def test_a_frozen_layer_is_attacked_but_nothing_of_it_leaves() -> None:
    model = frozen()
    state = servers.copied(model.state_dict())
    sent = servers.qbi(model, state, generator=seeded())
    with pytest.raises(MisuseError, match="layer '0' is frozen"):
        measure(model, state, sent, [(ROWS[:8], torch.arange(8) % 3)])


@pytest.mark.parametrize(
    ("model", "state", "sentence"),
    [
        (nn.Sequential(nn.LazyLinear(32)), {}, "run one record through it first"),
        (plain(), {"0.weight": torch.zeros(32, 13)}, "3 differ"),
        (plain(), nets.mlp(13, 16, 3).state_dict(), "3 differ"),
    ],
    ids=["lazy", "part of a state", "another width"],
)
def test_a_state_that_is_not_the_model_s_is_refused(
    model: nn.Module, state: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(MisuseError, match=sentence):
        servers.binning(model, state, generator=seeded())
    with pytest.raises(MisuseError, match=sentence):
        measure(model, state, state, [(ROWS[:8], torch.arange(8) % 3)])


def test_public_records_of_another_shape_are_refused_without_naming_them() -> None:
    model = plain()
    with pytest.raises(MisuseError, match="public records of the shape and dtype") as refusal:
        servers.binning(model, model.state_dict(), generator=seeded(), sample=torch.rand(20, 7))
    assert "20" not in str(refusal.value)


def test_a_compiled_model_is_neither_changed_nor_run_compiled() -> None:
    model = compiled()
    before = servers.copied(model.state_dict())
    assert all(name.startswith("_orig_mod.") for name in before)
    sent = servers.qbi(model, before, generator=seeded(), sample=ROWS, batch=8)
    assert sent.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
