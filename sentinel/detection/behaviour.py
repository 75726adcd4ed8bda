"""How a global model behaves on synthetic probes: rules over one forward and one backward pass.

A trap may look like any weights, but it must treat records unlike an honest net does: let few of
them past, or let one of them outweigh the others. No rule here reads a record of anybody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name, entry_name, wide
from sentinel.detection.probes import probed
from sentinel.detection.rules import Finding, Kind, ramp
from sentinel.detection.synthetic import twin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sentinel.detection.probes import Probed, Seen
    from sentinel.detection.synthetic import Twin

MANY_UNITS = 16
FINITE_OUTPUT = 1e6
RARELY = 0.13  # share of the probes for which a unit is rare: 4 of 32
# Dense layers behind a ReLU, the units that fire at all: in honest nets they fire for .39 of the
# probes or more, for .23 with a learning rate ten times too high; in traps of all rows, and in nets
# trained to tell records apart, for .05 to .2.
SELDOM_LOW, SELDOM_HIGH = 0.22, 0.13
# Share of those units that are rare: honest .3 at most, with such a rate .5; traps .3 to .97.
RARE_LOW, RARE_HIGH = 0.15, 0.3
FEW_UNITS = 8  # that must fire, or too few are left to say what is usual
# Share of units that no row of numbers fires: traps of all rows .45 at most; above, the rows are
# unlike what the net knows (flattened images: .8 to .95), and what still fires is chance.
STILL_LOW, STILL_HIGH = 0.65, 0.5
ONE_INPUT = 2.0  # effective number of a row's entries; a normal row of 13 has 4
# Effective share of the probes in the largest output: honest .51 at least, .59 with two outputs or
# more; nets trained to let one record dominate .1 to .4.
LOUD_LOW, LOUD_HIGH = 0.45, 0.3
# The same in the gradient of the last layer: honest .25 at least, where a net knows one class.
LAST_LOW, LAST_HIGH = 0.4, 0.25
# How far a record moves the outputs: honest 30 at most; a trained last layer times 30 moves 60 up.
SPREAD_LOW, SPREAD_HIGH = 60.0, 180.0
# Row norm of a last layer: honest 5 at most, 1 to 2 as a rule; with a learning rate ten times too
# high 16 in one net of eight.
STEEP_LOW, STEEP_HIGH = 12.0, 24.0


def behaviour_findings(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    sample: Sequence[int] | None,
    generator: torch.Generator,
) -> list[Finding] | None:
    """Run synthetic probes through a copy of the model and look at what they do to it.

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
    seen = probed(copied.module, sample, generator)
    if seen is None:
        return None
    return list(_findings(copied, seen, sorted(state)))


def _findings(copied: Twin, seen: Probed, entries: Sequence[str]) -> Iterator[Finding]:
    """Yield what the probes showed; a layer whose weight is in no entry of its own is passed by."""
    places = {
        name: entries.index(copied.names[own])
        for name in seen.layers
        if (own := entry_name(name, "weight")) in copied.names
    }
    last = list(places)[-1] if places else None
    if not bool(torch.isfinite(seen.output).all()) or float(seen.output.abs().max()) > (
        FINITE_OUTPUT
    ):
        yield Finding(Kind.EXPLODED, places[last] if last else 0)
        return
    for name, place in places.items():
        if bias_name(entry_name(name, "weight")) in copied.names and name != last:
            strength = _exclusive(seen, seen.layers[name], _weight_of(copied, name))
            if strength > 0.0:
                yield Finding(Kind.EXCLUSIVE_UNITS, place, strength)
    if last is None:
        return
    for kind, strength in (
        (Kind.DOMINANT_RECORD, _dominant(seen, seen.layers[last])),
        (Kind.STEEP_OUTPUT, _steep(seen, _weight_of(copied, last))),
    ):
        if strength > 0.0:
            yield Finding(kind, places[last], strength)


def _rarity(rates: Tensor, *, plain: bool) -> float:
    """How far the units that fire at all do so for few records only; dead ones say nothing."""
    living = rates[rates > 0]
    if len(living) < FEW_UNITS:
        return 0.0
    rare = float((living <= RARELY).double().mean())
    still = ramp(1.0 - len(living) / len(rates), STILL_LOW, STILL_HIGH) if plain else 1.0
    seldom = ramp(float(living.mean()), SELDOM_LOW, SELDOM_HIGH)
    return still * seldom * ramp(rare, RARE_LOW, RARE_HIGH)


def _weight_of(copied: Twin, name: str) -> Tensor:
    """Return a layer's weight as a matrix of one row per unit."""
    return wide(copied.module.get_parameter(entry_name(name, "weight")).detach()).flatten(1)


def _exclusive(seen: Probed, layer: Seen, weight: Tensor) -> float:
    """Whether nearly all units of a dense layer that fire at all fire for few probes."""
    if not layer.dense or len(weight) < MANY_UNITS or _passes_on(weight):
        return 0.0
    worst = 0.0
    for kind in seen.kinds():
        active = (layer.fired if layer.active is None else layer.active)[kind]
        active = active[active.any(1)]  # a record with no loss shows nothing
        if len(active) >= seen.each // 2:
            worst = max(worst, _rarity(active.double().mean(0), plain=seen.plain))
    return worst


def _passes_on(weight: Tensor) -> bool:
    """Whether each unit passes on one input, as identity first values do: it fires as that did."""
    squares = weight.square()
    spread = squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-30)
    return float(spread.median()) < ONE_INPUT


def _dominant(seen: Probed, last: Seen) -> float:
    """Whether few of the probes have the outputs and the gradient of the last layer alone."""
    if last.sizes is None or _is_single(seen):
        return 0.0
    peaks = seen.output.flatten(1).abs().amax(1).double()
    return max(
        min(
            ramp(effective(peaks[kind]), LOUD_LOW, LOUD_HIGH),
            ramp(effective(last.sizes[kind]), LAST_LOW, LAST_HIGH),
        )
        for kind in seen.kinds()
    )


def _is_single(seen: Probed) -> bool:
    """Whether there is one output: it passes through zero, so its size says little."""
    return seen.output[:1].numel() == 1


def effective(sizes: Tensor) -> float:
    """Effective share of records, (sum n)^2 / (count x sum n^2); 1 where nothing has a size."""
    total = sizes.square().sum() * len(sizes)
    return float(sizes.sum().square() / total) if float(total) > 0.0 else 1.0


def _steep(seen: Probed, weight: Tensor) -> float:
    """Whether a last layer far larger than any turns every record into certainty."""
    norms = torch.linalg.vector_norm(weight, dim=1)
    steep = ramp(float(norms.median()), STEEP_LOW, STEEP_HIGH)
    spreads = [_spread(seen.output[kind]) for kind in seen.kinds()]
    return steep * ramp(max(spreads), SPREAD_LOW, SPREAD_HIGH)


def _spread(output: Tensor) -> float:
    """How far an ordinary record moves its outputs from those of the others."""
    flat = output.flatten(1).double()
    return float((flat - flat.mean(0)).abs().amax(1).median())
