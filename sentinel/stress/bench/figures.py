"""Figures of the bench: from rows to rates with intervals; arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sentinel.interval import Count, wilson
from sentinel.stress.bench.baselines import BASELINES
from sentinel.stress.bench.crafted import FAMILIES, LEARNED, PLAIN
from sentinel.stress.bench.seen import ALARM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sentinel.stress.bench.cost import Cost
    from sentinel.stress.bench.left_out import LeftOut
    from sentinel.stress.bench.seen import CraftedRow, HonestRow, SiegeRow

FPRS = (0.001, 0.01, 0.05)
SENTINEL = "sentinel"
STAGES = ((0, 5), (6, 30), (31, 100), (101, math.inf))
EXPECTED: dict[str, tuple[str, ...]] = {
    "A": ("binning",),
    "B": ("sparse_activation",),
    "C": ("magnification",),
    "D": ("transformer_trap",),
    "E": ("inconsistency",),
    "F": ("learned",),
    "G": ("multi_round", "binning"),  # one part of a scan alone is a binning model
}


@dataclass(frozen=True, slots=True)
class Seen:
    """All rows of one evaluation.

    Attributes:
        honest: rounds.
        crafted: models.
        sieges: servers that turned.
        costs: of an inspection.
        left_out: architectures that the learned part was refitted without.
    """

    honest: Sequence[HonestRow]
    crafted: Sequence[CraftedRow]
    sieges: Sequence[SiegeRow] = ()
    costs: Sequence[Cost] = ()
    left_out: Sequence[LeftOut] = ()


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % Wilson interval.

    Attributes:
        hits: how many.
        trials: out of how many.
    """

    hits: int
    trials: int

    @property
    def share(self) -> float:
        """Hits by trials; NaN of none."""
        return self.hits / self.trials if self.trials else math.nan

    @property
    def low(self) -> float:
        """Lower end of the interval; 0 where nothing was tried."""
        return wilson(Count(self.hits, self.trials)).low if self.trials else 0.0

    @property
    def high(self) -> float:
        """Upper end of the interval; 1 where nothing was tried."""
        return wilson(Count(self.hits, self.trials)).high if self.trials else 1.0

    def document(self) -> dict[str, float]:
        """For a machine."""
        interval = {"low": round(self.low, 4), "high": round(self.high, 4)}
        return {"hits": self.hits, "trials": self.trials, **interval}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a score is cut so that few honest rounds lie above.

    Attributes:
        cut: a model is caught where its score is larger.
        fpr: share of honest rounds that may lie above.
        above: how many do.
        rounds: how many there were.
    """

    cut: float
    fpr: float
    above: int
    rounds: int


def threshold(honest: Sequence[float], fpr: float) -> Threshold:
    """Return the lowest cut above which at most `fpr` of the honest scores lie.

    Args:
        honest: scores, at least one.
        fpr: 0 to 1. With n scores, less than 1/n means none.

    Guarantees:
        Ties never count against the bound: scores equal to the cut are below it.
    """
    ranked = sorted(honest, reverse=True)
    allowed = math.floor(fpr * len(ranked))
    cut = ranked[allowed] if allowed < len(ranked) else -math.inf
    return Threshold(cut, fpr, sum(score > cut for score in ranked), len(ranked))


def caught(scores: Iterable[float], cut: float) -> Rate:
    """Count the scores above a cut."""
    values = list(scores)
    return Rate(sum(score > cut for score in values), len(values))


def score_of(name: str) -> Callable[[HonestRow | CraftedRow], float]:
    """Return what one detector says of a row: "sentinel" or a name of `BASELINES`."""
    if name == SENTINEL:
        return lambda row: row.suspicion
    return lambda row: row.baselines[name]


def leaking(seen: Seen, family: str | None = None) -> list[CraftedRow]:
    """Return the crafted models that are attacks."""
    return [row for row in seen.crafted if row.leaks and family in {None, row.family}]


def sound(seen: Seen) -> list[HonestRow]:
    """Return the honest rounds whose model had not diverged."""
    return [row for row in seen.honest if not row.broken]


@dataclass(frozen=True, slots=True)
class Against:
    """One detector at one false-alarm rate.

    Attributes:
        detector: "sentinel" or a baseline.
        cut: its threshold on the honest corpus.
        families: rate of each family.
    """

    detector: str
    cut: Threshold
    families: Mapping[str, Rate]


def against(seen: Seen, fpr: float) -> list[Against]:
    """Cut every detector at the same rate on the same honest rounds, and count what it catches."""
    rounds = [row for row in sound(seen) if row.baselines]
    found = []
    for name in (SENTINEL, *BASELINES):
        score = score_of(name)
        cut = threshold([score(row) for row in rounds], fpr)
        families = {
            family: caught(map(score, leaking(seen, family)), cut.cut) for family in present(seen)
        }
        found.append(Against(name, cut, families))
    return found


def present(seen: Seen) -> list[str]:
    """Families of which some model leaks, in order."""
    return [family for family in FAMILIES if leaking(seen, family)]


@dataclass(frozen=True, slots=True)
class Group:
    """What was caught of one group of crafted models.

    Attributes:
        name: of the group.
        shipped: at the shipped threshold.
        at: by false-alarm rate.
        alone: at the shipped threshold, from the state alone.
        verdicts: how many of those caught were called what they are.
        harmless: how many leaked nothing and are in no other figure.
    """

    name: str
    shipped: Rate
    at: Mapping[float, Rate]
    alone: Rate
    verdicts: Rate
    harmless: int


def groups(seen: Seen, key: Callable[[CraftedRow], str]) -> list[Group]:
    """Group the crafted models by a key, and count."""
    honest = [row.suspicion for row in sound(seen)]
    cuts = {fpr: threshold(honest, fpr).cut for fpr in FPRS}
    found = []
    for name in sorted({key(row) for row in seen.crafted}):
        rows = [row for row in seen.crafted if key(row) == name]
        found.append(_group(name, rows, cuts))
    return found


def _group(name: str, rows: Sequence[CraftedRow], cuts: Mapping[float, float]) -> Group:
    attacks = [row for row in rows if row.leaks]
    warned = [row for row in attacks if row.suspicion >= ALARM]
    right = sum(row.verdict in EXPECTED[row.family] for row in warned)
    return Group(
        name,
        Rate(len(warned), len(attacks)),
        {fpr: caught((row.suspicion for row in attacks), cut) for fpr, cut in cuts.items()},
        Rate(sum(row.alone >= ALARM for row in attacks), len(attacks)),
        Rate(right, len(warned)),
        len(rows) - len(attacks),
    )


def by_family(seen: Seen) -> list[Group]:
    """One group for each family."""
    return groups(seen, lambda row: row.family)


def by_variant(seen: Seen) -> list[Group]:
    """One group for each recipe."""
    return groups(seen, lambda row: f"{row.family} {row.recipe}")


def by_wrapper(seen: Seen) -> list[Group]:
    """One group for each family and way of hiding, the learned family apart."""
    return groups(seen, lambda row: f"{row.family} {row.wrapper}")


def by_setting(seen: Seen) -> list[Group]:
    """One group for each setting."""
    return groups(seen, lambda row: row.setting)


def by_net(seen: Seen) -> list[Group]:
    """One group for each architecture."""
    return groups(seen, lambda row: row.net)


def worst(seen: Seen, fpr: float) -> Group | None:
    """Return the handcrafted family of which least is caught, of those with a leaking model."""
    hand = [one for one in by_family(seen) if one.name != LEARNED and one.shipped.trials]
    return min(hand, key=lambda one: (one.at[fpr].share, one.at[fpr].low), default=None)


def hidden(seen: Seen, fpr: float) -> Rate:
    """Of handcrafted models that hide in some way, how many are caught."""
    cut = threshold([row.suspicion for row in sound(seen)], fpr).cut
    rows = [row for row in leaking(seen) if row.family != LEARNED and row.wrapper != PLAIN]
    return caught((row.suspicion for row in rows), cut)


@dataclass(frozen=True, slots=True)
class Quiet:
    """False alarms of one group of honest rounds at the shipped threshold.

    Attributes:
        name: of the group.
        rounds: alarms by rounds.
        runs: runs with an alarm, by runs.
        broken: rounds of diverged models, which count in neither.
        most: largest suspicion.
    """

    name: str
    rounds: Rate
    runs: Rate
    broken: int
    most: float


def quiet(name: str, rows: Sequence[HonestRow]) -> Quiet:
    """Count false alarms."""
    fine = [row for row in rows if not row.broken]
    alarms = [row for row in fine if row.alarm]
    return Quiet(
        name,
        Rate(len(alarms), len(fine)),
        Rate(len({row.run for row in alarms}), len({row.run for row in fine})),
        len(rows) - len(fine),
        max((row.suspicion for row in fine), default=0.0),
    )


def quiet_by(seen: Seen, key: Callable[[HonestRow], str]) -> list[Quiet]:
    """Count false alarms by a key, in the order of first appearance."""
    names = dict.fromkeys(key(row) for row in seen.honest)
    return [quiet(name, [row for row in seen.honest if key(row) == name]) for name in names]


def stage_of(row: HonestRow) -> str:
    """Return which stage of training a round belongs to."""
    for low, high in STAGES:
        if low <= row.number <= high:
            return f"rounds {low} to {high}" if high < math.inf else f"rounds from {low}"
    return ""


def long_runs(seen: Seen, rounds: int = 100) -> list[Quiet]:
    """Return each honest run of so many rounds."""
    numbers: dict[int, list[HonestRow]] = {}
    for row in seen.honest:
        numbers.setdefault(row.run, []).append(row)
    return [quiet(str(run), rows) for run, rows in numbers.items() if len(rows) >= rounds]


@dataclass(frozen=True, slots=True)
class Ahead:
    """Whether the detector catches more of a family than the best of the others.

    Attributes:
        family: A to G.
        own: its rate.
        best: name of the baseline that catches most.
        other: that one's rate.
    """

    family: str
    own: Rate
    best: str
    other: Rate

    @property
    def word(self) -> str:
        """One of "ahead", "level" and "behind", by the shares."""
        if self.own.share > self.other.share:
            return "ahead"
        return "level" if self.own.share == self.other.share else "behind"


def ahead(seen: Seen, fpr: float) -> list[Ahead]:
    """Compare with the best baseline of each family, chosen with hindsight: kind to baselines."""
    own, *others = against(seen, fpr)
    found = []
    for family in present(seen):
        best = max(others, key=lambda one: one.families[family].share)
        found.append(Ahead(family, own.families[family], best.detector, best.families[family]))
    return found


def document(seen: Seen) -> dict[str, Any]:
    """Return all figures as plain values, for a machine."""
    everything = quiet("all", seen.honest)
    runs = long_runs(seen)
    return {
        "honest": {
            "false_alarm_rounds": everything.rounds.document(),
            "false_alarm_runs": everything.runs.document(),
            "diverged_rounds": everything.broken,
            "largest_suspicion": round(everything.most, 4),
            "by_kind": {one.name: _quiet(one) for one in quiet_by(seen, lambda row: row.kind)},
            "by_net": {one.name: _quiet(one) for one in quiet_by(seen, lambda row: row.net)},
            "by_stage": {one.name: _quiet(one) for one in quiet_by(seen, stage_of)},
            "alarms_per_100_round_run": [one.rounds.hits for one in runs],
        },
        "crafted": {
            "by_family": {one.name: _grouped(one) for one in by_family(seen)},
            "by_recipe": {one.name: _grouped(one) for one in by_variant(seen)},
            "by_wrapper": {one.name: _grouped(one) for one in by_wrapper(seen)},
            "by_setting": {one.name: _grouped(one) for one in by_setting(seen)},
            "by_net": {one.name: _grouped(one) for one in by_net(seen)},
        },
        "baselines": {
            str(fpr): {one.detector: _against(one) for one in against(seen, fpr)} for fpr in FPRS
        },
        "false_alarms": [_without_baselines(row) for row in seen.honest if _wrong(row)],
        "missed": [_without_baselines(row) for row in leaking(seen) if row.suspicion < ALARM],
        "sieges": [asdict(row) for row in seen.sieges],
        "cost": [asdict(row) for row in seen.costs],
        "left_out": [asdict(row) for row in seen.left_out],
    }


def _wrong(row: HonestRow) -> bool:
    return row.alarm and not row.broken


def _without_baselines(row: HonestRow | CraftedRow) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "baselines"}


def _quiet(one: Quiet) -> dict[str, Any]:
    return {
        "rounds": one.rounds.document(),
        "runs": one.runs.document(),
        "diverged_rounds": one.broken,
        "largest_suspicion": round(one.most, 4),
    }


def _grouped(one: Group) -> dict[str, Any]:
    return {
        "shipped": one.shipped.document(),
        "at": {str(fpr): rate.document() for fpr, rate in one.at.items()},
        "state_alone": one.alone.document(),
        "verdict": one.verdicts.document(),
        "leaks_nothing": one.harmless,
    }


def _against(one: Against) -> dict[str, Any]:
    families = {family: rate.document() for family, rate in one.families.items()}
    return {"cut": one.cut.cut, "above": one.cut.above, "families": families}
