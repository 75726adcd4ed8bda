"""Guard: wraps a hospital's training loop; the shell around the release steps."""

from __future__ import annotations

import datetime as dt
import enum
import functools
import json
import math
import operator
import os
import secrets
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import nn

from sentinel.audit import AlertEvent, Alerts, RoundAborted
from sentinel.chunks import few_threads
from sentinel.door import Door
from sentinel.durable import storage
from sentinel.errors import MisuseError, SentinelError, Withheld, unforeseen
from sentinel.house import House
from sentinel.mechanism import SystemEntropy
from sentinel.policy import LoadedPolicy, load_policy
from sentinel.policy.schema import NUM_EXAMPLES
from sentinel.release import Decided, OpenRound, Released, release
from sentinel.releases import RoundKey
from sentinel.state import StateFolder
from sentinel.terms import Reason
from sentinel.update import (
    Kind,
    State,
    check_structure,
    model_digest,
    require_state,
    shares_storage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import TextIO

    import torch

    from sentinel.detection import Inspection

_LARGEST_NUMBER = 2**53


class Guard:
    """Stands between a training loop and the server.

    Example:
        >>> guard = Guard(policy="tabular-ehr", state_dir=folder)       # doctest: +SKIP
        >>> with guard.round(1, global_state, model, patients=212) as rnd:   # doctest: +SKIP
        ...     train(model, loader)
        >>> send(rnd.release())                                         # doctest: +SKIP

    Guarantees:
        - A round is released once: asked again, also after a crash, it gives the stored bytes.
        - Every error withholds. Whatever is released was charged and recorded before.
        - Level L0: the guard runs inside the training process. It protects honest training code
          against the server; it does not hold against training code that wants out.
    """

    def __init__(  # noqa: PLR0913 - each names one thing that a site decides
        self,
        policy: str | Path | LoadedPolicy,
        state_dir: str | Path | None = None,
        *,
        federation: str = "default",
        run: str = "default",
        dataset: str | None = None,
        unsafe_skip_inspection: bool = False,
        alerts: TextIO | None = None,
    ) -> None:
        """Open the state and read the policy.

        Args:
            policy: name of a shipped policy, path of a policy file, or a loaded policy.
            state_dir: folder of ledger, log and releases; SENTINEL_STATE_DIR or the user's state
                folder where left out.
            federation: who is trained with.
            run: which job; a new job needs a new run, since its round numbers begin again.
            dataset: repeats the policy's dataset, to be sure; another name is refused.
            unsafe_skip_inspection: train on whatever arrives. For measurements of what sanitizing
                does alone; recorded as a weakened control.
            alerts: where alerts are written; standard error where left out.

        Raises:
            PolicyError: the policy cannot be used.
            MisuseError: an argument that cannot be right.
            Withheld: the state folder, ledger or log cannot be trusted, or a detector is missing.
        """
        self._federation = _require_name(federation, "federation")
        self._run = _require_name(run, "run")
        loaded = _require_policy(policy)
        _require_dataset(loaded, dataset)
        told = Alerts(alerts)
        try:
            self._state = StateFolder(state_dir)
            house = House(
                policy=loaded,
                ledger=self._state.ledger,
                log=self._state.log,
                releases=self._state.releases,
                entropy=SystemEntropy,
                clock=lambda: dt.datetime.now(dt.UTC),
                process=secrets.token_hex(16),
            )
            self._door = Door(house, self._state, told, inspects=not unsafe_skip_inspection)
            self._door.start()
        except Withheld as error:
            told.send(AlertEvent.GUARD_NOT_STARTED, reason=error.reason)
            raise

    @property
    def policy(self) -> LoadedPolicy:
        """The policy that every round of this guard is under."""
        return self._door.house.policy

    def round(
        self,
        number: int,
        global_state: Mapping[str, torch.Tensor],
        model: nn.Module | None = None,
        *,
        patients: int | None = None,
    ) -> Round:
        """A round, to be entered with `with`.

        Args:
            number: of the round, from 0; federation, run and number name it.
            global_state: names to tensors, as received from the server.
            model: loaded with the global state on entry, and read at release. Left out, the local
                state is handed to `release`.
            patients: how many stand behind the update, where the policy has a minimum.

        Raises:
            MisuseError: an argument that cannot be right.
        """
        number = _require_whole(number, "The number of a round")
        if patients is not None:
            patients = _require_whole(patients, "patients")
        if model is not None and not isinstance(model, nn.Module):
            raise MisuseError("model must be a torch.nn.Module; pass the model itself.")
        require_state(global_state, "global_state")
        key = RoundKey(self._federation, self._run, number)
        return Round(self._door, key, global_state, model, patients)

    def protect(self, train: Callable[..., Mapping[str, torch.Tensor]]) -> Callable[..., State]:
        """Wrap a function `(global_state, ...) -> local_state` so that it returns what may leave.

        The wrapped function takes two keywords of its own: `round_number` (the next number of the
        run where left out: a global model seen last keeps its number) and `patients`. It is handed
        a copy of the global state, so that it may train in place.
        """

        @functools.wraps(train)
        def guarded(
            global_state: Mapping[str, torch.Tensor],
            *args: Any,  # noqa: ANN401 - whatever the wrapped function takes
            round_number: int | None = None,
            patients: int | None = None,
            **kwargs: Any,  # noqa: ANN401 - as above
        ) -> State:
            require_state(global_state, "global_state")
            number = self._next_number(global_state) if round_number is None else round_number
            with self.round(number, global_state, patients=patients) as rnd:
                local = train(
                    {name: value.detach().clone() for name, value in global_state.items()},
                    *args,
                    **kwargs,
                )
            return rnd.release(local)

        return guarded

    def _next_number(self, global_state: Mapping[str, torch.Tensor]) -> int:
        """The number after the last one; the last one again for the same global model."""
        counter = self._state.counter(self._federation, self._run)
        digest = model_digest(global_state)
        with storage(), counter.locked():
            number, seen = _counted(counter.read())
            if seen != digest:
                number += 1
                counter.write(json.dumps([number, digest]))
        return number


class _Stage(enum.Enum):
    """Where a round stands; what may follow is in `Round`."""

    NEW = "not entered yet"
    OPEN = "open"
    TRAINED = "trained, not released yet"
    RELEASED = "released"
    WITHHELD = "withheld"
    REFUSED = "refused"
    ABORTED = "aborted by an error in its block"


class Round:
    """One round: new, open, trained, and then released, withheld or aborted; wrong order raises."""

    def __init__(
        self,
        door: Door,
        key: RoundKey,
        global_state: Mapping[str, torch.Tensor],
        model: nn.Module | None,
        patients: int | None,
    ) -> None:
        """Made by `Guard.round`."""
        self.key = key
        self.patients = patients
        self._door = door
        self._global_state = global_state
        self._model = model
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
        self._require(_Stage.NEW)
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
        """
        self._require(_Stage.OPEN, _Stage.TRAINED, _Stage.RELEASED)
        if kind not in ("weights", "delta"):
            raise MisuseError('kind must be "weights" or "delta".')
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

    def metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of `values` that the policy lets leave.

        Under a promise `num-examples` is the public figure of the policy, whatever is passed.

        Raises:
            MisuseError: the round has not been released, or a metric that may leave is no finite
                number.
        """
        self._require(_Stage.RELEASED)
        policy = self._door.house.rules
        allowed = {
            name: _require_number(value, name)
            for name, value in values.items()
            if name in policy.limits.metrics
        }
        if policy.privacy is not None and NUM_EXAMPLES in allowed:
            public = policy.privacy.patients
            return {} if public is None else {NUM_EXAMPLES: public}
        return allowed

    def _open(self, base: Mapping[str, torch.Tensor]) -> OpenRound:
        """Gate, inspect, judge, load."""
        door, model = self._door, self._model
        if model is not None:
            _require_fit(base, model)
        self._digest = digest = door.gate(self.key, base, self.patients)
        self._inspection = door.inspect(self.key, base, model)
        suspicion, unhealthy = door.admit(self.key, digest, self._inspection)
        if model is not None:
            model.load_state_dict(dict(base))
        return OpenRound(
            key=self.key,
            base=base,
            global_model=digest,
            buffers=() if model is None else _buffers(model),
            patients=self.patients,
            suspicion=suspicion,
            unhealthy=unhealthy,
            measure=door.measure(model, base),
        )

    def _own_base(self) -> Mapping[str, torch.Tensor]:
        """The global state; a copy where training the model would change it."""
        state = self._global_state
        if self._model is None or not shares_storage(state, self._model.state_dict(keep_vars=True)):
            return dict(state)
        return {name: value.detach().clone() for name, value in state.items()}

    def _local(
        self, local_state: Mapping[str, torch.Tensor] | None
    ) -> Callable[[], Mapping[str, torch.Tensor]]:
        if self._model is not None:
            if local_state is not None:
                raise MisuseError("The round has a model; release() takes no local state.")
            return self._model.state_dict
        if local_state is None:
            raise MisuseError("The round has no model; hand the local state to release().")
        require_state(local_state, "local_state")
        return lambda: local_state

    def _require(self, *stages: _Stage) -> None:
        if self._stage not in stages:
            expected = " or ".join(stage.value for stage in stages)
            raise MisuseError(f"The round is {self._stage.value}; expected: {expected}.")

    def _refuse(self, reason: Reason) -> None:
        self._stage = _Stage.REFUSED
        self._door.refuse(self.key, self._digest, self._inspection, reason)

    def _tell(self, event: AlertEvent, reason: Reason) -> None:
        verdict = None if self._inspection is None else self._inspection.verdict
        self._door.tell(event, self.key, reason, verdict)


def connect(address: str | Path) -> NoReturn:
    """Reach the agent of this site over its socket.

    Raises:
        MisuseError: always, in this version: there is no agent yet.
    """
    raise MisuseError(
        f"There is no agent to connect to at {address}: this version has the embedded mode only. "
        "Use sentinel.Guard(policy=..., state_dir=...)."
    )


def _require_name(name: str, what: str) -> str:
    if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():  # noqa: PLR2004 - a generous line
        raise MisuseError(f"{what} must be a printable name of 1 to 200 characters.")
    return name


def _require_dataset(loaded: LoadedPolicy, dataset: str | None) -> None:
    if dataset is not None and dataset != loaded.policy.dataset:
        raise MisuseError(
            f"The policy is for the dataset {loaded.policy.dataset!r}; code may only repeat that "
            "name. Change the policy file to name another."
        )


def _require_policy(policy: str | Path | LoadedPolicy) -> LoadedPolicy:
    if isinstance(policy, LoadedPolicy):
        return policy
    if isinstance(policy, str | os.PathLike):
        return load_policy(policy)
    raise MisuseError(
        "policy must be the name of a shipped policy, the path of a policy file, or what "
        "load_policy gave."
    )


def _require_whole(value: object, what: str) -> int:
    """A whole number from 0, also from numpy; a boolean or a decimal number is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise MisuseError(f"{what} must be a whole number; convert it with int(...).")
    number = operator.index(value)
    if not 0 <= number <= _LARGEST_NUMBER:
        raise MisuseError(f"{what} must be a number from 0 to 2**53.")
    return number


def _require_number(value: object, name: str) -> float:
    """A finite number; also of numpy, and a tensor of one value."""
    refusal = MisuseError(f"Metric {name!r} must be a finite number.")
    if isinstance(value, bool | str):
        raise refusal
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise refusal from None
    if not math.isfinite(number):
        raise refusal
    return value if isinstance(value, int) else number


def _require_fit(base: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Refuse a global model that this site's model cannot take, before anything is loaded."""
    own = model.state_dict()
    check_structure(base, own)
    if all(name.startswith("module.") for name in own) and not any(
        name.startswith("module.") for name in base
    ):
        raise MisuseError("The model is wrapped (DataParallel?); pass model.module to the round.")


def _buffers(model: nn.Module) -> list[str]:
    """Every name of every buffer: one that several modules share has several."""
    return [name for name, _ in model.named_buffers(remove_duplicate=False)]


def _counted(text: str | None) -> tuple[int, str]:
    """Number and digest of the last counted round."""
    if text is None:
        return -1, ""
    try:
        number, seen = json.loads(text)
        return int(number), str(seen)
    except (ValueError, TypeError):
        raise Withheld(
            Reason.STATE_UNSAFE,
            "The counter of rounds cannot be read; put the state folder back as it was, or number "
            "the rounds yourself with round_number=.",
        ) from None
