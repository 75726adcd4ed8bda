"""Calibration: the weakest noise under which the attacks of the lab stay within a target."""

from __future__ import annotations

import datetime as dt
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.crew import one_thread
from sentinel.errors import MisuseError
from sentinel.stress.lab import servers
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.exchange import GuardedDoor, Site, norm_of
from sentinel.stress.lab.home import scratch
from sentinel.stress.lab.knobs import Knob, Turned, bare, fixed_knob, turned
from sentinel.stress.lab.policy_file import policy_toml
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.lab.finding import Finding, Tally
    from sentinel.stress.lab.subject import Subject

DEFAULT_TARGETS = {"rows": 0.0, "pictures": 0.02}
LOWEST, HIGHEST = 0.1, 100.0  # noise ratios that are tried
KEEPS = (1.0, 0.25)  # the weakest mask first
STEPS = 6  # halvings of the logarithm of the ratio
CLOSE = 1.1  # factor between two ratios that is close enough
MOST_UPDATES = 24  # in one measurement
NORMS = 9  # updates whose median norm becomes max_norm
EPOCHS = 2
WHOLE = 600.0  # seconds: an attack is not cut here, since a weak one would lower the noise


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
        """Whether the gain was within the target."""
        return self.tally.gain <= self.target

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
        max_norm: the bound that was set.
        evidence: what was measured at these knobs on records drawn anew; at the strictest knobs
            that were tried where none reached the target.
        tried: how many turns of the knobs were measured.
        cut: whether the time was up before the search was through: a weaker ratio may do.
    """

    text: str | None
    noise_ratio: float
    keep: float
    max_norm: float
    evidence: tuple[Measured, ...]
    tried: int
    cut: bool = False


def calibrate(  # noqa: PLR0913 - each is one choice of the site
    subject: Subject,
    loaded: LoadedPolicy,
    targets: dict[str, float],
    *,
    seconds: float,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Find the weakest knobs that keep every attack within its target.

    Args:
        subject: model and records. Under a promise its public records alone are used.
        loaded: the policy whose other parts are kept.
        targets: name of an attack -> gain over knowing nothing that is allowed.
        seconds: that it may take.
        seed: of attackers and draws.
        on_step: called with the steps done and the steps in all.

    Raises:
        MisuseError: an unknown attack, none that fits, a policy without a norm, a promise per
            patient or record, or a promise and no public records.

    Guarantees:
        Every measurement went through the guard, in a scratch folder. Under a promise no private
        record is looked at. What is written was measured once more, on records drawn anew.
    """
    work = _Calibration(_allowed(subject, loaded), loaded, targets, Deadline.after(seconds), seed)
    work.on_step = on_step or (lambda _done, _total: None)
    with one_thread(), scratch() as home:
        return work.run(home)


def _allowed(subject: Subject, loaded: LoadedPolicy) -> Subject:
    """The records that may be calibrated on."""
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
    some = torch.arange(len(subject.public))
    first, second = subject.public.take(some[:half]), subject.public.take(some[half:])
    return replace(subject, train=first, held_out=second, public=None)


class _Calibration:
    """One search under way."""

    def __init__(
        self,
        subject: Subject,
        loaded: LoadedPolicy,
        targets: dict[str, float],
        deadline: Deadline,
        seed: int,
    ) -> None:
        self.on_step: Callable[[int, int], None] = lambda _done, _total: None
        self._subject, self._loaded = subject, bare(loaded)
        self._whole, self._deadline, self._seed = loaded, deadline, seed
        self._tried = 0
        self._cut = False
        if why := fixed_knob(loaded, Knob.NOISE_RATIO):
            raise MisuseError(why)
        generator = torch.Generator().manual_seed(seed)
        self._conditions = _conditions(subject, loaded, targets, generator)
        self._targets = targets

    def run(self, home: Path) -> Calibrated:
        """Set the norm, bisect the noise, thin out where noise alone does not do, confirm."""
        norm = self._set_norm()
        evidence: tuple[Measured, ...] = ()
        ratio = HIGHEST
        for keep in KEEPS:
            found = self._weakest(keep, home)
            ratio = found or HIGHEST
            while found is not None:  # chance may have helped: confirm, or go up
                self._seed += 1
                evidence = self._measure(ratio, keep, home)
                if all(one.reached for one in evidence):
                    text = self._text(ratio, keep, evidence)
                    return Calibrated(text, ratio, keep, norm, evidence, self._tried, self._cut)
                if ratio >= HIGHEST or self._deadline.passed:
                    break
                ratio = min(HIGHEST, _rounded(ratio * 1.5))
            if self._deadline.passed:
                break
        if not evidence:
            evidence = self._measure(HIGHEST, KEEPS[-1], home)
        return Calibrated(None, math.nan, KEEPS[-1], norm, evidence, self._tried)

    def _set_norm(self) -> float:
        """The median norm of updates of local epochs, so that the bound binds on every second."""
        if fixed_knob(self._loaded, Knob.MAX_NORM):
            assert self._loaded.policy.privacy is not None  # noqa: S101 - that is what fixes it
            return self._loaded.policy.privacy.clip_norm
        site = Site(self._subject, torch.Generator().manual_seed(self._seed))
        records = min(128, len(self._subject.train))
        setting = Setting(records=records, epochs=EPOCHS)
        updates = [site.update(setting, SERVERS[HONEST]) for _ in range(NORMS)]
        norm = _rounded(float(torch.tensor([norm_of(update) for update in updates]).median()))
        self._loaded = turned(self._loaded, Turned(Knob.MAX_NORM, norm))
        self._whole = turned(self._whole, Turned(Knob.MAX_NORM, norm))
        return norm

    def _weakest(self, keep: float, home: Path) -> float | None:
        """The least ratio that reached the target; None where the largest did not."""
        if not self._reaches(HIGHEST, keep, home):
            return None
        low, high = math.log(LOWEST), math.log(HIGHEST)
        if self._reaches(LOWEST, keep, home):
            return LOWEST
        for _ in range(STEPS):
            if high - low < math.log(CLOSE):
                break
            if self._deadline.passed:
                self._cut = True
                break
            middle = (low + high) / 2
            if self._reaches(math.exp(middle), keep, home):
                high = middle
            else:
                low = middle
        return _rounded(math.exp(high))

    def _reaches(self, ratio: float, keep: float, home: Path) -> bool:
        return all(one.reached for one in self._measure(ratio, keep, home, early=True))

    def _measure(
        self, ratio: float, keep: float, home: Path, *, early: bool = False
    ) -> tuple[Measured, ...]:
        """Every attack under every condition; `early` ends with the first that is not reached."""
        self._tried += 1
        self.on_step(min(self._tried, 2 * STEPS), 2 * STEPS)
        variant = turned(self._loaded, Turned(Knob.NOISE_RATIO, ratio))
        variant = turned(variant, Turned(Knob.KEEP, keep))
        found = []
        for number, (attack, setting) in enumerate(self._conditions):
            door = GuardedDoor(variant, home / f"{self._tried}-{number}", alone=True)
            tally = self._tally(attack, setting, door)
            found.append(Measured(attack, setting, tally, self._targets[attack]))
            if early and not found[-1].reached:
                break
        return tuple(found)

    def _tally(self, name: str, setting: Setting, door: GuardedDoor) -> Tally:
        """The main measure over as many updates as the attack wants, the same for every turn."""
        attack = ATTACKS[name]
        site = Site(self._subject, torch.Generator().manual_seed(self._seed))
        attacker = torch.Generator().manual_seed(self._seed + 1)
        count = min(MOST_UPDATES, max(1, math.ceil(attack.wanted / setting.records)))
        pooled: Finding | None = None
        for _ in range(count):
            update = site.update(setting, SERVERS[setting.server])
            back = door.send(update, site.model, setting.records)
            if back.delta is None:
                raise MisuseError(
                    f"The policy keeps every update in ({back.reason}), so that there is nothing "
                    "to calibrate."
                )
            case = site.case(update, back)
            found = attack.run(case, update.behind, attacker, Deadline.after(WHOLE))
            pooled = found if pooled is None else pooled + found
        assert pooled is not None  # noqa: S101 - at least one update was attacked
        return pooled.main

    def _text(self, ratio: float, keep: float, evidence: tuple[Measured, ...]) -> str:
        whole = turned(self._whole, Turned(Knob.NOISE_RATIO, ratio))
        if keep < 1.0:
            whole = turned(whole, Turned(Knob.KEEP, keep))
        name = f"{self._whole.policy.name.removesuffix('-calibrated')}-calibrated"
        policy = whole.policy.model_copy(update={"name": name})
        promised = policy.privacy is not None
        comments = [
            f"Calibrated by `sentinel stress calibrate` on {dt.datetime.now(dt.UTC):%Y-%m-%d},",
            f'from policy "{self._whole.policy.name}"'
            + (", on public records alone: it makes a promise." if promised else "."),
            "",
            f"Weakest noise_ratio found: {ratio:g} (keep {keep:g}, max_norm: the median norm of",
            f"this site's updates); {self._tried} turns of the knobs were measured. Confirmed on",
            "records drawn anew, through the guard, its inspection off and rules with `when` out:",
            *(line for one in evidence for line in _wrapped(one.words)),
            "",
            "This holds for these attacks, this model and these records; another attacker may do",
            "better. Measure again when any of them changes.",
        ]
        if self._cut:
            comments += ["The time was up before the search was through: a weaker one may do."]
        if not promised:
            comments.insert(2, "No formal guarantee.")
        return policy_toml(policy, comments)


def _conditions(
    subject: Subject, loaded: LoadedPolicy, targets: dict[str, float], generator: torch.Generator
) -> list[tuple[str, Setting]]:
    """The smallest update that the policy lets out, of an honest and of a malicious server."""
    if unknown := [name for name in targets if name not in ATTACKS]:
        raise MisuseError(f"There is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}.")
    least = min(max(1, loaded.policy.limits.min_patients or 1), len(subject.train))
    fitting = (
        name
        for name in SERVERS
        if not servers.trains(name) and servers.misfit(name, subject, generator) is None
    )
    crafted = [name for name in fitting if name != HONEST][:1]
    settings = [Setting(name, records=least) for name in (HONEST, *crafted)]
    found = [
        (name, setting)
        for setting in settings
        for name in targets
        if ATTACKS[name].misfit(subject, setting) is None
    ]
    if not found:
        raise MisuseError(f"None of the attacks {', '.join(targets)} fits this model and data.")
    return found


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 92, initial_indent="- ", subsequent_indent="  ")


def _rounded(value: float) -> float:
    """Two digits, upwards: a figure that people read and sign."""
    step = 10 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.2g}")
