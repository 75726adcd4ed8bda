"""Lives: real releases in forks of one warm process, which are killed, failed, and looked at after.

Run as a script: reads one order per line (JSON) and answers each with one line. What a life gave
out goes through a pipe, written only after `release` returned, so that it outlives the life.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from private import PrivateLoop, is_private
from tracing import Fault, Trace, available, run_traced

import sentinel
from sentinel.audit import UpdateReleased, UpdateReplayed, read_log, verify_log
from sentinel.durable import remove_drafts
from sentinel.errors import Withheld
from sentinel.privacy import DpSgdEvent
from sentinel.releases import RoundKey
from sentinel.state import StateFolder
from sentinel.update import model_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.privacy import Event
    from sentinel.round import Round
    from sentinel.update import State

    Say = Callable[..., None]

START = {"w.weight": torch.zeros(40, 30), "w.bias": torch.zeros(40), "w.steps": torch.tensor(3)}
WARM = """
schema = 1
name = "warm"
[privacy]
unit = "site"
epsilon = 100.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 2.0
[[rule]]
id = "baseline"
"""


def local(shift: float) -> dict[str, torch.Tensor]:
    """A local state; every life has another one."""
    return {
        name: value + shift if value.is_floating_point() else value + 1
        for name, value in START.items()
    }


def digest_of(number: int) -> str:
    """The key of a round, as ledger and log name it."""
    return RoundKey("default", "default", number).digest


class Loop:
    """Gives out rounds as the policy asks for: privately trained, or of a local state."""

    def __init__(self, guard: sentinel.Guard, order: dict[str, Any], say: Say) -> None:
        """Make training private where it has to be."""
        self._guard, self._order, self._say = guard, order, say
        self._private = PrivateLoop(guard, order["shift"]) if is_private(guard) else None

    def release(self, number: int) -> tuple[State, Round, int]:
        """What left, its round, and the private steps that were taken in it."""
        if self._private is not None:
            return self._private.release(number, self._order["epochs"], self._say)
        with self._guard.round(number, START) as rnd:
            pass
        return rnd.release(local(self._order["shift"])), rnd, 0


def live(order: dict[str, Any], say: Say) -> None:
    """Open the state and release the rounds, trying each again where it was withheld."""
    loop = None
    for _ in range(order["tries"]):
        try:
            guard = sentinel.Guard(order["policy"], order["site"], alerts=io.StringIO())
            loop = Loop(guard, order, say)
            break
        except Withheld as error:
            say("no-guard", error.reason)
    for number in order["rounds"] if loop is not None else ():
        for _ in range(order["tries"]):
            try:
                state, rnd, steps = loop.release(number)
            except Withheld as error:
                say("withheld", number, error.reason)
            else:
                say("sent", number, model_digest(state), None if rnd.replayed else steps)
                break


def aftermath(order: dict[str, Any], say: Say) -> dict[str, Any]:
    """Ask for every round again, with another local state, and look at ledger and log."""
    guard = sentinel.Guard(order["policy"], order["site"], alerts=io.StringIO())
    loop = Loop(guard, order, say)
    answers: dict[int, list[Any]] = {}
    for number in order["rounds"]:
        try:
            state, rnd, steps = loop.release(number)
            answers[number] = [model_digest(state), rnd.replayed, steps]
        except Withheld as error:
            answers[number] = [None, error.reason, 0]
    state = StateFolder(order["site"])
    rows = state.ledger.rows()
    state.ledger.verify()
    noted = [(row.log_head.seq, row.log_head.hash) for row in rows]
    verify_log(state.audit, state.ledger.hash_at, noted)
    charged = {row.round: row.seq for row in reversed(rows)}  # the first charge of each round
    given: dict[str, set[str]] = {}
    early = 0
    for entry in read_log(state.audit):
        record = entry.record
        if isinstance(record, UpdateReleased | UpdateReplayed):
            given.setdefault(record.round, set()).add(record.released)
            early += not charged.get(record.round, sys.maxsize) <= record.ledger_seq
    strays = 0
    for folder in ("releases", "history", "references"):
        remove_drafts(Path(order["site"]) / folder, time.time() + 2 * 3600.0)
        strays += sum(path.name[0] == "." for path in (Path(order["site"]) / folder).iterdir())
    return {
        "answers": answers,
        "strays": strays,
        "uncharged": early,
        "torn": sum(len(digests) > 1 for digests in given.values()),
        "charged": {
            number: [steps_of(row.event) for row in rows if row.round == digest_of(number)]
            for number in order["rounds"]
        },
    }


def steps_of(event: Event) -> int:
    """Private steps that an event is the charge for."""
    return event.steps if isinstance(event, DpSgdEvent) else 0


def life(order: dict[str, Any], pipe: int) -> None:
    """One life in a fork: everything it has to say goes down the pipe as it happens."""

    def say(*words: object) -> None:
        os.write(pipe, (json.dumps(words) + "\n").encode())

    try:
        if "largest" in order:  # bytes that a file may have
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], resource.RLIM_INFINITY))
        if order["do"] == "live":
            live(order, say)
        else:
            say("found", aftermath(order, say))
    except BaseException as error:  # noqa: BLE001 - the only way to see it from outside
        say("crash", traceback.format_exception(error)[-3:])
        os._exit(1)
    os._exit(0)


def told(pipe: int) -> list[list[Any]]:
    """What a dead life said; a torn last line was never said."""
    with os.fdopen(pipe, "rb") as file:
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def run(orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run lives at the same time; each may be killed after so many seconds."""
    running, moments = [], []
    for place, order in enumerate(orders):
        mine, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            life(order, theirs)
        os.close(theirs)
        running.append((pid, mine))
        if "kill_after" in order:
            moments.append((order["kill_after"], place))
    begun = time.monotonic()
    for moment, place in sorted(moments):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        os.kill(running[place][0], signal.SIGKILL)
    return [{"status": os.waitpid(pid, 0)[1], "told": told(mine)} for pid, mine in running]


def run_with_fault(order: dict[str, Any]) -> dict[str, Any]:
    """Run one life under the tracer."""
    mine, theirs = os.pipe()
    trace: Trace = run_traced(lambda: life(order, theirs), order["site"], Fault(**order["fault"]))
    os.close(theirs)
    return {
        "status": trace.status,
        "told": told(mine),
        "hit": trace.hit,
        "operations": trace.operations,
    }


def mount(order: dict[str, Any]) -> None:
    """A disk in memory, in this process's own mount namespace."""
    options = f"size={order['size']},mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options, "none", order["folder"]]
    subprocess.run(command, check=True)  # noqa: S603 - our own words


def unmount(order: dict[str, Any]) -> None:
    """Take the disk away."""
    subprocess.run(["umount", order["folder"]], check=True)  # noqa: S603, S607 - our own words


def fill(order: dict[str, Any]) -> None:
    """Leave `left` bytes free on the disk of `folder`; all of it again where that is None."""
    ballast = Path(order["folder"]) / "ballast"
    ballast.unlink(missing_ok=True)
    if order["left"] is not None:
        stat = os.statvfs(order["folder"])
        ballast.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - order["left"])))


def empty(order: dict[str, Any]) -> None:
    """Remove everything on the disk."""
    for path in Path(order["folder"]).iterdir():
        shutil.rmtree(path)


DISK = {"mount": mount, "unmount": unmount, "fill": fill, "empty": empty}


def warm_up(text: str) -> None:
    """Load detectors, accountants and kernels once, so that a life takes milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(text)
        policy.chmod(0o600)
        guard = sentinel.Guard(policy, Path(folder) / "site", alerts=io.StringIO())
        loop = Loop(guard, {"shift": 1.0, "epochs": 1}, lambda *_: None)
        loop.release(0)


def reply(answer: object) -> None:
    """One line to whoever gave the order."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer orders until the input ends."""
    torch.set_num_threads(1)
    warm_up(WARM)
    reply({"traced": available()})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] in DISK:
            answer: Any = DISK[order["do"]](order)
        elif "fault" in order:
            answer = run_with_fault(order)
        elif order["do"] == "warm":
            answer = warm_up(order["policy"])
        else:
            answer = run(order["orders"])
        reply(answer)


if __name__ == "__main__":
    main()
