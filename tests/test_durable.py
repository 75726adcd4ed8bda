"""What is replaced is on disk before its name is, and drafts of the dead are cleared away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sentinel.durable import draft_of, private_folder, remove_drafts, replace_file, storage
from sentinel.errors import Withheld
from sentinel.terms import Reason


def test_bytes_are_synced_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "bytes")  # noqa: PTH112 - a link of /proc
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        seen.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    replace_file(tmp_path / "x", b"whole")
    assert seen == ["bytes", "name", "folder"]
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_failed_replacement_leaves_the_old_content_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Withheld) as caught, storage():
        replace_file(tmp_path / "x", b"new")
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_only_old_drafts_are_removed(tmp_path: Path) -> None:
    """Ours, and those that the tensor library writes on its way to ours."""
    old, young = draft_of(tmp_path / "a"), draft_of(tmp_path / "a")
    library = tmp_path / ".tmpaB3dEf"
    for path in (old, young, library, tmp_path / "a"):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    os.utime(library, (0, 0))
    os.utime(tmp_path / "a", (0, 0))
    remove_drafts(tmp_path, time.time())
    assert set(tmp_path.iterdir()) == {young, tmp_path / "a"}


def test_a_folder_below_one_that_anybody_may_rename_in_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "open"
    above.mkdir()
    above.chmod(0o777)
    with pytest.raises(Withheld, match="rename") as caught:
        private_folder(above / "state")
    assert caught.value.reason is Reason.STATE_UNSAFE
    above.chmod(0o1777)
    assert private_folder(above / "state").stat().st_mode & 0o777 == 0o700
