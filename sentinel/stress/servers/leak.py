"""How much a crafted model really leaks, beside the honest one on the same records.

The attacker sees one raw gradient: nothing is sanitized here, since this says what there is to
guard. It reads rows of the attacked layer's input: the record itself where that layer is the
first, what the convolutions make of it where they stand in front, single tokens in a transformer.
It also counts of how many records the gradient is made, for crafts that reduce a batch to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.passive.tabular import EXACT, nearest
from sentinel.stress.servers.fit import check_fit, eager
from sentinel.stress.servers.raw import (
    Gradient,
    count_read,
    gradient_of,
    guesses,
    read_layer,
    rows_read,
    viewed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from sentinel.stress.layers import State
    from sentinel.stress.servers.raw import Batch
    from sentinel.stress.servers.scan import Search

ATTACK_SHARE = 0.10  # of the records beyond the honest model's, from which it is an attack
ATTACK_FACTOR = 2.0  # times what the honest model gives away, from which it does as well
ATTACK_FLOOR = 0.02  # of the records, where the honest model gives away none


@dataclass(frozen=True, slots=True)
class Leak:
    """What a crafted model gave away, and what the honest one did on the same batches.

    Attributes:
        layer: the layer whose input was read.
        rows: how many rows reached it that are no other row's twin.
        read: how many of them were read, to a relative error of 1 %.
        honest_rows: how many such rows there were in the honest model.
        honest_read: how many of those were read.
        effective: of how many records a gradient is made, (sum n)^2 / sum n^2 over the records'
            gradient norms n in all layers but the last; mean over the batches that have one.
        honest_effective: the same of the honest model.
        largest: the largest record's share of the sum of those norms; mean over the batches.
        alike: cosine of that record's gradient to the whole gradient; mean over the batches.
    """

    layer: str
    rows: int
    read: int
    honest_rows: int
    honest_read: int
    effective: float
    honest_effective: float
    largest: float
    alike: float

    @property
    def share(self) -> float:
        """Share of the rows that were read."""
        return self.read / self.rows if self.rows else 0.0

    @property
    def honest_share(self) -> float:
        """Share of the rows that the honest model gave away."""
        return self.honest_read / self.honest_rows if self.honest_rows else 0.0

    @property
    def reads(self) -> bool:
        """Whether the model reads 10 % of the rows more than the honest one, or twice as many.

        What the honest model of the same net gives away of the same batches is nobody's attack:
        of a batch of one it gives all. Twice nothing is one row in fifty, since a single token out
        of hundreds is no attack.
        """
        twice = max(ATTACK_FACTOR * self.honest_share, ATTACK_FLOOR)
        return self.share >= min(self.honest_share + ATTACK_SHARE, twice)

    @property
    def fishes(self) -> bool:
        """Whether the gradient is made of at most half as many records as the honest one."""
        return 0.0 < ATTACK_FACTOR * self.effective <= self.honest_effective

    @property
    def verdict(self) -> str:
        """One of "reads", "fishes" and "nothing", the first that holds."""
        if self.reads:
            return "reads"
        return "fishes" if self.fishes else "nothing"

    @property
    def is_attack(self) -> bool:
        """Whether the crafted model counts as an attack: one that leaks nothing does not."""
        return self.reads or self.fishes


def measure(  # noqa: PLR0913 - two models, the batches, and how they are read
    model: nn.Module,
    honest: Mapping[str, Tensor],
    crafted: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    layer: str | None = None,
    secret: Tensor | None = None,
) -> Leak:
    """Measure both models on the same batches, each as one raw gradient in training mode.

    Args:
        model: the architecture; it is not touched.
        honest: the honest state.
        crafted: the crafted state.
        batches: records [n, ...] and integer labels [n] of each step.
        layer: whose input is read; where left out the first fully connected layer, or the last
            where that feeds no other.
        secret: [directions, neurons], the decoder of a hidden attack (see `seer`); the honest
            model is read without.

    Raises:
        MisuseError: no batch, no fully connected layer, or one that is not trained.
    """
    if not batches:
        msg = "measuring a leak needs at least one batch of records and labels"
        raise MisuseError(msg)
    model = _fitting(model, honest)
    chosen = read_layer(model, honest, layer)
    found = {
        "crafted": [gradient_of(model, crafted, batch, chosen) for batch in batches],
        "honest": [gradient_of(model, honest, batch, chosen) for batch in batches],
    }
    read = {
        "crafted": sum(rows_read(model, crafted, one, chosen, secret) for one in found["crafted"]),
        "honest": sum(rows_read(model, honest, one, chosen) for one in found["honest"]),
    }
    return Leak(
        layer=chosen,
        rows=sum(len(one.inputs) for one in found["crafted"]),
        read=read["crafted"],
        honest_rows=sum(len(one.inputs) for one in found["honest"]),
        honest_read=read["honest"],
        effective=_mean([effective_records(one.norms) for one in found["crafted"]]),
        honest_effective=_mean([effective_records(one.norms) for one in found["honest"]]),
        largest=_mean([_largest(one.norms) for one in found["crafted"]]),
        alike=_mean([one.alike for one in found["crafted"]]),
    )


def measure_sum(
    model: nn.Module,
    honest: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    batches: Sequence[Batch],
) -> Leak:
    """Measure what secure aggregation leaves of one client: the first batch is its, of a sum.

    Args:
        model: the architecture; it is not touched.
        honest: the honest state, which all clients have for comparison.
        target: the state that the first client gets.
        others: the state that the other clients get.
        batches: one for each client, the target's first.

    Returns:
        The reads of the target's rows in the sum, and of how many *clients* the sum is made.
    """
    model = _fitting(model, honest)
    chosen = read_layer(model, honest, None)
    states = [target, *([others] * (len(batches) - 1))]
    crafted = [
        gradient_of(model, state, batch, chosen)
        for state, batch in zip(states, batches, strict=True)
    ]
    plain = [gradient_of(model, honest, batch, chosen) for batch in batches]
    norms, honest_norms = (
        torch.stack([_flat(one.values, chosen).norm() for one in part]) for part in (crafted, plain)
    )
    whole = _flat(_summed(crafted), chosen)
    own = _flat(crafted[0].values, chosen)
    return Leak(
        layer=chosen,
        rows=len(crafted[0].inputs),
        read=count_read(viewed(model, target, _summed(crafted), chosen), crafted[0].inputs),
        honest_rows=len(plain[0].inputs),
        honest_read=count_read(viewed(model, honest, _summed(plain), chosen), plain[0].inputs),
        effective=effective_records(norms),
        honest_effective=effective_records(honest_norms),
        largest=_largest(norms),
        alike=float(torch.nn.functional.cosine_similarity(whole, own, dim=0)),
    )


def measure_rounds(
    model: nn.Module,
    honest: Mapping[str, Tensor],
    crafted: Sequence[Mapping[str, Tensor]],
    batch: Batch,
) -> Leak:
    """Measure what several crafted rounds read together of the same records.

    Args:
        model: the architecture; it is not touched.
        honest: the honest state; more rounds of it read nothing more.
        crafted: the crafted states, one for each round.
        batch: records and labels that the client trains on in every round.
    """
    model = _fitting(model, honest)
    chosen = read_layer(model, honest, None)
    rounds = [gradient_of(model, state, batch, chosen) for state in crafted]
    pooled = torch.cat(
        [
            guesses(viewed(model, state, one.values, chosen))
            for state, one in zip(crafted, rounds, strict=True)
        ]
    )
    plain = gradient_of(model, honest, batch, chosen)
    return Leak(
        layer=chosen,
        rows=len(rounds[0].inputs),
        read=int((nearest(pooled, rounds[0].inputs) < EXACT).sum()),
        honest_rows=len(plain.inputs),
        honest_read=rows_read(model, honest, plain, chosen),
        effective=_mean([effective_records(one.norms) for one in rounds]),
        honest_effective=effective_records(plain.norms),
        largest=_mean([_largest(one.norms) for one in rounds]),
        alike=_mean([one.alike for one in rounds]),
    )


def measure_search(  # noqa: PLR0913 - two models, the records, and how the search goes
    model: nn.Module,
    honest: Mapping[str, Tensor],
    search: Search,
    batch: Batch,
    rounds: int,
    *,
    generator: torch.Generator,
) -> Leak:
    """Measure what a search reads that bends each round's model by the last round's gradient.

    Args:
        model: the architecture; it is not touched.
        honest: the honest state, from which every round starts.
        search: the server, told each raw gradient as a step at rate one.
        batch: records and labels that the client trains on in every round.
        rounds: how many.
        generator: the attacker's randomness.
    """
    plain = _fitting(model, honest)
    chosen = read_layer(plain, honest, None)
    sent = []
    for _ in range(rounds):
        sent.append(search(plain, honest, generator=generator))
        values = gradient_of(plain, sent[-1], batch, chosen).values
        search.learn(
            {
                name: value.double() - values[name].double() if name in values else value
                for name, value in sent[-1].items()
            }
        )
    return measure_rounds(plain, honest, sent, batch)


def _fitting(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the model as it runs uncompiled; refuse one that does not fit the state."""
    plain = eager(model)
    check_fit(plain, state)
    return plain


def effective_records(norms: Tensor) -> float:
    """Return (sum n)^2 / sum n^2: how many equal records would concentrate as much, at least 1.

    Where no record has a gradient there are none: 0.
    """
    total = norms.double().square().sum()
    return float(norms.double().sum().square() / total) if total > 0 else 0.0


def _flat(values: State, layer: str) -> Tensor:
    return torch.cat([values[f"{layer}.weight"].flatten(), values[f"{layer}.bias"]])


def _summed(gradients: Sequence[Gradient]) -> State:
    return {
        name: torch.stack([one.values[name] for one in gradients]).sum(0)
        for name in gradients[0].values
    }


def _largest(norms: Tensor) -> float:
    total = float(norms.sum())
    return float(norms.max()) / total if total > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    """Return the mean over the batches that have a gradient, or 0 where none has."""
    some = [value for value in values if value != 0.0]
    return sum(some) / len(some) if some else 0.0
