"""A scratch folder goes with its test, and with the next one where a test was killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from sentinel.stress.lab.home import scratch

HOLD = """
import time
from sentinel.stress.lab.home import scratch
with scratch() as home:
    (home / "release").write_text("an update")
    print(home, flush=True)
    time.sleep(60)
"""


def aged(folder: Path) -> None:
    """As if it had been made an hour ago."""
    old = time.time() - 3600
    os.utime(folder, (old, old))


def test_the_folder_is_private_and_gone_afterwards() -> None:
    with scratch() as home:
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not home.exists()


def test_what_a_killed_test_left_goes_with_the_next_and_one_in_use_stays() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as other:  # noqa: S603 - our own command
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        aged(left)
        with scratch():
            assert (left / "release").exists()  # its test still runs
        other.send_signal(signal.SIGKILL)
    aged(left)
    with scratch():
        assert not left.exists()
