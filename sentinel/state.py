"""State: the folder that holds a site's ledger, log, releases and histories."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sentinel.adaptive import Memory
from sentinel.audit import AuditLog
from sentinel.durable import (
    locked,
    open_private,
    private_folder,
    remove_drafts,
    replace_file,
    storage,
)
from sentinel.errors import MisuseError, Withheld
from sentinel.privacy import Ledger
from sentinel.releases import Releases
from sentinel.terms import Reason

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sentinel.releases import RoundKey

ENVIRONMENT = "SENTINEL_STATE_DIR"
_LEDGER = "ledger.sqlite"
_AUDIT = "audit"


def default_folder() -> Path:
    """Where state is kept when nobody says: SENTINEL_STATE_DIR, else the user's state folder."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "gradient-sentinel"


class StateFolder:
    """One site's state; several guards, in one or several processes, may use it together.

    Layout: `ledger.sqlite`, `audit/`, `releases/`, `history/`, `references/`, and, once there is
    one, `calibration.json`. Everything is 0700 and 0600, belongs to the user, and is never reached
    through a symbolic link.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        """Make or open the folder.

        Raises:
            Withheld: STATE_UNSAFE, STORAGE_FAILED, LEDGER_DAMAGED.
        """
        with storage():
            self.path = private_folder(_folder(path))
            self.ledger = Ledger(self.path / _LEDGER)
            self.log = AuditLog(self.path / _AUDIT)
            self.releases = Releases(self.path / "releases")
            self.references = private_folder(self.path / "references")
            self._history = private_folder(self.path / "history")
            for folder in ("releases", "references", "history"):
                remove_drafts(self.path / folder, time.time())

    @classmethod
    def existing(cls, path: Path | str | None = None) -> StateFolder:
        """Open a folder that must be there already, for reading."""
        folder = Path(path) if path is not None else default_folder()
        if not (folder / _LEDGER).is_file():
            if (folder / _AUDIT).is_dir():
                raise Withheld(
                    Reason.LEDGER_BEHIND_LOG,
                    f"There is an audit log in {folder}, and its ledger is gone.",
                )
            raise MisuseError(
                f"There is no state in {folder}; name the folder that the guard uses with "
                f"--state-dir or {ENVIRONMENT}."
            )
        return cls(folder)

    @property
    def audit(self) -> Path:
        """The folder of the audit log."""
        return self.path / _AUDIT

    @property
    def calibration(self) -> SmallFile:
        """What the detectors said of this site's ordinary rounds."""
        return SmallFile(self.path / "calibration.json")

    def history(self, federation: str, run: str) -> SmallFile:
        """What is remembered about the global models of one run."""
        return self._run_file("history", federation, run)

    def counter(self, federation: str, run: str) -> SmallFile:
        """The last round number that was counted, and its global model."""
        return self._run_file("counter", federation, run)

    def memory(self, key: RoundKey, dataset: str) -> Memory:
        """What `max_norm = "auto"` came to in the run of a round, on one dataset."""
        return Memory(self._run_file("bounds", key.federation, key.run, dataset))

    def _run_file(self, kind: str, *named: str) -> SmallFile:
        name = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        return SmallFile(self._history / f"{name}.{kind}.json")


def _folder(path: Path | str | None) -> Path:
    if path is None:
        return default_folder()
    if not isinstance(path, str | os.PathLike):
        raise MisuseError("state_dir must be the path of a folder.")
    return Path(path).expanduser()


class SmallFile:
    """A small text about public things, replaced whole."""

    def __init__(self, path: Path) -> None:
        """Name the file; it need not exist."""
        self._path = path

    def locked(self) -> AbstractContextManager[None]:
        """Hold it alone while it is read and replaced."""
        return locked(self._path.with_suffix(".lock"))

    def read(self) -> str | None:
        """The text; None where there is none yet."""
        try:
            handle = open_private(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read().decode(errors="replace")

    def write(self, text: str) -> None:
        """Replace the text, durably."""
        replace_file(self._path, text.encode())
