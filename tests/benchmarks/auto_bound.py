"""What a bound that follows is worth: Fed-Heart-Disease under fixed bounds and under "auto".

    python tests/benchmarks/auto_bound.py [REPEATS] [ROUNDS]

Four hospitals average their updates; each has a guard with the same policy, whose one rule clips
and noises. Printed are the area under the ROC curve on held-out patients (mean over hospitals, then
over repeats, with the standard deviation between repeats), and what the bound came to. The splits
and starts are seeded; the guards' noise is not.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import torch

from sentinel.crew import one_thread
from sentinel.demo import cohorts
from sentinel.demo.hearts import auc, network
from sentinel.demo.hospitals import GuardedDoor, Loop, Site
from sentinel.stress.layers import copied
from sentinel.stress.servers.federation import FedAvgServer

AUTO = 'max_norm = "auto"\nmax_norm_floor = {}\nmax_norm_ceiling = {}\n'
BOUNDS = {
    "fixed, 30 times too small": "max_norm = 0.003\n",
    "fixed, as shipped": "max_norm = 0.1\n",
    "fixed, 50 times too large": "max_norm = 5.0\n",
    "auto, starts too small": AUTO.format(0.001, 1.0),
    "auto, starts too large": AUTO.format(0.05, 50.0),
}
RATIOS = (1.0, 5.0)


def main() -> None:
    """Run every bound under every noise, and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", type=int, nargs="?", default=3)
    parser.add_argument("rounds", type=int, nargs="?", default=30)
    asked = parser.parse_args()
    print(f"{asked.repeats} repeats, {asked.rounds} rounds, four hospitals")
    print(f"{'noise_ratio':>11}  {'max_norm':28}{'AUC':>6} {'+-':>6}   bound: first, last")
    for ratio in RATIOS:
        for name, bound in BOUNDS.items():
            found = [federate(bound, ratio, seed, asked.rounds) for seed in range(asked.repeats)]
            aucs = [area for area, _ in found]
            spread = stdev(aucs) if len(aucs) > 1 else math.nan
            first, last = (fmean(bounds[at] for _, bounds in found) for at in (0, -1))
            print(
                f"{ratio:11g}  {name:28}{fmean(aucs):6.3f} {spread:6.3f}   {first:.3g}, {last:.3g}",
                flush=True,
            )


def federate(bound: str, ratio: float, seed: int, rounds: int) -> tuple[float, list[float]]:
    """Mean area over the hospitals at the end, and the mean bound of each round."""
    generator = torch.Generator().manual_seed(seed)
    sites = [
        Site(name, *cohorts.split(cohorts.load(name), 0.7, generator), Loop())
        for name in cohorts.SITES
    ]
    model = network(len(cohorts.FEATURES), 256, generator)
    server = FedAvgServer(copied(model.state_dict()))
    bounds = []
    with one_thread(), TemporaryDirectory(dir=_memory()) as scratch:
        policy = Path(scratch) / "policy.toml"
        policy.write_text(
            'schema = 1\nname = "bench"\n[[rule]]\nid = "all"\n'
            f"{bound}noise_ratio = {ratio}\n[limits]\nkeep_releases = 1\n"
        )
        policy.chmod(0o600)
        doors = {
            site.name: GuardedDoor(
                str(policy), Path(scratch) / site.name, f"repeat-{seed}", inspects=False
            )
            for site in sites
        }
        for number in range(rounds):
            sent, states, used = server.global_state(number), {}, []
            for site in sites:
                used.append(_bound(doors[site.name], seed))
                outcome = doors[site.name].take_part(site, number, sent, model, generator)
                if outcome.state is None:
                    raise SystemExit(f"nothing was released: {outcome.reason}")
                states[site.name] = outcome.state
            server.aggregate(number, states, {site.name: float(len(site.train)) for site in sites})
            bounds.append(math.exp(fmean(map(math.log, used))))
    model.load_state_dict(server.global_state(rounds))
    with torch.no_grad():
        areas = [auc(model(s.held_out.rows)[:, 0], s.held_out.labels) for s in sites]
    return fmean(areas), bounds


def _bound(door: GuardedDoor, seed: int) -> float:
    """The bound that the next round of a hospital is under."""
    from sentinel.releases import RoundKey

    policy = door.guard.policy.policy
    memory = door.guard._door.house.memory(RoundKey("heart-demo", f"repeat-{seed}", 0))
    (bound,) = (rule.max_norm for rule in policy.resolved(memory.norms(policy.autos)).rules)
    assert isinstance(bound, float)
    return bound


def _memory() -> str | None:
    """A folder that is kept in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder in it


if __name__ == "__main__":
    main()
