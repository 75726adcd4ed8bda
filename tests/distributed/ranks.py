"""What each rank does in the tests: real processes, real gloo, real guards.

Every scenario is a function `(site) -> value`; it runs on all ranks at once, and what it returns
comes back to the test. A rank that dies calls `os._exit`, so that nothing of it is left.
"""

from __future__ import annotations

import datetime as dt
import io
import multiprocessing as mp
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import forkserver
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sentinel.audit import read_log
from sentinel.detection.bundle import GLOBAL_MODEL, UPDATE_SENSITIVITY, load_detector
from sentinel.distributed import Guard
from sentinel.errors import Withheld

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext
    from pathlib import Path

    from sentinel.distributed import Round

    State = dict[str, torch.Tensor]

PLAIN = """
schema = 1
name = "plain"

[[rule]]
id = "baseline"
max_norm = 0.5
"""
NOISY = PLAIN + "noise_ratio = 1.0\n"
FOLLOWS = PLAIN.replace("0.5", '"auto"\nmax_norm_floor = 0.05\nmax_norm_ceiling = 2.0')
SITE = """
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 20.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 2.0
[[rule]]
id = "baseline"
"""
PARTS = (
    PLAIN
    + """
[[rule]]
id = "last"
match = ["last.*"]
max_norm = 0.05
max_abs = 0.02
[[rule]]
id = "bias"
match = ["first.bias"]
action = "withhold"
"""
)
for _name in (UPDATE_SENSITIVITY, GLOBAL_MODEL):
    load_detector(_name)  # once, in the process that all ranks are forked from: it takes seconds
DIED = 9  # exit code of a rank that a scenario kills


@dataclass
class Site:
    """What a scenario has: its rank, and the folder that all ranks and the test share."""

    rank: int
    world: int
    folder: Path
    alerts: io.StringIO = field(default_factory=io.StringIO)

    def guard(self, text: str = PLAIN, *, timeout: float = 20.0, **options: object) -> Guard:
        """A guard under the policy `text`; all ranks share one state folder."""
        path = self.folder / f"policy-{self.rank}-{abs(hash(text))}.toml"
        path.write_text(text)
        path.chmod(0o600)
        return Guard(
            path,
            self.folder / "state",
            timeout=dt.timedelta(seconds=timeout),
            alerts=self.alerts,
            **options,
        )

    def records(self) -> list[str]:
        """Types of all records in the log, with the reason of those that have one."""
        return [
            f"{entry.record.type} {getattr(entry.record, 'reason', '')}".strip()
            for entry in read_log(self.folder / "state" / "audit")
        ]


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; a tied head; running statistics."""

    def __init__(self, seed: int = 0) -> None:
        """Draw the weights from `seed`."""
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 33)
        self.norm = nn.BatchNorm1d(33)
        self.last = nn.Linear(33, 6, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        self.twin = nn.Linear(6, 6, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, 6) -> (rows, 6)."""
        hidden = self.last(torch.relu(self.norm(self.first(rows))))
        return self.twin(torch.relu(self.head(hidden)))


def state_of(seed: int = 0) -> State:
    return {name: value.clone() for name, value in Net(seed).state_dict().items()}


def replica(seed: int = 1) -> DistributedDataParallel:
    return DistributedDataParallel(Net(seed))


def shards(seed: int = 1) -> nn.Module:
    model = Net(seed)
    fully_shard(model.first)
    fully_shard(model)
    return model


def replicated_shards(seed: int = 1) -> nn.Module:
    """Of four ranks, 0 and 1 hold one copy in shards, 2 and 3 another (HSDP)."""
    model = Net(seed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ddp": replica,
    "fsdp": shards,
    "hsdp": replicated_shards,
}


def train(model: nn.Module, rank: int, step: float = 5.0) -> None:
    """Two steps on this rank's own rows; the gradients are averaged over the ranks."""
    generator = torch.Generator().manual_seed(100 + rank)
    rows = torch.randn(32, 6, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=step)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(rows).pow(2).mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> State:
    """The model's parameters and buffers on this rank, whole: the test's own way to read them."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
        for name, v in inner.state_dict().items()
    }


def packed(state: Mapping[str, torch.Tensor] | None) -> bytes | None:
    if state is None:
        return None
    return safetensors.torch.save({n: v.detach().clone().contiguous() for n, v in state.items()})


def outcome(call: Callable[[], object]) -> str:
    """The reason code, the kind of error, or "ok"."""
    try:
        call()
    except Withheld as error:
        return f"{type(error).__name__} {error.reason}"
    except Exception as error:  # noqa: BLE001 - told to the test
        return type(error).__name__
    return "ok"


def one_round(
    site: Site, guard: Guard, number: int = 1, kind: str = "ddp", start: State | None = None
) -> Round:
    """A whole round, trained and not yet released."""
    model = MODELS[kind]()
    with guard.round(number, start or state_of(), model) as rnd:
        train(model, site.rank)
    return rnd


def die() -> None:
    os._exit(DIED)


def _main(
    scenario: Callable[..., object],
    place: tuple[int, int, Path, str],
    arguments: dict[str, object],
    answer: Connection,
) -> None:
    rank, world, folder, meeting = place
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / meeting}",
            rank=rank,
            world_size=world,
            timeout=dt.timedelta(seconds=30),
        )
        dist.barrier()  # a rank that is done at once must not go while others still connect to it
        answer.send(scenario(Site(rank, world, folder), **arguments))
    except BaseException:  # noqa: BLE001 - told to the test
        answer.send(traceback.format_exc())
    answer.close()
    os._exit(0)


def in_turn(site: Site, calls: list[tuple[Callable[..., object], dict[str, object]]]) -> object:
    """Several scenarios in which nobody dies, each in a folder of its own."""
    values = []
    for place, (scenario, arguments) in enumerate(calls):
        folder = site.folder / str(place)
        folder.mkdir(exist_ok=True)
        try:
            values.append(scenario(Site(site.rank, site.world, folder), **arguments))
        except Exception:  # noqa: BLE001 - told to the test
            values.append(traceback.format_exc())
    return values


def all_in_turn(
    folder: Path, calls: Sequence[tuple[Callable[..., object], dict[str, object]]]
) -> dict[tuple[object, ...], list[object]]:
    """What every rank returned, by the scenario's name and arguments; one pair of processes."""
    ranks = together(in_turn, folder, calls=list(calls))
    named = [(scenario.__name__, *arguments.values()) for scenario, arguments in calls]
    return dict(zip(named, zip(*ranks, strict=True), strict=True))


def _warm() -> ForkServerContext:
    """Makes processes from one that has imported everything: a fresh one takes five seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server's, which sees no other
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def together(
    scenario: Callable[..., object], folder: Path, *, world: int = 2, **arguments: object
) -> list[object]:
    """Run a scenario on `world` ranks; what each returned, None for a rank that died."""
    context = _warm()
    meeting = f"meeting-{time.monotonic_ns()}"
    started = []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        place = (rank, world, folder, meeting)
        process = context.Process(target=_main, args=(scenario, place, arguments, theirs))
        process.start()
        theirs.close()
        started.append((process, mine))
    values = []
    for process, mine in started:
        try:
            values.append(mine.recv() if mine.poll(90) else "no answer in time")
        except EOFError:
            values.append(None)
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    return values
