"""Whether rounds of a real training run are exchangeable enough for a calibrated threshold to hold.

    python tests/benchmarks/site_calibration.py [REPEATS] [ROUNDS] [FIRST_SEED]

Fed-Heart-Disease: four hospitals average their updates, and one of them (Cleveland) has a guard. Of
its rounds a third is calibrated on at alpha = .05, and those that follow are watched: "early" from
the first round on, "late" after as many rounds of training as are calibrated on. Printed for each
score, summed over repeats: alarms among the watched rounds, which are to be 5 in 100 on average if
rounds are exchangeable, and alarms where the threshold has room of a twentieth ("roomy"); in how
many repeats bets against that assumption reached 20 on the calibration's own order; in how many
there were more alarms than 5 in 100, in how many of these the bets since the calibration reached
20, and after how many alarms. Splits, starts and coins are seeded.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sentinel.audit import score_step
from sentinel.audit.records import SCORE_STEPS
from sentinel.crew import one_thread
from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.demo.hospitals import BareDoor, GuardedDoor, Loop, Site
from sentinel.detection import conformal
from sentinel.stress.layers import copied
from sentinel.stress.servers.federation import FedAvgServer

ALPHA, ROOM = 0.05, 0.05
WATCHED = "cleveland"
POLICY = 'schema = 1\nname = "bench"\n[limits]\nkeep_releases = 1\n[[rule]]\nid = "all"\n'
STAGES = {"early": 0, "late": 1}  # how many times the calibration's length passes before it
Scores = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Watched:
    """One calibration, and the rounds after it.

    Attributes:
        alarms: among `rounds`.
        roomy: alarms where the threshold has `ROOM`, as the command prints it.
        order: whether bets on the order of the calibration rounds reached 20.
        drift: whether bets on the rounds since did.
        before: alarms until they did; all of them where they did not.
    """

    rounds: int
    alarms: int
    roomy: int
    order: bool
    drift: bool
    before: int


def main() -> None:
    """Run all repeats, and print a line for each score and stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", type=int, nargs="?", default=8)
    parser.add_argument("rounds", type=int, nargs="?", default=150)
    parser.add_argument("first_seed", type=int, nargs="?", default=0)
    asked = parser.parse_args()
    seeds = range(asked.first_seed, asked.first_seed + asked.repeats)
    report([scores_of(seed, asked.rounds) for seed in seeds], asked.rounds // 3)


def report(runs: list[Scores], calibrated: int) -> None:
    """Print a line for each score and stage, summed over the runs."""
    print(f"{len(runs)} repeats, {calibrated} rounds calibrated on, alpha {ALPHA:g}")
    print("score        stage  alarms       roomy  repeats: order 20, too many, of them drift 20")
    for which in ("suspicion", "sensitivity"):
        for stage, passed in STAGES.items():
            found = [
                watched(run[which][passed * calibrated :], calibrated, seed)
                for seed, run in enumerate(runs)
            ]
            many = [one for one in found if one.alarms > ALPHA * one.rounds]
            print(
                f"{which:12} {stage:6} {sum(one.alarms for one in found):3} of "
                f"{sum(one.rounds for one in found):4} {sum(one.roomy for one in found):8}"
                f"{sum(one.order for one in found):14}"
                f"{len(many):12}{sum(one.drift for one in many):18}"
                f"   alarms before it: {[one.before for one in many]}; "
                f"drift 20 in all: {sum(one.drift for one in found)}",
                flush=True,
            )


def watched(scores: list[float], calibrated: int, seed: int) -> Watched:
    """Calibrate on the first rounds, and watch the others."""
    before, since = scores[:calibrated], scores[calibrated:]
    bar = conformal.threshold(before, ALPHA).score
    coin = conformal.coins(seed.to_bytes(4, "big"))
    order = conformal.bet(conformal.smoothed_p_values([], before, coin))[-1]
    paths = conformal.bet(conformal.smoothed_p_values(before, since, coin))
    told = [path.rounds for path in paths if path.reached(conformal.WARNING)]
    alarms = [score > bar for score in since]
    until = told[0] if told else len(since)
    return Watched(
        rounds=len(since),
        alarms=sum(alarms),
        roomy=sum(score > bar + ROOM + 1e-9 for score in since),
        order=order.reached(conformal.WARNING),
        drift=bool(told),
        before=sum(alarms[:until]),
    )


def scores_of(seed: int, rounds: int) -> Scores:
    """Both scores of every round at the watched hospital, in twentieths as the log has them."""
    generator = torch.Generator().manual_seed(seed)
    sites = [
        Site(name, *cohorts.split(cohorts.load(name), 0.7, generator), Loop())
        for name in cohorts.SITES
    ]
    model = network(len(cohorts.FEATURES), 64, generator)
    server = FedAvgServer(copied(model.state_dict()))
    found: Scores = {"suspicion": [], "sensitivity": []}
    with one_thread(), TemporaryDirectory() as scratch:
        policy = Path(scratch) / "policy.toml"
        policy.write_text(POLICY)
        policy.chmod(0o600)
        guarded = GuardedDoor(str(policy), Path(scratch) / "state", f"repeat-{seed}")
        doors = {name: guarded if name == WATCHED else BareDoor() for name in cohorts.SITES}
        for number in range(rounds):
            sent, states = server.global_state(number), {}
            for site in sites:
                outcome = doors[site.name].take_part(site, number, sent, model, generator)
                if outcome.state is None:
                    raise SystemExit(f"nothing was released: {outcome.reason}")
                states[site.name] = outcome.state
                if site.name == WATCHED:
                    found["suspicion"].append(_logged(outcome.suspicion))
                    found["sensitivity"].append(_logged(outcome.sensitivity))
            server.aggregate(number, states, {site.name: float(len(site.train)) for site in sites})
    return found


def _logged(score: float | None) -> float:
    if score is None:
        raise SystemExit("a round has no score")
    return score_step(score) / SCORE_STEPS


if __name__ == "__main__":
    main()
