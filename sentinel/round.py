"""Round: one round of federated learning at this site, from the global model to the release."""

from __future__ import annotations

import contextlib
import enum
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch

from sentinel.arguments import require_kind, require_number, require_stage
from sentinel.audit import AlertEvent, RoundAborted, UpdateWithheld
from sentinel.crew import few_threads
from sentinel.durable import storage
from sentinel.errors import MisuseError, SentinelError, Withheld, unforeseen
from sentinel.policy.schema import NUM_EXAMPLES
from sentinel.release import Decided, OpenRound, Released, release
from sentinel.update import Kind, State, require_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from sentinel.detection import Inspection
    from sentinel.door import Door
    from sentinel.dpsgd import PrivateTraining
    from sentinel.releases import RoundKey
    from sentinel.terms import Reason
    from sentinel.trainee import Trainee


class _Stage(enum.Enum):
    """Where a round stands; what may follow is in `Round`."""

    NEW = "not entered yet"
    OPEN = "open"
    TRAINED = "trained"
    RELEASED = "released"
    WITHHELD = "withheld"
    REFUSED = "refused"
    ABORTED = "aborted by an error in its block"


class Round:
    """One round: new, open, trained, and then released, withheld or aborted; wrong order raises.

    Guarantees:
        What leaves is given by `release` alone, after it was charged and recorded. Entering looks
        at the global model, its history, the policy, the account and `patients`: never at an
        update.

    Edges:
        entered twice, or released before it is entered: MisuseError
        a global model that the policy refuses:          RoundRefused; the model is not loaded
        a global state that does not fit the model:      Withheld (STRUCTURE_MISMATCH); the model is
                                                         as it was
        an exception in the block:                       recorded; nothing can be released any more.
                                                         One by which its own private training
                                                         withheld: told too, with its reason
        `withhold` before it is entered:                 REFUSED; it cannot be entered
        `withhold` of a round that has ended:            it stays as it was
        `withhold` of an open round:                     WITHHELD; `release` raises
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is one part of a round
        self,
        door: Door,
        key: RoundKey,
        global_state: Mapping[str, torch.Tensor],
        trainee: Trainee | None,
        patients: int | None,
        private: PrivateTraining | None = None,
    ) -> None:
        """Made by `Guard.round`."""
        self.key = key
        self.patients = patients
        self._door = door
        self._global_state = global_state
        self._trainee = trainee
        self._private = private
        self._stage = _Stage.NEW
        self._digest: str | None = None
        self._opened: OpenRound | None = None
        self._inspection: Inspection | None = None
        self._released: Released | None = None

    @property
    def inspection(self) -> Inspection | None:
        """What the inspection found; None before entry, or where inspection is switched off."""
        return self._inspection

    @property
    def replayed(self) -> bool:
        """Whether the release gave the stored bytes of an earlier one."""
        return self._released is not None and self._released.replayed

    @property
    def decided(self) -> Decided | None:
        """Evidence and plan of the release, for the screen; None before it, and for a replay."""
        return None if self._released is None else self._released.decided

    def __enter__(self) -> Self:
        """Inspect the global model and load it.

        Raises:
            RoundRefused: do not train on it.
            Withheld: whatever would be trained could not be released.
        """
        require_stage(self._stage, _Stage.NEW)
        try:
            with storage():
                base = self._own_base()
                with few_threads(base):
                    self._opened = self._open(base)
        except Withheld as error:
            self._refuse(error.reason)
            raise
        except SentinelError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the round is not opened
            refusal = unforeseen(error)
            self._refuse(refusal.reason)
            raise refusal from None
        self._stage = _Stage.OPEN
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End training; an exception in the block aborts the round."""
        if self._stage is not _Stage.OPEN:
            return
        if kind is None:
            self._stage = _Stage.TRAINED
            return
        refusal = None if self._private is None else self._private.end(error)
        if refusal is not None:
            self.withhold(refusal.reason)
            return
        self._stage = _Stage.ABORTED
        try:
            self._door.house.write(RoundAborted, round=self.key.digest)
        except Withheld as unwritten:  # the error of the block is the one to be seen
            self._tell(AlertEvent.UPDATE_WITHHELD, unwritten.reason)

    def release(
        self, local_state: Mapping[str, torch.Tensor] | None = None, *, kind: Kind = "weights"
    ) -> State:
        """Sanitize the update and give what may leave.

        Args:
            local_state: after training; only where the round was opened without a model.
            kind: "weights" (global + sanitized delta) or "delta".

        Returns:
            A state dict with the global state's names, shapes and dtypes, in memory of its own.

        Raises:
            Withheld: nothing leaves; `.reason` says why.
            MisuseError: wrong order, or a local state where none (or one) was expected.

        Guarantees:
            The bounds and the noise of the plan hold for what is returned. Under a promise its own
            clip and noise come first, fixed before the update was seen, and the plan rests on what
            they leave. Once the update was released, or refused for its values, the local state is
            not looked at again under this number.

        Edges:
            an update of zeros:                         released like any other, with all its noise
            a difference that is NaN, Inf or too large: NOT_FINITE, charged and final
            an empty entry:                             a parameter of no values
            a 0-d entry:                                a parameter of one value, inside the norm
            integers, booleans, statistics:             the global model's values go back
            float16 and bfloat16:                       worked on in float32 or wider, cast once
            tied entries:                               one parameter, counted and noised once
            an unknown, missing or reshaped entry:      STRUCTURE_MISMATCH, by name
            a global state changed in training:         GLOBAL_MODEL_CHANGED
            released before:                            the stored bytes, whatever the local state
                                                        is
            released before in another `kind`:          MisuseError
            an error that nobody foresaw:               INTERNAL_ERROR, without its text
        """
        require_stage(self._stage, _Stage.OPEN, _Stage.TRAINED, _Stage.RELEASED)
        require_kind(kind)
        local = self._local(local_state)
        assert self._opened is not None  # noqa: S101 - follows from the stage
        try:
            self._released = release(self._door.house, self._opened, local, kind)
        except Withheld as error:
            self._stage = _Stage.WITHHELD
            self._tell(AlertEvent.UPDATE_WITHHELD, error.reason)
            raise
        self._stage = _Stage.RELEASED
        return self._released.state

    def probe(self, records: torch.Tensor) -> None:
        """Show the guard some records of this round's training, to look for them in the update.

        Where nothing is promised, this sharpens the sensitivity score: at release the update is
        read as a server would (linear read-out of the first dense layer), and where more of these
        records come back than was estimated, that share is the score. Of several probes the
        largest share counts.

        Args:
            records: [n, ...], inputs as the model takes them; the first 256 are looked for.

        Raises:
            MisuseError: the policy promises something, the round has no model, or the model cannot
                be probed with these records.

        Guarantees:
            The score is never lowered. Records are read in this process alone, by a copy of the
            global model; nothing of them is kept but for the release, written or logged. Under a
            promise none is looked at.

        Edges:
            before the round is entered, or after its release: MisuseError
            the layer does not leave:                          the score is as without
        """
        require_stage(self._stage, _Stage.OPEN, _Stage.TRAINED)
        assert self._opened is not None  # noqa: S101 - follows from the stage
        model = None if self._trainee is None else self._trainee.architecture
        if model is None:
            raise MisuseError("A probe needs the model; open the round with it.")
        if not isinstance(records, torch.Tensor) or records.ndim < 1 or not len(records):
            raise MisuseError("A probe takes a tensor of inputs (records, ...), one at least.")
        opened = self._opened
        measure = self._door.probed(opened.measure, model, opened.base, records)
        self._opened = replace(opened, measure=measure)

    def withhold(self, reason: Reason) -> None:
        """Close the round from outside; recorded and told. A round that has ended stays as it is.

        What was released before stays in the store: another round of the same number gives it.
        """
        if self._stage is _Stage.NEW:
            self._refuse(reason)
        elif self._stage in (_Stage.OPEN, _Stage.TRAINED, _Stage.RELEASED):
            self._stage = _Stage.WITHHELD
            with contextlib.suppress(Withheld):  # a log that cannot be written hides no reason
                self._door.house.write(UpdateWithheld, round=self.key.digest, reason=reason)
            self._tell(AlertEvent.UPDATE_WITHHELD, reason)

    def metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of `values` that the policy lets leave.

        Under a promise `num-examples` is the public figure of the policy, whatever is passed.

        Raises:
            MisuseError: the round has not been released, or a metric that may leave is no finite
                number.

        Guarantees:
            Only names that the policy lists leave; under a promise only its own public figure.

        Edges:
            a name that the policy does not list: dropped
            before the release:                   MisuseError
            NaN, Inf or no number:                MisuseError
            `num-examples` under a promise:       the public figure, or left out where there is none
        """
        require_stage(self._stage, _Stage.RELEASED)
        policy = self._door.house.rules
        allowed = {
            name: require_number(value, name)
            for name, value in values.items()
            if name in policy.limits.metrics
        }
        if policy.privacy is not None and NUM_EXAMPLES in allowed:
            public = policy.privacy.patients
            return {} if public is None else {NUM_EXAMPLES: public}
        return allowed

    def _open(self, base: Mapping[str, torch.Tensor]) -> OpenRound:
        """Gate, inspect, judge, load."""
        door, trainee = self._door, self._trainee
        model = None if trainee is None else trainee.architecture
        if trainee is not None:
            trainee.require_fit(base)
        least = None if self._private is None else self._private.first_step()
        self._digest = digest = door.gate(self.key, base, self.patients, least)
        self._inspection = door.inspect(self.key, base, model)
        suspicion, unhealthy = door.admit(self.key, digest, self._inspection)
        if trainee is not None:
            trainee.load(base)
        private = None if self._private is None else self._private.begin(self.key, base)
        return OpenRound(
            key=self.key,
            base=base,
            global_model=digest,
            buffers=() if trainee is None else trainee.buffers,
            patients=self.patients,
            suspicion=suspicion,
            unhealthy=unhealthy,
            measure=door.measure(model, base),
            private=private,
        )

    def _own_base(self) -> Mapping[str, torch.Tensor]:
        """The global state; a copy where training the model would change it."""
        state = self._global_state
        if self._trainee is None or not self._trainee.shares(state):
            return dict(state)
        return {name: value.detach().clone() for name, value in state.items()}

    def _local(
        self, local_state: Mapping[str, torch.Tensor] | None
    ) -> Callable[[], Mapping[str, torch.Tensor]]:
        if self._trainee is not None:
            if local_state is not None:
                raise MisuseError("The round has a model; release() takes no local state.")
            return self._trainee.state
        if local_state is None:
            raise MisuseError("The round has no model; hand the local state to release().")
        require_state(local_state, "local_state")
        return lambda: local_state

    def _refuse(self, reason: Reason) -> None:
        self._stage = _Stage.REFUSED
        self._door.refuse(self.key, self._digest, self._inspection, reason)

    def _tell(self, event: AlertEvent, reason: Reason) -> None:
        verdict = None if self._inspection is None else self._inspection.verdict
        self._door.tell(event, self.key, reason, verdict)
