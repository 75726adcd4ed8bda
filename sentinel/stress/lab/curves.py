"""Curves: the policy with its knobs turned, what still leaks, and what is still learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import OutOfTimeError
from sentinel.stress.lab.exchange import GuardedDoor, Site, raw
from sentinel.stress.lab.knobs import Knob, Turned, bare, fixed_knob, turned, value_of
from sentinel.stress.lab.result import Curves, Point
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST
from sentinel.stress.lab.utility import learned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.finding import Finding, Tally
    from sentinel.stress.lab.plan import Item
    from sentinel.stress.lab.subject import Subject

NOISE = (0.0, 0.2, 1.0, 2.0, 5.0, 10.0, 20.0)
KEEP = (0.25, 0.1)
MULTIPLIERS = (0.1, 0.3, 3.0)  # times the policy's noise_multiplier, where it has one
NORMS = (0.25,)  # times the policy's max_norm; above it, the noise grows as with its own ratio
UPDATES = 2  # attacked at each point, where one alone is behind each; more where that is cheap
CHEAP = 1.0  # seconds for one update
MANY = 16
LEAST = 6
REPEATS = 3  # federations at each point; the first few points come with one
LEAK_SHARE = 0.5  # of a point's time


def worth_drawing(items: Sequence[Item]) -> Item | None:
    """The attack and the condition for the leakage: the first of the plan, honest server."""
    return next((item for item in items if item.setting.server == HONEST), None)


def turns(loaded: LoadedPolicy) -> list[Turned]:
    """Which knobs are turned, the ones that tell most first."""
    found = [Turned()]
    if fixed_knob(loaded, Knob.NOISE_RATIO) is None:
        order = sorted(NOISE, key=lambda value: (value not in (0.0, 2.0, 10.0), value))
        found += [Turned(Knob.NOISE_RATIO, value) for value in order]
        each = value_of(loaded, Knob.NOISE_MULTIPLIER)
        if each:
            found += [Turned(Knob.NOISE_MULTIPLIER, each * factor) for factor in MULTIPLIERS]
    found += [Turned(Knob.KEEP, value) for value in KEEP]
    norm = value_of(loaded, Knob.MAX_NORM)
    if norm is not None and fixed_knob(loaded, Knob.MAX_NORM) is None:
        found += [Turned(Knob.MAX_NORM, norm * factor) for factor in NORMS]
    return found


def draw_curves(  # noqa: PLR0913, PLR0917 - each is one part of a test
    subject: Subject,
    loaded: LoadedPolicy,
    item: Item,
    home: Path,
    seed: int,
    deadline: Deadline,
) -> Curves:
    """Measure leakage and utility at every turn of a knob, as far as the time goes.

    Args:
        subject: model and records.
        loaded: the policy as it is.
        item: attack and condition behind the leakage. Enough patients are named and the inspection
            is off, and rules with `when` are taken out, so that the knobs alone are seen.
        home: scratch folder.
        seed: the same records, parts and orders of batches at every point.
        deadline: after which nothing is begun; what would not end before it is left out.
    """
    plain = learned(subject, None, home, seed, REPEATS, deadline, deadline)
    unguarded, _ = _leak(subject, None, item, home, seed, deadline.share(LEAK_SHARE), deadline)
    planned = turns(loaded)
    points: list[Point] = []
    for at, turn in enumerate(planned):
        if deadline.passed:
            break
        mine = deadline.share(1.0 / (len(planned) - at))
        variant, folder = turned(bare(loaded), turn), home / f"point-{at}"
        leak, kept = _leak(subject, variant, item, folder, seed, mine.share(LEAK_SHARE), deadline)
        utility = None
        if plain is not None:  # with a guard it takes longer
            utility = learned(subject, variant, folder / "utility", seed, REPEATS, mine, deadline)
        if leak is None and utility is None and not kept:
            break
        points.append(Point(turn, leak, utility, kept))
    return Curves(item, unguarded, plain, tuple(points), len(planned))


def _leak(  # noqa: PLR0913, PLR0917 - as above
    subject: Subject,
    loaded: LoadedPolicy | None,
    item: Item,
    home: Path,
    seed: int,
    soft: Deadline,
    hard: Deadline,
) -> tuple[Tally | None, int]:
    """The main measure of the attack on what leaves, and how many updates were withheld."""
    generator = torch.Generator().manual_seed(seed)
    site = Site(subject, generator, hard)
    attacker = torch.Generator().manual_seed(seed + 1)
    door = None if loaded is None else GuardedDoor(loaded, home, alone=True)
    attack = ATTACKS[item.attack]
    pooled: Finding | None = None
    kept = 0
    least = LEAST if attack.seconds < CHEAP else 1
    for number in range(MANY if attack.seconds < CHEAP else UPDATES):
        if number >= least and soft.passed:
            break
        try:
            update = site.update(item.setting, SERVERS[item.setting.server])
            hard.require()
            records = item.setting.records
            back = raw(update) if door is None else door.send(update, site.model, records)
            if back.delta is None:
                kept += 1
                continue
            found = attack.run(site.case(update, back), update.behind, attacker, hard)
        except OutOfTimeError:
            break
        pooled = found if pooled is None else pooled + found
    return (None if pooled is None else pooled.main), kept
