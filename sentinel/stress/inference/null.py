"""Null: how well scores tell members from others, beside what they would by chance.

A threshold that is chosen on the records it is judged on flatters an attacker who knows nothing.
So records are put into two halves, and each half is judged at the threshold that the other half
would choose. A record is in one half, however many splits it is in.

The unit of every interval is the split: one federation, with memberships, start, batches and noise
drawn anew. Records of one split share all of these, and a record's rounds share the record, so
neither counts for itself. Given the records, splits are independent, since who is a member is drawn
anew in each; that the same people come back in all of them takes nothing from this. What is
estimated is the advantage over these people, not over all people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy import stats

from sentinel.errors import MisuseError
from sentinel.interval import Interval, of_mean

if TYPE_CHECKING:
    from torch import Tensor

FALSE_ALARMS = 0.01  # share of others taken for members, at which members found are counted
_HALVES = 2


@dataclass(frozen=True, slots=True)
class Pool:
    """Scores of all records of all splits.

    Attributes:
        scores: [n], larger where a record looks more like a member.
        members: [n] bool.
        records: [n], who it is; the same in every split.
        splits: [n], of which federation, from 0.
        strata: [n], within which membership was drawn (split, site, class); numbers of any kind.

    Raises:
        MisuseError: fewer than two splits, a split without members or without others, or a score
            that is NaN.
    """

    scores: Tensor
    members: Tensor
    records: Tensor
    splits: Tensor
    strata: Tensor

    def __post_init__(self) -> None:
        """Refuse what has no interval."""
        if bool(self.scores.isnan().any()):
            raise MisuseError("a score is NaN; score every record with a number")
        inside, all_ = (torch.bincount(s) for s in (self.splits[self.members], self.splits))
        if len(all_) < 2 or len(inside) < len(all_):  # noqa: PLR2004 - one has no spread
            raise MisuseError("there must be two splits or more, all with members")
        if bool((inside == 0).any()) or bool((inside == all_).any()):
            raise MisuseError("every split must hold members and others")


@dataclass(frozen=True, slots=True)
class Advantage:
    """What an attack is worth.

    Attributes:
        members: of all splits.
        others: of all splits.
        splits: the units of the interval.
        advantage: true positives less false positives, as shares; mean over the splits.
        interval: of `advantage`, 95 % two-sided, Student's t over splits.
        null: the mean of `advantage` where memberships are permuted.
        null_high: what 95 % of permutations stay under.
        p_value: share of permutations with an advantage as large.
        auc: area under the ROC curve; mean over the splits.
        found: share of members above a threshold that 1 % of the others, in the other half,
            exceed.
    """

    members: int
    others: int
    splits: int
    advantage: float
    interval: Interval
    null: float
    null_high: float
    p_value: float
    auc: float
    found: float

    @property
    def excess(self) -> float:
        """The interval's upper end less the permutation null."""
        return self.interval.high - self.null


def measure(pool: Pool, *, permutations: int = 200, generator: torch.Generator) -> Advantage:
    """Measure an attack.

    Args:
        pool: its scores.
        permutations: of memberships within strata; the thresholds are chosen anew in each.
        generator: draws halves and permutations.

    Guarantees:
        Where scores say nothing of memberships, `p_value` is at most p with probability about p.

    Edges:
        equal scores:              on one side of any threshold, together
        scores of +-Inf:           the highest and the lowest
        perfect scores:            1, but for records between the halves' thresholds
        a stratum of members only: its records are not permuted
    """
    half = torch.rand(int(pool.records.max()) + 1, generator=generator)[pool.records] < 1 / _HALVES
    places = [torch.nonzero(half == side)[:, 0] for side in (False, True)]
    ranked = _ranked(pool.scores)
    found = by_split(pool, _above(ranked, pool.members, places))
    chance = torch.stack(
        [
            by_split(replaced, _above(ranked, replaced.members, places)).mean()
            for replaced in (_permuted(pool, generator) for _ in range(permutations))
        ]
    )
    advantage = float(found.mean())
    return Advantage(
        members=int(pool.members.sum()),
        others=int((~pool.members).sum()),
        splits=len(found),
        advantage=advantage,
        interval=over_splits(found),
        null=float(chance.mean()),
        null_high=float(chance.quantile(0.95)),
        p_value=(1 + int((chance >= advantage).sum())) / (1 + permutations),
        auc=float(_areas(pool).mean()),
        found=_found(ranked, pool.members, places),
    )


def over_splits(values: Tensor, *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, [splits], two or more."""
    return of_mean(values.tolist(), confidence=confidence)


def by_split(pool: Pool, called: Tensor) -> Tensor:
    """True less false positives of each split, [splits], for records called members, [n] bool."""
    rates = []
    for group in (pool.members, ~pool.members):
        total = torch.bincount(pool.splits[group])
        hits = torch.bincount(pool.splits[group & called], minlength=len(total))
        rates.append(hits.double() / total)
    return rates[0] - rates[1]


def _ranked(scores: Tensor) -> Tensor:
    """Scores as ranks from 0, [n] int64; equal ones share theirs."""
    ranks: Tensor = torch.unique(scores, return_inverse=True)[1]
    return ranks


def _above(ranked: Tensor, members: Tensor, places: list[Tensor]) -> Tensor:
    """Who is called a member, each half at the other's best threshold, [n] bool."""
    called = torch.zeros_like(members)
    for own, other in (places, places[::-1]):
        called[own] = ranked[own] >= _best(ranked[other], members[other])
    return called


def _best(ranked: Tensor, members: Tensor) -> int:
    """The rank from which calling records members gains most; midway to the next one below."""
    size = int(ranked.max()) + 2
    shares = []
    for group in (members, ~members):
        counted = torch.bincount(ranked[group], minlength=size).double()
        shares.append(counted.flip(0).cumsum(0).flip(0) / counted.sum().clamp_min(1))
    best = int((shares[0] - shares[1]).argmax())
    below = ranked[ranked < best]
    return (best + int(below.max()) + 1) // 2 if len(below) else best


def _found(ranked: Tensor, members: Tensor, places: list[Tensor]) -> float:
    """Share of members over the rank that 1 % of the other half's others exceed."""
    hits = 0
    for own, other in (places, places[::-1]):
        others = ranked[other][~members[other]].sort(descending=True).values
        if len(others):
            least = int(others[int(FALSE_ALARMS * len(others))])
            hits += int((ranked[own][members[own]] > least).sum())
    return hits / int(members.sum())


def _areas(pool: Pool) -> Tensor:
    """Area under the ROC curve of each split, [splits]; a tie counts half."""
    areas = []
    for split in range(int(pool.splits.max()) + 1):
        here = pool.splits == split
        ranks = torch.from_numpy(stats.rankdata(pool.scores[here].numpy()))
        inside = pool.members[here]
        count, others = int(inside.sum()), int((~inside).sum())
        least = count * (count + 1) / 2
        areas.append((float(ranks[inside].sum()) - least) / (count * others))
    return torch.tensor(areas, dtype=torch.float64)


def _permuted(pool: Pool, generator: torch.Generator) -> Pool:
    """The same scores, memberships permuted within each stratum."""
    shuffled = torch.randperm(len(pool.scores), generator=generator)
    mixed = shuffled[pool.strata[shuffled].argsort(stable=True)]
    members = torch.empty_like(pool.members)
    members[pool.strata.argsort(stable=True)] = pool.members[mixed]
    return Pool(pool.scores, members, pool.records, pool.splits, pool.strata)
