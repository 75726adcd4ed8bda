"""Genotypes out of an update: vectors of 0, 1 or 2 minor alleles for each variant.

The genotypes made here are synthetic. Each of a person's two haplotypes walks along the variants:
with probability `linkage` the next allele follows from the same hidden normal value, so neighbours
are correlated; the two haplotypes are independent, so each variant is in Hardy-Weinberg
equilibrium. Real panels have stronger and patchier linkage, and relatives.

The attacker rounds what the linear read-out gives to 0, 1 or 2, and relaxes each genotype to three
shares. Concordance is the share of right genotypes; since rare alleles make 0 right most of the
time, it counts only above what the allele frequencies alone give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment

from sentinel.errors import MisuseError
from sentinel.interval import Count
from sentinel.stress.passive.columns import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

GENOTYPES = 3  # no, one or two minor alleles


@dataclass(frozen=True, slots=True)
class Panel:
    """What is public of the variants: the frequency of each minor allele, and the linkage.

    Attributes:
        frequencies: [variants], from 0 to 1/2; over it where the allele that is counted is not the
            minor one.
        linkage: correlation of neighbouring hidden values, from 0 to under 1.
    """

    frequencies: Tensor
    linkage: float

    @classmethod
    def learnt(cls, people: Tensor) -> Panel:
        """Frequencies of reference people [N, variants], none of them behind an attacked update.

        The linkage is not learnt; no attack here uses it.
        """
        shares = (people.mean(0) * len(people) + 1) / (GENOTYPES - 1) / (len(people) + 1)
        return cls(shares.clamp(0.0, 1.0), 0.0)

    @classmethod
    def drawn(cls, variants: int, linkage: float, generator: torch.Generator) -> Panel:
        """Frequencies drawn evenly from .05 to .5."""
        return cls(0.05 + 0.45 * torch.rand(variants, generator=generator), linkage)

    def people(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw synthetic people, [count, variants] of 0.0, 1.0 or 2.0."""
        shape = (2, count, len(self.frequencies))
        fresh = torch.randn(shape, generator=generator)
        hidden = [fresh[..., 0]]
        for place in range(1, shape[-1]):
            follows = self.linkage * hidden[-1]
            hidden.append(follows + math.sqrt(1 - self.linkage**2) * fresh[..., place])
        cuts = torch.special.ndtri(self.frequencies.double()).float()
        alleles: Tensor = (torch.stack(hidden, -1) < cuts).float().sum(0)
        return alleles

    def shares(self) -> Tensor:
        """How often each genotype occurs under Hardy-Weinberg equilibrium, [variants, 3]."""
        p = self.frequencies
        return torch.stack([(1 - p) ** 2, 2 * p * (1 - p), p**2], -1)

    def table(self) -> Table:
        """The same knowledge for the search by relaxation; linkage is not used there."""
        levels = torch.arange(float(GENOTYPES))[:, None]
        return Table(
            tuple(
                Column(levels, share.clamp_min(1e-9), share[None] @ levels[:, 0], 1.0, levels[top])
                for share, top in zip(self.shares(), self.shares().argmax(1), strict=True)
            )
        )

    def guess(self) -> Tensor:
        """The genotype that is most frequent at each variant, [variants]."""
        return self.shares().argmax(1).float()


def called(guesses: Tensor) -> Tensor:
    """Guesses [N, variants] as real numbers, rounded to 0, 1 or 2."""
    return guesses.round().clamp(0.0, GENOTYPES - 1.0).float()


@dataclass(frozen=True, slots=True)
class Concordance:
    """Right genotypes, and what the allele frequencies alone give.

    Attributes:
        calls: genotypes that are right, out of people x variants.
        by_frequency: those that the most frequent genotype of each variant gives.
        others: those of people who were not behind the update, under the same guesses.
        people: people whose every genotype is right, out of all.
    """

    calls: Count
    by_frequency: Count
    others: Count
    people: Count

    def __add__(self, other: Concordance) -> Concordance:
        """Pool two measurements."""
        return Concordance(
            *(
                Count(mine.hits + its.hits, mine.trials + its.trials)
                for mine, its in (
                    (self.calls, other.calls),
                    (self.by_frequency, other.by_frequency),
                    (self.others, other.others),
                    (self.people, other.people),
                )
            )
        )

    @property
    def gain(self) -> float:
        """Concordance above that of the allele frequencies."""
        return self.calls.share - self.by_frequency.share


def concordance(guesses: Tensor, people: Tensor, others: Tensor, panel: Panel) -> Concordance:
    """Compare called guesses with people, as `agreements` does.

    Args:
        guesses: [M, variants] of 0, 1 or 2, possibly none.
        people: [N, variants], behind the update.
        others: at least N others, not behind it.
        panel: gives the baseline.

    Raises:
        MisuseError: there are fewer others than people.
    """
    if len(others) < len(people):
        msg = "concordance takes at least as many others as people"
        raise MisuseError(msg)
    own = agreements(guesses, people, panel)
    whole = Count(int((own == people.shape[1]).sum()), len(people))
    apart = agreements(guesses, others[: len(people)], panel)
    alone = (panel.guess()[None] == people).sum()
    cells = people.numel()
    return Concordance(
        Count(int(own.sum()), cells),
        Count(int(alone), cells),
        Count(int(apart.sum()), cells),
        whole,
    )


def agreements(guesses: Tensor, people: Tensor, panel: Panel) -> Tensor:
    """Right genotypes of each person under the guess that suits best, [N].

    Guesses that were made more than once count once; where there are fewer guesses than people,
    the most frequent genotypes stand in. A person may be matched with one guess only.

    Args:
        guesses: [M, variants] of 0, 1 or 2, possibly none.
        people: [N, variants].
        panel: gives what is most frequent.
    """
    stand_in = panel.guess()[None].expand(len(people), -1)
    known = torch.cat([torch.unique(guesses, dim=0), stand_in])
    right = torch.stack([(known == person).sum(1) for person in people])
    chosen, places = linear_sum_assignment(right.numpy(), maximize=True)
    return right[torch.as_tensor(chosen), torch.as_tensor(places)]
