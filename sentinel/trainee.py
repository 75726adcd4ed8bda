"""Trainee: what a round trains; it takes the global state and gives the local one.

A round with a model has `OwnModel`; a round that is handed its local state has none. A model that
is spread over several processes is in `sentinel.distributed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from sentinel.errors import MisuseError
from sentinel.update import check_structure, shares_storage

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import nn


def require_one_process() -> None:
    """Refuse private training (DP-SGD) in a process group of several ranks.

    Raises:
        MisuseError: each rank would sample, clip and noise by itself, and be counted by none.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise MisuseError(
            "Private training (DP-SGD) over several processes is not in this version: each rank "
            "would sample, clip and noise by itself. Train in one process, without a process "
            'group, or use a policy with unit "site" and sentinel.distributed.Guard.'
        )


class Trainee(Protocol):
    """What a round trains."""

    @property
    def architecture(self) -> nn.Module | None:
        """The model to run probes on a copy of; None where no single process has a whole one."""

    @property
    def buffers(self) -> Collection[str]:
        """Every name of every buffer."""

    def shares(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether training would change `state` in place."""

    def require_fit(self, base: Mapping[str, torch.Tensor]) -> None:
        """Refuse a global state that cannot be loaded, before anything is."""

    def load(self, base: Mapping[str, torch.Tensor]) -> None:
        """Take the global state."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """The local state, whole; read once training has ended."""


class OwnModel:
    """A model that lies in this process alone."""

    def __init__(self, model: nn.Module) -> None:
        """Keep the model.

        Raises:
            MisuseError: its parameters are shards, and other processes hold the rest.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise MisuseError(
                "The model's parameters are shards that several processes hold (DTensor); open the "
                "round with sentinel.distributed.Guard, on every rank."
            )
        self.architecture: nn.Module = model

    @property
    def buffers(self) -> list[str]:
        """Every name of every buffer: one that several modules share has several."""
        return [name for name, _ in self.architecture.named_buffers(remove_duplicate=False)]

    def shares(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether a tensor of `state` is one of the model's own."""
        return shares_storage(state, self.architecture.state_dict(keep_vars=True))

    def require_fit(self, base: Mapping[str, torch.Tensor]) -> None:
        """Refuse a global state of another structure, and a model that is wrapped.

        Raises:
            Withheld: STRUCTURE_MISMATCH.
            MisuseError: the model is a wrapper.
        """
        own = self.architecture.state_dict()
        check_structure(base, own)
        if all(name.startswith("module.") for name in own) and not any(
            name.startswith("module.") for name in base
        ):
            raise MisuseError(
                "The model is wrapped (DataParallel?); pass model.module to the round."
            )

    def load(self, base: Mapping[str, torch.Tensor]) -> None:
        """Load the global state into the model."""
        self.architecture.load_state_dict(dict(base))

    def state(self) -> Mapping[str, torch.Tensor]:
        """The model's own state dict, borrowed."""
        return self.architecture.state_dict()
