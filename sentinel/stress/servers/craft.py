"""What every crafting function is: an honest global model goes in, a bent one comes out.

The names, shapes and dtypes stay, since the hospital's architecture is pinned; where a published
recipe inserts layers, it is written into existing ones here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, copied

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn


class Craft(Protocol):
    """A crafting function with all its choices made."""

    def __call__(
        self, model: nn.Module, state: Mapping[str, Tensor], /, *, generator: torch.Generator
    ) -> State:
        """Return a crafted copy of `state`."""


@runtime_checkable
class Learner(Protocol):
    """A craft that is told what came back, and bends the next model by it."""

    def learn(self, received: Mapping[str, Tensor]) -> None:
        """Take what came back of the model that was crafted last: a local state, or their mean."""


@dataclass(frozen=True, slots=True)
class Public:
    """What the attacker has besides the model: nothing of the hospital's.

    Attributes:
        sample: [n, ...] records of the same kind from elsewhere, or none.
        labels: [n] theirs, or none.
        batch: how many records the attacker expects behind a step.
    """

    sample: Tensor | None = None
    labels: Tensor | None = None
    batch: int = 32


NOTHING = Public()


def honest(model: nn.Module, state: Mapping[str, Tensor], *, generator: torch.Generator) -> State:
    """Return the honest state: what a server sends to those it does not attack."""
    del model, generator
    return copied(state)


def require_forgetful(*crafts: Craft) -> None:
    """Refuse to bend a craft that learns: what comes back would be of another model than its own.

    Raises:
        MisuseError: one of them learns.
    """
    if any(isinstance(craft, Learner) for craft in crafts):
        raise MisuseError("a search learns from the model that it sent itself; it cannot be bent")


def then(first: Craft, second: Craft) -> Craft:
    """Return the craft that bends what `first` has bent.

    Raises:
        MisuseError: one of them learns from what comes back.
    """
    require_forgetful(first, second)

    def both(model: nn.Module, state: Mapping[str, Tensor], *, generator: torch.Generator) -> State:
        return second(model, first(model, state, generator=generator), generator=generator)

    return both


def check_index(index: int, size: int, what: str) -> None:
    """Raise MisuseError unless `index` is from 0 to size - 1."""
    if not 0 <= index < size:
        msg = f"{what} must be from 0 to {size - 1}, got {index}"
        raise MisuseError(msg)
