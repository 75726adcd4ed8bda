"""The example in docs/distributed.md runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sentinel.audit import read_log

TOP = Path(__file__).parents[2]


def run_example(folder: Path) -> None:
    """Train for three rounds on two ranks, which end without a sound."""
    text = (TOP / "docs" / "distributed.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    script = folder / "train.py"
    script.write_text(code[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [*command, "--nproc-per-node", "2", str(script)],
        env={**os.environ, "STATE": str(folder / "state"), "OMP_NUM_THREADS": "1"},
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000]
    assert done.stdout.splitlines() == [f"round {n}: 4 tensors may leave" for n in range(3)]
    released = [entry.record.type for entry in read_log(folder / "state" / "audit")]
    assert released.count("update.released") == 3


@pytest.mark.slow
def test_the_example_runs_under_torchrun_on_two_ranks(tmp_path: Path) -> None:
    run_example(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("time", range(30))
def test_ranks_end_well_every_time(time: int, tmp_path: Path) -> None:
    """A thread of gloo that outlived the interpreter ended one job in six with SIGABRT."""
    del time
    run_example(tmp_path)
