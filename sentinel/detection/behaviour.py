"""How a global model behaves on synthetic probes: one forward pass of a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name
from sentinel.detection.rules import Finding, Kind, ramp
from sentinel.detection.synthetic import fitting_shape, records, twin, undisturbed, vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        Findings, or None where the model could not be probed (no copy, or no fitting input).
    """
    copied = twin(model, state)
    if copied is None:
        return None
    shape = fitting_shape(copied, generator, sample)
    if shape is None:
        return None
    probes = records(PROBES, shape, generator, tokens=vocabulary(copied))
    fired, output = _fired(copied, probes)
    order = {name: index for index, name in enumerate(sorted(state))}
    found = []
    if not bool(torch.isfinite(output).all()) or float(output.abs().max()) > FINITE_OUTPUT:
        last = order[f"{list(fired)[-1]}.weight"] if fired else 0
        found.append(Finding(Kind.EXPLODED, last))
    for name, on in fired.items():
        strength = _exclusive(on, state, name)
        if strength > 0.0:
            found.append(Finding(Kind.EXCLUSIVE_UNITS, order[f"{name}.weight"], strength))
    return found


def _fired(model: nn.Module, probes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return which probe fires which unit, [probes, units] per layer, and the output."""
    fired: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if isinstance(output, Tensor) and len(output) == len(probes):
                fired[name] = _units(model.get_submodule(name), output) > 0

        model.get_submodule(name).register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            watch(name)
    with torch.no_grad(), undisturbed():
        output = model(probes)
    return fired, output


def _units(module: nn.Module, output: Tensor) -> Tensor:
    """Return each unit's largest value over places, [probes, units]."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    return output.movedim(axis, 1).flatten(2).amax(2) if output.ndim > 2 else output  # noqa: PLR2004  # [probes, units] already


def _exclusive(on: Tensor, state: Mapping[str, Tensor], name: str) -> float:
    """Share of units that fire for exactly one probe, as a strength; weak evidence alone."""
    units = on.shape[1]
    if units < MANY_UNITS or bias_name(f"{name}.weight") not in state:
        return 0.0
    share = float((on.sum(0) == 1).double().mean())
    return 0.4 * ramp(share, 0.3, 0.5)
