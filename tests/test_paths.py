"""Where the shipped files lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sentinel import paths

if TYPE_CHECKING:
    from pathlib import Path


def test_the_shipped_policies_are_found_wherever_this_runs() -> None:
    assert (paths.bundled("policies") / "baseline.toml").is_file()


def test_the_copy_inside_the_package_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a wheel there is only that one."""
    package = tmp_path / "sentinel"
    inside = package / "_bundled" / "policies"
    inside.mkdir(parents=True)
    (tmp_path / "policies").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.bundled("policies") == inside


def test_a_foreign_folder_beside_an_installed_package_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pyproject.toml beside it, a folder `policies` belongs to somebody else."""
    (tmp_path / "sentinel").mkdir()
    (tmp_path / "policies").mkdir()
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "sentinel" / "paths.py"))
    with pytest.raises(FileNotFoundError, match="install gradient-sentinel again"):
        paths.bundled("policies")
    (tmp_path / "pyproject.toml").touch()
    assert paths.bundled("policies") == tmp_path / "policies"
