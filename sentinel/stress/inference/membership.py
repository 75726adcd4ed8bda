"""Membership: was this record trained on? Told by a server from what it sees over the rounds.

The server holds a list of candidates, members and others, and asks of each whether it is behind a
site's updates. It wrote the training plan, so it replays it: to first order an update is the sum
of its members' influences, and each attack is a way to find one influence in that sum. The
attacker is adaptive: it knows the clip's factor, the noise and the mask of every value, and counts
only what they leave.

- loss: small under the last global model.
- drop: how far the loss fell from the global model to the site's own, over all rounds.
- cosine: of influence and update.
- filter: the matched filter, a log likelihood ratio; the other candidates are noise to it.
- joint: all candidates of a round at once by linear estimation, so that they are not.
- shadow: a log likelihood ratio of the matched filter, in and out, fitted to each record on shadow
  trainings with data that the server has itself.

References: Nasr et al., S&P 2019, arXiv 1812.00910 (passive attacks in federated learning); Carlini
et al., S&P 2022, arXiv 2112.03570 (likelihood ratios over shadow models); Verdu, Multiuser
Detection, 1998, chapter 6 (the linear estimator).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError
from sentinel.stress.inference.loop import midway

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sentinel.stress.inference.loop import Loop
    from sentinel.stress.inference.observed import Observed
    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

ATTACKS = ("loss", "drop", "cosine", "filter", "joint", "shadow")
_TINY = 1e-12
_FLOOR = 1e-3  # of the update's size: what a replay is taken to miss at least
_LEAST_REPLAYS = 2
_CROWD = 256  # of the server's own records, whose influences tell what a crowd's look like
_REST = 0.03  # of that, in no direction of its own; tuned on raw updates of four hospitals
_SHRINK = 0.2  # of a covariance over shadow trainings, towards its diagonal
_LEAST_SHADOWS = 4  # fewer have no spread to speak of
_MOST_LOSS = 1e30  # of a record under a model that diverged


@dataclass(frozen=True, slots=True)
class Attacker:
    """How hard the server tries.

    Attributes:
        points: of the replayed training in which gradients are taken.
        shadows: trainings on its own data in each round.
        replays: trainings on candidates in each round, from which it learns what a sum of
            influences misses of an update.
        rounds: most of them that are replayed, evenly spread; all where left out.
    """

    points: int = 3
    shadows: int = 16
    replays: int = 8
    rounds: int | None = None

    def __post_init__(self) -> None:
        """Refuse an attacker that cannot replay or fit anything."""
        few = self.shadows < _LEAST_SHADOWS or self.replays < _LEAST_REPLAYS
        if self.points < 1 or few or self.rounds == 0:
            raise MisuseError(
                f"an attacker needs a point, a round, {_LEAST_REPLAYS} replays and "
                f"{_LEAST_SHADOWS} shadow trainings or more"
            )

    def chosen(self, seen: Sequence[Observed]) -> list[Observed]:
        """The rounds that are replayed."""
        count = min(self.rounds or len(seen), len(seen))
        return [seen[int((number + 0.5) * len(seen) / count)] for number in range(count)]


DEFAULTS = Attacker()


@dataclass(frozen=True, slots=True)
class Suspects:
    """Whom the server asks about at one site, and what it has itself.

    Attributes:
        data: the candidates, n of them.
        cohort: how many of them are members; the site's `num-examples`.
        own: records of the server's, in shadow trainings; at least `cohort` of them.

    Raises:
        MisuseError: no member, no other, or too few records of its own.
    """

    data: Records
    cohort: int
    own: Records

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to tell."""
        if not 0 < self.cohort < len(self.data):
            raise MisuseError("there must be members and others among the candidates")
        if len(self.own) < self.cohort:
            raise MisuseError("a shadow training needs as many records as the site trains on")

    @property
    def share(self) -> float:
        """Of the candidates that are members."""
        return self.cohort / len(self.data)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one round says, with values in units of what hides them.

    Attributes:
        before: loss under the global model, [n].
        after: loss under the released local model, [n].
        cosine: of each influence with the update, [n].
        matches: inner product of each influence with the update, [n].
        gram: inner products of influences, [n, n].
        lone: of influence and update, weighed by what the server's own records say of a crowd, [n].
        own: of each influence with itself, weighed like that, [n].
        shadows: of each influence with each shadow update, weighed like that, [n, shadows].
    """

    before: Tensor
    after: Tensor
    cosine: Tensor
    matches: Tensor
    gram: Tensor
    lone: Tensor
    own: Tensor
    shadows: Tensor


def membership(  # noqa: PLR0913 - each names one thing that the attacker has
    loop: Loop,
    seen: Sequence[Observed],
    final: State,
    suspects: Suspects,
    *,
    attacker: Attacker = DEFAULTS,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every candidate of one site by every attack.

    Args:
        loop: how the site trains.
        seen: what it released, in order.
        final: the last global state.
        suspects: the candidates, and the server's own data.
        attacker: how hard it tries.
        generator: of the attacker.

    Returns:
        By name in ATTACKS, [n] float64 each, finite; larger where a candidate looks more like a
        member. Only comparable within one call.

    Raises:
        MisuseError: the site released nothing.
    """
    if not seen:
        raise MisuseError("there is nothing to attack: the site released nothing")
    draws = torch.ones(attacker.shadows, len(suspects.own))
    cohorts = draws.multinomial(suspects.cohort, generator=generator)
    rounds = [
        gather(loop, one, suspects, cohorts, attacker, generator) for one in attacker.chosen(seen)
    ]
    losses = _told(loop.losses(final, suspects.data))
    return {"loss": -losses, **judge(rounds, suspects.share)}


def gather(  # noqa: PLR0913, PLR0917 - as `membership`
    loop: Loop,
    seen: Observed,
    suspects: Suspects,
    cohorts: Tensor,
    attacker: Attacker,
    generator: torch.Generator,
) -> Evidence:
    """Replay one round, and hold every candidate against what was released.

    Args:
        loop: how the site trains.
        seen: the round.
        suspects: the candidates.
        cohorts: indices of the server's own records behind each shadow training, [shadows, m].
        attacker: how hard it tries.
        generator: of the attacker.
    """
    data = suspects.data
    own = [suspects.own.take(chosen) for chosen in cohorts]
    replay = _replay(loop, seen, suspects, attacker, generator)
    updates = _updates(loop, seen, own, generator)
    if replay is None or not _whole(updates) or not _whole(seen.values):
        return _silent(loop, seen, suspects, len(cohorts))
    values, influences = replay.whitened(seen.values[seen.kept]), replay.influences
    shadows = replay.whitened(updates)
    calm = _crowd(loop, seen, suspects, replay, generator)
    lone = calm(influences)
    before, after = _losses(loop, seen, data)
    return Evidence(
        before=before,
        after=after,
        cosine=F.cosine_similarity(replay.gradients, seen.values[None, seen.kept]).double(),
        matches=(influences @ values).double(),
        gram=(influences @ influences.T).double(),
        lone=(lone @ calm(values)).double(),
        own=lone.square().sum(1).double(),
        shadows=(lone @ calm(shadows).T).double(),
    )


def _silent(loop: Loop, seen: Observed, suspects: Suspects, shadows: int) -> Evidence:
    """What a round says whose training diverges in the replay: nothing of influences."""
    before, after = _losses(loop, seen, suspects.data)
    count = len(suspects.data)
    nothing = torch.zeros(count, dtype=torch.float64)
    influences = loop.influences([seen.sent], suspects.data, suspects.cohort)[:, seen.kept]
    values = seen.values[None, seen.kept].double().nan_to_num()
    alike = F.cosine_similarity(influences.double().nan_to_num(), values)
    return Evidence(
        before=before,
        after=after,
        cosine=alike.nan_to_num(),
        matches=nothing,
        gram=nothing.expand(count, count),
        lone=nothing,
        own=nothing,
        shadows=nothing[:, None].expand(count, shadows),
    )


def _losses(loop: Loop, seen: Observed, data: Records) -> tuple[Tensor, Tensor]:
    """Of each record under the global model and under the released one, [n] float64 each."""
    released = loop.moved(seen.sent, seen.released)
    return _told(loop.losses(seen.sent, data)), _told(loop.losses(released, data))


def _told(losses: Tensor) -> Tensor:
    """Losses with the largest number in the place of none."""
    return losses.nan_to_num(_MOST_LOSS, _MOST_LOSS).clamp_max(_MOST_LOSS)


def _whole(values: Tensor) -> bool:
    """Whether values, and inner products of them, are numbers."""
    return bool(torch.isfinite(values.square().sum()))


def _crowd(
    loop: Loop, seen: Observed, suspects: Suspects, replay: _Replay, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Weighs down the directions in which a cohort's other records lie, as the server's own do."""
    some = torch.randperm(len(suspects.own), generator=generator)[:_CROWD]
    influences = loop.influences([seen.sent], suspects.own.take(some), suspects.cohort)
    influences = influences[:, seen.kept] * seen.factor[seen.kept] / replay.hidden
    return _Shapes.of(influences - influences.mean(0), suspects.cohort / len(some)).calmed


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Directions in which values vary by more than 1, each to be counted less.

    Attributes:
        directions: orthonormal, [r, k].
        shrink: by how much, [r].
    """

    directions: Tensor
    shrink: Tensor

    @classmethod
    def of(cls, apart: Tensor, weight: float) -> _Shapes:
        """Those of centred values [r, k] whose squares count `weight` each, beside noise of 1."""
        sizes, turns = torch.linalg.eigh((apart @ apart.T).double())
        sizes = sizes.clamp_min(_TINY * float(sizes[-1]) + _TINY)
        directions = (turns / sizes.sqrt()).T.to(apart.dtype) @ apart
        return cls(directions, (1 - (1 + weight * sizes).rsqrt()).to(apart.dtype))

    def calmed(self, values: Tensor) -> Tensor:
        """The same values [..., k], with variance 1 in all directions."""
        return values - (values @ self.directions.T * self.shrink) @ self.directions


@dataclass(frozen=True, slots=True)
class _Replay:
    """What candidates add to an update, and what hides it, over the k values that were kept.

    Attributes:
        gradients: influences under the clip, [n, k].
        bias: mean of what the sum of influences misses of an update, [k].
        hidden: deviation that each value has of its own: the noise, and the rest of what is
            missed, [k].
        shapes: directions in which the misses lie, in units of `hidden`.
    """

    gradients: Tensor
    bias: Tensor
    hidden: Tensor
    shapes: _Shapes

    @property
    def influences(self) -> Tensor:
        """Influences in units of what hides them, [n, k]."""
        return self.shapes.calmed(self.gradients / self.hidden)

    def whitened(self, updates: Tensor) -> Tensor:
        """Updates [..., k] in the same units, the bias taken off."""
        return self.shapes.calmed((updates - self.bias) / self.hidden)


def _replay(
    loop: Loop, seen: Observed, suspects: Suspects, attacker: Attacker, generator: torch.Generator
) -> _Replay | None:
    """Train on halves of the candidates, and see what the sum of influences misses of it.

    Returns:
        None where training diverges.
    """
    data, kept = suspects.data, seen.kept
    halves = [_half(suspects, generator) for _ in range(attacker.replays)]
    path = loop.path(seen.sent, data.take(_half(suspects, generator)), generator)
    influences = loop.influences(midway(path, attacker.points), data, suspects.cohort)
    influences = influences[:, kept] * seen.factor[kept]
    updates = _updates(loop, seen, [data.take(half) for half in halves], generator)
    if not (_whole(updates) and _whole(influences)):
        return None
    missed = updates - torch.stack([influences[half].sum(0) for half in halves])
    bias = missed.mean(0)
    missed = missed - bias
    least = _FLOOR**2 * updates.square().mean() + torch.finfo(updates.dtype).tiny
    rest = (_REST * missed.square().mean()).clamp_min(float(least))
    hidden = (seen.std[kept].square() + rest).sqrt()
    return _Replay(
        influences, bias, hidden, _Shapes.of(missed / hidden, 1 / (attacker.replays - 1))
    )


def _half(suspects: Suspects, generator: torch.Generator) -> Tensor:
    """As many candidates as are members, at random."""
    return torch.randperm(len(suspects.data), generator=generator)[: suspects.cohort]


def _updates(
    loop: Loop, seen: Observed, cohorts: Sequence[Records], generator: torch.Generator
) -> Tensor:
    """Simulated updates under the clip and mask, without noise, [cohorts, k]."""
    start = loop.flatten(seen.sent)
    trained = [loop.flatten(loop.train(seen.sent, data, generator)) for data in cohorts]
    return (torch.stack(trained) - start)[:, seen.kept] * seen.factor[seen.kept]


def judge(rounds: Sequence[Evidence], share: float) -> dict[str, Tensor]:
    """Every attack over all rounds but the one on the last global model.

    Args:
        rounds: of one site, with the same candidates in the same order.
        share: of the candidates that are members.
    """
    return {
        "drop": torch.stack([one.before - one.after for one in rounds]).mean(0),
        "cosine": torch.stack([one.cosine for one in rounds]).mean(0),
        "filter": torch.stack([filtered(one, share) for one in rounds]).sum(0),
        "joint": torch.stack([joint(one, share) for one in rounds]).sum(0),
        "shadow": shadowed(rounds),
    }


def filtered(one: Evidence, share: float) -> Tensor:
    """Log likelihood ratio of each candidate in one round, the others taken for noise, [n]."""
    own = one.gram.diagonal()
    others = one.gram - torch.diag(own)
    expected = share * others.sum(1)
    spread = own + share * (1 - share) * others.square().sum(1)
    ratio: Tensor = own / spread.clamp_min(_TINY) * (one.matches - expected - own / 2)
    return ratio


def joint(one: Evidence, share: float) -> Tensor:
    """Log likelihood ratio of each candidate in one round, all estimated together, [n].

    The best linear estimate of who is in, for memberships that are independent with probability
    `share`. What it says of a record beyond `share` itself is a Gaussian observation of 0 or 1.
    Over rounds the ratios are added: what a replay misses is alike in all rounds, and one estimate
    over all of them would take it for evidence.
    """
    prior = 1 / (share * (1 - share))
    right = one.matches - share * one.gram.sum(1)
    covariance = torch.linalg.inv(one.gram + prior * torch.eye(len(right), dtype=right.dtype))
    precision = covariance.diagonal().reciprocal()
    told = (precision - prior).clamp_min(_TINY)
    found = covariance @ right + share
    ratio: Tensor = precision * found - prior * share - told / 2
    return ratio


def shadowed(rounds: Sequence[Evidence]) -> Tensor:
    """Log likelihood ratio of each candidate, in and out fitted on shadow trainings, [n].

    A record's matches over the rounds are Gaussian, out as over the shadow trainings and in with
    the record's own influence added; the sanitizer's noise is known and independent by round.
    """
    own = torch.stack([one.own for one in rounds], 1)  # [n, rounds]
    matches = torch.stack([one.lone for one in rounds], 1)
    shadows = torch.stack([one.shadows for one in rounds], 2)  # [n, shadows, rounds]
    mean = shadows.mean(1)
    apart = shadows - mean[:, None]
    spread = apart.transpose(1, 2) @ apart / (shadows.shape[1] - 1)
    diagonal = torch.diag_embed(spread.diagonal(dim1=1, dim2=2))
    noise = torch.diag_embed(own.clamp_min(_TINY))
    covariance = (1 - _SHRINK) * spread + _SHRINK * diagonal + noise
    weights = torch.linalg.solve(covariance, own[:, :, None])[:, :, 0]
    ratio: Tensor = (weights * (matches - mean - own / 2)).sum(1)
    return ratio


def ceiling(
    loop: Loop, seen: Sequence[Observed], suspects: Suspects, *, points: int, order: torch.Generator
) -> Tensor:
    """To first order, the most that any attack can gain on each candidate, [n] float64.

    All else is known to it, so that a record in or out is one of two normals, apart by its
    influence in units of the noise: the advantage of the best test is 2 Phi(distance / 2) - 1, with
    distances of rounds added in squares. Left out is what the record does to later rounds' global
    models, to later steps of its own round, and to the factor of the clip.

    Args:
        loop: how the site trains.
        seen: what it released, in order.
        suspects: the candidates.
        points: of each replayed training in which gradients are taken.
        order: of the replays.

    Returns:
        TPR - FPR; 1 where a value that the record moves was released without noise, and where
        training diverges.

    Reference: Dong, Roth and Su, "Gaussian differential privacy", 2022, arXiv 1905.02383.
    """
    squares = torch.zeros(len(suspects.data), dtype=torch.float64)
    for one in seen:
        path = loop.path(one.sent, suspects.data.take(_half(suspects, order)), order)
        moved = loop.influences(midway(path, points), suspects.data, suspects.cohort)
        moved = (moved * one.factor)[:, one.kept]
        apart = torch.where(moved == 0.0, 0.0, moved / one.std[one.kept])
        squares += apart.square().sum(1)
    return torch.erf(squares.nan_to_num(torch.inf, torch.inf).sqrt() / 8**0.5)


def ranked(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of one site as shares of its candidates with a lower one, to be pooled over sites."""
    return {
        name: torch.searchsorted(value.sort().values, value).double() / len(value)
        for name, value in scores.items()
    }
