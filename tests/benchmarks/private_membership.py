"""Who a server tells from updates under a promise, beside the most that anybody could tell.

    python tests/benchmarks/private_membership.py [--epsilon 1 1.5] [--share 0.5] [--splits 20]

The four hospitals of Fed-Heart-Disease train a linear head through `guard.private`: everybody in
every step, 40 steps, one in each round, the last half of the global models averaged, as in
`private_utility.py`. Members, others and measures are those of `membership.py`. The attacker keeps
every released state and knows clip, noise, rate and cohort. A step is then exactly the sum of its
members' clipped gradients and noise, with nothing left to simulate.

"Any attacker" is 2 Phi(mu / 2) - 1 with mu = sqrt(steps) / noise multiplier, at the hospital with
the largest: the advantage of the best test of one patient against everybody else known (Dong, Roth
and Su, "Gaussian differential privacy", 2022). It holds for each patient and needs no interval.
"Utility lost" is that of a bare perceptron under federated averaging less that of the private head,
on patients outside training, paired by split, in points.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import membership as open_updates
import private_utility as private
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.crew import one_thread
from sentinel.stress.auc import auc
from sentinel.stress.inference.federation import federate
from sentinel.stress.inference.membership import Evidence, filtered, joint, ranked
from sentinel.stress.inference.null import Pool, measure, over_splits
from sentinel.stress.layers import State, copied
from sentinel.stress.servers.federation import FedAvgServer
from sentinel.terms import Unit

KNOBS = private.Knobs(40, 1, 0.3, 1.0)
HEADER = (
    "| epsilon | any attacker | attack | members + others in splits | TPR - FPR | upper 95 % | "
    "null | upper less null | AUC | utility lost: AUC | accuracy |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Trained:
    """One private federation.

    Attributes:
        scores: by attack and site.
        utility: AUC and accuracy outside training, means over hospitals.
        multipliers: noise multiplier of each site.
        rounds: by site, candidates' influences and the update of each round, in units of the noise.
    """

    scores: dict[str, dict[str, Tensor]]
    utility: tuple[float, float]
    multipliers: list[float]
    rounds: dict[str, list[tuple[Tensor, Tensor]]]


def influences(state: State, rows: Tensor, labels: Tensor, clip_norm: float) -> Tensor:
    """What each record adds to the sum of a private step on a linear head, [n, columns + 1]."""
    margins = rows @ state["weight"][0] + state["bias"]
    ones = torch.ones(len(rows), 1)
    gradients = (torch.sigmoid(margins) - labels)[:, None] * torch.cat([rows, ones], 1)
    norms = gradients.norm(dim=1, keepdim=True)
    return gradients * (clip_norm / norms.clamp_min(1e-12)).clamp_max(1.0)


def seen_in(parts: list[tuple[Tensor, Tensor]]) -> Evidence:
    """All rounds together: influences and updates, both in units of the noise."""
    gram = torch.stack([i @ i.T for i, _ in parts]).sum(0)
    matches = torch.stack([i @ update for i, update in parts]).sum(0)
    nothing = torch.zeros_like(matches)
    own = gram.diagonal()
    return Evidence(
        nothing, nothing, nothing, matches, gram, matches, own, torch.zeros(len(matches), 4)
    )


def flat(state: State) -> Tensor:
    """A head as one vector."""
    return torch.cat([state["weight"][0], state["bias"]])


def train(
    split: open_updates.Split, epsilon: float, home: Path, knobs: private.Knobs = KNOBS
) -> Trained:
    """Train all hospitals privately, and score every candidate."""
    rows = {name: private.heart_features(s.data.inputs) for name, s in split.sites.items()}
    doors = {}
    for name, site in split.sites.items():
        inside, labels = rows[name][site.members], site.train.labels
        own = private.Site(inside, labels, torch.arange(len(inside)))
        doors[name] = private.Door(home / name, own, Unit.RECORD, epsilon, knobs)
    server = FedAvgServer(copied(next(iter(doors.values())).model.state_dict()))
    parts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    kept: list[State] = []
    rate = knobs.rate / knobs.clip_norm
    for number in range(knobs.steps):
        sent, states = server.global_state(number), {}
        for name, door in doors.items():
            states[name] = door.round(number, sent)
            labels = split.sites[name].data.labels
            std = door.noise_multiplier * knobs.clip_norm
            moved = (flat(sent) - flat(states[name])) * (door.units / rate)  # the step's noisy sum
            own = influences(sent, rows[name], labels, knobs.clip_norm)
            parts[name].append(((own / std).double(), (moved / std).double()))
        server.aggregate(number, states, {name: float(d.units) for name, d in doors.items()})
        kept.append(server.global_state(number))
    kept = kept[round(len(kept) * (1 - knobs.averaged)) :]
    final = {name: torch.stack([state[name] for state in kept]).mean(0) for name in kept[0]}
    return Trained(
        judged(split, parts, rows, final),
        utility(split, rows, final),
        [door.noise_multiplier for door in doors.values()],
        parts,
    )


def judged(
    split: open_updates.Split,
    parts: dict[str, list[tuple[Tensor, Tensor]]],
    rows: dict[str, Tensor],
    final: State,
) -> dict[str, dict[str, Tensor]]:
    """Scores by attack and site."""
    scores: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, site in split.sites.items():
        one, share = seen_in(parts[name]), float(site.members.double().mean())
        margins = rows[name] @ final["weight"][0] + final["bias"]
        losses = F.binary_cross_entropy_with_logits(margins, site.data.labels, reduction="none")
        scores["joint"][name] = joint(one, share)
        scores["filter"][name] = filtered(one, share)
        scores["loss"][name] = -losses.double()
    return scores


def utility(
    split: open_updates.Split, rows: dict[str, Tensor], final: State
) -> tuple[float, float]:
    """AUC and accuracy on patients outside training, means over hospitals."""
    areas, right = [], []
    for name, site in split.sites.items():
        margins = (rows[name] @ final["weight"][0] + final["bias"])[~site.members]
        labels = site.data.labels[~site.members]
        areas.append(auc(margins, labels))
        right.append(float(((margins > 0) == (labels == 1)).double().mean()))
    return sum(areas) / len(areas), sum(right) / len(right)


def bare(case: open_updates.Case, split: open_updates.Split) -> tuple[float, float]:
    """The same of a perceptron without a guard."""
    guards = dict.fromkeys(split.sites)
    order = open_updates.seeded(split.number, 1)
    watched = federate(
        split.loop, split.start, split.sites, guards, rounds=case.rounds, order=order
    )
    return case.score(split, watched)


def lines(case: open_updates.Case, splits: int, epsilon: float) -> list[str]:
    """The rows of one epsilon."""
    parts: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    lost, multipliers = [], []
    for number in range(splits):
        split = case.draw(number)
        with tempfile.TemporaryDirectory(dir=open_updates.memory()) as home:
            trained = train(split, epsilon, Path(home))
        pairs = zip(bare(case, split), trained.utility, strict=True)
        lost.append([100 * (before - after) for before, after in pairs])
        multipliers += trained.multipliers
        for kind, by_site in trained.scores.items():
            for name, scores in by_site.items():
                place = open_updates.pooled(split, name, ranked({kind: scores})[kind])
                parts[kind].append(place)
    most = 2 * NormalDist().cdf(math.sqrt(KNOBS.steps) / min(multipliers) / 2) - 1
    told = []
    for column in torch.tensor(lost, dtype=torch.float64).T:
        ends = over_splits(column)
        told.append(f"{column.mean():.2f} [{ends.low:.2f}, {ends.high:.2f}]")
    rows = []
    for kind, some in parts.items():
        pool = Pool(**{name: torch.cat([part[name] for part in some]) for name in some[0]})
        got = measure(pool, generator=open_updates.seeded(0))
        rows.append(
            f"| {epsilon:g} | {most:.3f} | {kind} | {got.members} + {got.others} in {got.splits} | "
            f"{got.advantage:.3f} | {got.interval.high:.3f} | {got.null:.3f} | {got.excess:.3f} | "
            f"{got.auc:.3f} | {' | '.join(told)} |"
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", nargs="*", type=float, default=[1.0, 1.5])
    parser.add_argument("--share", type=float, default=0.5, help="of the patients that train")
    parser.add_argument("--splits", type=int, default=20)
    asked = parser.parse_args()
    print(HEADER, flush=True)
    with one_thread():
        case = open_updates.cases(None, 256, asked.share)["hearts"]
        for epsilon in asked.epsilon:
            print("\n".join(lines(case, asked.splits, epsilon)), flush=True)


if __name__ == "__main__":
    main()
