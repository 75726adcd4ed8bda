"""Fixed policies and the shipped, adaptive one over the same mix of rounds: leakage beside utility.

    python tests/benchmarks/policies.py [--data hearts|xrays] [--xrays FILE] [--seeds 5]
                                        [--cycles N] [--policy P] [--quick] [--json F]

Rounds come in cycles, so that every kind comes early and late. After a crafted round the server
goes on from the model it had. Where nothing leaves, nothing is averaged and nothing is read.

- hearts: four hospitals of Fed-Heart-Disease and a perceptron of 256 hidden units. A cycle of eight
  rounds: four of all patients over two local epochs, one step on 8 patients, one on one patient,
  and two crafted models (one step on 32, two epochs on all).
- xrays: chest X-rays dealt to four sites, and the small CNN. Four rounds of all pictures over two
  epochs, one step on 32, on 8, on one picture, and one on 32 under a crafted model. Attacked are
  the updates of the first site in rounds of one step. FILE is MedMNIST's pneumoniamnist.npz or a
  file with its arrays; without it there are the demo's pictures, too few to learn from under noise.

Contestants:

- Fixed policies have one rule, for every round: the shipped `max_norm`, a noise ratio, a `keep`.
  Nothing in them could act on the inspection, so it is left out. Two of them are the shipped base
  rule, without and with the shipped `min_patients`.
- The shipped policy has its rules with `when` and its `min_patients`, and inspects every model.

Every guarded update went through a guard of its own site. Leakage is measured for each update that
was asked for, 0 where nothing left, and is the mean over all of these:

- hearts, *near*: the share of the patients behind it that a guess comes near to (relative error
  under 30 %), less the share of held-out patients of that hospital under the same guesses. The
  attacker is told noise and mask, and takes neurons alone, in pairs and together;
- hearts, *lead*: how often the guesses are nearer to a patient behind it than to a held-out one,
  less how often they are farther. It still sees something where noise leaves no guess near;
- hearts, *told*: membership. The server keeps every honest update of all patients; of a hospital's
  patients the attack on all candidates together calls as many members as there are (it knows how
  many): true less false positives, mean over hospitals. It alone is of the whole federation;
- xrays, *gain*: mean SSIM above the class mean of public pictures, by the better of two estimates
  under a prior that was fitted on them; the attacker is told labels, clip, noise and mask.

Utility: on held-out records after the last round; of hearts the mean over hospitals.

A policy dominates another one where it is better beyond the 95 % interval of the paired difference
in leakage, AUC or accuracy, and worse beyond it in none. Intervals are Student's t over seeds, each
for itself.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from mixes import LARGE, TOLD, Back, Match, matches
from trade_off import Figures, line, told, verdict

from sentinel import Guard, RoundRefused, Withheld
from sentinel.crew import one_thread
from sentinel.policy import LoadedPolicy, load_policy
from sentinel.policy.decide import KNOBS
from sentinel.policy.store import parse_policy
from sentinel.stress.servers.federation import FedAvgServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mixes import Draw, Kind

    from sentinel.stress.layers import State
    from sentinel.stress.records import Records


@dataclass(frozen=True)
class Contestant:
    """A policy, or none."""

    name: str
    loaded: LoadedPolicy | None
    inspects: bool = False


@dataclass
class Ran:
    """What one contestant's federations came to.

    Attributes:
        leaks: measure -> one for each seed; `TOLD` where it is measured.
        kinds: (measure, kind of round) -> one for each update.
        scores: AUC and accuracy for each seed.
        fates: what became of the updates that were asked for.
    """

    leaks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kinds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    scores: list[tuple[float, float]] = field(default_factory=list)
    fates: Counter[str] = field(default_factory=Counter)

    def figures(self, measure: str) -> Figures:
        """All of it by seed, with the leakage of one measure."""
        scores = torch.tensor(self.scores, dtype=torch.float64)
        leaks = torch.tensor(self.leaks[measure], dtype=torch.float64)
        return Figures(leaks, scores[:, 0], scores[:, 1])


# Contestants.


def contestants(match: Match, shipped: str, *, quick: bool) -> Iterator[Contestant]:
    """No guard, the shipped policy, and the fixed ones."""
    loaded = load_policy(shipped)
    (base,) = loaded.policy.always
    least = loaded.policy.limits.min_patients
    yield Contestant("no guard", None)
    yield Contestant(f"shipped ({loaded.policy.name})", loaded, inspects=True)
    for noise, keep in [(0.0, 1.0), (10.0, 1.0)] if quick else match.fixed:
        knobs = {"max_norm": base.max_norm, "noise_ratio": noise, "keep": keep}
        yield Contestant(named(noise, keep), fixed(knobs))
    knobs = base.model_dump(include=set(KNOBS) - {"action"}, exclude_none=True)
    yield Contestant("the shipped base rule", fixed(knobs))
    yield Contestant(f"the same, at least {least} patients", fixed(knobs, least))


def named(noise: float, keep: float) -> str:
    """A fixed policy in words."""
    return f"noise {noise:g}" + (f", keep {keep:g}" if keep < 1 else "")


def fixed(knobs: Mapping[str, object], least: int | None = None) -> LoadedPolicy:
    """A policy with one rule, which always applies."""
    lines = ["schema = 1", 'name = "fixed"', "[limits]", "keep_releases = 1"]
    lines += [] if least is None else [f"min_patients = {least}"]
    lines += ["[[rule]]", 'id = "all"', *(f"{k} = {json.dumps(v)}" for k, v in knobs.items())]
    return parse_policy("\n".join(lines).encode(), "fixed")


# Rounds.


def run(match: Match, contestant: Contestant, seeds: int, cycles: int) -> Ran:
    """All federations of one contestant."""
    ran = Ran()
    with tempfile.TemporaryDirectory(dir=memory()) as home:
        for seed in range(seeds):
            federate(match, contestant, match.draw(seed), cycles, Path(home), ran)
    return ran


def federate(  # noqa: PLR0913, PLR0917 - a federation's parts
    match: Match, contestant: Contestant, draw: Draw, cycles: int, home: Path, ran: Ran
) -> None:
    """One federation from its first to its last round; what came of it goes into `ran`."""
    server, leaks, seen = FedAvgServer(draw.start), defaultdict(list), defaultdict(list)
    guards = {name: guard_of(contestant, home / name, draw.seed) for name in draw.parts}
    for number in range(cycles * len(match.cycle)):
        cycle, place = divmod(number, len(match.cycle))
        kind, backs = match.cycle[place], {}
        sent = draw.sent(kind, number, cycle, server.global_state(0))
        for name, (_, held) in draw.parts.items():
            behind = draw.behind(kind, number, name)
            local = draw.trained(kind, sent, behind, draw.order(number, name))
            fate, back = sent_back(guards[name], number, sent, draw, local, len(behind))
            ran.fates[fate] += 1
            if back is not None:
                backs[name] = back
            for measure, leak in read(match, draw, kind, name, sent, back, behind, held).items():
                ran.kinds[measure, kind.name].append(leak)
                leaks[measure].append(leak)
        if kind == LARGE:
            for name, back in backs.items():
                seen[name].append(back.observed(draw.loop, sent))
        if not kind.crafted:
            states = {name: back.state for name, back in backs.items()}
            weights = {name: float(len(draw.behind(kind, number, name))) for name in backs}
            server.aggregate(number, states, weights)
    final = server.global_state(0)
    ran.scores.append(draw.score(final))
    for measure, values in leaks.items():
        ran.leaks[measure].append(fmean(values))
    if match.told:
        ran.leaks[TOLD].append(fmean(match.told(draw, n, seen[n], final) for n in draw.parts))


def read(  # noqa: PLR0913, PLR0917 - an update's parts
    match: Match,
    draw: Draw,
    kind: Kind,
    name: str,
    sent: State,
    back: Back | None,
    behind: Records,
    held: Records,
) -> dict[str, float]:
    """What an attack gets of one update, by measure: nothing of one that stayed."""
    if not draw.attacks(kind, name):
        return {}
    if back is None:
        return dict.fromkeys(match.measures, 0.0)
    return draw.read(sent, back, behind, held)


def guard_of(contestant: Contestant, folder: Path, seed: int) -> Guard | None:
    """A hospital's guard for one job."""
    if contestant.loaded is None:
        return None
    return Guard(
        contestant.loaded,
        folder,
        federation="policies",
        run=f"seed-{seed}",
        unsafe_skip_inspection=not contestant.inspects,
        alerts=io.StringIO(),
    )


def sent_back(  # noqa: PLR0913, PLR0917 - a round's parts
    guard: Guard | None, number: int, sent: State, draw: Draw, local: State, patients: int
) -> tuple[str, Back | None]:
    """What became of the update, and what the server got."""
    if guard is None:
        return "released", Back(local, None)
    try:
        rnd = guard.round(number, sent, draw.loop.model, patients=patients)
        with rnd:
            draw.loop.model.load_state_dict(local)
        state = rnd.release()
    except RoundRefused:
        return "refused", None
    except Withheld as error:
        return error.reason.value, None
    return "released", Back(state, rnd.decided)


def memory() -> str | None:
    """A folder that is kept in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder in it


# The table.


def table(match: Match, ran: dict[str, Ran], shipped: Ran) -> Iterator[str]:
    """Two tables: what leaks, and what it is beside the shipped policy."""
    kinds = [kind for kind in match.kinds if (match.measures[0], kind) in shipped.kinds]
    measures = (*match.measures, *([TOLD] if match.told else []))
    yield line("policy", *(f"{m} [95 %]" for m in measures), *kinds, "left")
    yield "|---" * (2 + len(measures) + len(kinds)) + "|"
    for name, one in ran.items():
        leaks = [told(one.figures(measure).leak, 2, 100.0) for measure in measures]
        by_kind = [
            ", ".join(f"{100 * fmean(one.kinds[measure, kind]):.1f}" for measure in match.measures)
            for kind in kinds
        ]
        yield line(name, *leaks, *by_kind, f"{one.fates['released'] / one.fates.total():.2f}")
    yield ""
    yield line("policy", "AUC", "more [95 %]", "accuracy", "more [95 %]", *measures)
    yield "|---" * (5 + len(measures)) + "|"
    for name, one in ran.items():
        beside = [verdict(one.figures(m), shipped.figures(m)) for m in measures]
        own, other = (found.figures(match.measures[0]) for found in (one, shipped))
        yield line(
            name,
            f"{float(own.auc.mean()):.3f}",
            told(own.auc - other.auc, 1, 100.0),
            f"{float(own.accuracy.mean()):.3f}",
            told(own.accuracy - other.accuracy, 1, 100.0),
            *(["-"] * len(beside) if one is shipped else beside),
        )


def main() -> None:
    """Run all contestants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["hearts", "xrays"], default="hearts")
    parser.add_argument("--xrays", type=Path, help="pneumoniamnist.npz of MedMNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cycles", type=int)
    parser.add_argument("--policy", help="name or path of the adaptive policy")
    parser.add_argument("--quick", action="store_true", help="two seeds, one cycle, few policies")
    parser.add_argument("--json", type=Path, help="file for all figures by seed")
    asked = parser.parse_args()
    match = matches(asked.xrays)[asked.data]
    seeds, cycles = (2, 1) if asked.quick else (asked.seeds, asked.cycles or match.cycles)
    if any(rule.max_abs for rule in load_policy(asked.policy or match.shipped).policy.rules):
        parser.error("the attackers do not know policies with max_abs; name another one")
    begin, ran = time.process_time(), {}
    with one_thread():
        entered = list(contestants(match, asked.policy or match.shipped, quick=asked.quick))
        for contestant in entered:
            print(f"{contestant.name} ...", file=sys.stderr, flush=True)
            ran[contestant.name] = run(match, contestant, seeds, cycles)
    shipped = next(ran[one.name] for one in entered if one.inspects)
    print("\n".join(table(match, ran, shipped)))
    spent = time.process_time() - begin
    print(f"\n{seeds} seeds, {cycles * len(match.cycle)} rounds, {spent:.0f} CPU s")
    for name, one in ran.items():
        print(f"{name}: {', '.join(f'{fate} {count}' for fate, count in one.fates.items())}")
    if asked.json is not None:
        asked.json.write_text(json.dumps({name: as_json(one) for name, one in ran.items()}))


def as_json(ran: Ran) -> dict[str, object]:
    """Everything but single updates."""
    kinds = {f"{measure}, {kind}": fmean(v) for (measure, kind), v in ran.kinds.items()}
    return {"leaks": ran.leaks, "scores": ran.scores, "kinds": kinds, "fates": dict(ran.fates)}


if __name__ == "__main__":
    main()
