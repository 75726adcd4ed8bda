"""Several processes on one state folder, and processes that are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

import sentinel
from sentinel.audit import verify_log
from sentinel.state import StateFolder
from sentinel.update import model_digest

if TYPE_CHECKING:
    from pathlib import Path

POLICY = """
schema = 1
name = "noisy"
[[rule]]
id = "baseline"
max_norm = 0.5
noise_ratio = 1.0
"""
WORKER = """
import sys, torch, sentinel
from sentinel.update import model_digest
policy, site, first, last, shift = sys.argv[1:]
guard = sentinel.Guard(policy, site)
start = {"w.weight": torch.zeros(40, 30), "w.bias": torch.zeros(40)}
local = {name: value + float(shift) for name, value in start.items()}
print("ready", flush=True)
for number in range(int(first), int(last)):
    with guard.round(number, start) as rnd:
        pass
    print(number, model_digest(rnd.release(local)), flush=True)
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    path.chmod(0o600)
    return path


def start(policy: Path, first: int, last: int, shift: float) -> subprocess.Popen[str]:
    site = policy.parent / "site"
    command = [sys.executable, "-c", WORKER, policy, site, first, last, shift]
    return subprocess.Popen(  # noqa: S603 - our own code
        [str(part) for part in command], stdout=subprocess.PIPE, text=True
    )


def released(output: str) -> dict[int, str]:
    """What a worker gave out before it ended: number -> digest; a torn last line is left out."""
    whole = output[: output.rfind("\n") + 1].splitlines()[1:]
    return {int(number): digest for number, digest in (line.split() for line in whole)}


def test_processes_that_race_for_the_same_rounds_release_each_once(policy: Path) -> None:
    workers = [start(policy, 0, 8, shift) for shift in (0.01, 0.02, -0.03)]
    seen = [released(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0].values())) == 8
    state = StateFolder(policy.parent / "site")
    assert state.ledger.head().seq == 8
    types = verify_log(state.audit, state.ledger.hash_at).types
    assert types["update.released"] == 8
    assert types["update.replayed"] == 16


def test_whatever_was_given_out_before_a_kill_is_given_again_and_was_charged(policy: Path) -> None:
    """Killed four times at random moments; the last life then asks for every round again."""
    seen: dict[int, str] = {}
    chance = random.Random(0)  # noqa: S311 - when to kill
    for life in range(4):
        worker = start(policy, 0, 10_000, 0.01 * (life + 1))
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.05, 0.6))
        worker.kill()
        found = released("ready\n" + worker.communicate()[0])
        assert all(found[number] == seen[number] for number in found.keys() & seen.keys())
        seen |= found
    site = policy.parent / "site"
    guard = sentinel.Guard(policy, site)
    base = {"w.weight": torch.zeros(40, 30), "w.bias": torch.zeros(40)}
    for number, digest in seen.items():
        with guard.round(number, base) as rnd:
            pass
        assert (
            model_digest(rnd.release({name: value - 1 for name, value in base.items()})) == digest
        )
        assert rnd.replayed
    state = StateFolder(site)
    charged = {row.round for row in state.ledger.rows()}
    assert len(charged) >= len(seen) > 3
    assert state.ledger.verify() == state.ledger.head()
    noted = [(row.log_head.seq, row.log_head.hash) for row in state.ledger.rows()]
    assert verify_log(state.audit, state.ledger.hash_at, noted).types["guard.started"] == 5
