"""SpreadModel: a model that several ranks hold, as equal replicas (DDP) or as shards (FSDP2)."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from sentinel.detection.synthetic import unwrapped
from sentinel.distributed.peers import Order, Step
from sentinel.errors import MisuseError, Withheld
from sentinel.terms import Reason
from sentinel.update import check_structure, model_digest, shares_storage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sentinel.distributed.peers import Peers
    from sentinel.update import State


class SpreadModel:
    """A model on every rank of a group; what the round of the leading rank trains.

    `load` and `state` are called on the leader, which orders the others to take part with
    `receive` and `gather`.

    Guarantees:
        - Every rank starts from the bytes of the leader's global state.
        - The local state is the whole model, in the leader's memory alone. A sharded parameter is
          put together one at a time, so that a rank holds one whole parameter more than its part.
        - Entries that are one parameter under several names stay one tensor.
        - Replicas whose parameters differ after training are refused. Buffers may differ (DDP
          keeps running statistics per rank); the leader's are read.
    """

    def __init__(self, model: nn.Module, architecture: nn.Module | None, peers: Peers) -> None:
        """Keep the model, without its wrappers.

        Args:
            model: this rank's replica or shards; DistributedDataParallel and torch.compile may be
                around it.
            architecture: the same model, whole, for probes; it may be on the meta device. Left out,
                replicas are their own, and shards have none.
            peers: the ranks.

        Raises:
            MisuseError: a model that cannot be read tensor by tensor.
        """
        self._model = unwrapped(model)
        self._peers = peers
        entries = _entries(self._model)
        sharded = any(isinstance(entry, DTensor) for entry in entries.values())
        whole = None if sharded else self._model
        self.architecture = whole if architecture is None else architecture

    @property
    def buffers(self) -> list[str]:
        """Every name of every buffer."""
        return [name for name, _ in self._model.named_buffers(remove_duplicate=False)]

    @property
    def structure(self) -> bytes:
        """Digest of names, dtypes, whole shapes and placements; equal on all ranks."""
        lines = [
            [name, str(entry.dtype), list(entry.shape), _layout(entry)]
            for name, entry in _entries(self._model).items()
        ]
        return hashlib.sha256(json.dumps(lines).encode()).digest()

    def shares(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether a tensor of `state` is one of this rank's own."""
        own = {name: _local(entry) for name, entry in _entries(self._model).items()}
        return shares_storage(state, own)

    def require_fit(self, base: Mapping[str, torch.Tensor]) -> None:
        """Refuse a global state of another structure."""
        check_structure(base, _entries(self._model))

    def load(self, base: Mapping[str, torch.Tensor]) -> None:
        """Load the global state on every rank; on the leader."""
        self._peers.tell(Order.LOAD)
        with self._peers.unless_agreed():
            for name, entry in _entries(self._model).items():
                whole = base[name].detach().to("cpu", entry.dtype).contiguous()
                self._peers.share(whole)
                _put(entry, whole)

    def receive(self) -> None:
        """Take part in `load`."""
        with self._peers.unless_agreed():
            for entry in _entries(self._model).values():
                whole = torch.empty(entry.shape, dtype=entry.dtype)
                self._peers.share(whole)
                _put(entry, whole)

    def state(self) -> State:
        """Read the local state; on the leader.

        Raises:
            Withheld: RANKS_DISAGREE where replicas differ, RANK_LOST.
        """
        self._peers.tell(Order.GATHER)
        whole = self.gather()
        if whole is None:
            raise Withheld(
                Reason.RANKS_DISAGREE,
                "The ranks' replicas of the model differ after training; nothing was released.",
            )
        return whole

    def gather(self) -> State | None:
        """Take part in `state`; the whole model on the leader, empty elsewhere.

        Returns:
            None where replicas differ.
        """
        with self._peers.unless_agreed():
            if not self._replicas_agree():
                return None
            try:
                whole = self._whole()
            except RuntimeError:  # of the training's process group: a rank is gone
                raise Withheld(
                    Reason.RANK_LOST,
                    "The shards of the model could not be put together; nothing was released.",
                ) from None
            self._peers.exchange(Step.GATHERED)
        return whole

    def _replicas_agree(self) -> bool:
        """Whether parameters that several ranks hold whole, or the same shard of, are equal.

        Their digests pass between the ranks and are kept nowhere.
        """
        everywhere: State = {}
        somewhere: State = {}
        place: list[list[int]] = []
        for name, entry in _entries(self._model).items():
            if not isinstance(entry, nn.Parameter):
                continue
            if not isinstance(entry, DTensor):
                everywhere[name] = entry
            elif any(one.is_replicate() for one in entry.placements):
                somewhere[name] = entry.to_local()
                place.append(_coordinate(entry))
        said = self._peers.exchange(
            Step.REPLICAS,
            bytes.fromhex(model_digest(everywhere)),
            hashlib.sha256(json.dumps(place).encode()).digest(),
            bytes.fromhex(model_digest(somewhere)),
        )
        whole = {message.digests[0] for message in said}
        places = {message.digests[1] for message in said}
        shards = {message.digests[1:] for message in said}
        return len(whole) == 1 and len(shards) == len(places)

    def _whole(self) -> State:
        """Every entry, whole and on the leader; a parameter of several names is read once."""
        found: dict[int, torch.Tensor] = {}
        state: State = {}
        for name, entry in _entries(self._model).items():
            if id(entry) not in found:
                value = entry.detach()
                if isinstance(value, DTensor):
                    value = value.full_tensor()
                    value = value.cpu() if self._peers.leads else value.new_empty(0)
                found[id(entry)] = value
            state[name] = found[id(entry)]
        return state if self._peers.leads else {}


def _entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters and buffers, by the names of its state dict.

    Raises:
        MisuseError: the state dict holds something else, which could not be written in place.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise MisuseError(
            "The model is wrapped in FullyShardedDataParallel, whose parameters have no names of "
            "their own; shard it with torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    entries = cast("dict[str, torch.Tensor]", model.state_dict(keep_vars=True))
    # Only now: FSDP2 puts its shards back in the place of whole parameters when it is asked for.
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, entry in entries.items():
        if id(entry) not in own:
            raise MisuseError(
                f"Entry {name!r} of the model's state dict is no parameter or buffer of it, so "
                "that the ranks cannot load it; keep such a thing out of the state dict."
            )
    return entries


def _local(entry: torch.Tensor) -> torch.Tensor:
    return entry.to_local() if isinstance(entry, DTensor) else entry


def _layout(entry: torch.Tensor) -> list[str]:
    """How an entry lies on the ranks, in words."""
    if not isinstance(entry, DTensor):
        return []
    return [str(entry.device_mesh.mesh.tolist()), *map(str, entry.placements)]


def _coordinate(entry: DTensor) -> list[int]:
    """Which shard of the entry this rank holds."""
    place: Sequence[int] = entry.device_mesh.get_coordinate() or ()
    return [at for at, one in zip(place, entry.placements, strict=False) if not one.is_replicate()]


@torch.no_grad()
def _put(entry: torch.Tensor, whole: torch.Tensor) -> None:
    """Write this rank's part of `whole` into the entry."""
    if not isinstance(entry, DTensor):
        entry.copy_(whole)
        return
    mesh = entry.device_mesh
    everywhere = DTensor.from_local(
        whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    mine = everywhere.redistribute(placements=entry.placements)
    entry.to_local().copy_(mine.to_local())
