"""Mixes of rounds: what sites are asked for, what they train on, and how each round is attacked."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import private_utility
import torch
from membership import seeded
from torch import Tensor, nn
from trade_off import lead, scored

from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import network
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.mechanism import Recipe
from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.membership import Attacker, Suspects, membership
from sentinel.stress.inference.observed import Observed, raw, sanitized
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.passive import tabular
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import fit_prior
from sentinel.stress.passive.reidentify import match_within_class
from sentinel.stress.records import Records
from sentinel.stress.servers.catalogue import recipe
from sentinel.stress.servers.craft import NOTHING, Public
from sentinel.stress.servers.stealth import WRAPPERS
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sentinel.demo.xray_data import Pictures
    from sentinel.release import Decided
    from sentinel.stress.servers.craft import Craft


HIDDEN = 256
TOLD = "told"


@dataclass(frozen=True)
class Kind:
    """What a round asks of a hospital.

    Attributes:
        name: as the table calls it.
        records: patients behind an update; all where None.
        epochs: local epochs in batches of 32; 0 is one step.
        crafted: whether the model is.
    """

    name: str
    records: int | None = None
    epochs: int = 2
    crafted: bool = False


LARGE = Kind("all")
MEDIUM = Kind("32", 32, 0)
SMALL = Kind("8", 8, 0)
SINGLE = Kind("one", 1, 0)
TRAP = Kind("crafted", 32, 0, crafted=True)
LONG_TRAP = Kind("crafted", crafted=True)
# Recipe and wrapper of the crafted models of hearts, by turns.
CRAFTS = {
    TRAP: (
        ("binning-gaussian", None),
        ("qbi", None),
        ("trap-weights", None),
        ("binning-gaussian", "mixed"),
    ),
    LONG_TRAP: (("binning-scaled", None), ("binning-scaled", "among-honest")),
}


@dataclass(frozen=True)
class Draw:
    """One seed of one data set: what all contestants share.

    Attributes:
        seed: of everything but the guards' noise.
        parts: records of training and held out, by site.
        loop: local training.
        start: the first global model.
    """

    seed: int
    parts: Mapping[str, tuple[Records, Records]]
    loop: Loop
    start: State

    def behind(self, kind: Kind, number: int, name: str) -> Records:
        """The records of one round at one site."""
        train = self.parts[name][0]
        if kind.records is None:
            return train
        order = torch.randperm(len(train), generator=self.order(number, name))
        return train.take(order[: kind.records])

    def order(self, number: int, name: str) -> torch.Generator:
        """Of records and batches."""
        return seeded(self.seed, number, list(self.parts).index(name))

    def sent(self, kind: Kind, number: int, cycle: int, state: State) -> State:
        """What the server sends in this round, from the state that it has."""
        if not kind.crafted:
            return state
        craft = self.craft(kind, cycle)
        return craft(self.loop.model, state, generator=seeded(self.seed, number, 9))

    def trains(self, kind: Kind) -> Loop:
        """The site's own loop."""
        epochs, batch = (kind.epochs, 32) if kind.epochs else (1, None)
        return replace(self.loop, epochs=epochs, batch=batch)

    def trained(self, kind: Kind, sent: State, behind: Records, order: torch.Generator) -> State:
        """What it makes of the global model."""
        return self.trains(kind).train(sent, behind, order)

    def score(self, state: State) -> tuple[float, float]:
        """AUC and accuracy, means over the sites."""
        self.loop.model.load_state_dict(state)
        with torch.no_grad():
            found = [
                scored(self.margins(self.loop.model(held.inputs)), held.labels)
                for _, held in self.parts.values()
            ]
        return fmean(area for area, _ in found), fmean(right for _, right in found)

    @abstractmethod
    def margins(self, answers: Tensor) -> Tensor:
        """Positive for the second class, [n]."""

    @abstractmethod
    def craft(self, kind: Kind, cycle: int) -> Craft:
        """How this turn's model is crafted."""

    @abstractmethod
    def attacks(self, kind: Kind, name: str) -> bool:
        """Whether updates of such rounds are attacked at this site."""

    @abstractmethod
    def read(self, sent: State, back: Back, behind: Records, held: Records) -> dict[str, float]:
        """What an attack gets of what left, by measure, above what it gets without it."""


@dataclass(frozen=True)
class Back:
    """What the server got, and how it was treated; None without a guard."""

    state: State
    decided: Decided | None

    @property
    def recipe(self) -> Recipe:
        """What every value went through: a rule of these policies is for all parameters."""
        return Recipe() if self.decided is None else next(iter(self.decided.done.recipes.values()))

    def observed(self, loop: Loop, sent: State) -> Observed:
        """The same for an attack on members."""
        if self.decided is None:
            return raw(loop, sent, self.state)
        delta = {name: self.state[name] - value for name, value in sent.items()}
        return sanitized(loop, sent, delta, self.decided)


class Hearts(Draw):
    """Four hospitals and a perceptron."""

    @classmethod
    def of(cls, seed: int) -> Hearts:
        """Split every hospital, and draw the model."""
        generator, parts = seeded(seed), {}
        for name in cohorts.SITES:
            train, held = cohorts.split(cohorts.load(name), 0.7, generator)
            parts[name] = (Records(train.rows, train.labels), Records(held.rows, held.labels))
        model = network(len(cohorts.FEATURES), HIDDEN, generator)
        return cls(seed, parts, Loop(model, binary_loss, 0.05), copied(model.state_dict()))

    def margins(self, answers: Tensor) -> Tensor:
        """The one output."""
        return answers[:, 0]

    def craft(self, kind: Kind, cycle: int) -> Craft:
        """What it takes for public has the spread of the rows, and no more."""
        turns = CRAFTS[kind]
        name, wrapper = turns[cycle % len(turns)]
        sample = torch.randn(256, len(cohorts.FEATURES), generator=seeded(self.seed, cycle, 8))
        craft = recipe(name).craft(Public(sample=sample, batch=kind.records or 32))
        return craft if wrapper is None else WRAPPERS[wrapper](craft)

    def attacks(self, kind: Kind, name: str) -> bool:
        """All."""
        del kind, name
        return True

    def read(self, sent: State, back: Back, behind: Records, held: Records) -> dict[str, float]:
        """Rows of the first layer."""
        seen = tabular.view(sent, back.state, "0", "2")
        std, keep = back.recipe.std, back.recipe.keep
        known = tabular.Sanitizer(std / keep, keep)
        parts = [tabular.guess_rows(seen, known), tabular.differences(seen, known)]
        if std > 0.0:
            parts.append(tabular.guess_rows_untold(seen))
        guesses = torch.cat(parts)
        inside, outside = (tabular.nearest(guesses, part.inputs) for part in (behind, held))
        near = [float((errors < tabular.NEAR).double().mean()) for errors in (inside, outside)]
        return {"near": near[0] - near[1], "lead": lead(inside, outside)}

    def told(self, name: str, seen: list[Observed], final: State) -> float:
        """The attack on all candidates together; the server's own records are the other sites'."""
        if not seen:
            return 0.0
        train, held = self.parts[name]
        others = [part for other, parts in self.parts.items() if other != name for part in parts]
        own = Records(torch.cat([p.inputs for p in others]), torch.cat([p.labels for p in others]))
        scores = membership(
            self.trains(LARGE),
            seen,
            final,
            Suspects(train.plus(held), len(train), own),
            attacker=Attacker(points=2, shadows=8),
            generator=seeded(self.seed, list(self.parts).index(name), 3),
        )["joint"]
        called = torch.zeros(len(scores), dtype=torch.bool)
        called[scores.argsort(descending=True)[: len(train)]] = True
        shares = [float(part.double().mean()) for part in called.split([len(train), len(held)])]
        return shares[0] - shares[1]


@dataclass(frozen=True)
class Xrays(Draw):
    """Four sites and the small CNN; the attacker has the demo's public pictures."""

    public: Pictures

    @classmethod
    def of(cls, seed: int, file: Path | None) -> Xrays:
        """Deal the pictures that are not public to four sites, and draw the model."""
        generator, public = seeded(seed), xray_data.load().public
        images, labels = (torch.cat(p) for p in zip(*private_utility.pictures(file), strict=True))
        known = {picture.numpy().tobytes() for picture in public.images}
        own = torch.tensor([picture.numpy().tobytes() not in known for picture in images])
        data, parts = Records(images[own], labels[own].long()), {}
        for place, chosen in enumerate(torch.randperm(len(data), generator=generator).chunk(4)):
            cut = round(0.8 * len(chosen))
            parts[f"site-{place}"] = (data.take(chosen[:cut]), data.take(chosen[cut:]))
        model = xray_net()
        initialise(model, generator)
        loop = Loop(model, nn.CrossEntropyLoss(), 0.1)
        return cls(seed, parts, loop, copied(model.state_dict()), public)

    def margins(self, answers: Tensor) -> Tensor:
        """Of the second output above the first."""
        return answers[:, 1] - answers[:, 0]

    def craft(self, kind: Kind, cycle: int) -> Craft:
        """Fishing for one class: what fits a net with a single linear layer."""
        del kind, cycle
        return recipe("fishing-class").craft(NOTHING)

    def attacks(self, kind: Kind, name: str) -> bool:
        """One step, at one site: the others take too long."""
        return kind.epochs == 0 and name == next(iter(self.parts))

    def read(self, sent: State, back: Back, behind: Records, held: Records) -> dict[str, float]:
        """The better of two estimates."""
        del held
        prior = fit_prior(self.public.images, self.public.labels, 60)
        step = (torch.arange(len(behind)),)
        training = LocalTraining(self.loop.model, sent, behind.labels, step, self.loop.rate)
        delta = {name: back.state[name] - value for name, value in sent.items()}
        treated = back.recipe
        seen = Seen(training.flatten(delta), treated.factor, treated.std, treated.keep)
        nothing = ssim(prior.means[behind.labels], behind.inputs).mean()
        likeness = []
        for how in (Estimation(), Estimation(least_noise=2.0)):
            found = most_likely(training, seen, prior, how, seeded(self.seed, 11))
            matched = match_within_class(found, behind.inputs, behind.labels)
            likeness.append(ssim(matched, behind.inputs).mean())
        return {"gain": float(max(likeness) - nothing)}


@dataclass(frozen=True)
class Match:
    """What contestants meet in.

    Attributes:
        draw: one seed.
        shipped: the adaptive policy.
        cycle: kinds of rounds.
        cycles: how many.
        measures: of leakage, of each update.
        told: how membership is measured, of each site of a federation; None where it is not.
        fixed: noise ratio and share kept of the fixed policies.
    """

    draw: Callable[[int], Draw]
    shipped: str
    cycle: tuple[Kind, ...]
    cycles: int
    measures: tuple[str, ...]
    told: Callable[[Draw, str, list[Observed], State], float] | None
    fixed: tuple[tuple[float, float], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of rounds whose updates are attacked."""
        return tuple(dict.fromkeys(kind.name for kind in self.cycle))


def matches(file: Path | None) -> dict[str, Match]:
    """Both data sets."""
    return {
        "hearts": Match(
            draw=Hearts.of,
            shipped="tabular-ehr",
            cycle=(LARGE, SMALL, LARGE, TRAP, LARGE, SINGLE, LARGE, LONG_TRAP),
            cycles=4,
            measures=("near", "lead"),
            told=Hearts.told,
            fixed=(
                *((ratio, 1.0) for ratio in (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0)),
                *((ratio, keep) for ratio in (0.0, 2.0, 10.0) for keep in (0.5, 0.1)),
            ),
        ),
        "xrays": Match(
            draw=lambda seed: Xrays.of(seed, file),
            shipped="chest-xray",
            cycle=(LARGE, SMALL, LARGE, TRAP, LARGE, SINGLE, LARGE, MEDIUM),
            cycles=1,
            measures=("gain",),
            told=None,
            fixed=((0.0, 1.0), (2.0, 1.0), (5.0, 1.0), (10.0, 1.0), (0.0, 0.1), (2.0, 0.1)),
        ),
    }
