"""Scenarios of rounds that end as they should, or are refused; each runs on every rank at once."""

from __future__ import annotations

import datetime as dt
import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from ranks import (
    FOLLOWS,
    MODELS,
    NOISY,
    PARTS,
    PLAIN,
    SITE,
    Net,
    Site,
    die,
    one_round,
    outcome,
    packed,
    state_of,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

import sentinel
from sentinel.distributed.peers import Order, Peers
from sentinel.distributed.spread import SpreadModel
from sentinel.mechanism import SystemEntropy
from sentinel.state import StateFolder

if TYPE_CHECKING:
    from pathlib import Path


def same_as_one_process(site: Site, kind: str, text: str = PLAIN) -> dict[str, object]:
    """The release of all ranks, beside that of a plain guard given the same whole local state."""
    start, model = state_of(), MODELS[kind]()
    with site.guard(text).round(1, start, model) as rnd:
        loaded = whole(model)
        train(model, site.rank)
        model.eval()(torch.zeros(1, 6))  # leaves the last group of shards put together
    out = rnd.release(everywhere=True)
    local = whole(model)
    assert out is not None
    expected = None
    if site.rank == 0:
        path = site.folder / "plain.toml"
        path.write_text(text)
        path.chmod(0o600)
        single = Net()
        with sentinel.Guard(path, site.folder / "plain").round(1, start, single) as plain:
            single.load_state_dict(local)
        expected = packed(plain.release())
    return {
        "loaded": packed(loaded) == packed(start),
        "trained": not torch.equal(local["last.weight"], start["last.weight"]),
        "released": packed(out),
        "expected": expected,
        "order": list(out) == list(start),
        "replayed": rnd.replayed,
    }


def same_as_one_process_by_parts(site: Site, kind: str) -> dict[str, object]:
    """The same, where rules reach single parameters by name."""
    return same_as_one_process(site, kind, PARTS)


def a_bound_that_follows(site: Site, kind: str, rounds: int = 4) -> dict[str, object]:
    """Rounds under `max_norm = "auto"`, and a plain guard given the same whole local states."""
    guard, start = site.guard(FOLLOWS), state_of()
    starts, locals_, released = [], [], []
    for number in range(rounds):
        model = MODELS[kind]()
        with guard.round(number, start, model) as rnd:
            train(model, site.rank, step=5.0 + number)
        out = rnd.release(everywhere=True)
        assert out is not None
        starts.append(start)
        locals_.append(whole(model))
        released.append(packed(out))
        start = out
    dist.barrier()
    seen: dict[str, object] = {"released": released, "bounds": _bounds(site.folder / "state")}
    if site.rank == 0:
        path = site.folder / "plain.toml"
        path.write_text(FOLLOWS)
        path.chmod(0o600)
        plain, expected = sentinel.Guard(path, site.folder / "plain"), []
        for number, (begin, local) in enumerate(zip(starts, locals_, strict=True)):
            single = Net()
            with plain.round(number, begin, single) as rnd:
                single.load_state_dict(local)
            expected.append(packed(rnd.release()))
        seen |= {"expected": expected, "alone": _bounds(site.folder / "plain")}
    return seen


def _bounds(folder: Path) -> list[str]:
    """What is remembered of bounds, as it stands on disk."""
    return [path.read_text() for path in (folder / "history").glob("*.bounds.json")]


def only_the_leader_gets_it(site: Site, kind: str) -> dict[str, object]:
    guard = site.guard()
    rnd = one_round(site, guard, kind=kind)
    return {
        "release": packed(rnd.release()),
        "metrics": sorted(rnd.metrics({"loss": 1.0})),
        "inspected": rnd.inspection is not None,
        "probed": rnd.inspection is not None and rnd.inspection.probed,
        "read": sorted(rnd._model._whole()),  # what taking part in the reading leaves a rank with
    }


def noise_alone(site: Site, kind: str, rounds: int = 20) -> list[bytes | None]:
    """Rounds without training: whatever is released is noise."""
    return _untrained(site, kind, NOISY, rounds)


def noise_of_a_promise_alone(site: Site, kind: str, rounds: int = 20) -> list[bytes | None]:
    """The same under a site's promise, where step 2 makes the noise."""
    return _untrained(site, kind, SITE.replace("20.0", "1000.0"), rounds)


def _untrained(site: Site, kind: str, text: str, rounds: int) -> list[bytes | None]:
    guard, start = site.guard(text), state_of()
    released = []
    for number in range(rounds):
        with guard.round(number, start, MODELS[kind]()) as rnd:
            pass
        released.append(packed(rnd.release(kind="delta", everywhere=True)))
    return released


def charges_under_a_promise(site: Site, kind: str) -> dict[str, object]:
    """How many charges two rounds of two ranks make, and the log."""
    guard = site.guard(SITE)
    for number in (1, 2):
        one_round(site, guard, number, kind).release()
    folder = StateFolder.existing(site.folder / "state")
    dist.barrier()
    return {"charges": folder.ledger.head().seq, "records": site.records()}


def a_budget_that_is_spent(site: Site, kind: str) -> dict[str, object]:
    """One round is paid for, a second is not."""
    guard = site.guard(SITE.replace("20.0", "5.5"))
    first = outcome(one_round(site, guard, 1, kind).release)
    model = MODELS[kind]()
    before = packed(whole(model))
    entered = outcome(guard.round(2, state_of(), model).__enter__)
    charges = StateFolder.existing(site.folder / "state").ledger.head().seq
    same = packed(whole(model)) == before
    return {"first": first, "second": entered, "charges": charges, "untouched": same}


def not_finite_on_one_rank(site: Site, kind: str) -> dict[str, object]:
    """One value of the second rank's shard, or of every replica, has become NaN."""
    guard, model = site.guard(SITE), MODELS[kind]()
    with guard.round(1, state_of(), model) as rnd, torch.no_grad():
        if kind == "ddp" or site.rank == 1:
            _local(next(iter(model.parameters()))).view(-1)[0] = float("nan")
    asked = outcome(lambda: rnd.release(everywhere=True))
    charges = StateFolder.existing(site.folder / "state").ledger.head().seq
    return {"release": asked, "again": outcome(rnd.release), "charges": charges}


def own_streams(_: Site) -> list[bytes]:
    """The first bytes of this rank's entropy, and of its child after a fork."""
    entropy = SystemEntropy()
    mine, childs = bytearray(32), bytearray(32)
    reading, writing = os.pipe()
    if os.fork() == 0:
        entropy.fill(memoryview(childs))
        os.write(writing, childs)
        os._exit(0)
    childs = bytearray(os.read(reading, 32))
    entropy.fill(memoryview(mine))
    return [bytes(mine), bytes(childs)]


def replay(site: Site, kind: str) -> dict[str, object]:
    """Ask twice on one round, and again on a new guard whose replicas have run apart."""
    first = one_round(site, site.guard(NOISY), kind=kind)
    states = [packed(first.release(everywhere=True)), packed(first.release(everywhere=True))]
    model = MODELS[kind]()
    with site.guard(NOISY).round(1, state_of(), model) as again, torch.no_grad():
        next(model.parameters()).add_(site.rank + 1.0)
    states.append(packed(again.release(everywhere=True)))
    return {"states": states, "replayed": again.replayed, "records": site.records()}


def a_subgroup(site: Site) -> object:
    """Ranks 1 and 2 of three train together; rank 1 leads, and rank 0 has nothing to do with it."""
    group = dist.new_group([1, 2])
    if site.rank == 0:
        return outcome(lambda: site.guard(group=group))
    guard = site.guard(group=group)
    model = Net()
    with guard.round(1, state_of() if site.rank == 1 else None, model) as rnd:
        loaded = packed(whole(model)) == packed(state_of())
        with torch.no_grad():
            model.last.weight.add_(0.01)
    return loaded, rnd.release() is not None


def the_global_state_on_the_leader_alone(site: Site, kind: str) -> tuple[bool, bool]:
    model = MODELS[kind]()
    given = state_of() if site.rank == 0 else None
    with site.guard().round(1, given, model) as rnd:
        loaded = packed(whole(model)) == packed(state_of())
        train(model, site.rank)
    return loaded, rnd.release() is not None


def probes_of_a_sharded_model(site: Site) -> tuple[bool, bool]:
    """With and without the unsharded architecture on the meta device."""
    probed = []
    guard = site.guard()
    with torch.device("meta"):
        architecture = Net()
    for number, given in enumerate((None, architecture)):
        with guard.round(number, state_of(), MODELS["fsdp"](), architecture=given) as rnd:
            probed.append(rnd.inspection is not None and rnd.inspection.probed)
    return probed[0], probed[1]


def disagreeing(site: Site, about: str) -> dict[str, object]:
    """Rank 1 is at odds with rank 0; then both agree again."""
    odd = site.rank == 1
    if about == "policy":
        return {"start": outcome(lambda: site.guard(NOISY if odd else PLAIN))}
    differ = {"run": "ab", "federation": "ab", "dataset": (None, "default")}
    if about in differ:
        return {"start": outcome(lambda: site.guard(**{about: differ[about][odd]}))}
    if about == "inspection":
        return {"start": outcome(lambda: site.guard(unsafe_skip_inspection=odd))}
    guard = site.guard()
    number = 2 if odd and about == "number" else 1
    start = state_of(7 if odd and about == "state" else 0)
    patients = 5 if odd and about == "patients" else 4
    model: nn.Module = Net()
    if odd and about == "model":
        model.extra = nn.Linear(2, 2)
    if odd and about == "dtype":
        model.double()
    rnd = guard.round(number, start, model, patients=patients)
    trained = []

    def enter() -> None:
        with rnd:
            trained.append(True)

    first = outcome(enter)
    after = outcome(lambda: one_round(site, guard, 3).release())
    return {
        "first": first,
        "trained": trained,
        "then": outcome(rnd.release),
        "after": after,
        "records": site.records(),
    }


def asking_for_different_things(site: Site, what: str) -> str:
    rnd = one_round(site, site.guard())
    odd = site.rank == 1
    asked = {"kind": "delta" if odd else "weights"} if what == "kind" else {"everywhere": odd}
    return outcome(lambda: rnd.release(**asked))


def replicas_run_apart(site: Site, where: str) -> dict[str, object]:
    """One rank's replica is changed alone: a parameter, or a running statistic."""
    guard, model = site.guard(), Net()
    if where == "replicated DTensor":
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model.first, model.last):
            whole_weight = distribute_tensor(layer.weight.detach(), mesh, [Replicate()])
            layer.weight = nn.Parameter(whole_weight)
    changed = {
        "parameter": lambda: model.first.bias,
        "statistic": lambda: model.norm.running_mean,
        "replicated DTensor": lambda: _local(model.last.weight),
    }
    with guard.round(1, state_of(), model) as rnd, torch.no_grad():
        if site.rank == 1:
            changed[where]().add_(1e-3)
    return {
        "release": outcome(rnd.release),
        "again": outcome(rnd.release),
        "records": site.records(),
        "alerts": site.alerts.getvalue(),
        "after": outcome(lambda: one_round(site, guard, 2).release()),
    }


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def a_replica_of_a_shard_ran_apart(site: Site) -> dict[str, object]:
    """Ranks 0 and 2 hold the same shard; rank 2 changes its own."""
    guard, model = site.guard(), MODELS["hsdp"]()
    with guard.round(1, state_of(), model) as rnd, torch.no_grad():
        if site.rank == 2:
            _local(model.last.weight).add_(1e-3)
    return {"release": outcome(rnd.release), "records": site.records()}


def a_block_raises(site: Site, rank: int, *, inside: bool) -> dict[str, object]:
    """The block of one rank raises; the other releases after, or inside, its own."""
    guard, model = site.guard(), Net()
    seen: dict[str, object] = {}

    def block() -> None:
        with guard.round(1, state_of(), model) as rnd:
            seen["round"] = rnd
            if site.rank == rank:
                raise ValueError("patient 4711 of the loader")
            if inside:
                rnd.release()

    seen["block"] = outcome(block)
    rnd = seen.pop("round")
    return {
        **seen,
        "after": outcome(rnd.release),
        "next": outcome(lambda: one_round(site, guard, 2).release()),
        "records": site.records(),
        "alerts": site.alerts.getvalue(),
    }


def a_release_on_the_leader_alone(site: Site) -> list[str]:
    """The common slip: `if rank == 0: release()`."""
    guard = site.guard()
    rnd = one_round(site, guard)
    first = outcome(rnd.release) if site.rank == 0 else "not asked"
    return [first, outcome(guard.round(2, state_of(), Net()).__enter__)]


def odd_tensors(_: Site) -> bool:
    """Every kind of entry a state may have, from the leader to all."""
    peers = Peers(None, dt.timedelta(seconds=20))
    state = {
        "half": torch.arange(6.0).to(torch.bfloat16).view(2, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "counter": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "not in one piece": torch.arange(12.0).view(3, 4).t(),
    }
    if peers.leads:
        peers.give(state)
        return True
    taken = peers.take()
    return list(taken) == list(state) and all(
        taken[name].dtype == value.dtype and torch.equal(taken[name], value)
        for name, value in state.items()
    )


def a_crafted_model(site: Site) -> dict[str, object]:
    """A global model that is not finite, under a policy that refuses it."""
    text = (
        PLAIN + '\n[[rule]]\nid = "broken"\nwhen = { suspicion = 0.0 }\naction = "refuse-round"\n'
    )
    guard = site.guard(text)
    model = Net()
    before = packed(model.state_dict())
    entered = outcome(guard.round(1, state_of(), model).__enter__)
    return {"entered": entered, "untouched": packed(model.state_dict()) == before}


def withheld_by_a_rule(site: Site) -> str:
    text = PLAIN + '\n[[rule]]\nid = "never"\nwhen = { sensitivity = 0.0 }\n'
    text += 'action = "withhold-update"\n'
    rnd = one_round(site, site.guard(text))
    return outcome(lambda: rnd.release(everywhere=True))


def misuse(site: Site, what: str) -> str:
    if what in ("sharded", "private in one"):
        path = site.folder / f"policy-{site.rank}.toml"
        path.write_text(PLAIN)
        path.chmod(0o600)
        plain = sentinel.Guard(path, site.folder / f"plain-{site.rank}")
        if what == "private in one":
            model = nn.Linear(6, 1)
            rows = DataLoader(TensorDataset(torch.zeros(8, 6)), batch_size=4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return outcome(lambda: plain.private(model, optimizer, rows))
        return outcome(lambda: plain.round(1, state_of(), MODELS["fsdp"]()))
    guard = site.guard()
    if what == "private":
        return outcome(lambda: guard.private(Net(), None, None, patients=[1]))
    if what == "fsdp1":
        wrapped = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
        return outcome(lambda: guard.round(1, state_of(), wrapped))
    if what == "no state":
        return outcome(lambda: guard.round(1, None, Net()))
    return outcome(lambda: guard.round(-1, state_of(), Net()))


def a_leader_that_cannot_start(site: Site) -> str:
    if site.rank == 0:
        (site.folder / "state").write_text("a file in the place of the folder")
    dist.barrier()
    return outcome(site.guard)


def a_rank_dies(site: Site, when: str, rank: int, kind: str) -> dict[str, object]:
    """One rank ends without a word; what the other sees, on this round and the next."""

    def at(moment: str) -> None:
        if site.rank == rank and when == moment:
            die()

    seen: dict[str, object] = {}

    def whole_round() -> None:
        at("before the guard")
        guard = seen["guard"] = site.guard(timeout=4.0 if when == "before the guard" else 20.0)
        model = MODELS[kind]()
        at("before entering")
        if site.rank == rank:
            _doom(when)
        with guard.round(1, state_of(), model) as rnd:
            at("training")
            train(model, site.rank)
        at("before release")
        seen["state"] = packed(rnd.release(everywhere=True))

    seen["round"] = outcome(whole_round)
    guard = seen.pop("guard", None)
    if guard is not None:
        seen["next"] = outcome(guard.round(2, state_of(), Net()).__enter__)
    if (site.folder / "state" / "audit").is_dir():
        seen["records"] = site.records()
    return seen


def _doom(when: str) -> None:
    """Let this rank die inside a step of the protocol."""
    told = Peers.tell

    def tell(self: Peers, order: Order, *more: object) -> None:
        if order is Order.RELEASED:
            die()
        told(self, order, *more)

    moments = {
        "while loading": (Peers, "share", lambda *_: die()),
        "gathering": (SpreadModel, "_whole", lambda _: die()),
        "before the result": (Peers, "tell", tell),
        "before taking the result": (Peers, "take", lambda _: die()),
    }
    if when in moments:
        setattr(*moments[when])


def the_round_again(site: Site, kind: str) -> dict[str, object]:
    rnd = one_round(site, site.guard(), kind=kind)
    state = packed(rnd.release(everywhere=True))
    charges = StateFolder.existing(site.folder / "state").ledger.head().seq
    return {"state": state, "replayed": rnd.replayed, "charges": charges}


def a_rank_hangs(site: Site, when: str) -> dict[str, object]:
    """Rank 1 does not come; rank 0 gives up, and rank 1 learns of it when it comes after all."""
    guard = site.guard(timeout=1.5)
    late = site.rank == 1
    if late and when == "entering":
        time.sleep(3.0)
    seen: dict[str, object] = {"entered": ""}

    def whole_round() -> None:
        model = Net()
        with guard.round(1, state_of(), model) as rnd:
            seen["entered"] = "ok"
            if late and when == "training":
                time.sleep(3.0)
        if late and when == "release":
            time.sleep(3.0)
        rnd.release()

    seen["round"] = outcome(whole_round)
    seen["records"] = site.records()
    return seen
