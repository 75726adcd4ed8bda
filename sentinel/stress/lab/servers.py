"""Servers: who sends the global model in a test; the malicious ones come from the catalogue."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sentinel.errors import MisuseError
from sentinel.stress.lab.setting import HONEST
from sentinel.stress.layers import State, attacked_pair, copied
from sentinel.stress.servers.catalogue import RECIPES, Recipe, recipe
from sentinel.stress.servers.craft import Public
from sentinel.stress.servers.stealth import among_honest, jittered, mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.servers.craft import Craft

# The catalogue in the order in which a short test tries them; any others follow.
_FIRST = ("binning-gaussian", "binning-scaled", "qbi", "trap-weights", "fishing-class")


# What it does to one client in one round is nothing by itself, so that it would look withstood.
ALONE_NOTHING = {"scan": "it needs many rounds; in one it shows a single part of its line"}

_SUPPRESSION = "suppression"
_DEAD = (
    "Sent here is the dead model that the others get, to see whether it is refused. The client "
    "that is left gives away what it does under the honest server."
)


@dataclass(frozen=True, slots=True)
class Crafted:
    """What a server sends, and the mixtures of neurons that it alone knows to read by."""

    state: State
    secret: torch.Tensor | None = None


class Server(Protocol):
    """Sends a global model; `title` says what it does, for a reader."""

    @property
    def title(self) -> str:
        """What it does."""

    def craft(
        self, subject: Subject, state: State, records: int, generator: torch.Generator
    ) -> Crafted:
        """The global model that it sends in the place of `state`.

        Args:
            subject: whose model, and which public records there are.
            state: the honest global state.
            records: how many it expects behind a step.
            generator: its randomness.
        """


@dataclass(frozen=True, slots=True)
class Honest:
    """Sends the model as it is."""

    title: str = "sends the model as it was agreed"

    def craft(
        self, subject: Subject, state: State, records: int, generator: torch.Generator
    ) -> Crafted:
        """A copy of the state."""
        del subject, records, generator
        return Crafted(copied(state))


@dataclass(frozen=True, slots=True)
class Malicious:
    """Sends what a recipe of the catalogue makes of the model.

    Attributes:
        recipe: of the catalogue.
        note: what a reader must know besides the recipe's own sentence; mostly nothing.
        hide: what makes the trap harder to see; None where it is sent as it is.
    """

    recipe: Recipe
    note: str = ""
    hide: Callable[[Craft], Craft] | None = None

    @property
    def title(self) -> str:
        """What it does, and where it was published."""
        said = f"{self.recipe.sentence} {self.note}" if self.note else self.recipe.sentence
        return f"{said} ({self.recipe.source})"

    def craft(
        self, subject: Subject, state: State, records: int, generator: torch.Generator
    ) -> Crafted:
        """A crafted state; public records give it its thresholds."""
        known = subject.public
        sample, labels = (None, None) if known is None else (known.inputs, known.labels)
        public = Public(sample, labels, max(2, min(records, subject.batch)))
        secret = None
        if self.recipe.secret is not None:
            first, _ = attacked_pair(subject.model, state)
            secret = self.recipe.secret(len(state[f"{first}.weight"]), generator)
        craft = self.recipe.craft(public, secret)
        if self.hide is not None:
            craft = self.hide(craft)
        return Crafted(craft(subject.model, state, generator=generator), secret)


# Recipe, how it is hidden, what hides it, and what a reader must know. Each is hidden as far as the
# demo's rows need; order and scale of the rows change neither what is read nor what is seen.
_HIDDEN: tuple[tuple[str, str, Callable[[Craft], Craft], str], ...] = (
    (
        "binning-gaussian",
        "jittered",
        functools.partial(jittered, size=0.5),
        "Noise of half its size blurs each row.",
    ),
    (
        "binning-gaussian",
        "among-honest",
        functools.partial(among_honest, share=0.1),
        "Nine rows in ten stay honest.",
    ),
    (
        "binning-gaussian",
        "mixed",
        functools.partial(mixed, share=0.8),
        "A fifth of the honest model is mixed in.",
    ),
    (
        "qbi",
        "mixed",
        functools.partial(mixed, share=0.05),
        "All but a twentieth is the honest model.",
    ),
    (
        "fishing-class",
        "mixed",
        functools.partial(mixed, share=0.03),
        "All but three hundredths is the honest model.",
    ),
)


def _hidden() -> dict[str, Server]:
    """Traps as the inspection may miss them."""
    return {
        f"{name}, {how}": Malicious(recipe(name), note, hide) for name, how, hide, note in _HIDDEN
    }


def _plain() -> dict[str, Server]:
    tried = [one for one in RECIPES if one.name not in {*ALONE_NOTHING, _SUPPRESSION}]
    tried.sort(key=lambda one: _FIRST.index(one.name) if one.name in _FIRST else len(_FIRST))
    return {one.name: Malicious(one) for one in tried}


_LAST: dict[str, Server] = {**_hidden(), _SUPPRESSION: Malicious(recipe(_SUPPRESSION), _DEAD)}
LATE = tuple(_LAST)  # tried after all others, so that a short test is spent on those
SERVERS: dict[str, Server] = {HONEST: Honest(), **_plain(), **_LAST}


def trains(name: str) -> bool:
    """Whether this server trains its trap, which takes a minute or more."""
    server = SERVERS[name]
    if not isinstance(server, Malicious):
        return False
    return server.recipe.family == "F" and server.recipe.secret is None  # a secret is laid


def misfit(name: str, subject: Subject, generator: torch.Generator) -> str | None:
    """Why this server cannot attack this model, as a sentence; None where it can."""
    try:
        SERVERS[name].craft(subject, subject.start, subject.batch, generator)
    except MisuseError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a recipe that breaks on an odd model; told by type
        return f"it cannot be crafted for this model ({type(error).__name__})"
    return None
