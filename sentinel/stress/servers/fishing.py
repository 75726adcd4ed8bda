"""Family C, magnification: the last layer gives one class or one record nearly all the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    chosen_layer,
    copied,
    has_pair,
    layer_inputs,
    linear_layers,
)
from sentinel.stress.servers.craft import check_index
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.lines import Direction, cuts_at, line_of, middles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

CERTAIN = 1000.0  # a logit that no honest one comes near to
SLOPE = 300.0  # of the magnified feature, as published
TINY = 1e-6  # least scatter that a feature is divided by
SMALL = 0.01  # weight on the hidden layer that keeps it from moving the certain logit


@fitted
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
    check_index(target, max(outputs, 2), "class")
    weight.zero_()
    if outputs == 1:
        weight.fill_(0.5)
        bias.fill_(-CERTAIN if target == 1 else CERTAIN)
    else:
        weight[target] = 0.5
        bias.fill_(CERTAIN)
        bias[target] = 0.0
    return crafted


@fitted
def fishing_feature(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    target: int = 0,
    feature: int | None = None,
    threshold: float = 0.0,
    layer: str | None = None,
    sample: Tensor | None = None,
    batch: int = 8,
) -> State:
    """Magnify one feature of one class, so that records on one side of a threshold fall silent.

    Records of another class fall silent on the other side, so this is for a batch of one class; of
    several it singles out nobody where the net tells them apart.

    Args:
        model: the architecture.
        state: an honest global state.
        generator: chooses the feature where neither it nor a sample is given.
        target: the output that is magnified.
        feature: the input of the last layer that is magnified.
        threshold: where the cut lies on that feature; not used with a sample.
        layer: the last layer; the last fully connected one where left out.
        sample: [n, ...] records; the feature is the one that varies most over them, and the cut
            lies where one record of a batch has a gradient.
        batch: records per batch, for that cut.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Reference: Wen et al., "Fishing for User Data", ICML 2022, arXiv 2202.00580.
    """
    last = chosen_layer(linear_layers(model, state), layer, default=-1)
    crafted = copied(state)
    weight, bias = crafted[f"{last}.weight"], crafted[f"{last}.bias"]
    outputs, width = weight.shape
    drawn = int(torch.randint(width, (1,), generator=generator))
    slope = SLOPE
    if sample is not None:
        inputs = layer_inputs(model, state, sample, last).float().cpu()
        scatter = inputs.std(0)
        drawn = int(scatter.argmax()) if feature is None else feature
        # The far side: behind a ReLU the near one is a plateau at zero, with many records on it.
        threshold = float(torch.quantile(inputs[:, drawn], 1 - 1 / batch))
        slope = -SLOPE / max(float(scatter[drawn]), TINY)
    chosen = drawn if feature is None else feature
    check_index(target, outputs, "output")
    check_index(chosen, width, "feature")
    weight[target] = 0.0
    weight[target, chosen] = slope
    bias[target] = -slope * threshold
    return crafted


@fitted
def class_separation(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    sink: int = 0,
    sample: Tensor | None = None,
    direction: Direction = Direction.GAUSSIAN,
) -> State:
    """Give each class neurons of its own, so that a batch falls apart into its classes.

    One class, the sink, is made certain. A record of class y then moves two logits only, the
    sink's and its own, so neurons that feed the logit of c alone see the records of class c alone.
    With a hidden layer these neurons are bins; without one, the last layer's rows are read.

    Args:
        model: the architecture, with at least two outputs.
        state: an honest global state.
        generator: draws the line that the bins scan.
        sink: the class that is given up.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        direction: the line that is scanned.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: there is one output only, so no class to give up.

    Reference: Wang et al., "Maximum Knowledge Orthogonality Reconstruction", WACV 2024; in place.
    """
    names = linear_layers(model, state)
    last = chosen_layer(names, None, default=-1)
    crafted = copied(state)
    weight, bias = crafted[f"{last}.weight"], crafted[f"{last}.bias"]
    outputs, width = weight.shape
    if outputs < 2:  # noqa: PLR2004 - a pair of classes, at least
        msg = "class separation needs a last layer with an output for each class; it has one"
        raise MisuseError(msg)
    check_index(sink, outputs, "sink")
    others = [index for index in range(outputs) if index != sink]
    groups = torch.arange(width) % len(others)
    weight.zero_()
    for place, index in enumerate(others):
        weight[index, groups == place] = SMALL
    bias.zero_()
    bias[sink] = CERTAIN
    if has_pair(model, state) and attacked_pair(model, state)[1] == last:
        first = attacked_pair(model, state)[0]
        line = line_of(direction, crafted[f"{first}.weight"].shape[1], generator)
        inputs = None if sample is None else layer_inputs(model, state, sample, first)
        levels = middles(width)
        crafted[f"{first}.weight"].copy_(line.expand(width, -1))
        crafted[f"{first}.bias"].copy_(-cuts_at(levels, line, inputs))
    return crafted
