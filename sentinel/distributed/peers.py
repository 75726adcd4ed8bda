"""Peers: short messages between the ranks of a group, over gloo; any failure ends the talk.

Every message is a few bytes of fixed size: no pickle, no text from data. All ranks send at the same
steps, so a message of another step means that the ranks ran apart.
"""

from __future__ import annotations

import enum
import gc
import json
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from sentinel.errors import MisuseError, Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Iterator

    from sentinel.update import State

_Result = TypeVar("_Result")

_DIGEST = 32  # bytes
_DIGESTS = 3
_MESSAGE = 2 + _DIGESTS * _DIGEST
_ORDER = 64  # bytes: one for the order, the rest for a reason code
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_PIECE = 1 << 26  # bytes sent at once; each piece has the whole timeout


class Step(enum.IntEnum):
    """Where all ranks exchange messages."""

    START = 1  # the guard is made
    ENTER = 2  # a round begins
    BLOCK_END = 3  # training has ended
    ASK = 4  # a release is asked for
    REPLICAS = 5  # the leader reads the local state
    GATHERED = 6
    DONE = 7  # the answer has arrived


class Standing(enum.IntEnum):
    """How a rank stands at a step."""

    READY = 1
    FAILED = 2


class Order(enum.IntEnum):
    """What the leader tells the others."""

    LOAD = 1  # the global state follows
    OPENED = 2
    GATHER = 3  # take part in reading the local state
    RELEASED = 4
    REPLAYED = 5
    REFUSED = 6  # RoundRefused
    WITHHELD = 7
    MISUSE = 8


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank said at a step."""

    standing: Standing
    digests: tuple[bytes, ...]


class Peers:
    """The ranks of one group, as one of them sees them.

    Attributes:
        rank: within the group; rank 0 leads.

    Guarantees:
        - A call returns with the answer of every rank, or raises.
        - After a failure of any kind the connection is closed: the others fail at their next call
          at the latest, and so does every later call here.
        - A rank that dies is noticed at once, one that hangs after `timeout`.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: dt.timedelta) -> None:
        """Connect the ranks of `group` (all of them where None), apart from the training's traffic.

        Raises:
            MisuseError: there is no process group, or this process is not in it.
            Withheld: RANK_LOST.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise MisuseError(
                "torch.distributed is not initialised: call init_process_group first, or use "
                "sentinel.Guard in a single process."
            )
        whole = group is None or group is dist.group.WORLD
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise MisuseError("This process is not in the group; make the guard on its ranks only.")
        ranks = dist.get_process_group_ranks(group)
        self.size = len(ranks)
        self._leader = ranks[0]
        self._pending: list[tuple[dist.Work, list[torch.Tensor]]] = []
        self._line: dist.ProcessGroup | None
        try:
            self._line = dist.new_group(
                ranks, timeout=timeout, backend="gloo", use_local_synchronization=not whole
            )
        except RuntimeError:
            raise _lost() from None
        # At exit too: a thread of gloo that lets go of a tensor after the interpreter has ended
        # would end the process with SIGABRT.
        self._end = weakref.finalize(self, _end, self._line)

    @property
    def connected(self) -> bool:
        """Whether nothing has failed yet."""
        return self._line is not None

    @property
    def leads(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def exchange(
        self, step: Step, *digests: bytes, standing: Standing = Standing.READY
    ) -> list[Message]:
        """Say where this rank stands, and hear it of all, in the order of the ranks.

        Raises:
            Withheld: RANK_LOST, or RANKS_DISAGREE where the ranks are not at the same step.
        """
        mine, heard = _written(step, standing, digests), _blank(self.size)
        self._call(lambda line: dist.all_gather(heard, mine, group=line))
        said = [bytes(one.tolist()) for one in heard]
        if any(one[0] != step for one in said):
            self.hang_up()
            raise Withheld(
                Reason.RANKS_DISAGREE,
                "The ranks are not at the same step of a round; every rank must make the same "
                "calls, release() included.",
            )
        return [_read(one) for one in said]

    def leave_word(self, step: Step, standing: Standing) -> None:
        """Say where this rank stands without waiting: the others may come to the step much later.

        An error here is not raised: it follows one that matters more.
        """
        mine, heard = _written(step, standing, ()), _blank(self.size)
        self._pending = [kept for kept in self._pending if not kept[0].is_completed()]
        with suppress(Withheld):
            work = self._call(lambda line: dist.all_gather(heard, mine, group=line, async_op=True))
            self._pending.append((work, [mine, *heard]))

    def tell(self, order: Order, reason: Reason | None = None) -> None:
        """Tell every other rank; on the leader."""
        text = b"" if reason is None else reason.value.encode()
        sent = torch.frombuffer(
            bytearray(bytes([order]) + text.ljust(_ORDER - 1)), dtype=torch.uint8
        )
        self._broadcast(sent)

    def told(self) -> tuple[Order, Reason | None]:
        """What the leader tells; on every other rank."""
        heard = torch.empty(_ORDER, dtype=torch.uint8)
        self._broadcast(heard)
        content = bytes(heard.tolist())
        text = content[1:].decode().strip()
        return Order(content[0]), Reason(text) if text else None

    def share(self, tensor: torch.Tensor) -> None:
        """Give the leader's values to every rank, in place; contiguous, on the CPU."""
        flat = tensor.detach().view(-1).view(torch.uint8)
        for piece in torch.split(flat, _PIECE) if flat.numel() else ():
            self._broadcast(piece)

    def give(self, state: State) -> None:
        """Give a whole state to every rank; on the leader."""
        lines = [[name, str(value.dtype), list(value.shape)] for name, value in state.items()]
        header = json.dumps(lines).encode()
        self.share(torch.tensor([len(header)]))
        self.share(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for value in state.values():
            self.share(value.cpu().contiguous())

    def take(self) -> State:
        """Take what the leader gives; on every other rank."""
        length = torch.empty(1, dtype=torch.int64)
        self.share(length)
        header = torch.empty(int(length), dtype=torch.uint8)
        self.share(header)
        state: State = {}
        for name, dtype, shape in json.loads(bytes(header.tolist())):
            state[name] = torch.empty(shape, dtype=_DTYPES[dtype])
            self.share(state[name])
        return state

    def hang_up(self) -> None:
        """Close the connection, so that no rank waits for this one."""
        self._line = None
        self._pending.clear()
        self._end()

    @contextmanager
    def unless_agreed(self) -> Iterator[None]:
        """Hang up where the block raises: the others do not know why, and must not wait."""
        try:
            yield
        except BaseException:
            self.hang_up()
            raise

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._call(lambda line: dist.broadcast(tensor, src=self._leader, group=line))

    def _call(self, call: Callable[[dist.ProcessGroup], _Result]) -> _Result:
        if self._line is None:
            raise _lost()
        try:
            return call(self._line)
        except RuntimeError:  # of gloo: the peer is gone, or the time is up
            self.hang_up()
            raise _lost() from None


def _end(line: dist.ProcessGroup) -> None:
    with suppress(RuntimeError, ValueError):  # the group may be gone already
        dist.destroy_process_group(line)
    gc.collect()  # the sockets close with the last reference: the finalizer's own


def _lost() -> Withheld:
    return Withheld(
        Reason.RANK_LOST,
        "A rank of the group died, hung, or ended its part; nothing was released. Start the job "
        "again with the same run.",
    )


def _written(step: Step, standing: Standing, digests: tuple[bytes, ...]) -> torch.Tensor:
    content = bytes([step, standing]) + b"".join(digests)
    return torch.frombuffer(bytearray(content.ljust(_MESSAGE, b"\0")), dtype=torch.uint8)


def _read(content: bytes) -> Message:
    digests = (content[at : at + _DIGEST] for at in range(2, _MESSAGE, _DIGEST))
    return Message(Standing(content[1]), tuple(digests))


def _blank(size: int) -> list[torch.Tensor]:
    return [torch.empty(_MESSAGE, dtype=torch.uint8) for _ in range(size)]
