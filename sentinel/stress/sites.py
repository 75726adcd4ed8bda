"""Sites of the synthetic corpus: a global model to train on, and records to train with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.stress.corpus import NETS, Net, Source, Task, fresh, train
from sentinel.stress.nets import TextTransformer, VisionTransformer, drawn, group_norm, mlp

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAT = Net("mlp-784-128-2", lambda: mlp(784, 128, 2), (784,), 2)  # images as plain rows
WORDS, PLACES = 150, 16


def gelu_mlp() -> nn.Sequential:
    """Return four dense layers with GELU: no unit is ever quite still."""
    return nn.Sequential(
        nn.Linear(40, 96),
        nn.GELU(),
        nn.Linear(96, 64),
        nn.GELU(),
        nn.Linear(64, 48),
        nn.GELU(),
        nn.Linear(48, 4),
    )


def group_cnn() -> nn.Sequential:
    """Return three convolutions with group normalisation and two dense layers, for 1 x 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        group_norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        group_norm(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        group_norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 96),
        nn.ReLU(),
        nn.Linear(96, 3),
    )


def signal_net() -> nn.Sequential:
    """Return two convolutions along a signal and two dense layers, for 1 x 128."""
    return nn.Sequential(
        nn.Conv1d(1, 8, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv1d(8, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )


OTHERS: tuple[Net, ...] = (
    FLAT,
    Net("gelu-mlp-40", gelu_mlp, (40,), 4),
    Net("genotype-mlp-200", lambda: mlp(200, 64, 2), (200,), 2),
    Net("group-cnn-96", group_cnn, (1, 28, 28), 3),
    Net("signal-net-64", signal_net, (1, 128), 4),
    Net(
        "vision-transformer",
        lambda: VisionTransformer(3, width=32, hidden=96, depth=2),
        (1, 28, 28),
        3,
        hidden=False,
    ),
    Net(
        "text-transformer",
        lambda: TextTransformer(2, words=WORDS, places=PLACES, width=32, hidden=96, depth=1),
        (PLACES,),
        2,
        hidden=False,
    ),
)
STAGES = (0, 30, 200)  # steps of training before the round
UNSCALED = 0.01  # learning rate on columns that nobody scaled, as a share of the usual one
DARK = 0.55  # brightness below which a picture of little in front of nothing is black


@dataclass(frozen=True, slots=True)
class Site:
    """A site with a global model to train on, and records.

    Attributes:
        name: of the architecture.
        kind: of the task: "plain", "raw", "rare", "flat" (images as plain rows), "dark" (mostly
            black), "signal", "genotype" or "text".
        stage: index into `STAGES`.
        module: holds the global model.
        shape: of one record.
        task: where its records come from.
        pace: factor on the learning rates of plain SGD.
    """

    name: str
    kind: str
    stage: int
    module: nn.Module
    shape: tuple[int, ...]
    task: Source
    pace: float

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records [count, *shape] and labels [count]."""
        records, labels = self.task.draw(count)
        return records.view(count, *self.shape), labels

    def draw_alike(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records that all have one label, and their labels, [count] at most."""
        records, labels = self.draw(4 * count)
        same = labels == labels.mode().values
        return records[same][:count], labels[same][:count]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of the corpus: so many architectures, kinds of task and stages, from the first.

    Attributes:
        nets: architectures.
        kinds: kinds of task per architecture, where it has so many.
        stages: training stages.
        repeats: sites per architecture, kind and stage.
    """

    nets: int
    kinds: int
    stages: int
    repeats: int


def sites(size: Size, seed: int) -> Iterator[Site]:
    """Yield sites over architectures, kinds of task and training stages; `seed` makes them."""
    number = 0
    for net in (*NETS, *OTHERS)[: size.nets]:
        for kind in _site_kinds(net)[: size.kinds]:
            for stage in range(len(STAGES[: size.stages])):
                for repeat in range(size.repeats):
                    generator = torch.Generator().manual_seed(seed * 100_003 + number)
                    number += 1
                    yield _site(net, kind, stage, repeat, generator)


def _site_kinds(net: Net) -> tuple[str, ...]:
    named = {"mlp-784-128-2": "flat", "genotype-mlp-200": "genotype", "signal-net-64": "signal"}
    if net.name in named:
        return (named[net.name],)
    if net.name == "text-transformer":
        return ("text",)
    return ("plain", "raw", "rare") if len(net.shape) == 1 else ("plain", "dark")


def _site(net: Net, kind: str, stage: int, repeat: int, generator: torch.Generator) -> Site:
    if net in NETS or net is FLAT:
        module = fresh(net, generator, ("default", "kaiming")[repeat % 2])
    else:
        module = _drawn(net, generator)
    pace = UNSCALED if kind == "raw" else 1.0
    site = Site(net.name, kind, stage, module, net.shape, _task(net, kind, generator), pace)
    train(module, site, steps=STAGES[stage], rate=0.05 * pace)
    return site


def _drawn(net: Net, generator: torch.Generator) -> nn.Module:
    module = drawn(net.build, generator)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv1d):
                bound = 1.0 / math.sqrt(part.weight[0].numel())
                for value in part.parameters():
                    value.uniform_(-bound, bound, generator=generator)
    return module


def _task(net: Net, kind: str, generator: torch.Generator) -> Source:
    if kind == "flat":
        return Task(replace(net, shape=(1, 28, 28)), generator, kind)
    if kind == "dark":
        return _Dark(Task(net, generator))
    if kind == "genotype":
        return _Genotypes(net, generator)
    if kind == "signal":
        return _Signals(net, generator)
    return _Texts(net, generator) if kind == "text" else Task(net, generator, kind)


class _Dark:
    """Pictures that are mostly black, as digits and many scans are."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        images, labels = self._task.draw(count)
        return (images - DARK).clamp_min(0.0) / (1.0 - DARK), labels


class _Genotypes:
    """Counts of the rarer letter at each place, 0 to 2; the label hangs on a tenth of them."""

    def __init__(self, net: Net, generator: torch.Generator) -> None:
        self._generator = generator
        width = net.shape[0]
        self._frequency = 0.05 + 0.45 * torch.rand(width, generator=generator)
        self._effect = torch.randn(width, generator=generator)
        self._effect *= torch.rand(width, generator=generator) < 0.1  # noqa: PLR2004  # such places

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(2, count, len(self._frequency), generator=self._generator)
        rows = (drawn < self._frequency).float().sum(0)
        scores = (rows - 2.0 * self._frequency) @ self._effect
        scores += torch.randn(count, generator=self._generator)
        return rows, (scores > 0).long()


class _Signals:
    """Waves of several lengths, one length for each label, in noise: standardised."""

    def __init__(self, net: Net, generator: torch.Generator) -> None:
        self._generator = generator
        self._classes, self._side = net.classes, net.shape[-1]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self._classes, (count,), generator=self._generator)
        shift = 6.3 * torch.rand(count, 2, 1, generator=self._generator)
        times = torch.linspace(0.0, 6.3, self._side)[None]
        waves = torch.sin((1.0 + labels[:, None]) * times + shift[:, 0])
        waves += 0.5 * torch.sin(7.0 * times + shift[:, 1])
        noise = torch.randn(waves.shape, generator=self._generator)
        return (waves + 0.3 * noise)[:, None], labels


class _Texts:
    """Words by a law of few frequent and many rare ones; some words belong to one label."""

    def __init__(self, net: Net, generator: torch.Generator) -> None:
        self._generator, self._places = generator, net.shape[0]
        usual = 1.0 / (5.0 + torch.arange(WORDS).float())
        lean = torch.exp(torch.randn(net.classes, WORDS, generator=generator))
        self._likely = usual * lean

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(self._likely), (count,), generator=self._generator)
        words = torch.multinomial(
            self._likely[labels], self._places, replacement=True, generator=self._generator
        )
        return words, labels
