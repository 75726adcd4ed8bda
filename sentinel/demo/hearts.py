"""Four hospitals learn together who has heart disease, and the server turns on them.

Every repeat runs the same federation twice, from the same start, split and order of patients:
hospitals that are bare, and hospitals with the guard. In the middle of the run the server sends a
crafted model. A third form asks what the server would have read from guarded hospitals whose
inspection missed it. Every number is computed in the run; the seed fixes the federation and the
attacker, and never the guard's noise.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.crew import one_thread
from sentinel.demo import cohorts
from sentinel.demo.heart_result import Example, HeartsResult, Note, Settings
from sentinel.demo.hospitals import BareDoor, Door, GuardedDoor, Outcome, Site
from sentinel.stress.auc import auc
from sentinel.stress.layers import State, attacked_pair, copied
from sentinel.stress.passive import tabular
from sentinel.stress.passive.tabular import Reads, measure_reads
from sentinel.stress.servers import binning
from sentinel.stress.servers.federation import MaliciousServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SHOWN = 3  # patients in the report's picture
PRIME = 1_000_003  # keeps the seeds of repeats, rounds and sites apart

DEFAULTS = Settings()


def run_hearts(
    settings: Settings = DEFAULTS,
    *,
    state: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> HeartsResult:
    """Run all repeats.

    Args:
        settings: what to run.
        state: folder for the guards' ledgers, logs and releases, one folder per hospital and
            repeat; a temporary one, in memory where the system has such a place, where left out.
        on_step: called after every round with the rounds done and the rounds in all.

    Returns:
        What was measured.
    """
    step = _counter(settings, on_step)
    with one_thread(), _scratch() as scratch:
        home = Path(scratch) if state is None else state
        repeats = [
            _run_repeat(_Repeat.draw(settings, number), home / f"repeat-{number}", step)
            for number in range(settings.repeats)
        ]
    return HeartsResult(
        settings=settings,
        auc_unguarded_by_site=_by_site([repeat.aucs_unguarded for repeat in repeats]),
        auc_guarded_by_site=_by_site([repeat.aucs_guarded for repeat in repeats]),
        auc_losses=tuple(
            fmean(repeat.aucs_unguarded.values()) - fmean(repeat.aucs_guarded.values())
            for repeat in repeats
        ),
        notes=tuple(itertools.chain.from_iterable(repeat.notes for repeat in repeats)),
        unguarded=_pooled(repeat.unguarded for repeat in repeats),
        guarded=_pooled(repeat.guarded for repeat in repeats),
        uninspected={
            scale: _pooled(repeat.uninspected[scale] for repeat in repeats)
            for scale in settings.scales
        },
        examples=repeats[0].examples,
        alerts=repeats[0].alerts,
    )


def network(features: int, hidden: int, generator: torch.Generator) -> nn.Sequential:
    """Return a fresh perceptron, `features` -> `hidden` -> 1, with torch's own initial spread."""
    layers = [
        nn.Linear(width, outputs, device="meta").to_empty(device="cpu")
        for width, outputs in ((features, hidden), (hidden, 1))
    ]
    for layer in layers:
        spread = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.weight, -spread, spread, generator=generator)
        nn.init.uniform_(layer.bias, -spread, spread, generator=generator)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@dataclass(frozen=True, slots=True)
class _Repeat:
    """One start, one split, one order of patients: what all forms of the federation share."""

    number: int
    settings: Settings
    sites: tuple[Site, ...]
    start: State
    model: nn.Module

    @classmethod
    def draw(cls, settings: Settings, number: int) -> _Repeat:
        generator = _generator(settings.seed + number)
        sites = []
        for name in cohorts.SITES:
            parts = cohorts.split(cohorts.load(name), settings.train_share, generator)
            sites.append(Site(name, *parts, settings.loop))
        model = network(len(cohorts.FEATURES), settings.hidden, generator)
        return cls(number, settings, tuple(sites), copied(model.state_dict()), model)

    def shuffle(self, number: int, site: Site) -> torch.Generator:
        place = self.sites.index(site)
        return _generator(self.settings.seed + self.number, number, place)

    def server(self) -> MaliciousServer:
        return MaliciousServer(
            self.start,
            self.model,
            functools.partial(binning, scale=self.settings.scales[0]),
            turns_at=self.settings.turns_at,
            generator=self.attacker(),
        )

    def attacker(self) -> torch.Generator:
        return _generator(self.settings.seed + self.number, 0, 0)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one repeat measured."""

    aucs_unguarded: Mapping[str, float]
    aucs_guarded: Mapping[str, float]
    notes: tuple[Note, ...]
    unguarded: Reads
    guarded: Reads
    uninspected: Mapping[float, Reads]
    examples: tuple[Example, ...]
    alerts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sent:
    """One round at one hospital, as the server sees it."""

    number: int
    site: Site
    sent: State
    outcome: Outcome


def _run_repeat(repeat: _Repeat, home: Path, step: Callable[[], None]) -> _Found:
    policy, sites = repeat.settings.policy, repeat.sites
    bare = _federate(repeat, {site.name: BareDoor() for site in sites}, step)
    doors = {site.name: GuardedDoor(policy, home / site.name, _run(repeat)) for site in sites}
    guarded = _federate(repeat, doors, step)
    read = _guesses(repeat, [sent for sent in bare.rounds if _crafted(repeat, sent)])
    missed = _uninspected(repeat, home, step)
    return _Found(
        aucs_unguarded=_aucs(repeat, bare.final),
        aucs_guarded=_aucs(repeat, guarded.final),
        notes=tuple(_note(repeat, sent) for sent in guarded.rounds),
        unguarded=_measured(repeat, read),
        guarded=_measured(repeat, _guesses(repeat, guarded.rounds)),
        uninspected={scale: _measured(repeat, guesses) for scale, guesses in missed.items()},
        examples=_examples(repeat, read, missed[repeat.settings.scales[0]]),
        alerts=tuple(line for door in doors.values() for line in door.told()),
    )


@dataclass(frozen=True, slots=True)
class _Federation:
    """One federation from its first to its last round."""

    rounds: list[_Sent]
    final: State


def _federate(repeat: _Repeat, doors: Mapping[str, Door], step: Callable[[], None]) -> _Federation:
    """Run all rounds; the crafted one is averaged by nobody."""
    server = repeat.server()
    weights = {site.name: float(len(site.train)) for site in repeat.sites}
    rounds = []
    for number in range(1, repeat.settings.rounds + 1):
        seen = []
        for site in repeat.sites:
            sent = server.global_state(number)
            shuffle = repeat.shuffle(number, site)
            door = doors[site.name]
            outcome = door.take_part(site, number, sent, repeat.model, shuffle)
            seen.append(_Sent(number, site, sent, outcome))
        states = {s.site.name: s.outcome.state for s in seen if s.outcome.state is not None}
        server.aggregate(number, states, weights)
        rounds += seen
        step()
    return _Federation(rounds, server.global_state(repeat.settings.rounds + 1))


def _uninspected(
    repeat: _Repeat, home: Path, step: Callable[[], None]
) -> dict[float, dict[str, Tensor]]:
    """Return the server's guesses behind guards that train on whatever arrives, by scale."""
    doors = {
        site.name: GuardedDoor(
            repeat.settings.policy,
            home / f"{site.name}-uninspected",
            _run(repeat),
            inspects=False,
        )
        for site in repeat.sites
    }
    found = {}
    for number, scale in enumerate(repeat.settings.scales):
        sent = binning(repeat.model, repeat.start, generator=repeat.attacker(), scale=scale)
        seen = []
        for site in repeat.sites:
            shuffle = repeat.shuffle(repeat.settings.turns_at, site)
            outcome = doors[site.name].take_part(site, number, sent, repeat.model, shuffle)
            seen.append(_Sent(number, site, sent, outcome))
        found[scale] = _guesses(repeat, seen)
        step()
    return found


def _guesses(repeat: _Repeat, seen: list[_Sent]) -> dict[str, Tensor]:
    """Return all guesses of the server at each hospital's patients, from everything it got."""
    layer, following = attacked_pair(repeat.model, repeat.start)
    width = repeat.start[f"{layer}.weight"].shape[1]
    guesses = {site.name: [torch.empty(0, width, dtype=torch.float64)] for site in repeat.sites}
    for one in seen:
        if one.outcome.state is None:
            continue
        looked_at = tabular.view(one.sent, one.outcome.state, layer, following)
        guesses[one.site.name].append(tabular.guess_rows_untold(looked_at))
    return {name: torch.cat(parts) for name, parts in guesses.items()}


def _measured(repeat: _Repeat, guesses: Mapping[str, Tensor]) -> Reads:
    return _pooled(
        measure_reads(guesses[site.name], site.train.rows, site.held_out.rows)
        for site in repeat.sites
    )


def _examples(
    repeat: _Repeat, read: Mapping[str, Tensor], sanitized: Mapping[str, Tensor]
) -> tuple[Example, ...]:
    """Return patients whom the server read, the most complete records first."""
    found: list[tuple[int, float, int, str, Tensor]] = []
    for site in repeat.sites:
        errors = tabular.nearest(read[site.name], site.train.rows)
        for row, error in zip(site.train.rows, errors, strict=True):
            if error < tabular.EXACT:
                missing = int((row == 0.0).sum())
                found.append((missing, float(error), len(found), site.name, row))
    return tuple(
        _example(name, row, read[name], sanitized[name])
        for *_, name, row in sorted(found, key=lambda one: one[:3])[:SHOWN]
    )


def _example(site: str, row: Tensor, read: Tensor, sanitized: Tensor) -> Example:
    (unguarded, first), (behind, second) = (_closest(part, row) for part in (read, sanitized))
    return Example(site, cohorts.record(row), unguarded, behind, first, second)


def _closest(guesses: Tensor, row: Tensor) -> tuple[dict[str, float], float]:
    """Return the guess nearest to a row, in the columns' units, and its relative error."""
    if len(guesses) == 0:
        return {}, math.inf
    distances = (guesses - row.double()).square().sum(1)
    error = float(distances.amin().sqrt() / row.double().square().sum().sqrt())
    return cohorts.record(guesses[distances.argmin()]), error


def _aucs(repeat: _Repeat, state: State) -> dict[str, float]:
    repeat.model.load_state_dict(state)
    with torch.no_grad():
        return {
            site.name: auc(repeat.model(site.held_out.rows)[:, 0], site.held_out.labels)
            for site in repeat.sites
        }


def _note(repeat: _Repeat, sent: _Sent) -> Note:
    outcome = replace(sent.outcome, state=None)
    return Note(repeat.number, sent.number, sent.site.name, _crafted(repeat, sent), outcome)


def _crafted(repeat: _Repeat, sent: _Sent) -> bool:
    return sent.number == repeat.settings.turns_at


def _run(repeat: _Repeat) -> str:
    return f"repeat-{repeat.number}"


def _pooled(reads: Iterable[Reads]) -> Reads:
    return sum(reads, Reads())


def _by_site(aucs: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(one[name] for one in aucs) for name in cohorts.SITES}


def _generator(*parts: int) -> torch.Generator:
    seed = functools.reduce(lambda total, part: total * PRIME + part, parts)
    return torch.Generator().manual_seed(seed)


def _scratch() -> TemporaryDirectory[str]:
    """Return a folder that is thrown away, so that nothing has to wait for a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - a private folder with a random name is made in it
    roomy = memory.is_dir() and os.access(memory, os.W_OK)
    return TemporaryDirectory(prefix="sentinel-hearts-", dir=memory if roomy else None)


def _counter(settings: Settings, on_step: Callable[[int, int], None] | None) -> Callable[[], None]:
    """Return what is called after each round."""
    total = settings.repeats * (2 * settings.rounds + len(settings.scales))
    done = itertools.count(1)

    def step() -> None:
        if on_step is not None:
            on_step(next(done), total)

    return step
