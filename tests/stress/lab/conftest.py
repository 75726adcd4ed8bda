"""A small site that every test of the lab can attack."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from sentinel.policy.store import parse_policy
from sentinel.stress.lab.attacks.pictures import Pictures
from sentinel.stress.lab.attacks.rows import Rows
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.passive.genotypes import Panel
from sentinel.stress.passive.notes import NoteTransformer, initialise

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.subject import Subject

PLAIN = """
schema = 1
name = "plain"
[[rule]]
id = "baseline"
max_norm = {norm}
noise_ratio = {noise}
{more}
"""


@pytest.fixture
def plain() -> Callable[..., LoadedPolicy]:
    """A policy with one rule: no limit, no rule with `when`."""

    def make(noise: float = 10.0, norm: float = 0.1, more: str = "") -> LoadedPolicy:
        text = PLAIN.format(noise=noise, norm=norm, more=more)
        return parse_policy(text.encode(), "plain.toml")

    return make


@pytest.fixture(autouse=True)
def _few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for what these tests say, and no more."""
    monkeypatch.setattr(Rows, "wanted", 10)
    monkeypatch.setattr(Pictures, "wanted", 1)
    monkeypatch.setattr("sentinel.stress.lab.calibration.MOST_UPDATES", 2)


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is what this process got of it, so that a busy machine makes no test partial."""
    monkeypatch.setattr(time, "monotonic", time.process_time)


@pytest.fixture
def stop_after() -> Callable[[int], Callable[[int, int], None]]:
    """Presses Ctrl-C once so many attacks are through."""

    def after(count: int) -> Callable[[int, int], None]:
        def step(done: int, _total: int) -> None:
            if done == count:
                raise KeyboardInterrupt

        return step

    return after


@pytest.fixture
def table() -> Subject:
    """256 standard normal rows, and a perceptron."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 8, generator=generator)
    labels = (rows[:, 0] > 0).float()
    return subject_of(perceptron(8, 64), (rows, labels), generator, "rows")


@pytest.fixture
def images() -> Subject:
    """96 pictures of a bright square at one of two places, and a small convolutional net."""
    generator = torch.Generator().manual_seed(0)
    pictures = 0.2 * torch.rand(96, 1, 12, 12, generator=generator)
    labels = torch.arange(96) % 2
    pictures[labels == 0, :, 2:6, 2:6] += 0.6
    pictures[labels == 1, :, 6:10, 6:10] += 0.6
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
    )
    data = {
        "train": (pictures[:40], labels[:40]),
        "held_out": (pictures[40:], labels[40:]),
        "public": (pictures[40:], labels[40:]),
    }
    return subject_of(net, data, generator, "pictures")


@pytest.fixture
def coloured(images) -> Callable[..., Subject]:
    """The same pictures in three channels, and a net that is smooth in them.

    Another `given` hands them over in another way.
    """

    def make(given: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Subject:
        tint = torch.tensor([1.0, 0.5, 0.8])[:, None, None]
        parts = {"train": images.train, "held_out": images.held_out, "public": images.public}
        data = {name: (part.inputs * tint, part.labels) for name, part in parts.items()}
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(12 * 36, 2),
        )
        return subject_of(net, given(data), torch.Generator().manual_seed(0), "colours")

    return make


@pytest.fixture
def texts() -> Subject:
    """120 texts of six words out of twenty, and a small transformer that reads them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (120, 6), generator=generator)
    net = NoteTransformer(20, 6, 32)
    initialise(net, generator)
    return subject_of(net, (tokens, tokens[:, 0] % 2), generator, "texts")


@pytest.fixture
def people() -> Subject:
    """120 synthetic people, 24 variants each, and a perceptron."""
    generator = torch.Generator().manual_seed(0)
    alleles = Panel.drawn(24, 0.5, generator).people(120, generator)
    labels = (alleles[:, :8].sum(1) > alleles[:, 8:16].sum(1)).float()
    data = {"train": (alleles, labels), "kind": "genotypes"}
    return subject_of(perceptron(24, 32), data, generator, "people")


def perceptron(features: int, hidden: int) -> nn.Module:
    """Two fully connected layers with torch's own first weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
