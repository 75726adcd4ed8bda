"""Who and what a server tells from updates, raw and as a guard leaves them.

    python tests/benchmarks/membership.py [--data hearts xrays] [--xrays FILE] [--policy P]
                                           [--knobs RATIO:NORM] [--share SHARE] [--splits N]

`--knobs xMULTIPLIER:NORM` is the noise on each value instead of RATIO, as in `x1.05:0.04`.

Three tables, in Markdown; every update of a policy went through a guard of its own hospital:

- membership of every candidate, by each attack of `sentinel.stress.inference.membership`;
- membership of planted records, outlying and mislabelled: the control of the attacks' strength;
- properties of a hospital's patients, told from a single update (hearts alone).

Half of the candidates (or `--share`) are members, drawn anew by hospital and class in each split. A
threshold is chosen on other records than it is judged on, and the interval is Student's t over
splits, 95 % two-sided: see `sentinel.stress.inference.null`. "Utility lost" is raw less policy on
records outside training, paired by split. Under a promise: `private_membership.py`. FILE is
MedMNIST's pneumoniamnist.npz or a file with its arrays; without it there are only the 542 pictures
of the demo.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sentinel.crew import one_thread
from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import auc, network
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.policy import LoadedPolicy, load_policy
from sentinel.stress.inference import property as group_property
from sentinel.stress.inference.federation import Doors, Site, Watched, federate
from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.membership import (
    ATTACKS,
    Attacker,
    Suspects,
    ceiling,
    membership,
    ranked,
)
from sentinel.stress.inference.null import Pool, measure, over_splits
from sentinel.stress.inference.planted import mislabelled, outlying
from sentinel.stress.lab.knobs import Knob, Turned, turned
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sentinel.stress.inference.property import Cohorts

PARTS = ("train", "val", "test")
PLANTED = 20  # at each site; half of each kind, half of all in training
GROUP = 32  # patients behind an update whose property is told
SHARE = 0.75  # of a group that has the property, or has not


@dataclass(frozen=True)
class Split:
    """One federation to run."""

    number: int
    sites: dict[str, Site]
    records: dict[str, Tensor]  # who each candidate is
    loop: Loop
    start: State


@dataclass(frozen=True)
class Case:
    """A data set, and how it is trained on and attacked."""

    name: str
    policy: str
    draw: Callable[[int], Split]
    rounds: int
    splits: int
    attacker: Attacker
    attacked: int  # sites, of all
    planted_splits: int
    score: Callable[[Split, Watched], tuple[float, float]]  # AUC and accuracy outside training


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for each purpose."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number + 1
    return torch.Generator().manual_seed(seed % 2**62)


def drawn(labels: Tensor, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """Who is a member: a share of each class."""
    members = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen = torch.nonzero(labels == label)[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        members[chosen[: round(len(chosen) * share)]] = True
    return members


# The data.


def hearts(hidden: int, share: float) -> Callable[[int], Split]:
    """Four hospitals, and a perceptron."""

    def draw(number: int) -> Split:
        generator, sites, records, first = seeded(number), {}, {}, 0
        for name in cohorts.SITES:
            cohort = cohorts.load(name)
            members = drawn(cohort.labels, generator, share)
            sites[name] = Site(Records(cohort.rows, cohort.labels), members)
            records[name] = first + torch.arange(len(cohort))
            first += len(cohort)
        model = network(len(cohorts.FEATURES), hidden, generator)
        loop = Loop(model, binary_loss, rate=0.05, epochs=2, batch=32)
        return Split(number, sites, records, loop, copied(model.state_dict()))

    return draw


def hearts_score(split: Split, watched: Watched) -> tuple[float, float]:
    """Means over hospitals."""
    split.loop.model.load_state_dict(watched.final)
    areas, right = [], []
    for site in split.sites.values():
        held = site.data.take(~site.members)
        with torch.no_grad():
            margins = split.loop.model(held.inputs)[:, 0]
        areas.append(auc(margins, held.labels))
        right.append(float(((margins > 0) == (held.labels == 1)).double().mean()))
    return sum(areas) / len(areas), sum(right) / len(right)


def pictures(file: Path | None) -> Records:
    """All chest X-rays."""
    if file is None:
        parts = xray_data.load()
        every = (parts.hospital, parts.decoys, parts.public)
        return Records(torch.cat([p.images for p in every]), torch.cat([p.labels for p in every]))
    with np.load(file, allow_pickle=False) as arrays:
        images = np.concatenate([arrays[f"{part}_images"] for part in PARTS])
        labels = np.concatenate([arrays[f"{part}_labels"] for part in PARTS])
    return Records(
        torch.from_numpy(images).float().div(255).unsqueeze(1),
        torch.from_numpy(labels)[:, 0].long(),
    )


def xrays(data: Records, share: float) -> Callable[[int], Split]:
    """Four sites with pictures by chance, and a small CNN."""

    def draw(number: int) -> Split:
        generator, sites, records = seeded(number), {}, {}
        for place, chosen in enumerate(torch.randperm(len(data), generator=generator).chunk(4)):
            own = data.take(chosen)
            sites[f"site-{place}"] = Site(own, drawn(own.labels, generator, share))
            records[f"site-{place}"] = chosen
        model = xray_net()
        initialise(model, generator)
        loop = Loop(model, nn.CrossEntropyLoss(), rate=0.1, epochs=2, batch=32)
        return Split(number, sites, records, loop, copied(model.state_dict()))

    return draw


def xrays_score(split: Split, watched: Watched) -> tuple[float, float]:
    """Over the pictures of all sites."""
    split.loop.model.load_state_dict(watched.final)
    held = [site.data.take(~site.members) for site in split.sites.values()]
    labels = torch.cat([one.labels for one in held])
    with torch.no_grad():
        answers = split.loop.model(torch.cat([one.inputs for one in held]))
    area = auc(answers[:, 1] - answers[:, 0], labels.float())
    return area, float((answers.argmax(1) == labels).double().mean())


# Membership.


def with_planted(split: Split) -> Split:
    """The same split with planted candidates at every site, the last ones there."""
    generator = seeded(split.number, 7)
    sites = {}
    for name, site in split.sites.items():
        odd = outlying(site.data, PLANTED // 2, generator)
        odd = odd.plus(mislabelled(site.data, PLANTED // 2, generator))
        members = torch.zeros(PLANTED, dtype=torch.bool)
        members[torch.randperm(PLANTED, generator=generator)[: PLANTED // 2]] = True
        sites[name] = Site(site.data.plus(odd), torch.cat([site.members, members]))
    return replace(split, sites=sites)


def suspects(case: Case, split: Split) -> Iterator[tuple[str, Suspects]]:
    """The attacked sites of a split; the server's own data are the other sites'."""
    names = list(split.sites)
    for place in range(case.attacked):
        name = names[(split.number + place) % len(names)]
        rest = [split.sites[other].data for other in names if other != name]
        own = rest[0].plus(rest[1]).plus(rest[2])
        site = split.sites[name]
        yield name, Suspects(site.data, int(site.members.sum()), own)


def attack(case: Case, split: Split, watched: Watched) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Scores by site and attack."""
    for place, (name, asked) in enumerate(suspects(case, split)):
        yield (
            name,
            membership(
                split.loop,
                watched.seen[name],
                watched.final,
                asked,
                attacker=case.attacker,
                generator=seeded(split.number, place, 3),
            ),
        )


def ceilings(case: Case, split: Split, watched: Watched) -> list[Tensor]:
    """What no attack can pass, for each candidate of the attacked sites."""
    return [
        ceiling(split.loop, watched.seen[name], asked, points=1, order=seeded(split.number, 4))
        for name, asked in suspects(case, split)
    ]


def pooled(split: Split, name: str, scores: Tensor) -> dict[str, Tensor]:
    """A site's part of a pool, without planted records."""
    count, place = len(split.records[name]), list(split.sites).index(name)
    labels = split.sites[name].data.labels[:count].long()
    return {
        "scores": scores[:count],
        "members": split.sites[name].members[:count],
        "records": split.records[name],
        "splits": torch.full((count,), split.number),
        "strata": (split.number * 4 + place) * 2 + labels,
    }


def pooled_planted(split: Split, name: str, scores: Tensor) -> dict[str, Tensor]:
    """The same of planted records, told from one another."""
    place, site = list(split.sites).index(name), split.sites[name]
    stratum = split.number * 4 + place
    return {
        "scores": ranked({"": scores[-PLANTED:]})[""],
        "members": site.members[-PLANTED:],
        "records": stratum * PLANTED + torch.arange(PLANTED),
        "splits": torch.full((PLANTED,), split.number),
        "strata": torch.full((PLANTED,), stratum),
    }


@dataclass(frozen=True)
class Ran:
    """All splits of a case under one policy."""

    pools: dict[str, Pool]
    scores: Tensor  # [splits, 2], AUC and accuracy
    withheld: int
    ceilings: Tensor  # of every candidate; none where updates are raw


def run(case: Case, policy: str | LoadedPolicy | None, *, planted: bool) -> Ran:
    """Federate, watch and attack."""
    parts: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    scores, withheld, most = [], 0, [torch.zeros(0, dtype=torch.float64)]
    with tempfile.TemporaryDirectory(dir=memory()) as home:
        for number in range(case.planted_splits if planted else case.splits):
            split = case.draw(number)
            split = with_planted(split) if planted else split
            guards = Doors(split.sites, Path(home), policy).open(f"split-{number}")
            watched = federate(
                split.loop,
                split.start,
                split.sites,
                guards,
                rounds=case.rounds,
                order=seeded(number, 1),
            )
            withheld += watched.withheld
            scores.append(case.score(split, watched))
            most += [] if policy is None else ceilings(case, split, watched)
            for name, found in attack(case, split, watched):
                for kind, values in (found if planted else ranked(found)).items():
                    part = (pooled_planted if planted else pooled)(split, name, values)
                    parts[kind].append(part)
    pools = {
        kind: Pool(**{name: torch.cat([part[name] for part in some]) for name in some[0]})
        for kind, some in parts.items()
    }
    return Ran(pools, torch.tensor(scores, dtype=torch.float64), withheld, torch.cat(most))


def memory() -> str | None:
    """A folder that is kept in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder in it


def lines(name: str, policy: str, ran: Ran, lost: str) -> Iterator[str]:
    """The rows of one case and policy."""
    for attack_name in ATTACKS:
        got = measure(ran.pools[attack_name], generator=seeded(0))
        yield (
            f"| {name} | {policy} | {attack_name} | {got.members} + {got.others} in {got.splits} | "
            f"{got.advantage:.3f} | {got.interval.high:.3f} | {got.null:.3f}, {got.null_high:.3f}"
            f" | "
            f"{got.excess:.3f} | {got.auc:.3f} | {got.found:.3f} | {lost} |"
        )


def lost_between(raw: Ran, other: Ran) -> str:
    """Utility lost, with its interval."""
    told = []
    for place, figure in enumerate(("AUC", "accuracy")):
        apart = 100 * (raw.scores - other.scores)[:, place]
        ends = over_splits(apart)
        told.append(f"{figure} {float(apart.mean()):.2f} [{ends.low:.2f}, {ends.high:.2f}]")
    return ", ".join(told)


HEADER = (
    "| data | policy | attack | members + others in splits | TPR - FPR | upper 95 % | null: mean, "
    "95 % | upper less null | AUC | TPR at 1 % FPR | utility lost, points |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(case: Case, policies: Mapping[str, str | LoadedPolicy], *, planted: bool) -> None:
    """Raw, then each policy by its label."""
    raw = run(case, None, planted=planted)
    print("\n".join(lines(case.name, "raw", raw, "-")), flush=True)
    for label, policy in policies.items():
        ran = run(case, policy, planted=planted)
        print("\n".join(lines(case.name, label, ran, lost_between(raw, ran))), flush=True)
        print(
            f"\n{case.name}, {label}: to first order no attack can pass {ran.ceilings.mean():.3f} "
            f"on average, and {ran.ceilings.max():.3f} on any candidate.",
            flush=True,
        )
        if ran.withheld:
            print(f"{case.name}, {label}: {ran.withheld} updates withheld", flush=True)


def with_knobs(policy: str, knobs: str) -> LoadedPolicy:
    """A policy with another noise and max_norm, given as "ratio:norm" or "xmultiplier:norm"."""
    noise, norm = knobs.split(":")
    knob = Knob.NOISE_MULTIPLIER if noise.startswith("x") else Knob.NOISE_RATIO
    noised = turned(load_policy(policy), Turned(knob, float(noise.removeprefix("x"))))
    return turned(noised, Turned(Knob.MAX_NORM, float(norm)))


# Properties.


@dataclass(frozen=True)
class Asked:
    """One property of a split: groups of the attacker's own patients, and of others."""

    shadows: Cohorts
    tested: Cohorts


def questions(split: Split, count: int) -> dict[str, Asked]:
    """Sex, illness and hospital; members are the attacker's, the others are asked about."""
    sites = split.sites.values()
    asked: dict[str, list[Cohorts]] = defaultdict(list)
    for inside, groups in ((True, 5 * count), (False, count)):
        kept = [site.data.take(site.members == inside) for site in sites]
        data = Records(torch.cat([d.inputs for d in kept]), torch.cat([d.labels for d in kept]))
        where = torch.cat([torch.full((len(d),), place) for place, d in enumerate(kept)])
        for name, flags in (("women", data.inputs[:, 1] < 0), ("ill", data.labels == 1)):
            asked[name].append(
                group_property.lopsided(
                    data,
                    flags,
                    size=GROUP,
                    share=SHARE,
                    count=groups,
                    generator=seeded(split.number, inside, 5),
                )
            )
        asked["hospital"].append(
            group_property.of_classes(
                data,
                where,
                size=min(GROUP, *map(len, kept)),
                count=groups,
                generator=seeded(split.number, inside, 6),
            )
        )
    return {name: Asked(*some) for name, some in asked.items()}


def told(split: Split, asked: Asked, policy: str | None, home: Path) -> tuple[Tensor, Tensor]:
    """What the updates, and what the labels' shares are taken for."""
    tested, shadows = asked.tested, asked.shadows
    seen = []
    for number, group in enumerate(tested.groups):
        site = Site(tested.data.take(group), torch.ones(len(group), dtype=torch.bool))
        run_name = f"split-{split.number}-{number}-{len(shadows.answers.unique())}"
        guards = Doors({"one": site}, home, policy).open(run_name)
        watched = federate(
            split.loop,
            split.start,
            {"one": site},
            guards,
            rounds=1,
            order=seeded(split.number, number, 8),
        )
        seen += watched.seen["one"]
    examples = group_property.simulated(split.loop, split.start, shadows, seeded(split.number, 9))
    counted = group_property.classify(
        shadows.label_shares(2), shadows.answers, tested.label_shares(2), torch.zeros(2)
    )
    return group_property.read(examples, shadows.answers, seen), counted


def property_table(case: Case, policies: list[str], splits: int, count: int) -> None:
    """Sex, illness and hospital, raw and under each policy."""
    print("\n| property | policy | updates | told | 95 % | chance | by labels | beyond labels |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in ("women", "ill", "hospital"):
        for policy in (None, *policies):
            found: list[tuple[Tensor, Tensor, Tensor]] = []
            for number in range(splits):
                with tempfile.TemporaryDirectory(dir=memory()) as home:
                    split = case.draw(number)
                    asked = questions(split, count)[name]
                    pair = told(split, asked, policy, Path(home))
                    found.append((*pair, asked.tested.answers))
            got = group_property.told(*(torch.stack(part) for part in zip(*found, strict=True)))
            print(
                f"| {name} | {'raw' if policy is None else Path(policy).stem} | {got.updates} | "
                f"{got.accuracy:.2f} | {got.interval.low:.2f} to {got.interval.high:.2f} | "
                f"{got.chance:.2f} | {got.counts:.2f} | {got.beyond.low:+.2f} to "
                f"{got.beyond.high:+.2f} |",
                flush=True,
            )


def cases(file: Path | None, hidden: int, share: float = 0.5) -> dict[str, Case]:
    """Both data sets."""
    return {
        "hearts": Case(
            name="hearts",
            policy="tabular-ehr",
            draw=hearts(hidden, share),
            rounds=20,
            splits=6,
            attacker=Attacker(points=2, shadows=8),
            attacked=4,
            planted_splits=4,
            score=hearts_score,
        ),
        "xrays": Case(
            name="X-rays",
            policy="chest-xray",
            draw=xrays(pictures(file), share),
            rounds=20,
            splits=4,
            attacker=Attacker(points=2, shadows=4, replays=32, rounds=6),
            attacked=1,
            planted_splits=3,
            score=xrays_score,
        ),
    }


def main() -> None:
    """Run the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", default=["hearts", "xrays"])
    parser.add_argument("--xrays", type=Path, help="pneumoniamnist.npz of MedMNIST")
    parser.add_argument("--policy", nargs="*", help="instead of the shipped one")
    parser.add_argument(
        "--knobs",
        nargs="*",
        help="its noise_ratio:max_norm instead, as 50:0.035, or xnoise_multiplier:max_norm, as "
        "x1.05:0.04",
    )
    parser.add_argument("--hidden", type=int, default=256, help="neurons of the perceptron")
    parser.add_argument("--share", type=float, default=0.5, help="of the candidates, members")
    parser.add_argument("--splits", type=int, help="of the first table")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tables", nargs="*", default=["all", "planted", "property"])
    parser.add_argument("--quick", action="store_true", help="two splits, four rounds")
    asked = parser.parse_args()
    begin = time.perf_counter()
    with one_thread():
        for name in asked.data:
            case = cases(asked.xrays, asked.hidden, asked.share)[name]
            if asked.quick:
                case = replace(case, splits=2, planted_splits=2, rounds=4)
            case = replace(
                case, splits=asked.splits or case.splits, rounds=asked.rounds or case.rounds
            )
            names = asked.policy or [case.policy]
            policies: dict[str, str | LoadedPolicy] = {Path(one).stem: one for one in names}
            if asked.knobs:
                policies = {one: with_knobs(names[0], one) for one in asked.knobs}
            for kind in ("all", "planted"):
                if kind in asked.tables:
                    print(f"\n{case.name}, {kind}, {case.rounds} rounds\n\n{HEADER}", flush=True)
                    table(case, policies, planted=kind == "planted")
            if name == "hearts" and "property" in asked.tables:
                property_table(case, names, *((2, 8) if asked.quick else (5, 40)))
            print(f"\n{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
