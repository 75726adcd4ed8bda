"""Training: private training of one model, from the batches to the charge.

Where it stands, and what may follow:

- idle: no round is open. A step raises.
- open: a round was entered; the model holds the global state. Batches, backward passes, steps.
- concluded: the release has read the update. A step raises.

Every step of an open round runs: batch, gradients by record, sum by unit, clip, sum, noise,
average, optimizer. The optimizer sees nothing but private averages, so that whatever it makes of
them (momentum, weight decay, learning rates) is post-processing.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import torch

from sentinel.dpsgd import chain as chains
from sentinel.dpsgd import clipping
from sentinel.dpsgd.allowance import Allowance
from sentinel.dpsgd.chain import Chain, broken
from sentinel.dpsgd.chance import Chance
from sentinel.dpsgd.losses import LossWatch
from sentinel.dpsgd.step import add_batch_, noised_average, slots_of
from sentinel.dpsgd.taps import OpenBatch, Taps, tensors_in
from sentinel.dpsgd.wrapped import Wrapped
from sentinel.errors import MisuseError, SentinelError, Withheld

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sentinel.dpsgd.clipping import ClippedSum
    from sentinel.dpsgd.loader import Piece
    from sentinel.dpsgd.plan import Plan
    from sentinel.house import House
    from sentinel.privacy import DpSgdEvent
    from sentinel.releases import RoundKey


_SCALES = "_step_supports_amp_scaling"  # torch's word on an optimizer, for its GradScaler


class _Stage(enum.Enum):
    IDLE = "no round is open"
    OPEN = "a round is open"
    CONCLUDED = "the round's update was read for its release"


class PrivateTraining:
    """DP-SGD of one model with one optimizer, round after round.

    Attributes:
        left_out: records that the cap on records per patient kept out so far; stays in memory.
        not_finite: units left out so far because of NaN or Inf; stays in memory.

    Guarantees:
        What a round releases is the global state after private steps alone, each charged; else it
        is withheld. What `Chain`, `Wrapped`, `LossWatch`, `Chance` and `Bound` see to is in theirs.

        Rows that were changed as well as moved, and records from elsewhere in the place of a batch,
        are not recognised: docs/private-training.md says what else is not covered.

    Edges:
        no step:                                       the round is charged for one: `first_step`
        a batch of nobody:                             a step of noise alone, charged
        a record of NaN or Inf:                        its unit is left out of that step
        rows of a batch left out, or moved:            raises; the step is not taken
        a forward pass without a backward one:         raises; the step is not taken
        a batch skipped, or a second step on one:      raises; nothing is released
        a step outside of a round:                     raises
        a round that ends in an error (`end`):         aborted; its momentum goes on in no later
                                                       round
        `begin` with momentum that was not charged:    PROMISE_NOT_KEPT
        `begin` after model or optimizer were changed: MisuseError
        `conclude` after another round was begun:      PROMISE_NOT_KEPT
        `require_epoch` without budget:                BUDGET_EXHAUSTED; what was trained may be
                                                       released
        `open_batch` without a step on the one before: MisuseError; nothing is released
        `remove`:                                      the model trains as before, and privately no
                                                       more
    """

    def __init__(
        self,
        house: House,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mean_loss: bool,
    ) -> None:
        """Tap the model and take hold of the optimizer's steps.

        Raises:
            MisuseError: a layer or an optimizer that private training refuses.
        """
        self._wrapped = Wrapped(model, optimizer)
        self.left_out = 0
        self.not_finite = 0
        self._plan, self._model, self._optimizer = plan, model, optimizer
        self._slots = slots_of(self._wrapped.trainable)
        self._coordinates = self._slots[-1].end
        plan.require_possible(self._coordinates)
        self._entropy = house.entropy()
        self._taps = Taps(model, mean_loss=mean_loss, chance=Chance(self._entropy.branch()))
        self._losses = LossWatch()
        self._allowance = Allowance(house, plan, self._coordinates)
        self._stage = _Stage.IDLE
        self._fault: Withheld | None = None
        self._refusal: Withheld | None = None
        self._chain: Chain | None = None
        self._charged_memory: dict[tuple[int, str], object] = {}
        self._clip_norm = self._charged_clip_norm = plan.clip_norm
        self._steps = 0
        self._batches = 0
        self._piece: Piece | None = None
        self._sum: ClippedSum | None = None
        self._units = 0
        self._wrapped.hook(self._before_step, self._after_step)
        self._scales = getattr(optimizer, _SCALES, False)
        setattr(optimizer, _SCALES, True)  # so that a scaler hands itself over, and is refused

    @property
    def steps(self) -> int:
        """Private steps of the round so far: public."""
        return self._steps

    @property
    def clip_norm(self) -> float:
        """The clip norm of the next step: public."""
        return self._clip_norm

    def remove(self) -> None:
        """Let go of model and optimizer."""
        self._taps.remove()
        self._taps.active = False
        self._losses.end()
        self._wrapped.remove()
        setattr(self._optimizer, _SCALES, self._scales)

    def begin(self, key: RoundKey, base: Mapping[str, Tensor]) -> PrivateRound:
        """A round was entered, and the model has been loaded with the global state.

        Returns:
            The training of this round, for its release.

        Raises:
            Withheld: PROMISE_NOT_KEPT: the optimizer holds state that is not from charged private
                steps.
            MisuseError: model or optimizer were changed since guard.private.
        """
        self._settle()
        self._taps.restore()
        self._wrapped.require_unchanged()
        self._wrapped.require_separate()
        memory = chains.optimizer_state(self._optimizer, copy=False)
        if memory and not chains.same_memory(memory, self._charged_memory):
            raise broken(
                "the optimizer begins with state that is not from charged private steps; give each "
                "round a fresh optimizer state (optimizer.state.clear()) after a round that was "
                "not released"
            )
        self._allowance.begin(key)
        self._fault, self._refusal, self._steps = None, None, 0
        self._clip_norm = self._charged_clip_norm
        self._forget_batch()
        self._chain = Chain(self._model, self._optimizer, base)
        self._chain.require()
        self._stage = _Stage.OPEN
        self._taps.active = True
        return PrivateRound(self, self._chain)

    def end(self, error: BaseException | None) -> Withheld | None:
        """The round ended in `error`: what is left of a batch is forgotten.

        Returns:
            The error, where it is the last one by which this training withheld; else None.
        """
        refusal, self._refusal = self._refusal, None
        self._stage = _Stage.IDLE
        self._taps.active = False
        self._taps.restore()
        self._forget_batch()
        return refusal if refusal is error else None

    def first_step(self) -> DpSgdEvent:
        """What one step costs."""
        return self._allowance.event(1)

    def conclude(
        self, chain: Chain, local_state: Mapping[str, Tensor]
    ) -> tuple[DpSgdEvent, dict[str, Tensor]]:
        """Check that the local state is what the private steps left; what they cost, and a copy.

        Raises:
            Withheld: PROMISE_NOT_KEPT.
        """
        if self._chain is not chain or self._stage is _Stage.IDLE:
            raise broken("another round was opened with this model since")
        if self._fault is not None:
            raise self._fault
        self._taps.restore()
        self._chain.require()
        kept = self._chain.require_local(local_state)
        try:
            if self._steps:
                self._wrapped.require_settings()
        except MisuseError as error:
            raise broken("the optimizer's settings were changed in the midst of it") from error
        self._stage = _Stage.CONCLUDED
        self._taps.active = False
        self._losses.end()
        return self._allowance.concluded(max(1, self._steps)), kept

    def require_epoch(self, batches: int) -> None:
        """Refuse to begin an epoch that the budget does not pay for.

        Raises:
            Withheld: BUDGET_EXHAUSTED; the steps so far may still be released.
        """
        if self._stage is not _Stage.OPEN:
            return
        self._taps.batch = None
        self._piece = None
        self._losses.end()
        if self._sum is not None:
            raise self._fail(
                MisuseError(
                    "The last epoch was left in the middle of a batch that comes in several pieces."
                )
            )
        try:
            self._allowance.require_epoch(self._steps, batches)
        except Withheld as error:
            self._refusal = error
            raise

    def open_batch(self, piece: Piece, data: object) -> None:
        """The loader gives out a piece of a batch: `data` is what the loop gets.

        Raises:
            MisuseError: the one before had no step, or `data` has other rows than the piece.
        """
        if self._piece is not None:
            raise self._fail(
                MisuseError(
                    "A batch came without an optimizer.step() on the one before. Take one step on "
                    "every batch, also on one that looks odd: to skip it would be a choice by the "
                    "data, which the promise does not cover. To add up the gradients of several "
                    "batches, set a larger privacy.batch in the policy; max_records gives it out "
                    "in pieces that fit into memory."
                )
            )
        if self._stage is not _Stage.OPEN:
            return
        given = tuple(tensor for tensor in tensors_in(data) if tensor.dim())
        if given and len(given[0]) != len(piece.rows):
            raise self._fail(
                MisuseError(
                    "The data set or its collating gave other rows than the records that were "
                    "asked for. Every record must be kept: one that is not to count gets the "
                    "weight 0 in the loss, or is left out of the data set beforehand."
                )
            )
        if not self._steps and self._sum is None:  # what was set before the first batch is public
            self._wrapped.note_settings()
        self._batches += 1
        self._piece = piece
        self._taps.batch = OpenBatch(self._batches, len(piece.rows), given)
        self._losses.begin()
        self.left_out += piece.left_out

    def _before_step(
        self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Put private averages where the optimizer looks for gradients."""
        try:
            self._require_step(optimizer, args, kwargs)
            self._set_gradients()
        except SentinelError as error:
            self._fail(error)
            raise
        except BaseException:
            self._fail(broken("a private step ended in an error"))
            raise

    def _require_step(
        self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # args[0] is the optimizer itself
        if len(args) > 1 or any(value is not None for value in kwargs.values()):
            raise MisuseError(
                "optimizer.step() takes no closure in private training: it would run the batch "
                "again. Run backward() yourself, then step()."
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise MisuseError(
                "A GradScaler was given the private optimizer; private training runs in full "
                "precision. Leave the scaler and autocast out."
            )
        if self._stage is not _Stage.OPEN or self._chain is None:
            raise MisuseError(
                f"A private step may be taken only while a round is open ({self._stage.value}): "
                "train inside `with guard.round(number, global_state, model):`."
            )
        if self._fault is not None:
            raise self._fault
        if self._piece is None or self._taps.batch is None:
            raise MisuseError(
                "optimizer.step() came without a batch of the private loader, or twice on one. "
                "Take one step on each batch of the loader that guard.private gave."
            )
        self._taps.batch.require_whole()
        self._losses.require_plain()
        self._wrapped.require_no_gradients()
        self._chain.require()
        self._wrapped.require_unchanged()
        self._wrapped.require_settings()

    def _set_gradients(self) -> None:
        piece, batch = self._piece, self._taps.batch
        assert piece is not None and batch is not None  # noqa: PT018, S101 - `_require_step` saw to it
        if self._sum is None:
            self._begin_sum()
        assert self._sum is not None  # noqa: S101 - as above
        with torch.no_grad():
            captures = list(batch.captures.values())
            add_batch_(self._sum, self._slots, captures, piece.rows)
            self._units += piece.units
            self._piece = self._taps.batch = None
            self._losses.end()
            if piece.last:
                self._finish_sum()

    def _begin_sum(self) -> None:
        self._allowance.require(self._steps + 1)
        device = self._slots[0].parameter.device
        clip = self._plan.bound(self._clip_norm, self._coordinates)
        self._sum = clipping.empty_sum(clip, device)
        self._units = 0

    def _finish_sum(self) -> None:
        """Noise, average, and the next clip norm; from here on the step counts."""
        total, plan = self._sum, self._plan
        assert total is not None  # noqa: S101 - the caller saw to it
        self._steps += 1
        self._sum = None
        self.not_finite += total.not_finite
        average = noised_average(total, plan.rate.batch, self._entropy)
        for slot in self._slots:
            parameter = slot.parameter
            values = average[slot.begin : slot.end].view(parameter.shape)
            parameter.grad = values.to(parameter.dtype)
        if plan.quantile is not None:
            self._clip_norm = plan.quantile.following(
                self._clip_norm, total.unclipped, self._units, self._entropy
            )

    def _after_step(self, *_: object) -> None:
        """Note where the step ended, and leave no gradient behind."""
        self._wrapped.clear_gradients()
        if self._chain is not None:
            self._chain.note()

    def _settle(self) -> None:
        """What the last round left counts only if its steps were charged."""
        chain, self._chain = self._chain, None
        if chain is None:
            return
        if self._stage is _Stage.CONCLUDED and self._allowance.was_charged():
            self._charged_memory, self._charged_clip_norm = chain.memory, self._clip_norm
        else:
            self._charged_memory = {}
        self._stage = _Stage.IDLE

    def _fail(self, error: SentinelError) -> SentinelError:
        """From here on nothing of this round can be released."""
        if isinstance(error, Withheld):
            self._refusal = error
        if self._stage is _Stage.OPEN and self._fault is None:
            refused = broken("a step or batch of the loop was refused")
            self._fault = error if isinstance(error, Withheld) else refused
        return error

    def _forget_batch(self) -> None:
        self._piece = self._sum = None
        self._taps.batch = None
        self._losses.end()
        self._wrapped.clear_gradients()


class PrivateRound:
    """The private training of one round, as its release sees it.

    Guarantees:
        `conclude` answers for the round it was made in and for no other: what it returns is the
        cost of everything that private steps did to `local`, and nothing else had a part in it.

    Edges:
        no step was taken:              `conclude` gives the cost of one, as `first_step`
        a local state of anything else: `conclude` raises PROMISE_NOT_KEPT
        another round was begun since:  `conclude` raises PROMISE_NOT_KEPT
    """

    def __init__(self, training: PrivateTraining, chain: Chain) -> None:
        """Made by `PrivateTraining.begin`."""
        self._training, self._chain = training, chain

    def first_step(self) -> DpSgdEvent:
        """What one step costs."""
        return self._training.first_step()

    def conclude(self, local: Mapping[str, Tensor]) -> tuple[DpSgdEvent, dict[str, Tensor]]:
        """What the steps of the round cost, and the state that they left, which stays as it is.

        Args:
            local: what is about to be released.

        Raises:
            Withheld: PROMISE_NOT_KEPT where `local` is not what private steps alone made of
                the global state.
        """
        return self._training.conclude(self._chain, local)
