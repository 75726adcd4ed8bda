"""How a global model behaves on synthetic probes: one forward pass of a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name, entry_name
from sentinel.detection.rules import Finding, Kind, ramp
from sentinel.detection.synthetic import (
    ModelError,
    fitting_shape,
    records,
    run,
    twin,
    vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sentinel.detection.synthetic import Twin

PROBES = 32
MANY_UNITS = 16
FINITE_OUTPUT = 1e6


def behaviour_findings(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    sample: Sequence[int] | None,
    generator: torch.Generator,
) -> list[Finding] | None:
    """Run synthetic probes through a copy of the model and look at which units fire.

    Args:
        model: the architecture.
        state: a finite global state.
        sample: shape of one input, or None to find it.
        generator: draws the probes.

    Returns:
        Findings, or None where the model could not be probed (no copy, no fitting input, or its
        own code fails).
    """
    copied = twin(model, state)
    if copied is None:
        return None
    try:
        shape = fitting_shape(copied.module, generator, sample)
        if shape is None:
            return None
        probes = records(PROBES, shape, generator, tokens=vocabulary(copied.module))
        fired, output = _fired(copied.module, probes)
    except ModelError:
        return None
    return list(_findings(copied, fired, output, sorted(state)))


def _findings(
    copied: Twin, fired: Mapping[str, Tensor], output: Tensor, entries: Sequence[str]
) -> Iterator[Finding]:
    """Yield what the probes showed; a layer whose weight is in no entry of its own is passed by."""
    places = {
        name: entries.index(copied.names[own])
        for name in fired
        if (own := entry_name(name, "weight")) in copied.names
    }
    if not bool(torch.isfinite(output).all()) or float(output.abs().max()) > FINITE_OUTPUT:
        yield Finding(Kind.EXPLODED, list(places.values())[-1] if places else 0)
    for name, place in places.items():
        has_bias = bias_name(entry_name(name, "weight")) in copied.names
        strength = _exclusive(fired[name]) if has_bias else 0.0
        if strength > 0.0:
            yield Finding(Kind.EXCLUSIVE_UNITS, place, strength)


def _fired(model: nn.Module, probes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return which probe fires which unit, [probes, units] per layer, and the output."""
    fired: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if isinstance(output, Tensor) and output.ndim > 1 and len(output) == len(probes):
                fired[name] = _units(model.get_submodule(name), output) > 0

        model.get_submodule(name).register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            watch(name)
    with torch.no_grad():
        output = run(model, probes)
    return fired, output


def _units(module: nn.Module, output: Tensor) -> Tensor:
    """Return each unit's largest value over places, [probes, units]."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    return output.movedim(axis, 1).flatten(2).amax(2) if output.ndim > 2 else output  # noqa: PLR2004  # [probes, units] already


def _exclusive(on: Tensor) -> float:
    """Share of units that fire for exactly one probe, as a strength; weak evidence alone."""
    if on.shape[1] < MANY_UNITS:
        return 0.0
    share = float((on.sum(0) == 1).double().mean())
    return 0.4 * ramp(share, 0.3, 0.5)
