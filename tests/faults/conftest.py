"""A warm process that forks lives, and sites that outlive them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

sys.path.insert(0, str(Path(__file__).parent))  # the tracer is imported by name, here and in lives

POLICIES = {
    "noisy": """
schema = 1
name = "noisy"
[[rule]]
id = "baseline"
max_norm = 0.5
noise_ratio = 1.0
""",
    "promise": """
schema = 1
name = "promise"
[privacy]
unit = "site"
epsilon = 1000.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 100.0
[[rule]]
id = "baseline"
""",
    "pruning": """
schema = 1
name = "pruning"
[limits]
keep_releases = 1
[[rule]]
id = "baseline"
max_norm = 0.5
noise_ratio = 1.0
""",
}
POLICIES |= {
    unit: f"""
schema = 1
name = "{unit}"
[privacy]
unit = "{unit}"
patients = 24
batch = 12
epsilon = 1000.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 20.0
[[rule]]
id = "baseline"
"""
    for unit in ("patient", "record")
}
_LIVES = itertools.count(1)  # every life has a local state of its own


class Host:
    """The warm process; orders in, answers out."""

    def __init__(self, *before: str) -> None:
        """Start it, behind a command such as `unshare` where one is named."""
        script = Path(__file__).parent / "lives.py"
        self._process = subprocess.Popen(  # noqa: S603 - our own code
            [*before, sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # else backward() dies in a fork
        )
        self.traced: bool = self._answer()["traced"]

    def ask(self, **order: object) -> Any:
        """One order, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            pytest.fail("the warm process died; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@dataclass
class Site:
    """One state folder, and what the world was ever sent from it.

    Attributes:
        folder: of the policy file; the state is kept there too where `state` names no other place.
        sent: round number -> digest of what `release` returned.
        took: round number -> private steps that lives took in it, each life its own number.
        behind: round number -> private steps behind what was sent, where the life lived to say so.
        withheld: reasons that lives were told.
    """

    host: Host
    folder: Path
    policy: str
    state: Path | None = None
    sent: dict[int, str] = field(default_factory=dict)
    took: dict[int, set[int]] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write the policy file."""
        self.state = self.state or self.folder / "state"
        self.folder.mkdir(mode=0o700)
        file = self.folder / "policy.toml"
        file.write_text(POLICIES[self.policy])
        file.chmod(0o600)

    def live(self, rounds: list[int], fault: dict[str, int], *, tries: int = 1) -> dict[str, Any]:
        """One life with a fault at one of its file operations."""
        seen = self.host.ask(**self._order("live", rounds, tries), fault=fault)
        self._learn(seen)
        return seen

    def live_together(self, rounds: list[int], *lives: dict[str, Any]) -> list[dict[str, Any]]:
        """Lives at the same time; `kill_after` seconds ends one."""
        orders = [self._order("live", rounds, 1) | life for life in lives]
        found = self.host.ask(do="run", orders=orders)
        for seen in found:
            self._learn(seen)
        return found

    def must_be_sound(self, rounds: list[int]) -> None:
        """Ask for every round again, with another local state: of another training, if private.

        What was sent is given again, byte for byte; what was not is released now. Ledger and log
        verify, and name a charge before each release: for the steps behind it, where training is
        private. No draft stays for longer than an hour.
        """
        (seen,) = self.host.ask(do="run", orders=[self._order("aftermath", rounds, 1)])
        (*told, (word, found)) = seen["told"]
        assert (seen["status"], word) == (0, "found"), seen
        self._hear(told)
        assert found["uncharged"] == found["torn"] == found["strays"] == 0
        for text, (digest, more, steps) in found["answers"].items():
            number = int(text)
            if digest is None:  # another round took its place on disk
                assert (self.policy, more) == ("pruning", "round-closed"), (number, more)
                assert any(other for other, *_ in found["answers"].values())
            elif number in self.sent:
                assert (digest, more) == (self.sent[number], True), number
            self._note(number, digest, None if more else steps)
        for text, charged in found["charged"].items():
            self._must_be_charged(int(text), charged)

    def _must_be_charged(self, number: int, charged: list[int]) -> None:
        """What was sent has a charge for its steps, and every charge is for steps that were taken.

        Steps are 0 where training is not private.
        """
        assert charged or number not in self.sent, number
        assert self.behind.get(number) in {None, *charged}, number
        assert self.took.get(number, {0}) >= set(charged), number

    def _order(self, what: str, rounds: list[int], tries: int) -> dict[str, Any]:
        life = next(_LIVES)
        return {
            "do": what,
            "policy": str(self.folder / "policy.toml"),
            "site": str(self.state),
            "rounds": rounds,
            "tries": tries,
            "shift": 0.01 * life,
            "epochs": 1 + life % 3,
        }

    def _learn(self, seen: dict[str, Any]) -> None:
        """Hear what a life said before its end; a life may withhold or be killed, never crash."""
        killed = os.WIFSIGNALED(seen["status"]) and os.WTERMSIG(seen["status"]) == signal.SIGKILL
        assert killed or seen["status"] == 0, seen
        self._hear(seen["told"])

    def _hear(self, told: list[list[Any]]) -> None:
        for word, *rest in told:
            assert word in {"sent", "took", "withheld", "no-guard"}, told
            if word == "sent":
                self._note(*rest)
            elif word == "took":
                number, steps = rest
                self.took.setdefault(number, set()).add(steps)
            else:
                self.withheld.append(rest[-1])

    def _note(self, number: int, digest: str | None, steps: int | None) -> None:
        if digest is not None:
            assert self.sent.setdefault(number, digest) == digest, f"round {number} was sent twice"
            if steps is not None:
                self.behind[number] = steps


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def new_site(host: Host, tmp_path: Path) -> Callable[[str], Site]:
    """Makes fresh sites."""
    places = itertools.count()
    return lambda policy: Site(host, tmp_path / f"site-{next(places)}", policy)


@pytest.fixture(scope="session")
def warm_for_private(host: Host) -> None:
    """The warm process knows private training as well."""
    for unit in ("patient", "record"):
        host.ask(do="warm", policy=POLICIES[unit])


@pytest.fixture
def traced(host: Host) -> None:
    """Only where a child can be traced."""
    if not host.traced:
        pytest.skip("system calls of a child cannot be traced here (Linux on x86-64 is needed)")


@pytest.fixture
def small_disk(host_in_namespace: Host, tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 512 KiB that only the warm process sees."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    host_in_namespace.ask(do="mount", folder=str(folder), size=512 * 1024)
    yield SmallDisk(host_in_namespace, folder, tmp_path)
    host_in_namespace.ask(do="unmount", folder=str(folder))


@dataclass
class SmallDisk:
    """A small disk, and sites on it."""

    host: Host
    folder: Path
    outside: Path

    def new_site(self, policy: str, name: str) -> Site:
        """A site whose state is on the disk, and its policy is not."""
        return Site(self.host, self.outside / name, policy, state=self.folder / name)

    def leave(self, left: int | None) -> None:
        """Fill the disk until so many bytes are left; None: remove the filling."""
        self.host.ask(do="fill", folder=str(self.folder), left=left)

    def empty(self) -> None:
        """Remove everything."""
        self.host.ask(do="empty", folder=str(self.folder))


@pytest.fixture(scope="session")
def host_in_namespace() -> Iterator[Host]:
    """A warm process in a mount namespace of its own, where it may mount a small disk."""
    before = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        able = subprocess.run([*before, "true"], check=False, capture_output=True)  # noqa: S603 - fixed words
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if able.returncode:
        pytest.skip("a namespace of one's own is not permitted here")
    made = Host(*before)
    yield made
    made.close()
