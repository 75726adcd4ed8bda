"""The synthetic corpus that detectors are trained and measured on: nets, tasks, runs, crafts.

Everything is made here from a seed: no record, no download. The corpus itself is not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sentinel.detection.rounds import loss_of
from sentinel.detection.synthetic import Columns
from sentinel.stress import servers
from sentinel.stress.nets import lenet, mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Crafts = tuple[tuple[str, str, Callable[..., dict[str, Tensor]]], ...]

State = dict[str, Tensor]


class Residual(nn.Module):
    """Two convolutions with batch normalisation around a skip connection."""

    def __init__(self, channels: int) -> None:
        """Build for `channels` in and out."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, h, w] to the same shape."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


def small_cnn(classes: int) -> nn.Sequential:
    """Return three strided convolutions and one dense layer, for 1 x 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, classes),
    )


def norm_cnn(hidden: int, classes: int) -> nn.Sequential:
    """Return two convolutions with batch normalisation and two dense layers, for 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def small_resnet(classes: int) -> nn.Sequential:
    """Return a stem, two residual blocks, average pooling and one dense layer, for 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Residual(32),
        nn.MaxPool2d(2),
        Residual(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


@dataclass(frozen=True, slots=True)
class Net:
    """One architecture of the corpus.

    Attributes:
        name: how figures call it.
        build: makes the module; its first values are thrown away.
        shape: of one record, without the batch.
        classes: outputs.
        hidden: whether two dense layers stand in a row, as most crafts need.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    hidden: bool = True


NETS: tuple[Net, ...] = (
    Net("mlp-13-256-1", lambda: mlp(13, 256, 1), (13,), 1),
    Net("mlp-13-64-2", lambda: mlp(13, 64, 2), (13,), 2),
    Net("mlp-30-128-64-5", lambda: mlp(30, 128, 64, 5), (30,), 5),
    Net("mlp-100-512-10", lambda: mlp(100, 512, 10), (100,), 10),
    Net("small-cnn", lambda: small_cnn(2), (1, 28, 28), 2, hidden=False),
    Net("lenet-256", lambda: lenet(256, 10), (1, 28, 28), 10),
    Net("norm-cnn-128", lambda: norm_cnn(128, 4), (3, 32, 32), 4),
    Net("small-resnet", lambda: small_resnet(5), (3, 32, 32), 5, hidden=False),
)

INITS = ("default", "kaiming", "xavier", "small", "zero-last", "identity")


def fresh(net: Net, generator: torch.Generator, init: str = "default") -> nn.Module:
    """Build a net whose values come from `generator` alone."""
    with torch.device("meta"):
        module = net.build()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for part in module.modules():
            _initialise(part, generator, init)
        last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
        if init == "zero-last":
            last.weight.zero_()
            last.bias.zero_()
    return module


def _initialise(part: nn.Module, generator: torch.Generator, init: str) -> None:
    if isinstance(part, nn.BatchNorm2d):
        part.weight.fill_(1.0)
        part.bias.zero_()
        part.reset_running_stats()
    elif isinstance(part, nn.Linear | nn.Conv2d):
        _initialise_matrix(part.weight, generator, init)
        if part.bias is not None:
            bound = 1.0 / math.sqrt(part.weight[0].numel())
            part.bias.uniform_(-bound, bound, generator=generator)
            if init != "default":
                part.bias.zero_()


def _initialise_matrix(weight: Tensor, generator: torch.Generator, init: str) -> None:
    if init == "kaiming":
        nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    elif init == "xavier":
        nn.init.xavier_uniform_(weight, generator=generator)
    elif init == "small":
        weight.normal_(0.0, 0.02, generator=generator)
    elif init == "identity" and weight.ndim == 2:  # noqa: PLR2004  # a dense layer
        nn.init.eye_(weight)
    elif init == "identity":
        nn.init.dirac_(weight)
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.01)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


RARE = 0.03  # share of the records of all classes but the first, where labels are rare


class Task:
    """A labelling of synthetic records that a net can learn."""

    def __init__(self, net: Net, generator: torch.Generator, kind: str = "plain") -> None:
        """Draw the task: class patterns for images, correlated columns and a teacher for rows.

        Args:
            net: the architecture.
            generator: draws the task and its records.
            kind: for rows "plain", "raw" (columns that nobody scaled) or "rare" (few positives).
        """
        self.net, self._generator = net, generator
        self._head_start = 0.0
        width = math.prod(net.shape)
        self._columns = Columns.drawn(width, generator) if kind == "raw" else None
        self._labels = max(net.classes, 2)
        if len(net.shape) == 1:
            self._mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / (
                math.sqrt(width)
            )
            self._binary = torch.rand(width, generator=generator) < 0.3  # noqa: PLR2004  # columns that hold yes or no
            self._teacher = torch.randn(width, self._labels, generator=generator)
            if kind == "rare":
                scores = self._scores(self._rows(4000))
                lead = scores[:, 1:].amax(1) - scores[:, 0]
                self._head_start = float(lead.quantile(1.0 - RARE))
        else:
            self._patterns = self._field(self._labels)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records [count, *shape] and labels [count]."""
        if len(self.net.shape) > 1:
            labels = torch.randint(self._labels, (count,), generator=self._generator)
            images = 0.5 * self._field(count) + 0.5 * self._patterns[labels]
            noise = torch.randn(images.shape, generator=self._generator)
            return (images + 0.05 * noise).clamp_(0.0, 1.0), labels
        rows = scaled = self._rows(count)
        if self._columns is not None:
            rows = self._columns.draw(count, self._generator)
            scaled = (rows - self._columns.offset) / self._columns.scatter
        scores = self._scores(scaled)
        scores[:, 0] += self._head_start
        return rows, scores.argmax(1)

    def _scores(self, scaled: Tensor) -> Tensor:
        scores = scaled @ self._teacher / math.sqrt(self.net.shape[0])
        return scores + 0.3 * torch.randn(scores.shape, generator=self._generator)

    def _rows(self, count: int) -> Tensor:
        rows = torch.randn(count, self.net.shape[0], generator=self._generator) @ self._mix
        return torch.where(self._binary, rows.sign(), rows)

    def _field(self, count: int) -> Tensor:
        channels, *sides = self.net.shape
        coarse = torch.rand(count, channels, 6, 6, generator=self._generator)
        smooth = nn.functional.interpolate(coarse, size=tuple(sides), mode="bicubic")
        return smooth.clamp_(0.0, 1.0)


class Source(Protocol):
    """Where records come from."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records and labels."""


def train(module: nn.Module, task: Source, *, steps: int, rate: float, batch: int = 32) -> None:
    """Train in place with plain SGD on fresh records."""
    module.train()
    for _ in range(steps):
        records, labels = task.draw(batch)
        loss = loss_of(module(records), labels, records)
        grads = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for value, grad in zip(module.parameters(), grads, strict=True):
                value.sub_(grad, alpha=rate)
    module.eval()


@dataclass(frozen=True, slots=True)
class HonestRun:
    """The global models of one honest run, oldest first.

    Attributes:
        net: the architecture.
        module: a module of that architecture.
        kind: what is special about the run.
        states: global states.
    """

    net: Net
    module: nn.Module
    kind: str
    states: tuple[State, ...]


KINDS = (
    "plain",
    "fast",
    "pruned-50",
    "pruned-90",
    "float16",
    "bfloat16",
    "noised",
    "one-class",
    "long",
    "rollback",
)


def honest_runs(count: int, rounds: int, seed: int) -> Iterator[HonestRun]:
    """Yield honest runs over all nets, first values and kinds in turn.

    Args:
        count: runs.
        rounds: global models per run.
        seed: of everything.
    """
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        net = NETS[index % len(NETS)]
        kind = KINDS[(index // 2) % len(KINDS)]
        init = INITS[(index * 7 // 5) % len(INITS)]
        module = fresh(net, generator, init)
        yield HonestRun(net, module, kind, tuple(_rounds(net, module, kind, rounds, generator)))


def _rounds(
    net: Net, module: nn.Module, kind: str, rounds: int, generator: torch.Generator
) -> Iterator[State]:
    task = Task(net, generator)
    if kind == "one-class":
        task = _OneClass(net, generator)
    rate = 0.02 + 0.08 * float(torch.rand(1, generator=generator))
    rate *= {"fast": 4.0}.get(kind, 1.0)
    first: State | None = None
    for number in range(rounds):
        state = servers.copied(module.state_dict())
        first = first or state
        if kind == "rollback" and number == rounds - 1:
            state = first
        yield _finished(state, kind, generator)
        steps = {"long": 60}.get(kind, 5 + 3 * number)
        train(module, task, steps=steps, rate=rate)


class _OneClass(Task):
    """A site that has seen one class only."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records with the label 0."""
        records, labels = super().draw(count)
        return records, torch.zeros_like(labels)


def _finished(state: State, kind: str, generator: torch.Generator) -> State:
    """Return the state as the server of this kind sends it."""
    if kind.startswith("pruned"):
        return pruned(state, int(kind[-2:]) / 100)
    if kind in {"float16", "bfloat16"}:
        target = getattr(torch, kind)
        return {
            name: value.to(target) if value.is_floating_point() else value
            for name, value in state.items()
        }
    if kind == "noised":
        return {
            name: value + 0.01 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and not name.endswith("running_var")
            else value
            for name, value in state.items()
        }
    return state


def pruned(state: Mapping[str, Tensor], share: float) -> State:
    """Set the smallest entries of each weight matrix to zero."""
    result = servers.copied(state)
    for value in result.values():
        if value.is_floating_point() and value.ndim > 1:
            magnitudes = value.abs().flatten()
            cut = magnitudes.kthvalue(max(1, int(share * len(magnitudes)))).values
            value[value.abs() <= cut] = 0.0
    return result


@dataclass(frozen=True, slots=True)
class CraftedModel:
    """One crafted global model.

    Attributes:
        net: the architecture.
        module: a module of it.
        family: A, B, C or E, as in the catalogue of attacks.
        variant: which recipe.
        honest: the state it was made from.
        state: what the server sends.
    """

    net: Net
    module: nn.Module
    family: str
    variant: str
    honest: State
    state: State


def _binning(**choices: object) -> Callable[..., State]:
    def craft(model: nn.Module, state: State, *, generator: torch.Generator) -> State:
        return servers.binning(model, state, generator=generator, **choices)  # type: ignore[arg-type]  # checked there

    return craft


def _traps(**choices: object) -> Callable[..., State]:
    def craft(model: nn.Module, state: State, *, generator: torch.Generator) -> State:
        return servers.trap_weights(model, state, generator=generator, **choices)  # type: ignore[arg-type]  # checked there

    return craft


def _blended(craft: Callable[..., State]) -> Callable[..., State]:
    def mix(model: nn.Module, state: State, *, generator: torch.Generator) -> State:
        return servers.blended(craft(model, state, generator=generator), state, 0.5)

    return mix


def _spared(model: nn.Module, state: State, *, generator: torch.Generator) -> State:
    return servers.suppression(model, state, generator=generator, spared=0.33)


HIDING = servers.Stealth(permute=True, scale=1.0, flip=0.5, jitter=0.1)
QUARTER = servers.Stealth(permute=True, rows=0.25)
SHAKEN = servers.Stealth(jitter=0.3)
CRAFTS: Crafts = (
    ("A", "binning-gaussian", _binning()),
    ("A", "binning-mean", _binning(direction=servers.Direction.MEAN)),
    ("A", "binning-cosine", _binning(direction=servers.Direction.COSINE)),
    ("A", "binning-scaled", _binning(scale=0.01)),
    ("A", "binning-hidden", _binning(stealth=HIDING)),
    ("B", "trap-weights", servers.trap_weights),
    ("B", "qbi", servers.qbi),
    ("C", "fishing-class", servers.fishing_class),
    ("C", "fishing-feature", servers.fishing_feature),
    ("E", "suppression", servers.suppression),
)
# Variants that the rules were not made for; whether they still leak is not measured here.
HARDER: Crafts = (
    ("A", "a quarter of the rows", _binning(stealth=QUARTER)),
    ("A", "jitter of .3", _binning(stealth=SHAKEN)),
    ("A", "half mixed with an honest model", _blended(servers.binning)),
    ("B", "traps in a quarter of the rows", _traps(stealth=QUARTER)),
    ("B", "traps with jitter of .3", _traps(stealth=SHAKEN)),
    ("B", "QBI half mixed with an honest model", _blended(servers.qbi)),
    ("C", "fishing half mixed with an honest model", _blended(servers.fishing_class)),
    ("E", "a third of the units spared", _spared),
)


def crafted_models(per_family: int, seed: int, crafts: Crafts = CRAFTS) -> Iterator[CraftedModel]:
    """Yield crafted models of every variant, over nets, first values and training stages in turn.

    Args:
        per_family: how many of each family at least; its variants share them.
        seed: of everything.
        crafts: family, variant and crafting function of each.
    """
    for place, (family, variant, craft) in enumerate(crafts):
        variants = sum(other == family for other, _, _ in crafts)
        per_variant = math.ceil(per_family / variants)
        fitting = [net for net in NETS if net.hidden or family == "C"]
        for index in range(per_variant):
            generator = torch.Generator().manual_seed(seed * 100_003 + 1009 * place + index)
            net = fitting[index % len(fitting)]
            module = fresh(net, generator, ("default", "kaiming", "xavier")[index % 3])
            train(module, Task(net, generator), steps=(0, 10, 60)[(index // 2) % 3], rate=0.05)
            honest = servers.copied(module.state_dict())
            state = craft(module, honest, generator=generator)
            yield CraftedModel(net, module, family, variant, honest, state)
