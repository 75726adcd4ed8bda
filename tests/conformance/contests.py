"""Contests: one contestant against one case, in this process or in a child with a time limit."""

from __future__ import annotations

import json
import os
import random
import select
import signal
from typing import TYPE_CHECKING

import numpy as np
import ours
import peers
import torch
from judging import Finding, NotApplicable, Refused, judge
from odd_inputs import Case, State, Wants

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = {"no-promise": "Sentinel, no promise", "site-promise": "Sentinel, site promise"}
PEERS = {
    "flower-localdp": "Flower LocalDpMod",
    "flower-fixedclipping": "Flower fixedclipping_mod",
    "nvflare-svt": "NVFLARE SVTPrivacy",
    "nvflare-percentile": "NVFLARE PercentilePrivacy",
    "nvflare-excludevars": "NVFLARE ExcludeVars",
}
PATIENCE = 10.0  # seconds; an ordinary case takes milliseconds


def contest(name: str, case: Case) -> Finding:
    """Run the case twice and judge what came out."""
    side = ours if name in OURS else peers
    try:
        outs = [_seeded(case, lambda: side.run(name, case)) for _ in range(2)]
    except NotApplicable:
        return Finding("n/a")
    except Refused as error:
        word = "wrong" if case.wants is Wants.LEAVES else "right"
        return Finding(word, f"refused, {error}")
    except Exception as error:  # noqa: BLE001 - whatever a contestant does is a finding
        return Finding("crash", type(error).__name__)
    if not outs[0]:
        return Finding("right", "nothing leaves")
    return judge(case, side.claims(name, case), outs)


def contest_apart(name: str, case: Case) -> Finding:
    """The same in a child, which is ended after `PATIENCE` seconds."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        np.random.seed()  # noqa: NPY002 - no two children draw the same
        found = contest(name, case)
        os.write(theirs, json.dumps([found.word, found.measured]).encode())
        os._exit(0)
    os.close(theirs)
    ready, _, _ = select.select([mine], [], [], PATIENCE)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(mine, "rb") as pipe:
        said = pipe.read()
    if not ready:
        return Finding("hang", f"over {PATIENCE:.0f} s")
    return Finding(*json.loads(said)) if said else Finding("crash", "the process died")


def _seeded(case: Case, run: Callable[[], State]) -> State:
    if case.seeded:
        random.seed(42)
        np.random.seed(42)  # noqa: NPY002 - what training code does
        torch.manual_seed(42)
    return run()
