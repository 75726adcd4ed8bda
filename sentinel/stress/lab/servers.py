"""Servers: who sends the global model in a test; the malicious ones come from the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sentinel.errors import MisuseError
from sentinel.stress.lab.setting import HONEST
from sentinel.stress.layers import State, attacked_pair, copied
from sentinel.stress.servers.catalogue import RECIPES, Recipe
from sentinel.stress.servers.craft import Public

if TYPE_CHECKING:
    import torch

    from sentinel.stress.lab.subject import Subject

# The catalogue in the order in which a short test tries them; any others follow.
_FIRST = ("binning-gaussian", "binning-scaled", "qbi", "trap-weights", "fishing-class")


# What they do to one client in one round is nothing by itself, so that they would look withstood.
ALONE_NOTHING = {
    "suppression": "it needs several clients, all but one of whom send nothing, and their sum",
    "scan": "it needs many rounds; in one it shows a single part of its line",
}


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
    """Sends what a recipe of the catalogue makes of the model."""

    recipe: Recipe

    @property
    def title(self) -> str:
        """What it does, and where it was published."""
        return f"{self.recipe.sentence} ({self.recipe.source})"

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
        return Crafted(craft(subject.model, state, generator=generator), secret)


def _ordered() -> list[Recipe]:
    return sorted(
        (recipe for recipe in RECIPES if recipe.name not in ALONE_NOTHING),
        key=lambda recipe: _FIRST.index(recipe.name) if recipe.name in _FIRST else len(_FIRST),
    )


SERVERS: dict[str, Server] = {
    HONEST: Honest(),
    **{recipe.name: Malicious(recipe) for recipe in _ordered()},
}


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
