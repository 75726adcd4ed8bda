"""Family G, multi-round scanning: parallel rows whose biases move on from round to round."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, attacked_pair, copied, layer_inputs, linear_layers
from sentinel.stress.passive.tabular import LayerView, view
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.lines import Direction, cuts_at, line_of
from sentinel.stress.servers.rows import scale_from, set_even

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

EMPTY = 1e-5  # share of the layer's largest bias update under which a bin holds no record
LIKE = 0.15  # relative difference under which two records' errors are alike
CROWD = 0.7  # records to a bin that is split: more would not come apart, fewer would waste neurons
SPARE = 0.1  # of the sample's range, by which the first cuts reach past it on each side
FINEST = 1e-5  # share of the line under which a bin is not split: single precision ends there
LEAST = 3  # neurons that split one bin in two


@fitted
def scan(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    part: int = 0,
    parts: int = 4,
    layer: str | None = None,
    direction: Direction = Direction.COSINE,
    sample: Tensor | None = None,
    scale: float = 0.1,
) -> State:
    """Spend the whole layer on one part of the line; the next rounds take the other parts.

    A layer of K neurons has K bins in a round and K x parts over all rounds, so a hospital that
    trains on the same records again is read as by a layer so much wider. Neighbouring parts share
    a cut.

    Args:
        model: the architecture, with a ReLU behind the attacked layer.
        state: an honest global state.
        generator: draws the line where `direction` is a normal one; the same in each part then.
        part: which part, from 0.
        parts: into how many the line is divided.
        layer: attacked layer; the first fully connected one where left out.
        direction: the line that is scanned.
        sample: [n, ...] records the thresholds are quantiles of; where left out, the layer's input
            is taken for standard normal.
        scale: factor on this layer and every later fully connected one, so that no record's loss
            becomes certain; where the outputs hardly move, nor does a record's part in the rounds.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: no two fully connected layers in a row, or no such part.

    Reference: "Cutting Through Privacy" (Diana), 2025, arXiv 2505.10264; cuts set in advance,
    where `Search` sets them by what came back.
    """
    if not 0 <= part < parts:
        msg = f"part must be from 0 to {parts - 1}, got {part}"
        raise MisuseError(msg)
    first, following = attacked_pair(model, state, layer)
    crafted = copied(state)
    weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
    count = len(bias)
    line = line_of(direction, weight.shape[1], generator)
    inputs = None if sample is None else layer_inputs(model, state, sample, first)
    levels = (part * (count - 1) + torch.arange(count) + 0.5) / (parts * (count - 1) + 1)
    weight.copy_(line.expand_as(weight))
    bias.copy_(-cuts_at(levels, line, inputs))
    set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
    scale_from(crafted, linear_layers(model, state), first, scale)
    return crafted


@dataclass(frozen=True, slots=True)
class _Bin:
    """A part of the line in which something lies.

    Attributes:
        low: its lower end.
        high: its upper end.
        step: by how much the bias's update differs over it, a record's error each.
        read: the read-out of all that lies in it, [width].
        place: where on the line that read-out lies.
    """

    low: float
    high: float
    step: float
    read: Tensor
    place: float


class Search:
    """A scan that splits in each round the bins in which an earlier one found several records.

    A craft with a memory: called for each round's model, and told by `learn` what came back. A bin
    with the error of one record, whose read-out lies in it, is left alone; an empty one is dropped;
    the layer is spent on the others. Three records whose errors leave that of one pass for one.

    Reference: "Cutting Through Privacy" (Diana), 2025, arXiv 2505.10264.
    """

    def __init__(
        self,
        *,
        sample: Tensor,
        direction: Direction = Direction.COSINE,
        layer: str | None = None,
        scale: float = 0.1,
    ) -> None:
        """Start with nothing found.

        Args:
            sample: [n, ...] public records; the first cuts are spread over them.
            direction: the line that is searched.
            layer: attacked layer; the first fully connected one where left out.
            scale: factor on this layer and every later fully connected one, as for `scan`.
        """
        self._sample, self._direction, self._layer, self._scale = sample, direction, layer, scale
        self._line: Tensor | None = None
        self._reach = 0.0  # how far along the line a record could lie
        self._cuts: list[float] = []
        self._open: list[_Bin] | None = None
        self._steps: list[float] = []
        self._names = ("", "")
        self._sent: State = {}

    @property
    def open(self) -> int:
        """How many bins are still to be split; none before the first round has come back."""
        return len(self._open or ())

    def __call__(
        self, model: nn.Module, state: Mapping[str, Tensor], /, *, generator: torch.Generator
    ) -> State:
        """Return the next round's model.

        Raises:
            MisuseError: no two fully connected layers in a row, or fewer than three neurons.
        """
        return fitted(self._next)(model, state, generator=generator)

    def _next(
        self, model: nn.Module, state: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> State:
        self._names = first, following = attacked_pair(model, state, self._layer)
        crafted = copied(state)
        weight, bias = crafted[f"{first}.weight"], crafted[f"{first}.bias"]
        if len(bias) < LEAST:
            msg = f"a search needs at least {LEAST} neurons, layer {first!r} has {len(bias)}"
            raise MisuseError(msg)
        if self._line is None:
            self._line = line_of(self._direction, weight.shape[1], generator)
            inputs = layer_inputs(model, state, self._sample, first).float().cpu()
            self._reach = float(self._line.norm() * inputs.norm(dim=1).max())
            self._cuts = _first_cuts(inputs @ self._line, len(bias))
        elif self._open:
            self._cuts = _next_cuts(self._open, len(bias), _usual(self._steps))
        weight.copy_(self._line.expand_as(weight))
        bias.copy_(-torch.tensor(self._cuts))
        set_even(crafted, following, is_last=linear_layers(model, state)[-1] == following)
        scale_from(crafted, linear_layers(model, state), first, self._scale)
        self._sent = crafted
        return copied(crafted)

    def learn(self, received: Mapping[str, Tensor]) -> None:
        """Find the bins that hold several records.

        Args:
            received: the local state, or the mean of several.
        """
        if self._line is None:
            msg = "a search learns of a round that it has crafted; call it first"
            raise MisuseError(msg)
        seen = view(self._sent, received, *self._names)
        found = _occupied(seen, self._cuts, self._line.double())
        split = [one for one in self._open or () if _is_split(one, self._cuts)]
        if self._open is not None:  # between the bins that were split lie those that were not
            found = [one for one in found if any(_inside(one, other) for other in split)]
        self._steps += [one.step for one in found if one.low <= one.place <= one.high]
        usual = _usual(self._steps)
        finest = FINEST * self._reach
        several = [
            one for one in found if not _is_single(one, usual) and one.high - one.low > finest
        ]
        waiting = [one for one in self._open or () if not _is_split(one, self._cuts)]
        self._open = sorted(waiting + several, key=lambda one: one.low)


def _first_cuts(along: Tensor, count: int) -> list[float]:
    """Return cuts at quantiles of the public records, the outermost beyond all of them."""
    spare = SPARE * float(along.max() - along.min())
    inner = torch.quantile(along, torch.linspace(0, 1, count - 2)).tolist()
    return [float(along.min()) - spare, *inner, float(along.max()) + spare]


def _next_cuts(bins: list[_Bin], count: int, usual: tuple[float, float]) -> list[float]:
    """Return `count` cuts that split the first bins, the more finely the more records they hold."""
    cuts: list[float] = []
    for one in bins:
        left = count - len(cuts) + (one.low in cuts)  # a cut that two bins share is made once
        if left < LEAST:
            break
        unit = usual[0] if one.step > 0 else usual[1]
        records = max(2.0, abs(one.step / unit)) if unit else 2.0
        ends = torch.linspace(
            one.low, one.high, min(left, math.ceil(records / CROWD) + 1), dtype=torch.float64
        )
        cuts += [cut for cut in ends.tolist() if cut not in cuts]
    return cuts + cuts[-1:] * (count - len(cuts))


def _occupied(seen: LayerView, cuts: list[float], line: Tensor) -> list[_Bin]:
    """Return the bins between neighbouring cuts in which a record moved the model."""
    weight, bias = seen.weight / seen.gains[:, None], seen.bias / seen.gains
    floor = EMPTY * float(bias.abs().max())
    steps, parts = -bias.diff(), -weight.diff(dim=0)
    reads = parts / torch.where(steps.abs() > floor, steps, floor)[:, None]
    places = reads @ line
    return [
        _Bin(low, high, float(steps[number]), reads[number], float(places[number]))
        for number, (low, high) in enumerate(itertools.pairwise(cuts))
        if steps[number].abs() > floor or float(parts[number].norm()) > floor
    ]


def _usual(steps: list[float]) -> tuple[float, float]:
    """Return the step of one record, upwards and downwards: the one with the most like it, or 0."""
    found = []
    for side in ([one for one in steps if one > 0], [one for one in steps if one < 0]):
        alike = [sum(abs(one / other - 1) < LIKE for one in side) for other in side]
        found.append(side[alike.index(max(alike))] if side else 0.0)
    return found[0], found[1]


def _is_single(one: _Bin, usual: tuple[float, float]) -> bool:
    """Whether one record alone seems to lie in the bin: a usual error, read where the bin is."""
    unit = usual[0] if one.step > 0 else usual[1]
    return one.low <= one.place <= one.high and abs(one.step - unit) < LIKE * abs(unit)


def _is_split(one: _Bin, cuts: list[float]) -> bool:
    """Whether the cuts that were sent split this bin."""
    return any(one.low < cut < one.high for cut in cuts)


def _inside(one: _Bin, other: _Bin) -> bool:
    return other.low <= one.low and one.high <= other.high
