"""Releases: what was given out for each round, so that asking again gives the same bytes.

Per round there is one small file with its fate, and, once released, the tensors (safetensors).
The fate is written after the tensors and before they are given out, so a fate of `released` always
has its tensors. After pruning the fate stays as a tombstone.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import safetensors.torch
from safetensors import SafetensorError

from sentinel.crew import both
from sentinel.durable import (
    drafted,
    locked,
    private_folder,
    publish,
    replace_file,
    storage,
    sync_file,
    sync_folder,
)
from sentinel.errors import Withheld
from sentinel.scratch import rooms_for
from sentinel.terms import Reason
from sentinel.update import model_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from sentinel.memory import Rooms
    from sentinel.update import State


Result = TypeVar("Result")


class Fate(enum.StrEnum):
    """How a round ended."""

    RELEASED = "released"
    WITHHELD = "withheld"  # decided on data: final, or the answers to retries would add up
    PRUNED = "pruned"


@dataclass(frozen=True, slots=True)
class RoundKey:
    """A round: federation, run and number. Its digest names it on disk and in the log."""

    federation: str
    run: str
    number: int

    @property
    def digest(self) -> str:
        """SHA-256 of the three, 64 hex digits."""
        text = json.dumps([self.federation, self.run, self.number])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Ending:
    """The fate of one round.

    Attributes:
        global_model: digest of the global model it was trained on.
        released: digest of the released state; empty unless released or pruned.
        kind: whether weights or the delta were released.
        reason: why it was withheld; None unless withheld.
    """

    fate: Fate
    global_model: str
    released: str = ""
    kind: Literal["weights", "delta"] = "weights"
    reason: Reason | None = None


class Releases:
    """The folder of endings and released tensors.

    Guarantees:
        What `store` and `end` write is durable and its owner's alone once they return; until then
        what was there before is whole. What `load` gives is what was released, bit for bit. No fate
        is ever removed, and tensors only once their tombstone is written.

    Edges:
        `ending` before there is one:                  None
        `ending` that cannot be read:                  Withheld (ROUND_CLOSED)
        `end` once more:                               the later fate stands
        `store` of 0-d, empty or bfloat16 tensors:     `load` gives them as they were
        `store` of a name that the format keeps:       `load` gives it as it was
        `store` on a full disk:                        OSError; nothing is left behind
        `store` whose check raises:                    its error; nothing is left behind
        `load` of tensors that are gone or changed:    Withheld (ROUND_CLOSED)
        `locked` while somebody else holds it:         waits
        `locked` through a symbolic link:              OSError
        `keep_newest` of 0:                            tombstones alone, which `holds_any` counts
        `keep_newest` of tensors without a fate:       they stay
        `keep_newest` past a fate that cannot be read: Withheld (ROUND_CLOSED)
        `rooms` for more than half of the memory:      on disk, without a name
        a folder that others may write to:             Withheld (STATE_UNSAFE)
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder (0700) where it is missing."""
        self._folder = private_folder(folder)

    def locked(self, key: RoundKey) -> AbstractContextManager[None]:
        """Hold one round alone, across threads and processes."""
        return locked(self._folder / f"{key.digest}.lock")

    def ending(self, key: RoundKey) -> Ending | None:
        """How the round ended; None while it has not.

        Raises:
            Withheld: ROUND_CLOSED where the file cannot be read as an ending.
        """
        return _read_ending(self._path(key, "json"))

    def end(self, key: RoundKey, ending: Ending) -> None:
        """Write the fate of a round, durably."""
        _write_ending(self._path(key, "json"), ending)

    def store(
        self, key: RoundKey, state: dict[str, torch.Tensor], check: Callable[[], Result]
    ) -> Result:
        """Write what will be released, durably, unless `check` raises; what `check` returned.

        The check runs beside the writing.
        """
        named = {_stored_name(name): value for name, value in state.items()}
        path = self._path(key, "safetensors")
        with drafted(path) as draft:
            _, found = both(lambda: _write(draft, named), check)
            publish(draft, path)
        return found

    def rooms(self, size: int) -> Rooms:
        """Where `size` bytes of what may leave find room: in memory, or on disk."""
        return rooms_for(size, self._folder)

    def load(self, key: RoundKey, ending: Ending) -> dict[str, torch.Tensor]:
        """The stored tensors of a released round.

        Raises:
            Withheld: ROUND_CLOSED where they are missing, or are not what was released.
        """
        try:
            stored = safetensors.torch.load_file(self._path(key, "safetensors"))
        except (OSError, SafetensorError):
            raise _closed("was released, but the stored tensors cannot be read") from None
        state = {_own_name(name): value for name, value in stored.items()}
        if model_digest(state) != ending.released:
            raise _closed("was released, but the stored tensors were changed since")
        return state

    def holds_any(self) -> bool:
        """Whether any round has ended here.

        Raises:
            Withheld: STORAGE_FAILED where the folder cannot be read.
        """
        with storage():
            return next(self._folder.glob("*.json"), None) is not None

    def keep_newest(self, count: int) -> None:
        """Remove the tensors of all but the `count` newest releases; their tombstones stay.

        One process at a time: nothing vanishes while another one looks at it.
        """
        with locked(self._folder / "prune.lock"):
            stored = sorted(
                self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
            )
            for path in stored[: max(0, len(stored) - count)]:
                self._prune(path.with_suffix(".json"))

    def _prune(self, path: Path) -> None:
        ending = _read_ending(path)
        if ending is None or ending.fate is not Fate.RELEASED:
            return
        _write_ending(path, replace(ending, fate=Fate.PRUNED))
        path.with_suffix(".safetensors").unlink(missing_ok=True)
        sync_folder(self._folder)

    def _path(self, key: RoundKey, suffix: str) -> Path:
        return self._folder / f"{key.digest}.{suffix}"


def _is_reserved(name: str) -> bool:
    """Whether a name is `__metadata__`, which safetensors keeps for itself, or that after `_`s."""
    return name.startswith("__") and name.lstrip("_") == "metadata__"


def _stored_name(name: str) -> str:
    return f"_{name}" if _is_reserved(name) else name


def _own_name(stored: str) -> str:
    return stored[1:] if _is_reserved(stored) else stored


def write_tensors(path: Path, state: State) -> None:
    """Write safetensors, without a copy in memory, so that `path` is whole or untouched.

    The file is durable when this returns, and readable by its owner alone.

    Raises:
        OSError: it could not be written.
    """
    with drafted(path) as draft:
        _write(draft, state)
        publish(draft, path)


def _write(draft: Path, state: State) -> None:
    try:
        safetensors.torch.save_file(state, draft)
    except SafetensorError as error:
        raise OSError("the released tensors could not be written") from error
    draft.chmod(0o600)
    sync_file(draft)


def _read_ending(path: Path) -> Ending | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        reason = found.pop("reason")
        fate = Fate(found.pop("fate"))
        return Ending(fate=fate, reason=None if reason is None else Reason(reason), **found)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _closed("cannot be read, so it stays closed") from None


def _write_ending(path: Path, ending: Ending) -> None:
    replace_file(path, json.dumps(asdict(ending)).encode())


def _closed(problem: str) -> Withheld:
    return Withheld(Reason.ROUND_CLOSED, f"This round {problem}.")
