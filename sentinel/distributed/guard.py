"""Guard: what every rank of a process group makes, so that one of them guards for all."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from typing import TYPE_CHECKING, NoReturn

from torch import nn

from sentinel import guard as single
from sentinel.arguments import require_policy, require_whole
from sentinel.distributed.peers import Peers, Standing, Step
from sentinel.distributed.round import Round
from sentinel.distributed.spread import SpreadModel
from sentinel.errors import MisuseError, SentinelError, Withheld
from sentinel.terms import Reason
from sentinel.trainee import require_one_process
from sentinel.update import require_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import TextIO

    import torch
    import torch.distributed as dist

    from sentinel.policy import LoadedPolicy

_PATIENCE = dt.timedelta(minutes=30)


class Guard:
    """Stands between a training loop of several processes and the server.

    Every rank makes it, and every rank makes the same calls:

        >>> guard = Guard(policy="tabular-ehr", state_dir=folder)         # doctest: +SKIP
        >>> with guard.round(1, global_state, model, patients=212) as rnd:   # doctest: +SKIP
        ...     train(model, loader)
        >>> state = rnd.release()                                           # doctest: +SKIP
        >>> if state is not None: send(state)                               # doctest: +SKIP

    Guarantees:
        What `sentinel.Guard` guarantees, since the leader has one and nothing leaves but through
        it; and of several processes all release, or none does.

    Edges:
        ranks name another policy, run or round:     all withhold: RANKS_DISAGREE
        ranks have another global state or model:    all withhold: RANKS_DISAGREE
        replicas differ after training:              all withhold: RANKS_DISAGREE
        a rank raises in its block:                  it sees its error, the others withhold:
                                                     RANK_LOST
        a rank dies, at any point:                   the living ranks withhold: RANK_LOST, at once
        a rank hangs:                                the others withhold after `timeout`: RANK_LOST
        the leader dies after it recorded a release: the job, started again, gives the stored bytes
                                                     to all ranks
        a rank is lost:                              the guard is used up on every rank; the job
                                                     starts again
        the leader cannot start:                     no rank does
        no process group:                            MisuseError, which names `sentinel.Guard`
    """

    def __init__(  # noqa: PLR0913 - each names one thing that a site decides
        self,
        policy: str | Path | LoadedPolicy,
        state_dir: str | Path | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: dt.timedelta = _PATIENCE,
        federation: str = "default",
        run: str = "default",
        dataset: str | None = None,
        unsafe_skip_inspection: bool = False,
        alerts: TextIO | None = None,
    ) -> None:
        """Connect the ranks, and open the state on the leader.

        Args:
            policy: as in `sentinel.Guard`; every rank names the same one.
            state_dir: as in `sentinel.Guard`; only the leader, the first rank of the group, opens
                it.
            group: the ranks that train one model together; all of them where left out.
            timeout: how long a rank may be behind the others before it counts as lost.
            federation: who is trained with.
            run: which job.
            dataset: repeats the policy's dataset, to be sure.
            unsafe_skip_inspection: as in `sentinel.Guard`.
            alerts: where the leader writes alerts.

        Raises:
            PolicyError: the policy cannot be used.
            MisuseError: an argument that cannot be right, or no process group.
            Withheld: as in `sentinel.Guard`; RANK_LOST where another rank cannot start;
                RANKS_DISAGREE where they were not given the same.
        """
        self._peers = Peers(group, timeout)
        self._led: single.Guard | None = None
        self._names = [federation, run]
        failure: SentinelError | None = None
        terms = b""
        try:
            self._policy = require_policy(policy)
            terms = _digest([self._policy.digest, federation, run, dataset, unsafe_skip_inspection])
            if self._peers.leads:
                self._led = single.Guard(
                    self._policy,
                    state_dir,
                    federation=federation,
                    run=run,
                    dataset=dataset,
                    unsafe_skip_inspection=unsafe_skip_inspection,
                    alerts=alerts,
                )
        except SentinelError as error:
            failure = error
        _start_together(self._peers, terms, failure)

    @property
    def policy(self) -> LoadedPolicy:
        """The policy that every round of this guard is under."""
        return self._policy

    def round(
        self,
        number: int,
        global_state: Mapping[str, torch.Tensor] | None,
        model: nn.Module,
        *,
        patients: int | None = None,
        architecture: nn.Module | None = None,
    ) -> Round:
        """A round, to be entered with `with` on every rank.

        Args:
            number: of the round, from 0.
            global_state: names to whole tensors, as received from the server. A rank that has not
                received it passes None; the leader needs it, and every rank gets its values.
            model: this rank's replica (DistributedDataParallel or not) or shards (`fully_shard`).
            patients: how many stand behind the update of all ranks together.
            architecture: of a sharded model, the same model unsharded, for the probes of the
                inspection and of the sensitivity score: made under `torch.device("meta")` it costs
                no memory. Without it, both go by the weights alone.

        Raises:
            MisuseError: an argument that cannot be right.

        Guarantees:
            Nothing crosses ranks, and nothing is charged or recorded, before the round is entered.

        Edges:
            a number, patients or model that cannot be right: MisuseError
            no global state on the leader:                    MisuseError
            no global state on another rank:                  it gets the leader's values
        """
        number = require_whole(number, "The number of a round")
        if patients is not None:
            patients = require_whole(patients, "patients")
        for given in (model, architecture):
            if given is not None and not isinstance(given, nn.Module):
                raise MisuseError("model must be a torch.nn.Module; pass the model itself.")
        if global_state is not None:
            require_state(global_state, "global_state")
        spread = SpreadModel(model, architecture, self._peers)
        led = None
        if self._led is not None:
            if global_state is None:
                raise MisuseError("The leading rank needs the global state; pass it there.")
            led = self._led.round_of(number, global_state, spread, patients)
        terms = _digest([*self._names, number, patients])
        return Round(self._peers, spread, terms, global_state, led)

    def private(self, *_: object, **__: object) -> NoReturn:
        """Refuse: private training counts on one process that sees every batch.

        Raises:
            MisuseError: always, in this version.
        """
        require_one_process()
        raise MisuseError(
            "Private training (DP-SGD) is not behind this guard; a group of one rank uses "
            "sentinel.Guard."
        )


def _start_together(peers: Peers, terms: bytes, failure: SentinelError | None) -> None:
    """Start on all ranks or on none."""
    standing = Standing.READY if failure is None else Standing.FAILED
    try:
        said = peers.exchange(Step.START, terms, standing=standing)
    except Withheld:
        if failure is not None:
            raise failure from None
        raise
    if failure is not None:
        raise failure
    failed = [rank for rank, message in enumerate(said) if message.standing is Standing.FAILED]
    if failed:
        raise Withheld(
            Reason.RANK_LOST,
            f"The guard could not start on rank {failed[0]}; see the error of that rank.",
        )
    if len({message.digests[0] for message in said}) != 1:
        raise Withheld(
            Reason.RANKS_DISAGREE,
            "The ranks were not given the same policy, federation, run, dataset or inspection; "
            "pass the same on every rank.",
        )


def _digest(content: list[object]) -> bytes:
    return hashlib.sha256(json.dumps(content, default=str).encode()).digest()
