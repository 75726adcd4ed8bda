"""Calibration: the weakest noise under which the attacks of the lab stay within a target.

The noise is searched as a noise_ratio; a noise_multiplier of the rules for every round is set aside
with each turn, and the file that is written says so.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.crew import one_thread
from sentinel.errors import MisuseError
from sentinel.stress.lab import servers
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import Deadline, OutOfTimeError
from sentinel.stress.lab.exchange import GuardedDoor, Site, norm_of
from sentinel.stress.lab.home import scratch
from sentinel.stress.lab.knobs import Knob, Turned, bare, fixed_knob, turned, value_of
from sentinel.stress.lab.plan import LEAST_GROUP, most_lopsided
from sentinel.stress.lab.policy_file import policy_toml
from sentinel.stress.lab.servers import LATE, SERVERS
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.exchange import Update
    from sentinel.stress.lab.finding import Finding, Tally
    from sentinel.stress.lab.subject import Subject

# Those that fit the records; as large as what passes where the shipped policies are measured.
DEFAULT_TARGETS = {"rows": 0.02, "pictures": 0.02, "words": 0.05, "genotypes": 0.02}
LOWEST, HIGHEST = 0.1, 100.0  # noise ratios that are tried
KEEPS = (1.0, 0.25)  # the weakest mask first
STEPS = 6  # halvings of the logarithm of the ratio
CLOSE = 1.1  # factor between two ratios that is close enough
MOST_UPDATES, MOST_RECORDS = 320, 2048  # in one measurement
SEARCH_SHARE = 0.7  # of the time left; the rest is to confirm what was found
NORMS = 9  # updates whose median norm becomes max_norm
EPOCHS = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """One attack under one condition, at one turn of the knobs.

    Attributes:
        attack: its name.
        setting: the condition.
        tally: its main measure.
        target: the gain that is allowed.
    """

    attack: str
    setting: Setting
    tally: Tally
    target: float

    @property
    def reached(self) -> bool:
        """Whether the gain's upper 95 % bound is within the target."""
        return self.tally.interval().high <= self.target

    @property
    def settled(self) -> bool:
        """Whether more records would hardly change that."""
        return self.reached or self.tally.interval().low > self.target

    @property
    def words(self) -> str:
        """One line of evidence."""
        found = self.tally.interval()
        return (
            f"{self.attack}, {self.setting.words}: gain {self.tally.gain:.3f} (95 % "
            f"{found.low:.3f} to {found.high:.3f}, n = {len(self.tally.values)}), allowed "
            f"{self.target:g}"
        )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was found.

    Attributes:
        text: of the policy file; None where no knobs reached the target.
        noise_ratio: the weakest that did; NaN without.
        keep: the mask beside it.
        max_norm: the bound that was set; NaN where the time was up before.
        evidence: what was measured at these knobs on records drawn anew; what was measured last
            where none were shown to reach the target.
        tried: how many turns of the knobs were measured.
        cut: whether the time was up before the search was through: a weaker ratio may do, or,
            without a text, any.
        set_aside: noise_multiplier of the starting policy that the file leaves out; None where it
            had none.
    """

    text: str | None
    noise_ratio: float
    keep: float
    max_norm: float
    evidence: tuple[Measured, ...]
    tried: int
    cut: bool = False
    set_aside: float | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits the result, one sentence each; for the file and for the terminal."""
        if self.text is None:
            return ()
        return tuple(_notes(self.noise_ratio, self.evidence, self.set_aside))


def _notes(ratio: float, evidence: tuple[Measured, ...], aside: float | None) -> list[str]:
    """What a reader of the result must know of how it was found."""
    said = []
    if ratio <= LOWEST:
        said.append(
            f"A noise_ratio of {LOWEST:g} is the weakest value that was tried; a weaker one, or "
            "none, may do."
        )
    measured = list(dict.fromkeys(one.attack for one in evidence))
    others = [name for name in ATTACKS if name not in measured]
    said.append(
        f"Calibrated on {', '.join(measured) or 'no attack'} alone, not on {', '.join(others)}: "
        "of those nothing is shown, and they may ask for more noise. Run `sentinel stress` on it."
    )
    if aside:
        said.append(
            f"Set aside: noise_multiplier = {aside:g} of the rules for every round: the ratio was "
            "all the noise. Put it back, unless membership was among the attacks."
        )
    return said


def calibrate(  # noqa: PLR0913 - each is one choice of the site
    subject: Subject,
    loaded: LoadedPolicy,
    targets: dict[str, float] | None,
    *,
    seconds: float,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Find the weakest knobs that keep every attack within its target.

    Args:
        subject: model and records. Under a promise its public records alone are used.
        loaded: the policy whose other parts are kept.
        targets: name of an attack -> gain over knowing nothing that is allowed, above 0. Where left
            out, DEFAULT_TARGETS of the attacks that fit.
        seconds: that it may take.
        seed: of attackers and draws.
        on_step: called with the steps done and the steps in all.

    Raises:
        MisuseError: an unknown attack, one that does not fit, a target that nothing can show, a
            policy without a norm, a promise per patient or record, or a promise and no public
            records.

    Guarantees:
        Every measurement went through the guard, in a scratch folder. Under a promise no private
        record is looked at. A policy is written only where, on records drawn anew, the upper 95 %
        bound of every gain is within its target; where the time is up before that, none is. No
        attack is begun after the time is up.
    """
    allowed = _allowed(subject, loaded, seed)
    work = _Calibration(allowed, loaded, targets, Deadline.after(seconds), seed)
    work.on_step = on_step or (lambda _done, _total: None)
    with one_thread(), scratch() as home:
        return work.run(home)


def _allowed(subject: Subject, loaded: LoadedPolicy, seed: int) -> Subject:
    """The records that may be calibrated on; public ones are halved at random."""
    privacy = loaded.policy.privacy
    if privacy is None:
        return subject
    if privacy.unit is not Unit.SITE:
        raise MisuseError(
            "A promise per patient or record is kept by private training; it has no noise_ratio to "
            "calibrate."
        )
    if subject.public is None:
        raise MisuseError(
            "The policy makes a promise, so knobs may not be fitted to private records; let the "
            "loader give public ones, under the key public."
        )
    half = len(subject.public) // 2
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(subject.public), generator=generator)  # files come sorted
    first, second = subject.public.take(some[:half]), subject.public.take(some[half:])
    return replace(subject, train=first, held_out=second, public=None)


class _Calibration:
    """One search under way."""

    def __init__(
        self,
        subject: Subject,
        loaded: LoadedPolicy,
        targets: dict[str, float] | None,
        deadline: Deadline,
        seed: int,
    ) -> None:
        self.on_step: Callable[[int, int], None] = lambda _done, _total: None
        self._subject, self._loaded = subject, bare(loaded)
        self._whole, self._deadline, self._seed = loaded, deadline, seed
        self._limit = deadline
        self._tried = 0
        self._cut = False
        self._evidence: tuple[Measured, ...] = ()
        self._updates: dict[tuple[str, Setting], int] = {}
        if why := fixed_knob(loaded, Knob.NOISE_RATIO):
            raise MisuseError(why)
        generator = torch.Generator().manual_seed(seed)
        self._targets = DEFAULT_TARGETS if targets is None else targets
        self._conditions = _conditions(
            subject, loaded, self._targets, generator, asked=targets is not None
        )

    def run(self, home: Path) -> Calibrated:
        """Set the norm, bisect the noise, thin out where noise alone does not do, confirm."""
        norm = math.nan
        try:
            norm = self._set_norm()
            for keep in KEEPS:
                found = self._weakest(keep, home)
                ratio = None if found is None else self._confirmed(found, keep, home)
                if ratio is not None:
                    text = self._text(ratio, keep, self._evidence)
                    return self._calibrated(text, ratio, keep, norm)
        except OutOfTimeError:
            self._cut = True
        return self._calibrated(None, math.nan, KEEPS[-1], norm)

    def _calibrated(self, text: str | None, ratio: float, keep: float, norm: float) -> Calibrated:
        return Calibrated(
            text, ratio, keep, norm, self._evidence, self._tried, self._cut, self._aside
        )

    @property
    def _aside(self) -> float | None:
        """The starting policy's noise_multiplier, which each turn of the ratio sets aside."""
        return value_of(self._whole, Knob.NOISE_MULTIPLIER)

    def _set_norm(self) -> float:
        """The median norm of updates of local epochs, so that the bound binds on every second.

        Under a promise its own `clip_norm` stays.
        """
        if fixed_knob(self._loaded, Knob.MAX_NORM):
            assert self._loaded.policy.privacy is not None  # noqa: S101 - that is what fixes it
            return self._loaded.policy.privacy.clip_norm
        site = Site(self._subject, torch.Generator().manual_seed(self._seed), self._deadline)
        records = min(128, len(self._subject.train))
        setting = Setting(records=records, epochs=EPOCHS)
        updates = [site.update(setting, SERVERS[HONEST]) for _ in range(NORMS)]
        norm = _rounded(float(torch.tensor([norm_of(update) for update in updates]).median()))
        self._loaded = turned(self._loaded, Turned(Knob.MAX_NORM, norm))
        self._whole = turned(self._whole, Turned(Knob.MAX_NORM, norm))
        return norm

    def _weakest(self, keep: float, home: Path) -> float | None:
        """The least ratio that reached the target; None where the largest did not.

        Where the time of the search is up, the least so far, for the rest of the time to confirm.
        """
        self._limit = self._deadline.share(SEARCH_SHARE)
        low, high = math.log(LOWEST), math.log(HIGHEST)
        try:
            if not self._reaches(HIGHEST, keep, home):
                return None
            if self._reaches(LOWEST, keep, home):
                return LOWEST
            for _ in range(STEPS):
                if high - low < math.log(CLOSE):
                    break
                middle = (low + high) / 2
                if self._reaches(math.exp(middle), keep, home):
                    high = middle
                else:
                    low = middle
        except OutOfTimeError:
            self._cut = True
        return _rounded(math.exp(high))

    def _confirmed(self, ratio: float, keep: float, home: Path) -> float | None:
        """That ratio or the next larger one that reaches the target on records drawn anew.

        How many are drawn is settled before: stopping when the figures please would flatter them.
        """
        self._limit = self._deadline
        while True:
            self._seed += 1
            self._measure(ratio, keep, home, dict(self._updates))
            if all(one.reached for one in self._evidence):
                return ratio
            if ratio >= HIGHEST:
                return None
            ratio = min(HIGHEST, _rounded(ratio * 1.5))

    def _reaches(self, ratio: float, keep: float, home: Path) -> bool:
        self._measure(ratio, keep, home)
        return all(one.reached for one in self._evidence)

    def _measure(
        self,
        ratio: float,
        keep: float,
        home: Path,
        counts: dict[tuple[str, Setting], int] | None = None,
    ) -> None:
        """Every attack under every condition becomes the evidence.

        Args:
            ratio: of the noise.
            keep: of the mask.
            home: scratch folder.
            counts: updates that each is measured on; where left out, as many as it takes to see
                whether the target is reached, and no more after the first that is not.
        """
        self._tried += 1
        self.on_step(min(self._tried, 2 * STEPS), 2 * STEPS)
        variant = turned(self._loaded, Turned(Knob.NOISE_RATIO, ratio))
        variant = turned(variant, Turned(Knob.KEEP, keep))
        found: list[Measured] = []
        for number, condition in enumerate(self._conditions):
            door = GuardedDoor(variant, home / f"{self._tried}-{number}", alone=True)
            count = None if counts is None else counts.get(condition, MOST_UPDATES)
            found.append(self._attacked(condition, door, count))
            if counts is None and not found[-1].reached:
                break
        self._evidence = tuple(found)

    def _attacked(
        self, condition: tuple[str, Setting], door: GuardedDoor, count: int | None
    ) -> Measured:
        """The main measure, over the same records for every turn of the knobs."""
        name, setting = condition
        site = Site(self._subject, torch.Generator().manual_seed(self._seed), self._limit)
        attacker = torch.Generator().manual_seed(self._seed + 1)
        least = math.ceil(ATTACKS[name].wanted / setting.records)
        pooled: Finding | None = None
        for number in range(1, (count or MOST_UPDATES) + 1):
            found = self._once(
                name, site.update(setting, SERVERS[setting.server]), site, door, attacker
            )
            pooled = found if pooled is None else pooled + found
            one = Measured(name, setting, pooled.main, self._targets[name])
            enough = len(one.tally.values) >= MOST_RECORDS or (number >= least and one.settled)
            if count is None and enough:
                break
        if count is None and one.reached:
            self._updates[condition] = max(number, self._updates.get(condition, 0))
        return one

    def _once(
        self, name: str, update: Update, site: Site, door: GuardedDoor, attacker: torch.Generator
    ) -> Finding:
        """Attack one update as it leaves.

        Raises:
            OutOfTimeError: the time is up, or was too short for all of the attack.
        """
        self._limit.require()
        back = door.send(update, site.model, update.setting.records)
        if back.delta is None:
            raise MisuseError(
                f"The policy keeps every update in ({back.reason}), so that there is nothing to "
                "calibrate."
            )
        found = ATTACKS[name].run(site.case(update, back), update.behind, attacker, self._limit)
        if found.cut:  # a weaker attack would lower the noise
            raise OutOfTimeError
        return found

    def _text(self, ratio: float, keep: float, evidence: tuple[Measured, ...]) -> str:
        whole = turned(self._whole, Turned(Knob.NOISE_RATIO, ratio))
        if keep < 1.0:
            whole = turned(whole, Turned(Knob.KEEP, keep))
        name = f"{self._whole.policy.name.removesuffix('-calibrated')}-calibrated"
        policy = whole.policy.model_copy(update={"name": name})
        promised = policy.privacy is not None
        norm = "clip_norm of the promise" if promised else "the median norm of this site's updates"
        comments = [
            f"Calibrated by `sentinel stress calibrate` on {dt.datetime.now(dt.UTC):%Y-%m-%d},",
            f'from policy "{self._whole.policy.name}"'
            + (", on public records alone: it makes a promise." if promised else "."),
            "",
            f"Weakest noise_ratio found: {ratio:g} (keep {keep:g}, max_norm: {norm});",
            f"{self._tried} turns of the knobs were measured. Confirmed on records drawn anew,",
            "through the guard, its inspection off and rules with `when` out. The upper end of",
            "each 95 % interval is within what was allowed; n counts appearances: updates draw on",
            "the same records, so that one may count several times.",
            *(line for one in evidence for line in _wrapped(one.words)),
            "",
            "This holds for these attacks, this model and these records; another attacker may do",
            "better. Measure again when any of them changes.",
        ]
        for note in _notes(ratio, evidence, self._aside):
            comments += _wrapped(note)
        if self._cut:
            comments += ["The time was up before the search was through: a weaker one may do."]
        if not promised:
            comments.insert(2, "No formal guarantee.")
        return policy_toml(policy, comments)


def _conditions(
    subject: Subject,
    loaded: LoadedPolicy,
    targets: dict[str, float],
    generator: torch.Generator,
    *,
    asked: bool,
) -> list[tuple[str, Setting]]:
    """The smallest update that the policy lets out, of an honest and of a malicious server.

    Args:
        subject: model and records.
        loaded: the policy.
        targets: what is allowed.
        generator: of trial crafting.
        asked: whether somebody asked for each of these targets, so that each must fit.
    """
    _require_targets(targets)
    least = min(max(1, loaded.policy.limits.min_patients or 1), len(subject.train))
    fitting = (
        name
        for name in SERVERS
        if name not in {HONEST, *LATE}
        and not servers.trains(name)
        and servers.misfit(name, subject, generator) is None
    )
    crafted = list(itertools.islice(fitting, 1))
    settings = [Setting(name, records=least) for name in (HONEST, *crafted)]
    group = min(least, most_lopsided(subject.train))
    settings += [Setting(HONEST, records=group, lopsided=True)] if group >= LEAST_GROUP else []
    found, unfit = [], {}
    for name in targets:
        own = [one for one in settings if one.lopsided == ATTACKS[name].of_groups]
        why = [ATTACKS[name].misfit(subject, one) for one in own]
        found += [(name, one) for one, reason in zip(own, why, strict=True) if reason is None]
        if not own or why[0] is not None:
            unfit[name] = why[0] if own else "the loader names no property, or too few have it"
    if asked and unfit:
        name, reason = next(iter(unfit.items()))
        raise MisuseError(f"The attack {name} cannot be calibrated against here: {reason}.")
    if not found:
        raise MisuseError(f"None of the attacks {', '.join(targets)} fits this model and data.")
    return found


def _require_targets(targets: dict[str, float]) -> None:
    for name, target in targets.items():
        if name not in ATTACKS:
            raise MisuseError(f"There is no attack {name!r}; there are {', '.join(ATTACKS)}.")
        if not target > 0.0:
            raise MisuseError(
                f"The target of {name} must be above 0: however many records are measured, the "
                "upper bound of a gain never comes down to nothing. Allow a little, as in "
                f"{name}=0.02."
            )


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 92, initial_indent="- ", subsequent_indent="  ")


def _rounded(value: float) -> float:
    """Two digits, upwards: a figure that people read and sign."""
    step = 10 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.2g}")
