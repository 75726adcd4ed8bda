"""Guard: wraps a hospital's training loop; the shell around the release steps."""

from __future__ import annotations

import datetime as dt
import functools
import json
import secrets
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from torch import nn

from sentinel.arguments import require_dataset, require_name, require_policy, require_whole
from sentinel.audit import AlertEvent, Alerts
from sentinel.door import Door
from sentinel.dpsgd import wrap
from sentinel.durable import storage
from sentinel.errors import MisuseError, Withheld
from sentinel.house import House
from sentinel.mechanism import SystemEntropy
from sentinel.releases import RoundKey
from sentinel.round import Round
from sentinel.state import StateFolder
from sentinel.terms import Reason
from sentinel.trainee import OwnModel, require_one_process
from sentinel.update import State, model_digest, require_state

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from pathlib import Path
    from typing import TextIO

    import torch
    from torch.utils.data import DataLoader

    from sentinel.dpsgd import PrivateLoader, PrivateTraining
    from sentinel.policy import LoadedPolicy
    from sentinel.trainee import Trainee


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

    Edges:
        an argument that cannot be right: MisuseError; nothing is opened
        state that cannot be trusted:     Withheld, told in an alert
        several guards on one folder:     each operation is locked; one ledger, one log
        killed at any instant:            whatever left was charged and recorded
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
        self._federation = require_name(federation, "federation")
        self._run = require_name(run, "run")
        loaded = require_policy(policy)
        require_dataset(loaded, dataset)
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
                memory=lambda key: self._state.memory(key, loaded.policy.dataset),
            )
            self._door = Door(house, self._state, told, inspects=not unsafe_skip_inspection)
            self._private: dict[nn.Module, PrivateTraining] = {}
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

        Guarantees:
            Nothing is read of the update, charged or recorded before the round is entered.

        Edges:
            a number below 0, beyond 2^53, or none at all: MisuseError
            `patients` that is no whole number:            MisuseError
            a whole number of numpy:                       that number
            a global state with no entry, or none at all:  MisuseError
            a model that is no module:                     MisuseError
            shards of a model:                             MisuseError: `sentinel.distributed.Guard`
        """
        number = require_whole(number, "The number of a round")
        if patients is not None:
            patients = require_whole(patients, "patients")
        if model is not None and not isinstance(model, nn.Module):
            raise MisuseError("model must be a torch.nn.Module; pass the model itself.")
        require_state(global_state, "global_state")
        trainee = None if model is None else OwnModel(model)
        private = None if model is None else self._private.get(model)
        return self.round_of(number, global_state, trainee, patients, private)

    def round_of(
        self,
        number: int,
        global_state: Mapping[str, torch.Tensor],
        trainee: Trainee | None,
        patients: int | None,
        private: PrivateTraining | None = None,
    ) -> Round:
        """A round of whatever is trained; arguments that `round` would refuse are not checked."""
        key = RoundKey(self._federation, self._run, number)
        return Round(self._door, key, global_state, trainee, patients, private)

    def private(  # noqa: PLR0913 - each names one thing that the loop has
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        *,
        patients: Iterable[Hashable] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_records: int | None = None,
    ) -> tuple[nn.Module, torch.optim.Optimizer, PrivateLoader]:
        """Make a training loop private per patient or per record (DP-SGD), as the policy promises.

        The loop stays as it is; it trains inside `with guard.round(...)`, on the loader that this
        gives, with one `optimizer.step()` for each batch. See docs/private-training.md.

        Args:
            model: changed in place, by hooks alone; BatchNorm and other layers that mix records are
                refused, with the replacement named.
            optimizer: fresh, of torch.optim, over the model's trainable parameters.
            loader: a DataLoader over a data set with indices; batches are drawn anew from it.
            patients: whose each record is: one id for each index of the data set. Only grouped by,
                never kept or logged. Left out under unit "record".
            loss_reduction: whether the loss is the mean or the sum over a batch.
            max_records: most records given out at once, to bound memory; the step then comes with
                the last piece of a batch.

        Returns:
            The same model, the same optimizer, and a loader of Poisson-sampled batches.

        Raises:
            MisuseError: a model, optimizer or loader that cannot be made private, and what to do.
            PolicyError: the policy lacks a figure, such as `privacy.batch`.

        Guarantees:
            Rounds of this model are released only as the private steps left it, every step charged
            (see `sentinel.dpsgd.PrivateTraining`). Sampling and noise rest on public figures and on
            the system's entropy.

        Edges:
            a policy that promises nothing, or for a site: MisuseError
            the same model once more:                      private by the new arguments alone; the
                                                           budget goes on
            anything that is refused:                      model and optimizer are as they were
            a process group of several ranks:              MisuseError
        """
        require_one_process()
        if model in self._private:
            self._private.pop(model).remove()
        training, batches = wrap(
            self._door.house,
            model,
            optimizer,
            loader,
            patients=patients,
            loss_reduction=loss_reduction,
            max_records=max_records,
        )
        self._private[model] = training
        return model, optimizer, batches

    def protect(self, train: Callable[..., Mapping[str, torch.Tensor]]) -> Callable[..., State]:
        """Wrap a function `(global_state, ...) -> local_state` so that it returns what may leave.

        The wrapped function takes two keywords of its own: `round_number` (the next number of the
        run where left out: a global model seen last keeps its number) and `patients`. It is handed
        a copy of the global state, so that it may train in place.

        Guarantees:
            What the wrapped function returns went through `Round.release`, or an error is raised.

        Edges:
            the same global model again:         the same number, so the stored bytes
            a number given by the caller:        that one; the counter stays
            a function that raises:              the round is aborted, and its error is seen
            a function that gives no state dict: MisuseError
            a counter that cannot be read:       Withheld (STATE_UNSAFE)
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


def connect(address: str | Path) -> NoReturn:
    """Reach the agent of this site over its socket.

    Raises:
        MisuseError: always, in this version: there is no agent yet.
    """
    raise MisuseError(
        f"There is no agent to connect to at {address}: this version has the embedded mode only. "
        "Use sentinel.Guard(policy=..., state_dir=...)."
    )


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
