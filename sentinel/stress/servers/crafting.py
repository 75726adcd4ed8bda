"""What a malicious server sends: global models whose training gives patients away.

Each crafting function takes an honest global model and returns one with the same names, shapes and
dtypes, bent in as few places as the attack needs. They exist to test what stands at the door; the
recipes are published ones. What they read, they read from a fully connected layer followed by a
ReLU; a model without such a layer is refused with a sentence that says so.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    chosen_layer,
    copied,
    layer_inputs,
    linear_layers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = [
    "PLAIN",
    "Craft",
    "Direction",
    "Stealth",
    "attacked_pair",
    "binning",
    "blended",
    "copied",
    "fishing_class",
    "fishing_feature",
    "isolation",
    "layer_inputs",
    "linear_layers",
    "pass_through",
    "qbi",
    "suppression",
    "trap_weights",
]


class Direction(enum.StrEnum):
    """Which line the bins lie on."""

    MEAN = "mean"  # ones / d: the mean of the record's values
    GAUSSIAN = "gaussian"  # one normal row of length one
    COSINE = "cosine"  # the first DCT-2 row that is not constant, length one


@dataclass(frozen=True, slots=True)
class Stealth:
    """How a crafted layer hides; none of it costs the attacker a record.

    Attributes:
        permute: bins stand in random order.
        scale: row i and its bias are multiplied by exp(u), u uniform in -scale to scale.
        flip: share of the rows whose sign is turned (they cut the same line from the other side).
        jitter: normal noise on each weight of a row, relative to the row's root mean square.
        rows: share of the layer's rows that are crafted; the others stay honest.
    """

    permute: bool = False
    scale: float = 0.0
    flip: float = 0.0
    jitter: float = 0.0
    rows: float = 1.0


PLAIN = Stealth()


class Craft(Protocol):
    """A crafting function with all its choices made."""

    def __call__(self, model: nn.Module, state: State, *, generator: torch.Generator) -> State:
        """Return a crafted copy of `state`."""


def binning(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    direction: Direction = Direction.GAUSSIAN,
    scale: float = 1.0,
    sample: Tensor | None = None,
    stealth: Stealth = PLAIN,
) -> State:
    """Let all neurons scan one direction at rising thresholds, so that neighbours isolate a record.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        direction: the line that is scanned.
        scale: factor on this layer and every later fully connected one. Small values keep several
            local steps close to one, so that more is read from epochs of local training.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        stealth: how the rows hide.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no two fully connected layers in a row.

    Reference: Fowl et al., "Robbing the Fed", ICLR 2022, arXiv 2110.13057; in place, as in Shi et
    al., NDSS 2025.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    rows = _crafted_rows(len(bias), stealth, generator)
    line = _line(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, state, sample, first)
    cuts = _cuts(line, len(rows), inputs)
    weight[rows] = _jittered(line.expand(len(rows), -1), stealth, generator).to(weight)
    bias[rows] = (-cuts).to(bias)
    _set_constant(crafted, following, linear_layers(model, state)[-1] == following)
    factors = _row_factors(len(rows), stealth, generator).to(weight)
    weight[rows] *= factors[:, None]
    bias[rows] *= factors
    crafted[f"{following}.weight"][:, rows] /= factors.abs()
    _scale_from(crafted, linear_layers(model, state), first, scale)
    return crafted


def isolation(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    sample: Tensor,
) -> State:
    """Put every neuron at one cut that only the outermost record passes, and stake all on it.

    Binning with a single bin. The whole layer's update is then one record's, so this is what a
    server does that wants one patient through the noise rather than many without it.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        sample: [n, ...] with n >= 2, records like those behind the update; the cut lies between
            the two outermost.

    Returns:
        A crafted state with the same names, shapes and dtypes.
    """
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    line = _line(Direction.GAUSSIAN, weight.shape[1], generator)
    along = layer_inputs(model, state, sample, first).float().cpu() @ line
    cut = along.topk(2).values.mean()
    weight.copy_(line.expand_as(weight))
    bias.copy_(-cut.expand_as(bias))
    _set_constant(crafted, following, linear_layers(model, state)[-1] == following)
    return crafted


def trap_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    stealth: Stealth = PLAIN,
) -> State:
    """Make the negative half of each row outweigh the positive, so that few records fire it.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        stealth: `rows`, `scale` and `jitter` apply; the rows have no order and no sign to hide.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Reference: Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023, arXiv 2112.02918.
    """
    first = chosen_layer(linear_layers(model, state), layer, default=0)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    rows = _crafted_rows(len(bias), stealth, generator)
    traps = torch.stack([_trap_row(weight.shape[1], generator) for _ in rows])
    traps = _jittered(traps, stealth, generator)
    weight[rows] = (traps * _row_scales(len(rows), stealth, generator)[:, None]).to(weight)
    bias[rows] = 0.0
    return crafted


def qbi(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    batch: int = 32,
) -> State:
    """Set each bias at the quantile where a normal row fires for one record of a batch.

    Args:
        model: the architecture, with a ReLU behind the attacked layer and standardised inputs.
        state: an honest global state.
        generator: where the attacker's randomness comes from.
        layer: attacked layer; the first fully connected one where left out.
        batch: records per batch, at least 2.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Reference: Nowak et al., "QBI: Quantile-based bias initialization", 2024, arXiv 2406.18745.
    """
    if batch < 2:  # noqa: PLR2004 - the quantile of one in one is infinite
        msg = f"batch must be at least 2 records, got {batch}"
        raise MisuseError(msg)
    first = chosen_layer(linear_layers(model, state), layer, default=0)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    weight.copy_(torch.randn(weight.shape, generator=generator))
    one_in_batch = torch.special.ndtri(torch.tensor(1.0 / batch)) * math.sqrt(weight.shape[1])
    bias.fill_(float(one_in_batch))
    return crafted


def fishing_class(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    target: int = 0,
    layer: str | None = None,
) -> State:
    """Make the loss certain about every class but one, so that only its records have a gradient.

    Args:
        model: the architecture.
        state: an honest global state.
        generator: not used; here because all crafting functions share one shape.
        target: the class that is fished for; with a single output 0 or 1.
        layer: the last layer; the last fully connected one where left out.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Reference: Wen et al., "Fishing for User Data", ICML 2022, arXiv 2202.00580.
    """
    del generator
    last = chosen_layer(linear_layers(model, state), layer, default=-1)
    crafted = copied(state)
    weight, bias = crafted[f"{last}.weight"], crafted[f"{last}.bias"]
    outputs = len(bias)
    _check_index(target, max(outputs, 2), "class")
    weight.zero_()
    if outputs == 1:
        weight.fill_(0.5)
        bias.fill_(-1000.0 if target == 1 else 1000.0)
    else:
        weight[target] = 0.5
        bias.fill_(1000.0)
        bias[target] = 0.0
    return crafted


def fishing_feature(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    target: int = 0,
    feature: int | None = None,
    threshold: float = 0.0,
    layer: str | None = None,
) -> State:
    """Magnify one feature of one class, so that records on one side of a threshold fall silent.

    Args:
        model: the architecture.
        state: an honest global state.
        generator: chooses the feature where none is named.
        target: the output that is magnified.
        feature: the input of the last layer that is magnified.
        threshold: where the cut lies on that feature.
        layer: the last layer; the last fully connected one where left out.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Reference: Wen et al., "Fishing for User Data", ICML 2022, arXiv 2202.00580.
    """
    last = chosen_layer(linear_layers(model, state), layer, default=-1)
    crafted = copied(state)
    weight, bias = crafted[f"{last}.weight"], crafted[f"{last}.bias"]
    outputs, width = weight.shape
    drawn = int(torch.randint(width, (1,), generator=generator))
    chosen = drawn if feature is None else feature
    _check_index(target, outputs, "output")
    _check_index(chosen, width, "feature")
    weight[target] = 0.0
    weight[target, chosen] = 300.0
    bias[target] = -300.0 * threshold
    return crafted


def suppression(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    layer: str | None = None,
    push: float = 1000.0,
    spared: float = 0.0,
) -> State:
    """Kill a ReLU layer by its bias, so that this client's update is zero and another's stands out.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: chooses the rows that are spared.
        layer: attacked layer; the first fully connected one where left out.
        push: how far below zero every bias is put.
        spared: share of the rows that stay alive.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the layer is the last one, so no ReLU can follow it.

    Reference: Pasquini et al., "Eluding Secure Aggregation", CCS 2022, arXiv 2111.07380.
    """
    first, _ = attacked_pair(model, state, layer)
    crafted = copied(state)
    bias = crafted[f"{first}.bias"]
    dead = torch.randperm(len(bias), generator=generator)[round(spared * len(bias)) :]
    bias[dead] = -push
    return crafted


def pass_through(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Turn every convolution into the identity, so that a later layer sees the image itself.

    Args:
        model: the architecture.
        state: an honest global state.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the model has no convolution.

    Reference: Boenisch et al., 2023, arXiv 2112.02918, section on convolutional layers.
    """
    crafted = copied(state)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and f"{name}.weight" in crafted
    ]
    if not names:
        msg = (
            "pass_through needs a model with a convolution (torch.nn.Conv1d, 2d or 3d); it has none"
        )
        raise MisuseError(msg)
    for name in names:
        nn.init.dirac_(crafted[f"{name}.weight"])
        if f"{name}.bias" in crafted:
            crafted[f"{name}.bias"].zero_()
    return crafted


def blended(crafted: Mapping[str, Tensor], honest: Mapping[str, Tensor], share: float) -> State:
    """Mix `share` of a crafted state with the rest of an honest one, floating entries only."""
    return {
        name: torch.lerp(honest[name], value, share) if value.is_floating_point() else value.clone()
        for name, value in crafted.items()
    }


def _check_index(index: int, size: int, what: str) -> None:
    if not 0 <= index < size:
        msg = f"{what} must be from 0 to {size - 1}, got {index}"
        raise MisuseError(msg)


def _line(direction: Direction, width: int, generator: torch.Generator) -> Tensor:
    """Return the scanned direction, [width]."""
    if direction is Direction.MEAN:
        return torch.full((width,), 1.0 / width)
    if direction is Direction.COSINE:
        steps = (torch.arange(width) + 0.5) * (math.pi / width)
        return torch.cos(steps) * math.sqrt(2.0 / width)
    drawn = torch.randn(width, generator=generator)
    return drawn / drawn.square().sum().sqrt()


def _cuts(line: Tensor, count: int, inputs: Tensor | None) -> Tensor:
    """Return `count` rising thresholds, [count]: inner quantiles of line . x."""
    levels = (torch.arange(count) + 0.5) / count
    if inputs is None:
        standard: Tensor = torch.special.ndtri(levels)
        return standard * line.square().sum().sqrt()
    return torch.quantile(inputs.float().cpu() @ line, levels)


def _crafted_rows(count: int, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Return which rows are crafted, in the order of their bins."""
    order = torch.randperm(count, generator=generator)
    chosen = order[: max(2, round(stealth.rows * count))]
    return chosen if stealth.permute else chosen.sort().values


def _jittered(rows: Tensor, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Add normal noise relative to each row's root mean square."""
    rms = rows.square().mean(1, keepdim=True).sqrt()
    return rows + stealth.jitter * rms * torch.randn(rows.shape, generator=generator)


def _row_scales(count: int, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Return positive factors, log-uniform, [count]."""
    return torch.exp(stealth.scale * (2 * torch.rand(count, generator=generator) - 1))


def _row_factors(count: int, stealth: Stealth, generator: torch.Generator) -> Tensor:
    """Return factors with random sign, [count]."""
    scales = _row_scales(count, stealth, generator)
    flipped = torch.rand(count, generator=generator) < stealth.flip
    return torch.where(flipped, -scales, scales)


def _trap_row(width: int, generator: torch.Generator) -> Tensor:
    """Return one trap row, [width]: half negative, half the same sizes, shuffled and shrunk."""
    half = width // 2
    order = torch.randperm(width, generator=generator)
    negative = -(torch.randn(width - half, generator=generator) * 0.5).abs()
    shuffled = negative[torch.randperm(len(negative), generator=generator)][:half]
    row = torch.empty(width)
    row[order[: width - half]] = negative
    row[order[width - half :]] = 0.95 * shuffled.abs()
    return row


def _set_constant(crafted: State, layer: str, is_last: bool) -> None:  # noqa: FBT001 - private
    """Give every input of `layer` the same column, so that all bins weigh records alike."""
    weight = crafted[f"{layer}.weight"]
    column = torch.ones(weight.shape[0])
    if is_last and len(column) > 1:
        # Softmax gradients sum to zero over the classes: an equal column would read nothing.
        column[1::2] = -1.0
    weight.copy_(column[:, None].expand_as(weight))
    crafted[f"{layer}.bias"].zero_()


def _scale_from(crafted: State, names: list[str], first: str, scale: float) -> None:
    for name in itertools.dropwhile(lambda name: name != first, names):
        crafted[f"{name}.weight"] *= scale
        crafted[f"{name}.bias"] *= scale
