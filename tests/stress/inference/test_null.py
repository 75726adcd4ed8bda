"""Chance is found to be chance, and what is more than chance to be more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sentinel.errors import MisuseError
from sentinel.stress.inference.null import Pool, by_split, measure, over_splits

RECORDS, SPLITS = 200, 6
NAMES = ("scores", "members", "records", "splits", "strata")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shift: float, seed: int = 0, *, person: float = 1.0, splits: int = SPLITS) -> Pool:
    """Scores N(person's own, 1), members' raised by `shift`; half of all are members."""
    generator = seeded(seed)
    own = person * torch.randn(RECORDS, generator=generator, dtype=torch.float64)
    parts = []
    for split in range(splits):
        members = torch.zeros(RECORDS, dtype=torch.bool)
        members[torch.randperm(RECORDS, generator=generator)[: RECORDS // 2]] = True
        noise = torch.randn(RECORDS, generator=generator, dtype=torch.float64)
        scores = own + noise + shift * members
        parts.append((scores, members, torch.arange(RECORDS), torch.full((RECORDS,), split)))
    scores, members, records, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pool(scores, members, records, numbers, numbers)


def test_perfect_scores_are_worth_nearly_one() -> None:
    got = measure(drawn(100.0), generator=seeded())
    assert got.auc == got.found == 1.0
    assert got.advantage >= 0.99  # the other half's threshold may pass by a record or two
    assert got.p_value < 0.01
    assert (got.members, got.others, got.splits) == (600, 600, 6)


def test_the_advantage_is_that_of_two_shifted_normals() -> None:
    """Reference: at the best threshold 2 Phi(shift / 2) - 1, and the AUC Phi(shift / sqrt 2)."""
    got = measure(drawn(1.0, person=0.0, splits=20), permutations=20, generator=seeded())
    assert got.advantage == pytest.approx(math.erf(0.5 / 2**0.5), abs=0.03)
    assert got.auc == pytest.approx(0.5 + 0.5 * math.erf(0.5), abs=0.02)
    assert got.found == pytest.approx(0.092, abs=0.02)  # 1 - Phi(2.326 - 1)


def test_scores_that_say_nothing_are_rarely_found_to_say_something() -> None:
    """At p = .1 in about a tenth of all trials, though the same people come back in each split."""
    values = [
        measure(drawn(0.0, seed, person=2.0), permutations=19, generator=seeded(seed))
        for seed in range(60)
    ]
    assert 1 <= sum(got.p_value <= 0.1 for got in values) <= 14
    assert abs(sum(got.advantage for got in values)) / 60 < 0.01
    assert abs(values[0].null) < 0.02
    outside = sum(not got.interval.low <= 0.0 <= got.interval.high for got in values)
    assert outside <= 9


def test_a_threshold_is_not_chosen_on_the_records_it_is_judged_on() -> None:
    """Twelve records without a difference: the best threshold of their own would gain much."""
    pools = [drawn(0.0, seed) for seed in range(30)]
    few = [Pool(*(getattr(p, n)[p.records < 12] for n in Pool.__dataclass_fields__)) for p in pools]
    kept = [pool for pool in few if bool((by_split(pool, pool.members) == 1).all())]
    gains = [measure(pool, permutations=1, generator=seeded(1)).advantage for pool in kept]
    flattering = [
        max(float(by_split(pool, pool.scores >= least).mean()) for least in pool.scores)
        for pool in kept
    ]
    assert sum(flattering) / len(kept) > 0.1
    assert abs(sum(gains) / len(kept)) < 0.05


def test_memberships_are_permuted_within_strata_only() -> None:
    """A score that tells the stratum, and so the membership, is no more than its null."""
    pool = drawn(0.0)
    strata = pool.splits * 2 + pool.members  # each stratum all members or none
    got = measure(
        Pool(pool.members.double(), pool.members, pool.records, pool.splits, strata),
        generator=seeded(),
    )
    assert got.advantage == got.null == 1.0
    assert got.p_value == 1.0


def test_equal_scores_are_worth_nothing() -> None:
    pool = drawn(0.0)
    flat = Pool(torch.zeros(len(pool.scores)), *(getattr(pool, n) for n in NAMES[1:]))
    got = measure(flat, generator=seeded())
    assert got.advantage == 0.0
    assert got.auc == 0.5
    assert got.found == 0.0


def test_infinite_scores_are_the_highest_and_the_lowest() -> None:
    pool = drawn(0.0)
    scores = torch.where(pool.members, math.inf, -math.inf)
    got = measure(Pool(scores, *(getattr(pool, n) for n in NAMES[1:])), generator=seeded())
    assert got.advantage == 1.0
    assert got.auc == 1.0


def test_the_same_generator_gives_the_same_figures() -> None:
    pool = drawn(0.3)
    assert measure(pool, generator=seeded(3)) == measure(pool, generator=seeded(3))


def test_the_excess_is_what_the_upper_end_has_over_the_null() -> None:
    got = measure(drawn(0.3), generator=seeded())
    assert got.excess == got.interval.high - got.null


def test_the_interval_over_splits_is_students() -> None:
    """Reference: mean 2, deviation 1, three values; t at .975 and 2 degrees is 4.303."""
    ends = over_splits(torch.tensor([1.0, 2.0, 3.0]))
    assert ends.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)
    assert ends.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)


def _bad(case: str, pool: Pool) -> dict[str, Tensor]:
    values = {name: getattr(pool, name).clone() for name in NAMES}
    if case == "NaN":
        values["scores"][3] = math.nan
    elif case == "one split":
        values["splits"][:] = 0
    elif case == "a split of members":
        values["members"][values["splits"] == 1] = True
    else:
        values["members"][values["splits"] == SPLITS - 1] = False
    return values


@pytest.mark.parametrize("case", ["NaN", "one split", "a split of members", "none in the last"])
def test_what_has_no_interval_is_refused(case: str) -> None:
    with pytest.raises(MisuseError):
        Pool(**_bad(case, drawn(0.0)))
