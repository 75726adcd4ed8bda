"""The architectures of the bench, none of which a detector was trained on, and their tasks.

Narrow, so that thousands of rounds take minutes; a few of more than five million parameters stand
apart in `WIDE`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.stress.nets import (
    DenseLayer,
    TextTransformer,
    VisionTransformer,
    drawn,
    group_norm,
    lenet_of,
    mlp,
    resnet18,
)

if TYPE_CHECKING:
    from collections.abc import Callable

COARSE = 6  # cells a side of the random fields that images are made of
LATENT = 8  # causes behind the columns of a table


def lenet5(classes: int) -> nn.Sequential:
    """Return LeNet-5 with its three dense layers, for 1 x 28 x 28."""
    return lenet_of(120, 84, classes)


def vgg(classes: int) -> nn.Sequential:
    """Return four convolutions and two dense layers, for 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 160),
        nn.ReLU(),
        nn.Linear(160, classes),
    )


def group_resnet(classes: int) -> nn.Sequential:
    """Return ResNet-18 with group normalisation, eight channels wide, for 1 x 28 x 28."""
    return resnet18(classes, 8, norm=group_norm)


def densenet(classes: int) -> nn.Sequential:
    """Return two dense blocks of three layers, for 1 x 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *(DenseLayer(8 + 4 * layer, 4) for layer in range(3)),
        nn.Conv2d(20, 10, 1, bias=False),
        nn.AvgPool2d(2),
        *(DenseLayer(10 + 4 * layer, 4) for layer in range(3)),
        nn.BatchNorm2d(22),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(22, classes),
    )


def depthwise(classes: int) -> nn.Sequential:
    """Return depthwise and pointwise convolutions in turn, as MobileNet has, for 3 x 32 x 32."""
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)]
    parts.append(nn.ReLU6())
    for before, after, stride in ((16, 32, 2), (32, 32, 1), (32, 64, 2)):
        parts += [
            nn.Conv2d(before, before, 3, stride, padding=1, groups=before, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU6(),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU6(),
        ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def signal_net(classes: int) -> nn.Sequential:
    """Return two one-dimensional convolutions and two dense layers, for 2 x 128."""
    return nn.Sequential(
        nn.Conv1d(2, 12, 7, 4, padding=3),
        nn.ReLU(),
        nn.Conv1d(12, 24, 5, 2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 96),
        nn.ReLU(),
        nn.Linear(96, classes),
    )


def vit(classes: int) -> VisionTransformer:
    """Return a transformer of two blocks over sixteen patches, for 1 x 28 x 28."""
    return VisionTransformer(classes, width=32, hidden=96, depth=2)


def text(classes: int) -> TextTransformer:
    """Return a transformer of two blocks over sixteen tokens out of 120."""
    return TextTransformer(classes, words=120, width=32, hidden=96)


def autoencoder(width: int) -> nn.Sequential:
    """Return an autoencoder of rows, with a bottleneck of eight."""
    return mlp(width, 64, 8, 64, width)


class TiedText(nn.Module):
    """A net that names a text's word: what reads words also writes them."""

    def __init__(self, words: int, width: int, hidden: int) -> None:
        """Build for texts of tokens out of `words`."""
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, hidden)
        self.back = nn.Linear(hidden, width)
        self.bias = nn.Parameter(torch.empty(words))

    def forward(self, texts: Tensor) -> Tensor:
        """Map [n, places] of integers to [n, words]."""
        seen = self.words(texts).mean(1)
        seen = seen + self.back(torch.relu(self.hidden(seen)))
        return nn.functional.linear(seen, self.words.weight, self.bias)


class LowRank(nn.Module):
    """A dense layer beside which a product of two thin ones is trained, the second from zero.

    Reference: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685.
    """

    def __init__(self, before: int, after: int, rank: int = 4) -> None:
        """Build for `before` values in and `after` out."""
        super().__init__()
        self.base = nn.Linear(before, after)
        self.lora_a = nn.Linear(before, rank, bias=False)
        self.lora_b = nn.Linear(rank, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., before] to [..., after]."""
        mapped: Tensor = self.base(x) + self.lora_b(self.lora_a(x))
        return mapped


def low_rank_mlp(inputs: int, hidden: int, classes: int) -> nn.Sequential:
    """Return two hidden layers with low-rank adapters, and a dense head."""
    return nn.Sequential(
        LowRank(inputs, hidden),
        nn.ReLU(),
        LowRank(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


@dataclass(frozen=True, slots=True)
class Net:
    """One architecture of the bench.

    Attributes:
        name: how figures call it.
        build: makes the module; its first values are thrown away.
        shape: of one record, without the batch.
        classes: how many labels there are.
        words: size of the vocabulary where records are tokens, else None.
        costly: whether a step takes so long that it has part in fewer runs.
        counts: whether records are counts of 0 to 2, as genotypes are.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    words: int | None = None
    costly: bool = False
    counts: bool = False

    def fresh(self, generator: torch.Generator, init: str = "default") -> nn.Module:
        """Build it with first values from `generator` alone, in evaluation mode."""
        module = drawn(self.build, generator).eval()
        with torch.no_grad():
            for part in module.modules():
                if init != "default" and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
                    _initialised(part, init, generator)
        return module


INITS = ("default", "kaiming", "xavier")


def _initialised(
    part: nn.Linear | nn.Conv1d | nn.Conv2d, init: str, generator: torch.Generator
) -> None:
    """Give one layer other first values, and a bias of zero.

    Args:
        part: the layer.
        init: "kaiming", "xavier" or "identity".
        generator: draws them.
    """
    if init == "kaiming":
        nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
    elif init == "identity" and part.weight.ndim == 2:  # noqa: PLR2004 - a dense layer
        nn.init.eye_(part.weight)
    elif init == "identity" and getattr(part, "groups", 1) == 1:
        nn.init.dirac_(part.weight)  # with a little noise, or channels without input stay dead
        part.weight.add_(torch.randn(part.weight.shape, generator=generator), alpha=0.05)
    else:
        nn.init.xavier_uniform_(part.weight, generator=generator)
    if part.bias is not None:
        part.bias.zero_()


PICTURE, COLOUR = (1, 28, 28), (3, 32, 32)
NETS: tuple[Net, ...] = (
    Net("mlp-8-32-2", lambda: mlp(8, 32, 2), (8,), 2),
    Net("mlp-20-96-3", lambda: mlp(20, 96, 3), (20,), 3),
    Net("mlp-54-384-7", lambda: mlp(54, 384, 7), (54,), 7),
    Net("mlp-64-200-100-4", lambda: mlp(64, 200, 100, 4), (64,), 4),
    Net("lenet5-120-84", lambda: lenet5(6), PICTURE, 6),
    Net("vgg-160", lambda: vgg(4), COLOUR, 4),
    Net("signal-96", lambda: signal_net(3), (2, 128), 3),
    Net("autoencoder-30", lambda: autoencoder(30), (30,), 3),
    Net("resnet18-gn-8", lambda: group_resnet(3), PICTURE, 3, costly=True),
    Net("densenet-4", lambda: densenet(3), PICTURE, 3, costly=True),
    Net("depthwise-16", lambda: depthwise(5), COLOUR, 5, costly=True),
    Net("vit-32", lambda: vit(4), PICTURE, 4, costly=True),
    Net("text-32", lambda: text(3), (16,), 3, 120, costly=True),
)
TIED: tuple[Net, ...] = (
    Net("tied-text-60", lambda: TiedText(60, 24, 48), (12,), 60, 60),
    Net("tied-text-200", lambda: TiedText(200, 32, 96), (16,), 200, 200),
)
LOW_RANK: tuple[Net, ...] = (
    Net("lora-20-96", lambda: low_rank_mlp(20, 96, 3), (20,), 3),
    Net("lora-54-128", lambda: low_rank_mlp(54, 128, 7), (54,), 7),
)
WIDE: tuple[Net, ...] = (
    Net("mlp-500-2048-2048-10", lambda: mlp(500, 2048, 2048, 10), (500,), 10),
    Net("resnet18-64", lambda: resnet18(10), PICTURE, 10),
)
GENOTYPES = Net("genotype-300-48-2", lambda: mlp(300, 48, 2), (300,), 2, counts=True)


class World:
    """What records look like and what their labels follow from; all sites live in one."""

    def __init__(self, net: Net, generator: torch.Generator) -> None:
        """Draw the pattern of each class: a row, a field, or a liking for words."""
        self.net = net
        self.labels = max(net.classes, 2)
        if net.words is not None:
            liking = 1.5 * torch.randn(self.labels, net.words, generator=generator)
            self._patterns = torch.softmax(liking, 1)
        elif net.counts:  # how often the rarer letter is met at each place, by class
            usual = 0.05 + 0.45 * torch.rand(net.shape[0], generator=generator)
            shifts = 0.1 * torch.randn(self.labels, net.shape[0], generator=generator)
            self._patterns = (usual + shifts).clamp_(0.02, 0.6)
        elif len(net.shape) == 1:
            width = net.shape[0]
            self._patterns = torch.randn(self.labels, width, generator=generator)
            self._mix = torch.randn(LATENT, width, generator=generator) / math.sqrt(LATENT)
            self._binary = torch.rand(width, generator=generator) < 0.3  # noqa: PLR2004 - columns that hold yes or no
        else:
            self._patterns = self._field(self.labels, generator)

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return one record for each label, [n, *shape]."""
        count = len(labels)
        if self.net.words is not None:
            return torch.multinomial(
                self._patterns[labels], self.net.shape[0], replacement=True, generator=generator
            )
        if self.net.counts:
            rates = self._patterns[labels]
            first = torch.bernoulli(rates, generator=generator)
            return first + torch.bernoulli(rates, generator=generator)
        if len(self.net.shape) == 1:
            causes = torch.randn(count, LATENT, generator=generator) @ self._mix
            own = torch.randn(count, self.net.shape[0], generator=generator)
            rows = 0.7 * self._patterns[labels] + 0.6 * causes + 0.6 * own
            return torch.where(self._binary, rows.sign(), rows)
        fields = 0.5 * self._field(count, generator) + 0.5 * self._patterns[labels]
        noise = 0.05 * torch.randn(fields.shape, generator=generator)
        return (fields + noise).clamp_(0.0, 1.0)

    def _field(self, count: int, generator: torch.Generator) -> Tensor:
        channels, *sides = self.net.shape
        coarse = torch.rand(count, channels, *([COARSE] * len(sides)), generator=generator)
        mode = "linear" if len(sides) == 1 else "bicubic"
        return nn.functional.interpolate(coarse, size=tuple(sides), mode=mode).clamp_(0.0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One hospital: which classes its patients have.

    Attributes:
        world: what records look like.
        shares: [labels], how likely each class is here.
        generator: draws its records.
    """

    world: World
    shares: Tensor
    generator: torch.Generator

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records [count, *shape] and labels [count]."""
        labels = torch.multinomial(self.shares, count, replacement=True, generator=self.generator)
        return self.world.draw(labels, self.generator), labels


def sites(world: World, count: int, alpha: float | None, generator: torch.Generator) -> list[Site]:
    """Return `count` sites whose class shares are Dirichlet of `alpha`.

    Args:
        world: what they share.
        count: how many.
        alpha: the smaller, the more unlike they are; 0 for one class each, None for equal shares.
        generator: draws the shares, and then the records of all.
    """
    found = []
    for index in range(count):
        shares = torch.ones(world.labels)
        if alpha == 0:
            shares = nn.functional.one_hot(torch.tensor(index % world.labels), world.labels).float()
        elif alpha is not None:
            rates = torch.full((world.labels,), alpha)
            shares = torch._standard_gamma(rates, generator=generator) + 1e-6  # noqa: SLF001 - torch.distributions takes no generator
        found.append(Site(world, shares, generator))
    return found


@functools.cache
def net(name: str) -> Net:
    """Return the architecture of this name.

    Raises:
        KeyError: there is none.
    """
    return {one.name: one for one in (*NETS, *TIED, *LOW_RANK, *WIDE, GENOTYPES)}[name]
