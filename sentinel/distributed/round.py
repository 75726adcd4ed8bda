"""Round: one round on every rank; the leader decides, the others follow.

1. Enter.     All ranks name the round; where they differ, it is refused.
2. Open.      The leader inspects the global model; all ranks load it, or none trains.
3. Train.     The caller's own loop.
4. Block end. All ranks say that their block ended well; where one did not, all withhold.
5. Release.   The leader reads the local state (step 1 of a release) with the help of the others,
              takes it through the steps alone, and tells the answer.
6. Done.      All ranks have the answer, or every living one withholds.
"""

from __future__ import annotations

import enum
import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from sentinel.arguments import require_kind, require_stage
from sentinel.distributed.peers import Order, Standing, Step
from sentinel.errors import MisuseError, RoundRefused, SentinelError, Withheld, unforeseen
from sentinel.terms import Reason
from sentinel.update import model_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    import torch

    from sentinel import round as single
    from sentinel.detection import Inspection
    from sentinel.distributed.peers import Message, Peers
    from sentinel.distributed.spread import SpreadModel
    from sentinel.update import Kind, State

UNSAID = bytes(32)  # in the place of a digest: this rank has no global state of its own


class _Stage(enum.Enum):
    """Where a round stands on this rank."""

    NEW = "not entered yet"
    OPEN = "open"
    TRAINED = "trained"
    RELEASED = "released"
    CLOSED = "withheld, refused or aborted"


class Round:
    """One round, as one rank sees it; every rank makes the same calls in the same order.

    Guarantees:
        Every norm is of the whole update and every coordinate gets one draw of noise, since the
        leader alone takes the update through the steps. The ranks agree on the answer, or the
        living ones withhold.

    Edges:
        `release` asked for on some ranks only:     withheld
        `release` asked for in different ways:      RANKS_DISAGREE
        released before:                            the stored bytes, to every rank
        a rank that is not the leader:              None, unless asked for `everywhere`
        `metrics` on a rank that is not the leader: none
        a global model that the policy refuses:     RoundRefused on all ranks, loaded on none
        an exception in the block of one rank:      aborted on all; no text of it crosses
    """

    def __init__(
        self,
        peers: Peers,
        model: SpreadModel,
        terms: bytes,
        global_state: Mapping[str, torch.Tensor] | None,
        led: single.Round | None,
    ) -> None:
        """Made by `Guard.round`; `led` is the round of the whole model, on the leader."""
        self._peers = peers
        self._model = model
        self._terms = terms
        self._global_state = global_state
        self._led = led
        self._stage = _Stage.NEW
        self._replayed = False

    @property
    def inspection(self) -> Inspection | None:
        """What the inspection found; on the leader, and None elsewhere."""
        return None if self._led is None else self._led.inspection

    @property
    def replayed(self) -> bool:
        """Whether the release gave the stored bytes of an earlier one."""
        return self._replayed

    def __enter__(self) -> Self:
        """Agree on the round, inspect the global model on the leader, and load it on every rank.

        Raises:
            RoundRefused: do not train on it.
            Withheld: RANKS_DISAGREE, RANK_LOST, or what a guard of one process would say.
            MisuseError: what a guard of one process would say.
        """
        require_stage(self._stage, _Stage.NEW)
        with self._closing():
            self._agree_on_the_round()
            if self._led is None:
                self._follow_in()
            else:
                self._lead_in(self._led)
        self._stage = _Stage.OPEN
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End training; an exception in the block of one rank aborts the round on all.

        Raises:
            Withheld: RANK_LOST, where the block of another rank did not end well.
        """
        if self._stage is not _Stage.OPEN:
            return
        if kind is not None:
            self._stage = _Stage.CLOSED
            self._peers.leave_word(Step.BLOCK_END, Standing.FAILED)
            if self._led is not None:
                self._led.__exit__(kind, error, trace)
            return
        with self._closing():
            self._end_block()

    def release(self, *, kind: Kind = "weights", everywhere: bool = False) -> State | None:
        """Sanitize the update; what may leave, on the leader.

        Args:
            kind: "weights" (global + sanitized delta) or "delta".
            everywhere: give it to every rank, not to the leader alone.

        Returns:
            What a guard of one process would give, on the CPU; None on a rank that is not to have
            it. The rank that gets a state sends it.

        Raises:
            Withheld: nothing leaves; `.reason` says why, the same on every rank that lives.
            MisuseError: wrong order.
        """
        require_stage(self._stage, _Stage.OPEN, _Stage.TRAINED, _Stage.RELEASED)
        require_kind(kind)
        with self._closing():
            if self._stage is _Stage.OPEN:
                self._end_block()
            asked = hashlib.sha256(json.dumps([kind, bool(everywhere)]).encode()).digest()
            _require_same(self._peers.exchange(Step.ASK, asked), "kind or everywhere")
            if self._led is None:
                state = self._follow_out(everywhere=everywhere)
            else:
                state = self._lead_out(self._led, kind, everywhere=everywhere)
            self._peers.exchange(Step.DONE)
        self._stage = _Stage.RELEASED
        return state

    def metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of `values` that the policy lets leave; on the leader, and none elsewhere."""
        require_stage(self._stage, _Stage.RELEASED)
        return {} if self._led is None else self._led.metrics(values)

    def _agree_on_the_round(self) -> None:
        mine = (
            UNSAID
            if self._global_state is None
            else bytes.fromhex(model_digest(self._global_state))
        )
        said = self._peers.exchange(Step.ENTER, self._terms, self._model.structure, mine)
        _require_same(said, "federation, run, round number or patients", 0)
        _require_same(said, "model", 1)
        states = {message.digests[2] for message in said} - {UNSAID}
        if len(states) != 1:
            raise _disagreement("global state")

    def _lead_in(self, led: single.Round) -> None:
        try:
            led.__enter__()
        except SentinelError as error:
            self._tell(error)
            raise
        self._peers.tell(Order.OPENED)

    def _follow_in(self) -> None:
        while True:
            order, reason = self._peers.told()
            if order is Order.OPENED:
                return
            if order is not Order.LOAD:
                raise _told(order, reason)
            self._model.receive()

    def _end_block(self) -> None:
        said = self._peers.exchange(Step.BLOCK_END)
        failed = [rank for rank, one in enumerate(said) if one.standing is not Standing.READY]
        if failed:
            raise Withheld(
                Reason.RANK_LOST,
                f"The training block raised on rank {failed[0]}, so the round was aborted; see the "
                "error of that rank.",
            )
        self._stage = _Stage.TRAINED

    def _lead_out(self, led: single.Round, kind: Kind, *, everywhere: bool) -> State:
        try:
            state = led.release(kind=kind)
        except SentinelError as error:
            self._tell(error)
            raise
        self._replayed = led.replayed
        self._peers.tell(Order.REPLAYED if led.replayed else Order.RELEASED)
        if everywhere:
            self._peers.give(state)
        return state

    def _follow_out(self, *, everywhere: bool) -> State | None:
        while True:
            order, reason = self._peers.told()
            if order in (Order.RELEASED, Order.REPLAYED):
                self._replayed = order is Order.REPLAYED
                return self._peers.take() if everywhere else None
            if order is not Order.GATHER:
                raise _told(order, reason)
            self._model.gather()

    def _tell(self, error: SentinelError) -> None:
        """Tell the others how the leader's part ended; where they are gone, there is nobody."""
        if not self._peers.connected:
            return
        if isinstance(error, RoundRefused):
            self._peers.tell(Order.REFUSED, error.reason)
        elif isinstance(error, Withheld):
            self._peers.tell(Order.WITHHELD, error.reason)
        else:
            self._peers.tell(Order.MISUSE)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Whatever goes wrong closes the round here; what nobody foresaw ends the talk as well."""
        try:
            yield
        except MisuseError:
            raise
        except Withheld as error:
            self._close(error.reason)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it withholds
            self._peers.hang_up()
            withheld = unforeseen(error)
            self._close(withheld.reason)
            raise withheld from None
        except BaseException:
            self._peers.hang_up()
            self._close(Reason.INTERNAL_ERROR)
            raise

    def _close(self, reason: Reason) -> None:
        self._stage = _Stage.CLOSED
        if self._led is not None:
            self._led.withhold(reason)


def _require_same(said: list[Message], what: str, place: int = 0) -> None:
    if len({message.digests[place] for message in said}) != 1:
        raise _disagreement(what)


def _disagreement(what: str) -> Withheld:
    return Withheld(
        Reason.RANKS_DISAGREE,
        f"The ranks do not name the same {what}; pass the same on every rank.",
    )


def _told(order: Order, reason: Reason | None) -> SentinelError:
    """The leader's answer, as an error of this rank."""
    if order is Order.MISUSE or reason is None:
        return MisuseError("The leading rank was called wrongly; its own error says how.")
    kind = RoundRefused if order is Order.REFUSED else Withheld
    return kind(reason, "So the leading rank decided; its log and its error say more.")
