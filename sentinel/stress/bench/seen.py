"""What the bench sees: one row for each honest round, crafted model and siege."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.detection import inspect_global_model
from sentinel.stress import servers
from sentinel.stress.bench import baselines as rules
from sentinel.stress.bench.crafted import PARTS, PLAIN, Variant, craft, ground_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from sentinel.detection import Detector, History, Inspection
    from sentinel.stress.bench.crafted import Crafted, Ground
    from sentinel.stress.bench.honest import Run
    from sentinel.stress.bench.nets import Net
    from sentinel.stress.layers import State
    from sentinel.stress.servers import Recipe

ALARM = 0.5  # the threshold of the shipped policies
WIDEST = 1_000_000  # parameters up to which the baselines are taken as well
SIEGE = 20  # honest rounds before the first crafted one of a siege
EVERY = 50  # rounds from one crafted one to the next


@dataclass(frozen=True, slots=True)
class HonestRow:
    """One honest round.

    Attributes:
        kind: of the run.
        net: the architecture.
        run: number of the run.
        number: of the round in it.
        suspicion: 0 to 1.
        verdict: what the detector took it for.
        unhealthy: whether it was called broken.
        broken: whether it was: its loss had run away.
        baselines: score of each rule, empty for the widest nets.
    """

    kind: str
    net: str
    run: int
    number: int
    suspicion: float
    verdict: str
    unhealthy: bool
    broken: bool
    baselines: dict[str, float]

    @property
    def alarm(self) -> bool:
        """Whether a guard refuses it wrongly: a model that did diverge is refused rightly."""
        return self.suspicion >= ALARM or (self.unhealthy and not self.broken)


@dataclass(frozen=True, slots=True)
class CraftedRow:
    """One crafted model.

    Attributes:
        family: A to G.
        recipe: of the catalogue.
        wrapper: how it hides.
        net: the architecture.
        setting: first round, running federation, or one round in fifty.
        leaks: whether it is an attack at all.
        share: of the rows that were read.
        honest_share: of those that the honest model gives away.
        suspicion: 0 to 1, with history and architecture.
        alone: the same from the state alone.
        verdict: what the detector took it for.
        baselines: score of each rule.
    """

    family: str
    recipe: str
    wrapper: str
    net: str
    setting: str
    leaks: bool
    share: float
    honest_share: float
    suspicion: float
    alone: float
    verdict: str
    baselines: dict[str, float]


@dataclass(frozen=True, slots=True)
class SiegeRow:
    """One malicious server against one hospital, over rounds.

    Attributes:
        family: A to G.
        recipe: of the catalogue.
        net: the architecture.
        sent: crafted models that the server sends in all.
        trained: how many of them the hospital trained on before it was warned.
        warned: whether it was.
        late: whether it was an honest round after a crafted one that warned it.
    """

    family: str
    recipe: str
    net: str
    sent: int
    trained: int
    warned: bool
    late: bool


def honest_rows(
    runs: Iterable[Run], seed: int, detector: Detector | None = None
) -> list[HonestRow]:
    """Inspect every round of every honest run, with its history, as a guard does.

    Args:
        runs: see `honest_runs`.
        seed: of the baselines' probes.
        detector: the learned part; the shipped one where left out.
    """
    return [row for number, run in enumerate(runs) for row in _watched(run, number, seed, detector)]


def _watched(run: Run, number: int, seed: int, detector: Detector | None) -> Iterator[HonestRow]:
    generator = torch.Generator().manual_seed(seed + number)
    small = sum(value.numel() for value in run.module.parameters()) <= WIDEST
    history: History | None = None
    for one in run.rounds:
        found = inspect_global_model(one.state, history, run.module, detector=detector)
        history = found.history
        batch = run.site.draw(rules.RECORDS)
        scores = rules.baselines(run.module, run.net, one.state, batch, generator) if small else {}
        yield HonestRow(
            run.kind,
            run.net.name,
            number,
            one.number,
            found.suspicion,
            found.verdict.value,
            found.unhealthy,
            one.broken,
            scores,
        )


def crafted_rows(models: Iterable[Crafted], seed: int, known: Known) -> list[CraftedRow]:
    """Inspect crafted models, each with the history of its ground, and from the state alone.

    Args:
        models: see `crafted_models`.
        seed: of the baselines' probes.
        known: the guard's knowledge of the grounds, and its detector.
    """
    return [_judged(made, seed + number, known) for number, made in enumerate(models)]


class Known:
    """What a guard knows at each ground; kept, as grounds come again."""

    def __init__(self, detector: Detector | None = None) -> None:
        """Know nothing yet; the shipped detector where left out."""
        self.detector = detector
        self._histories: dict[Ground, History | None] = {}

    def history(self, where: Ground) -> History | None:
        """Return the history after the honest rounds of a ground."""
        if where not in self._histories:
            found = None
            for state in where.past:
                seen = inspect_global_model(state, found, where.module, detector=self.detector)
                found = seen.history
            self._histories[where] = found
        return self._histories[where]


def _judged(made: Crafted, seed: int, known: Known) -> CraftedRow:
    where = made.ground
    history = known.history(where)
    found = inspect_global_model(made.state, history, where.module, detector=known.detector)
    alone = inspect_global_model(made.state, detector=known.detector)
    generator = torch.Generator().manual_seed(seed)
    batch = replace(where.site, generator=generator).draw(rules.RECORDS)
    return CraftedRow(
        made.family,
        made.recipe,
        made.wrapper,
        where.net.name,
        where.setting,
        made.leaks,
        made.leak.share,
        made.leak.honest_share,
        found.suspicion,
        alone.suspicion,
        found.verdict.value,
        rules.baselines(where.module, where.net, made.state, batch, generator),
    )


def siege_rows(
    net: Net, rounds: int, seed: int, detector: Detector | None = None
) -> list[SiegeRow]:
    """Let a server of each recipe turn in the middle of a run, and count until a guard is warned.

    It turns once in fifty rounds, a scan in several rounds on end; in all others it is honest. A
    guard that is not warned goes on with the history that the crafted round left.

    Args:
        net: the architecture.
        rounds: of the run, more than `SIEGE`.
        seed: of everything.
        detector: the learned part; the shipped one where left out.
    """
    whole = ground_of(net, rounds - 1, seed)
    states = [*whole.past, whole.honest]
    watch = _Watch(whole.module, states, detector)
    rows = []
    for number, recipe in enumerate(servers.RECIPES):
        sent = _sent(recipe, whole, states, seed + number)
        if sent:
            rows.append(watch.siege(recipe, net, sent))
    return rows


def _sent(recipe: Recipe, whole: Ground, states: Sequence[State], seed: int) -> dict[int, State]:
    """Return the crafted models by round; none where the recipe does not fit or leaks nothing."""
    scans = recipe.family == "G"
    turns = range(SIEGE, SIEGE + PARTS) if scans else range(SIEGE, len(states), EVERY)
    sent = {}
    for part, number in enumerate(turns):
        at = states[SIEGE] if scans else states[number]
        where = replace(whole, past=(), honest=at)
        generator = torch.Generator().manual_seed(seed)
        made = craft(Variant(recipe, PLAIN, part if scans else 0), where, generator)
        if made is not None and made.leaks:
            sent[number] = made.state
    return sent


class _Watch:
    """A guard in one honest run, whose server may turn."""

    def __init__(
        self, module: nn.Module, states: Sequence[State], detector: Detector | None
    ) -> None:
        """See the honest run once: histories, and alarms that are false ones."""
        self._module, self._states, self._detector = module, states, detector
        self._histories: list[History | None] = [None]
        self._false: set[int] = set()
        for number, state in enumerate(states):
            found = self._look(state, self._histories[-1])
            self._histories.append(found.history)
            if _warns(found):
                self._false.add(number)

    def siege(self, recipe: Recipe, net: Net, sent: Mapping[int, State]) -> SiegeRow:
        """Go through the run with the crafted models in it, until one warns."""
        row = functools.partial(SiegeRow, recipe.family, recipe.name, net.name, len(sent))
        first = min(sent)
        history = self._histories[first]
        trained = 0
        for number in range(first, len(self._states)):
            crafted = number in sent
            found = self._look(sent[number] if crafted else self._states[number], history)
            history = found.history
            if _warns(found) and (crafted or number not in self._false):
                return row(trained=trained, warned=True, late=not crafted)
            trained += crafted
        return row(trained=trained, warned=False, late=False)

    def _look(self, state: State, history: History | None) -> Inspection:
        return inspect_global_model(state, history, self._module, detector=self._detector)


def _warns(found: Inspection) -> bool:
    return found.suspicion >= ALARM or found.unhealthy
