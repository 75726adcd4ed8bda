"""The architectures that attacks are tried on, in plain torch, with their widths as arguments.

Records are [n, features] for rows, [n, channels, height, width] for images and [n, places] of
integers for text. All return [n, outputs]. Drawing their first values takes a generator.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Norm = Callable[[int], nn.Module]


def drawn(build: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """Build a net whose first values come from `generator` alone, spread as torch's own are.

    Args:
        build: makes the module; it is called on the meta device, so it draws nothing.
        generator: draws every matrix, kernel, embedding and bias, in the modules' order.
    """
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - the base of all
                part.reset_running_stats()
            for name, value in part.named_parameters(recurse=False):
                _draw(part, name, value, generator)
    return module


def _draw(part: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> None:
    if isinstance(part, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
        value.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
        bound = 1.0 / math.sqrt(part.weight[0].numel())
        value.uniform_(-bound, bound, generator=generator)
    elif name == "in_proj_bias":
        value.zero_()
    elif name == "in_proj_weight":
        nn.init.xavier_uniform_(value, generator=generator)
    else:  # embeddings and tokens
        value.normal_(0.0, 0.5, generator=generator)


def mlp(*widths: int) -> nn.Sequential:
    """Return fully connected layers with ReLU between them."""
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def lenet(hidden: int = 256, classes: int = 10) -> nn.Sequential:
    """Return LeNet with ReLU and max pooling, for 1 x 28 x 28.

    Reference: LeCun et al., 1998, with the activation and the pooling of today.
    """
    return lenet_of(hidden, classes)


def lenet_of(*widths: int) -> nn.Sequential:
    """Return LeNet with dense layers of these widths; the last one holds the classes."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *mlp(400, *widths),
    )


def batch_norm(channels: int) -> nn.Module:
    """Return batch normalisation."""
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    """Return group normalisation, in groups of four channels or more."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


class BasicBlock(nn.Module):
    """Two convolutions around a skip connection, as ResNet-18 has them."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        """Build for `before` channels in and `after` out."""
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = norm(after)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), norm(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, before, h, w] to [n, after, h / stride, w / stride]."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.downsample(x) + self.bn2(self.conv2(inner)))


def resnet18(
    classes: int = 2, width: int = 64, channels: int = 1, norm: Norm = batch_norm
) -> nn.Sequential:
    """Return ResNet-18; `width` is that of the first stage, 64 in the paper.

    Reference: He et al., CVPR 2016, arXiv 1512.03385.
    """
    stages: list[nn.Module] = []
    before = width
    for stage, after in enumerate((width, 2 * width, 4 * width, 8 * width)):
        stride = 1 if stage == 0 else 2
        stages += [BasicBlock(before, after, stride, norm), BasicBlock(after, after, 1, norm)]
        before = after
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
        norm(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


class DenseLayer(nn.Module):
    """One layer of a dense block: it appends `growth` channels to its input."""

    def __init__(self, before: int, growth: int) -> None:
        """Build for `before` channels in."""
        super().__init__()
        self.inner = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.ReLU(),
            nn.Conv2d(before, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, before, h, w] to [n, before + growth, h, w]."""
        return torch.cat([x, self.inner(x)], 1)


DENSENET_121 = (6, 12, 24, 16)  # layers of the four dense blocks


def densenet121(classes: int = 2, growth: int = 32, channels: int = 1) -> nn.Sequential:
    """Return DenseNet-121 with its own blocks; `growth` is 32 in the paper.

    Reference: Huang et al., CVPR 2017, arXiv 1608.06993.
    """
    width = 2 * growth
    parts: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for place, layers in enumerate(DENSENET_121):
        for _ in range(layers):
            parts.append(DenseLayer(width, growth))
            width += growth
        parts += [nn.BatchNorm2d(width), nn.ReLU()]
        if place < len(DENSENET_121) - 1:
            parts += [nn.Conv2d(width, width // 2, 1, bias=False)]
            parts += [nn.AvgPool2d(2, ceil_mode=True)]
            width //= 2
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*parts)


class Block(nn.Module):
    """Self-attention and a feed-forward net, each behind a layer normalisation and a skip."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Build for tokens of `width` values."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [n, places, width] to the same shape."""
        seen = self.norm1(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        mapped: Tensor = tokens + self.feed(self.norm2(tokens))
        return mapped


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, a class token that gathers them, and one dense layer.

    Reference: Dosovitskiy et al., ICLR 2021, arXiv 2010.11929.
    """

    def __init__(  # noqa: PLR0913 - its widths, by keyword
        self,
        classes: int = 2,
        *,
        side: int = 28,
        patch: int = 7,
        channels: int = 1,
        width: int = 64,
        hidden: int = 256,
        depth: int = 4,
    ) -> None:
        """Build for images of `side` pixels and patches of `patch`."""
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.gathering = nn.Parameter(torch.empty(1, 1, width))
        self.places = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, 4, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, channels, side, side] to [n, classes]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.gathering.expand(len(images), -1, -1), tokens], 1)
        tokens = self.blocks(tokens + self.places)
        scores: Tensor = self.head(self.norm(tokens[:, 0]))
        return scores


class TextTransformer(nn.Module):
    """Tokens with their places, blocks of attention, their mean, and one dense layer.

    Reference: Vaswani et al., NeurIPS 2017, arXiv 1706.03762; the encoder alone.
    """

    def __init__(  # noqa: PLR0913 - its widths, by keyword
        self,
        classes: int = 2,
        *,
        words: int = 200,
        places: int = 16,
        width: int = 64,
        hidden: int = 256,
        depth: int = 2,
    ) -> None:
        """Build for texts of at most `places` tokens out of `words`."""
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.empty(1, places, width))
        self.blocks = nn.Sequential(*(Block(width, 4, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, texts: Tensor) -> Tensor:
        """Map [n, places] of integers to [n, classes]."""
        tokens = self.words(texts) + self.places[:, : texts.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return scores
