"""The tabular attacker: reads patients' rows out of the update of a model's first layer.

For a layer h = relu(W x + b), every record adds c_i x to row i of the weight's update and c_i to
entry i of the bias's, with one c_i for each neuron i that it fires. So dW_i / db_i is a record
where one record fires the neuron, and (dW_i - dW_j) / (db_i - db_j) is one where a single record
tells two neurons apart. Where one record dominates, the update has rank one, and all neurons
together beat the noise that hides it in each.

The attacker is adaptive: it knows the global model that was sent, and is told how much noise the
update carries or estimates it. It drops what lies under the noise, averages neurons, and shrinks
what is left as the noise asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.interval import Count, Interval, difference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

EXACT = 0.01  # relative error under which a row counts as read
NEAR = 0.30  # relative error under which a guess counts as near
WIDTHS = (1, 2, 3, 4, 8, 16)  # bins averaged on each side of a cut
PARALLEL = 0.9  # cosine from which two rows scan the same direction
STANDS_OUT = 2.0  # standard deviations by which a divisor must exceed the noise
SPECTRUM = 4  # singular directions that the matched filter starts from
MEDIAN_SIZE = 0.6745  # median of |z| of a standard normal z
PAIRED = 256  # neurons at most that are taken in pairs: those whose bias moved most
FARTHEST = 6.0  # standard deviations from the middle beyond which no feature of a record lies
FILLINGS = 100  # alternations that fill in what a mask dropped
STEPS = 6  # alternations of the matched filter: which neurons fire, then which record


@dataclass(frozen=True, slots=True)
class Sanitizer:
    """What the attacker knows of the treatment of the update; where left out, none.

    Attributes:
        std: standard deviation of the noise on each coordinate that was kept.
        keep: share of coordinates kept; the others are exactly zero, which shows the mask.
    """

    std: float = 0.0
    keep: float = 1.0


UNTREATED = Sanitizer()


@dataclass(frozen=True, slots=True)
class LayerView:
    """What the server sees of the attacked layer, and what it sent there; all float64.

    Attributes:
        weight: update of the weight, [neurons, features].
        bias: update of the bias, [neurons].
        sent_weight: the weight it sent, [neurons, features].
        sent_bias: the bias it sent, [neurons].
        next_weight: update of the next layer's weight, [outputs, neurons].
        next_bias: update of the next layer's bias, [outputs].
        sent_next: the weight it sent to the next layer, [outputs, neurons].
    """

    weight: Tensor
    bias: Tensor
    sent_weight: Tensor
    sent_bias: Tensor
    next_weight: Tensor
    next_bias: Tensor
    sent_next: Tensor

    @property
    def gains(self) -> Tensor:
        """The weight by which the next layer's first output takes each neuron, [neurons]."""
        return self.sent_next[0]


@dataclass(frozen=True, slots=True)
class Reads:
    """What one or several updates gave away, and what chance gives.

    `held_out_near` counts records that were *not* behind the update but lie as near to the same
    guesses: patients of one hospital resemble one another, and many guesses hit many people.

    Attributes:
        records: how many records were behind the updates.
        exact: how many of them were read.
        near: how many of them a guess came near to.
        held_out: how many held-out records the same guesses were measured against.
        held_out_near: how many of those a guess came near to.
        guesses: how many guesses there were; without any, nothing was measured.
    """

    records: int = 0
    exact: int = 0
    near: int = 0
    held_out: int = 0
    held_out_near: int = 0
    guesses: int = 0

    def __add__(self, other: Reads) -> Reads:
        """Pool two measurements."""
        return Reads(
            self.records + other.records,
            self.exact + other.exact,
            self.near + other.near,
            self.held_out + other.held_out,
            self.held_out_near + other.held_out_near,
            self.guesses + other.guesses,
        )

    @property
    def near_share(self) -> float:
        """Share of the records that a guess came near to."""
        return Count(self.near, self.records).share

    @property
    def held_out_share(self) -> float:
        """Share of the held-out records that the same guesses came near to."""
        return Count(self.held_out_near, self.held_out).share

    @property
    def advantage(self) -> float:
        """How much larger the first share is than the second."""
        return self.near_share - self.held_out_share

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the advantage (two-sided, Newcombe)."""
        return difference(Count(self.near, self.records), Count(self.held_out_near, self.held_out))


def view(
    sent: Mapping[str, Tensor], received: Mapping[str, Tensor], layer: str, following: str
) -> LayerView:
    """Take the attacked layer out of what was sent and what came back.

    Args:
        sent: the global state.
        received: the released state, with the same names.
        layer: name of the attacked layer.
        following: name of the layer that it feeds.

    Raises:
        MisuseError: a name is missing in either state.
    """
    names = [f"{name}.{part}" for name in (layer, following) for part in ("weight", "bias")]
    if missing := [name for name in names if name not in sent or name not in received]:
        msg = f"the sent and the received state must both hold {', '.join(missing)}"
        raise MisuseError(msg)
    weight, bias, next_weight, _ = was = [sent[name].double() for name in names]
    steps = [received[name].double() - before for name, before in zip(names, was, strict=True)]
    return LayerView(
        weight=steps[0],
        bias=steps[1],
        sent_weight=weight,
        sent_bias=bias,
        next_weight=steps[2],
        next_bias=steps[3],
        sent_next=next_weight,
    )


def sanitizer_of(seen: LayerView) -> Sanitizer:
    """Estimate the treatment from a sanitized update itself; nobody has to tell the attacker.

    Most coordinates of a noised update are noise, so the median size of those that are not zero
    gives the noise away. An update without noise is taken for noised.
    """
    values = torch.cat([seen.weight, seen.bias[:, None]], 1)
    kept = values[values != 0.0]
    if kept.numel() == 0:
        return UNTREATED
    return Sanitizer(float(kept.abs().median()) / MEDIAN_SIZE)


def guess_rows(seen: LayerView, sanitizer: Sanitizer) -> Tensor:
    """Return all of the attacker's guesses at records behind one update.

    Args:
        seen: the attacked layer.
        sanitizer: what is known of the update's treatment.

    Returns:
        [guesses, features] float64; finite, in no order of merit, possibly empty.
    """
    parts = [read_outs(seen, sanitizer), matched_filter(seen, sanitizer), lone_record(seen)]
    order = bins(seen)
    parts += [neighbours(seen, sanitizer, order, width) for width in WIDTHS]
    if sanitizer.keep < 1.0:
        parts.append(completion(seen))
    guesses = torch.cat(parts)
    return guesses[torch.isfinite(guesses).all(1)]


def guess_rows_untold(seen: LayerView) -> Tensor:
    """Return the guesses of an attacker whom nobody tells how the update was sanitized.

    An update alone does not say whether its small values are noise or training, so this attacker
    guesses under both readings.

    Args:
        seen: the attacked layer.

    Returns:
        [guesses, features], as `guess_rows`.
    """
    return torch.cat([guess_rows(seen, UNTREATED), guess_rows(seen, sanitizer_of(seen))])


def read_outs(seen: LayerView, sanitizer: Sanitizer) -> Tensor:
    """Return dW_i / db_i of every neuron whose divisor stands out from the noise."""
    return _ratios(seen.weight, seen.bias, sanitizer.std)


def read_mixtures(seen: LayerView, sanitizer: Sanitizer, secret: Tensor) -> Tensor:
    """Return the same of mixtures of neurons, [mixtures, neurons], that the server alone knows."""
    mixtures = torch.nn.functional.normalize(secret.double(), dim=1)  # noise as a neuron's own
    return _ratios(mixtures @ seen.weight, mixtures @ seen.bias, sanitizer.std)


def neighbours(seen: LayerView, sanitizer: Sanitizer, order: list[Tensor], width: int) -> Tensor:
    """Return the read-outs of the step between `width` bins before and after each cut.

    Args:
        seen: the attacked layer.
        sanitizer: what is known of the update's treatment.
        order: what `bins` found; an honest model has none, and gives no guesses.
        width: bins averaged on each side of a cut.
    """
    found = [seen.weight.new_empty(0, seen.weight.shape[1])]
    for rows in order:
        if len(rows) < 2 * width:
            continue
        level = seen.gains[rows] / seen.gains[rows].square().mean().sqrt()
        weight = _steps(seen.weight[rows] / level[:, None], width)
        bias = _steps(seen.bias[rows, None] / level[:, None], width)
        std = sanitizer.std * float(level.reciprocal().square().mean().sqrt()) * (2 / width) ** 0.5
        found.append(_ratios(weight, bias[:, 0], std))
    return torch.cat(found)


def differences(seen: LayerView, sanitizer: Sanitizer) -> Tensor:
    """Return the read-outs of the step between any two neurons, each by its gain.

    By its gain, a neuron's update is the sum of the records that fire it, each by its own error; so
    two neurons that differ in a single record give it away. Among many pairs of neurons there is
    one such for nearly every record of a small batch, in an honest model too. Not part of
    `guess_rows`, whose figures are what honest servers are compared by.

    Args:
        seen: the attacked layer; needs a next layer with one output, otherwise gives nothing.
        sanitizer: what is known of the update's treatment.

    Returns:
        [guesses, features]; at most PAIRED^2 / 2, none with a feature beyond FARTHEST.
    """
    if len(seen.sent_next) != 1:
        return seen.weight.new_empty(0, seen.weight.shape[1])
    chosen = seen.bias.abs().argsort(descending=True)[:PAIRED]
    chosen = chosen[seen.gains[chosen] != 0.0]
    gains = seen.gains[chosen]
    one, other = torch.triu_indices(len(chosen), len(chosen), 1)
    weight, bias = seen.weight[chosen] / gains[:, None], seen.bias[chosen] / gains
    divisors = bias[one] - bias[other]
    spread = gains[one].square().reciprocal() + gains[other].square().reciprocal()
    std = sanitizer.std * spread.sqrt()
    floor = 1e-6 * float(divisors.abs().max()) if len(divisors) else 0.0
    stand_out = divisors.abs() > (STANDS_OUT * std).clamp_min(floor)
    found = (weight[one] - weight[other])[stand_out] / divisors[stand_out, None]
    shrunk = found / (1 + (std / divisors)[stand_out].square())[:, None]
    return shrunk[(shrunk.abs() < FARTHEST).all(1)]


def bins(seen: LayerView) -> list[Tensor]:
    """Return the rows that scan one direction, in the order of their cuts, for each of two signs.

    Order, sign and scale of the rows come from the weights that were sent, so permuted, rescaled
    and sign-flipped bins are found as well as plain ones.

    Returns:
        Up to two index tensors; none where no two rows are parallel.
    """
    unit = torch.nn.functional.normalize(seen.sent_weight, dim=1)
    cosines = unit @ unit.T
    leader = int((cosines.abs() > PARALLEL).sum(1).argmax())
    cuts = -seen.sent_bias / (seen.sent_weight @ unit[leader])
    sides = (cosines[leader] > PARALLEL, cosines[leader] < -PARALLEL)
    rows = [torch.nonzero(side)[:, 0] for side in sides]
    return [part[cuts[part].argsort()] for part in rows if len(part) > 1]


def matched_filter(seen: LayerView, sanitizer: Sanitizer) -> Tensor:
    """Return the records that the whole layer, taken as of rank one, points to.

    The first singular direction is the best single record under white noise. From each of the
    first few, and from the next layer's weights, alternate: which neurons does this record fire in
    the model that was sent, and which record do those neurons, weighted as backpropagation weighs
    them, point to.
    """
    joined = torch.cat([seen.weight, seen.bias[:, None]], 1)  # [neurons, features + 1]
    left, _, right = torch.linalg.svd(joined, full_matrices=False)
    filters = torch.cat([left.T[:SPECTRUM], seen.gains[None]])  # [starts, neurons]
    found = [_ratios(right[:SPECTRUM, :-1], right[:SPECTRUM, -1], 0.0)]
    for _ in range(STEPS):
        filters = torch.nn.functional.normalize(filters, dim=1)
        pointed = filters @ joined
        records = _quotient(pointed)
        found.append(_ratios(pointed[:, :-1], pointed[:, -1], sanitizer.std))
        fires = records @ seen.sent_weight.T + seen.sent_bias > 0
        filters = fires * seen.gains
    return torch.cat(found)


def completion(seen: LayerView) -> Tensor:
    """Return the record that a masked layer, taken as of rank one, points to.

    A mask that shows is no protection of its own: what it dropped of one neuron, another neuron
    still has. Alternating least squares over the coordinates that were kept fill it in.

    Returns:
        [2, features]: started from the first singular direction, and from the next layer's weights.
    """
    joined = torch.cat([seen.weight, seen.bias[:, None]], 1)  # [neurons, features + 1]
    kept = (joined != 0.0).double()
    left, _, _ = torch.linalg.svd(joined, full_matrices=False)
    found = []
    for start in (left[:, 0], seen.gains):
        neurons = start
        for _ in range(FILLINGS):
            record = (joined.T @ neurons) / (kept.T @ neurons.square()).clamp_min(1e-30)
            record = record / record.norm().clamp_min(1e-30)
            neurons = (joined @ record) / (kept @ record.square()).clamp_min(1e-30)
        found.append(torch.nan_to_num(record[:-1] / record[-1]))
    return torch.stack(found)


def lone_record(seen: LayerView) -> Tensor:
    """Return the one record that fits both layers' updates best, had only one been behind them.

    With d the loss's derivative at a single output, a record x that fires the neurons in a mask
    gives dW = d w x', db = d w, dw = d (W x + b) and d itself as the last bias's update. For a
    given mask that is linear in (d x, d), so least squares solves it; the mask follows from x.
    Needs a next layer with one output; otherwise gives nothing.

    Returns:
        [STEPS, features], or none.
    """
    width = seen.weight.shape[1]
    if len(seen.sent_next) != 1:
        return seen.weight.new_empty(0, width)
    joined = torch.cat([seen.weight, seen.bias[:, None]], 1)  # [neurons, features + 1]
    sent = torch.cat([seen.sent_weight, seen.sent_bias[:, None]], 1)
    fires = seen.next_weight[0] * seen.next_bias.sign() > 0
    last = torch.eye(width + 1, dtype=torch.float64)[-1]
    found = []
    for _ in range(STEPS):
        gains = seen.gains * fires
        normal = sent[fires].T @ sent[fires] + torch.outer(last, last)
        normal += gains.square().sum() * torch.eye(width + 1, dtype=torch.float64)
        right = joined.T @ gains + sent[fires].T @ seen.next_weight[0, fires]
        solved = torch.linalg.pinv(normal, hermitian=True) @ (right + last * seen.next_bias)
        record = torch.nan_to_num(solved[:-1] / solved[-1])
        found.append(record)
        fires = seen.sent_weight @ record + seen.sent_bias > 0
    return torch.stack(found)


def measure_reads(guesses: Tensor, rows: Tensor, held_out: Tensor) -> Reads:
    """Count the records that were read, and those that a guess came near to.

    Args:
        guesses: [guesses, features].
        rows: [records, features], the records behind the update.
        held_out: [others, features], records of the same hospital that were not behind it.

    Returns:
        The counts. The relative error of a record is the least distance of any guess, by the
        record's norm: under 1 % it is read, under 30 % a guess is near.
    """
    errors, others = nearest(guesses, rows), nearest(guesses, held_out)
    return Reads(
        records=len(rows),
        exact=int((errors < EXACT).sum()),
        near=int((errors < NEAR).sum()),
        held_out=len(held_out),
        held_out_near=int((others < NEAR).sum()),
        guesses=len(guesses),
    )


def nearest(guesses: Tensor, rows: Tensor) -> Tensor:
    """Return each record's relative error under the guess closest to it, [records]."""
    if len(guesses) == 0:
        return torch.full((len(rows),), torch.inf, dtype=torch.float64)
    # Differences, not the matrix product: an exact read must not drown in cancellation.
    distances = torch.cdist(
        rows.double(), guesses.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.amin(1) / rows.double().square().sum(1).sqrt()


def _steps(values: Tensor, width: int) -> Tensor:
    """Return the mean of `width` rows after each cut less the mean of `width` rows before it."""
    means: Tensor = values.unfold(0, width, 1).mean(-1)
    return means[width:] - means[:-width]


def _quotient(pointed: Tensor) -> Tensor:
    return torch.nan_to_num(pointed[:, :-1] / pointed[:, -1:])


def _ratios(numerators: Tensor, divisors: Tensor, std: float) -> Tensor:
    """Return numerators by divisors where these stand out; under noise also shrunk.

    Features are standardised, so a record's prior is normal with variance one, and the best guess
    under noise of variance (std / divisor)^2 is the ratio by one plus that variance.
    """
    floor = max(STANDS_OUT * std, 1e-9 * float(divisors.abs().amax()))
    chosen = divisors.abs() > floor
    ratios = numerators[chosen] / divisors[chosen, None]
    if std == 0.0:
        return ratios
    return torch.cat([ratios, ratios / (1 + (std / divisors[chosen, None]).square())])
