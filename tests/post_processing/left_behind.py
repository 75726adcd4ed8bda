"""What a site leaves behind of its rounds, under a fixed clock and given random bits."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import re
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from sentinel import Guard
from sentinel.cli.main import app
from sentinel.errors import Withheld
from sentinel.mechanism.rounded_normal import RoundedNormal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.mechanism import Entropy
    from sentinel.round import Round
    from sentinel.terms import Reason
    from sentinel.update import State
RULES = {
    "plain": "",
    "sensitive": '[[rule]]\nid = "calm"\nwhen = { sensitivity = 0.1 }\nnoise_ratio = 500.0\n',
    "masked": '[[rule]]\nid = "mask"\nwhen = { sensitivity = 0.0 }\nkeep = 0.5\nmax_abs = 3.0\n',
    "spent": '[[rule]]\nid = "spent"\nwhen = { budget_spent = 0.3 }\nnoise_ratio = 90.0\n',
    "withheld": '[[rule]]\nid = "stop"\nwhen = { sensitivity = 0.2 }\naction = "withhold-update"\n',
    "partly": '[[rule]]\nid = "head"\nmatch = ["last.*"]\naction = "withhold"\n',
}


class ScriptedEntropy:
    """Only for testing! Words that make the base mechanism draw given numbers."""

    def __init__(self, numbers: np.ndarray, scale: float) -> None:
        """Keep the numbers, whole steps of the grid; `scale` is the deviation in such steps."""
        self.words = words_for(numbers, scale)

    def fill(self, buffer: memoryview) -> None:
        """Give the next words: one for each coordinate, and no more than there are."""
        out = np.frombuffer(buffer, dtype=np.uint64)
        given, self.words = np.split(self.words, [out.size])
        out[:] = given

    def branch(self) -> ScriptedEntropy:
        """The same: there is one block."""
        return self


def words_for(numbers: np.ndarray, scale: float) -> np.ndarray:
    """One word for each number: the slot of its cell above, its place in the cell right below."""
    tables = RoundedNormal.of(scale)
    boxes = tables.cells.numpy()[: tables.boxes]
    cells = numbers >> tables.bits
    slots = np.searchsorted(boxes, cells)
    assert (boxes[slots] == cells).all()  # farther out is the rest, which no single word gives
    within = (numbers - (cells << tables.bits)).astype(np.uint64)
    return (slots.astype(np.uint64) << np.uint64(48)) | (within << np.uint64(48 - tables.bits))


@dataclass(frozen=True)
class Left:
    """All that a round left behind: what left, what was written, and what is shown of it."""

    released: dict[str, bytes] | None
    reason: tuple[Reason, str] | None
    metrics: dict[str, float]
    files: dict[str, bytes]
    charges: list[object]
    shown: str
    alerts: str


@contextmanager
def fixed_house(sources: Iterator[Entropy]) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    """A folder, and guards whose clock and names are always the same; entropy is `sources`."""
    clock = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    fixed = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda _: clock), UTC=dt.UTC)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sentinel.guard.dt", fixed)
        patch.setattr("sentinel.guard.secrets.token_hex", lambda size: "ab" * size)
        patch.setattr("sentinel.guard.SystemEntropy", lambda: next(sources))
        yield Path(folder), patch


class Site:
    """A guard in a folder of its own, and what its last round came to."""

    def __init__(self, folder: Path, policy: str) -> None:
        """Make the guard, without inspection, which reads public things alone."""
        self._folder, self._told = folder, io.StringIO()
        path = folder / "policy.toml"
        path.write_text(policy)
        path.chmod(0o600)
        options = {"unsafe_skip_inspection": True, "alerts": self._told}
        self.guard = Guard(path, folder / "state", **options)
        self._released: dict[str, bytes] | None = None
        self._reason: tuple[Reason, str] | None = None
        self._metrics: dict[str, float] = {}

    def release(self, opened: Round, private: float, *given: State) -> State | None:
        """Ask for a release, and for metrics with a raw figure in them."""
        try:
            state = opened.release(*given)
        except Withheld as error:
            self._released, self._reason = None, (error.reason, str(error))
            return None
        self._released = {name: value.numpy().tobytes() for name, value in state.items()}
        self._metrics = opened.metrics({"num-examples": private, "loss": private})
        return state

    def left(self) -> Left:
        """All of it; the ledger by its rows, and no references, made of the global model alone."""
        written = {
            str(path.relative_to(self._folder)): path.read_bytes()
            for path in sorted(self._folder.rglob("*"))
            if path.is_file() and "ledger" not in path.name and "references" not in str(path)
        }
        state, policy = str(self._folder / "state"), str(self._folder / "policy.toml")
        words = ["budget", "show", "--json", "--state-dir", state, "--policy", policy]
        shown = CliRunner().invoke(app, words)
        assert shown.exit_code == 0
        return Left(
            self._released,
            self._reason,
            self._metrics,
            written,
            self.guard._state.ledger.rows(),
            shown.stdout,
            re.sub(r"timestamp=\S+", "", self._told.getvalue()),
        )


def require_same(one: Left, other: Left) -> None:
    """Everything that two sites left behind is the same, byte by byte."""
    for field in dataclasses.fields(Left):
        assert getattr(one, field.name) == getattr(other, field.name), field.name
