"""The plan: what is to be tried, in the order of its worth, for a short budget to go furthest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.stress.lab import servers
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.result import NO_TIME
from sentinel.stress.lab.servers import LATE, SERVERS
from sentinel.stress.lab.setting import HONEST, LOPSIDED, Setting, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.attack import Attack
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

MOST_UPDATES = 24  # under one condition
LEAST_GROUP = 8  # records of which a majority says anything
AVERAGED = 128  # records behind an update of several local epochs, where there are so many
VIEWS = 2  # an update is attacked raw, and as released or as clip and noise leave it
PATIENT = 1200.0  # seconds from which servers are tried that train their trap
PATIENCE = "it trains its trap; give the test 20 minutes or more"
DOOR = 1.0  # seconds that a guard takes to look at a global model it has not seen
CRAFTED = 0.25  # share of the time in which malicious servers are tried on the model
PLANNED = 0.55  # share of the time that is planned for; the rest is for the curves, and in reserve
FIRST = 2  # conditions that every plan begins with, however short the time
SECOND = 0.6  # worth of an attack below which it is a second opinion
STEP = 32  # records in a step of training, about; an attacker goes through all steps each time
LONE = 0.5  # of an attack's time, where one record is behind an update


@dataclass(frozen=True, slots=True)
class Item:
    """One attack under one condition.

    Attributes:
        setting: the condition.
        attack: the name of the attack.
        updates: how many are attacked.
        slowness: of the model; see `make_plan`.
    """

    setting: Setting
    attack: str
    updates: int
    slowness: float = field(default=1.0, compare=False)

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        steps = self.setting.epochs * self.setting.records / STEP
        share = LONE if self.setting.records == 1 else max(1.0, steps)
        each = ATTACKS[self.attack].seconds * share
        return VIEWS * self.updates * self.slowness * (each + 0.05) + DOOR


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was not tried, and why.

    Attributes:
        what: an attack, a condition or a server.
        why: for a reader.
        of_time: whether more time would have it tried.
        of_server: whether it is a server that was left out, and not an attack.
    """

    what: str
    why: str
    of_time: bool = False
    of_server: bool = False

    @classmethod
    def server(cls, name: str, why: str, *, of_time: bool) -> Skipped:
        """A server that was left out."""
        return cls(f"server {name}", why, of_time, of_server=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is to be tried, and everything that cannot be.

    Attributes:
        items: in the order of their worth.
        skipped: what cannot be tried, and why.
        core: how many of the items fit into the time by estimate; the others are tried where the
            test turns out to be faster.
    """

    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]
    core: int


def unmade(attacks: Sequence[str]) -> Plan:
    """The plan of a test that ended before there was one: nothing of it was tried.

    Args:
        attacks: names; all where empty.

    Raises:
        MisuseError: no attack of that name.
    """
    late = [Skipped(name, NO_TIME, of_time=True) for name in _known(attacks)]
    late += [Skipped.server(name, NO_TIME, of_time=True) for name in SERVERS if name != HONEST]
    return Plan((), tuple(late), 0)


def make_plan(  # noqa: PLR0913 - each is one part of a test
    subject: Subject,
    loaded: LoadedPolicy,
    attacks: Sequence[str],
    seconds: float,
    generator: torch.Generator,
    *,
    deadline: Deadline | None = None,
    slowness: float = 1.0,
) -> Plan:
    """Lay out all conditions and attacks, the ones that tell most first.

    Args:
        subject: what is tested.
        loaded: the policy; the smallest update that it lets out is one of the conditions.
        attacks: names; all where empty.
        seconds: that the test may take; servers that train their trap need many.
        generator: of trial crafting.
        deadline: a share of what is left is for trial crafting; servers that have no turn in it are
            listed as not tried.
        slowness: how many times longer the model takes than those that the attacks' seconds are of.

    Raises:
        MisuseError: no attack of that name.
    """
    limit = (deadline or Deadline.never()).share(CRAFTED)
    chosen = [ATTACKS[name] for name in _known(attacks)]
    unfit = {name: _unfit(name, subject, seconds, generator, limit) for name in SERVERS}
    skipped = []
    items = []
    least = loaded.policy.limits.min_patients or 1
    crafted = [name for name in SERVERS if name != HONEST and unfit[name] is None]
    for setting in settings(len(subject.train), least, crafted, most_lopsided(subject.train)):
        for attack in chosen:
            if attack.of_groups != setting.lopsided:
                continue
            if (why := attack.misfit(subject, setting)) is None:
                items.append(Item(setting, attack.name, _updates(attack, setting), slowness))
            else:
                skipped.append(Skipped(f"{attack.name}: {setting.words}", why))
    skipped += _groupless(subject, chosen)
    servers_out = [
        # More time is of no use to servers where no attack fits.
        Skipped.server(name, why, of_time=why in {PATIENCE, NO_TIME} and bool(items))
        for name, why in unfit.items()
        if why is not None
    ]
    # Second opinions come when everything else is through: they are slow, and seldom the strongest.
    items.sort(key=lambda item: ATTACKS[item.attack].worth < SECOND)
    return Plan(tuple(items), tuple(_merged([*servers_out, *skipped])), _core(items, seconds))


def leading(items: Sequence[Item], count: int) -> int:
    """How many items the plan begins with that belong to its first `count` conditions."""
    first = list(dict.fromkeys(item.setting for item in items))[:count]
    later = (at for at, item in enumerate(items) if item.setting not in first)
    return next(later, len(items))


def most_lopsided(records: Records) -> int:
    """Records of the largest lopsided update, whichever way it leans; 0 without a property."""
    if records.flags is None:
        return 0
    having = int(records.flags.sum())
    return int(min(having, len(records) - having) / LOPSIDED)


def _groupless(subject: Subject, chosen: Sequence[Attack]) -> list[Skipped]:
    """Attacks on groups, where there are none to be made."""
    if most_lopsided(subject.train) >= LEAST_GROUP:
        return []
    why = (
        "the loader names no property"
        if subject.train.flags is None
        else "too few records have the property, or too few lack it"
    )
    return [Skipped(attack.name, why) for attack in chosen if attack.of_groups]


def settings(records: int, least: int, crafted: Sequence[str], lopsided: int = 0) -> list[Setting]:
    """All conditions, the ones that tell most first.

    Args:
        records: that the site has.
        least: patients that the policy wants behind an update.
        crafted: names of the malicious servers that fit the model; those of LATE come last.
        lopsided: records of the largest update that leans to one side of a property.
    """
    first = [name for name in crafted if name not in LATE]
    late = [name for name in crafted if name in LATE]
    ample = min(max(32, least), records)
    epochs = min(max(AVERAGED, least), records)
    start, later = Stage.START, Stage.LATER
    groups = [
        Setting(HONEST, start, min(ample, lopsided), lopsided=True),
        Setting(HONEST, start, min(epochs, lopsided), epochs=2, lopsided=True),
    ]
    found = [
        Setting(HONEST, start, 1),
        Setting(HONEST, start, ample),
        *(Setting(name, start, ample) for name in first[:1]),
        Setting(HONEST, start, epochs, epochs=2),
        *(groups if lopsided >= LEAST_GROUP else []),
        Setting(HONEST, start, min(8, records)),
        Setting(HONEST, later, 1),
        *(Setting(name, start, epochs, epochs=2) for name in first[1:2]),
        Setting(HONEST, later, ample),
        *(Setting(name, start, ample) for name in first[1:]),
        Setting(HONEST, later, min(8, records)),
        *(Setting(name, later, ample) for name in first[:1]),
        *(Setting(name, start, ample) for name in late),
    ]
    return list(dict.fromkeys(found))


def _core(items: Sequence[Item], seconds: float) -> int:
    """How many items fit into the time; those of the first conditions always count."""
    least, spent = leading(items, FIRST), 0.0
    for at, item in enumerate(items):
        spent += item.seconds
        if spent > PLANNED * seconds and at >= least:
            return at
    return len(items)


def _unfit(
    name: str, subject: Subject, seconds: float, generator: torch.Generator, limit: Deadline
) -> str | None:
    if name == HONEST:
        return None
    if servers.trains(name):
        return None if seconds >= PATIENT else PATIENCE
    if limit.passed:
        return NO_TIME
    return servers.misfit(name, subject, generator)


def _known(attacks: Sequence[str]) -> list[str]:
    for name in attacks:
        if name not in ATTACKS:
            raise MisuseError(f"There is no attack {name!r}; there are {', '.join(ATTACKS)}.")
    return list(attacks) or sorted(ATTACKS, key=lambda name: -ATTACKS[name].worth)


def _updates(attack: Attack, setting: Setting) -> int:
    if attack.of_groups:
        return min(MOST_UPDATES, attack.wanted)
    return max(1, min(MOST_UPDATES, math.ceil(attack.wanted / setting.records)))


def _merged(skipped: list[Skipped]) -> list[Skipped]:
    """An attack that fits no condition for one reason is said once."""
    grouped: dict[tuple[str, str], list[Skipped]] = {}
    for one in skipped:
        grouped.setdefault((one.what.split(":")[0], one.why), []).append(one)
    return [
        ones[0] if len(ones) == 1 else replace(ones[0], what=f"{what} ({len(ones)} conditions)")
        for (what, _), ones in grouped.items()
    ]
