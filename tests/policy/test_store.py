"""Finding and reading policy files."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from sentinel.errors import PolicyError
from sentinel.policy import load_policy
from sentinel.policy.parsing import MAX_BYTES
from sentinel.policy.store import shipped

if TYPE_CHECKING:
    from pathlib import Path

TEXT = 'schema = 1\nname = "mine"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0o644)
    return path


def test_a_file_is_loaded_with_the_digest_of_its_bytes(file: Path) -> None:
    loaded = load_policy(file)
    assert loaded.policy.name == "mine"
    assert loaded.digest == hashlib.sha256(TEXT.encode()).hexdigest()
    assert loaded.source == str(file)
    assert load_policy(str(file)) == loaded


@pytest.mark.parametrize("name", ["baseline", "chest-xray", "genomics", "tabular-ehr"])
def test_a_shipped_policy_is_loaded_by_its_name(name: str) -> None:
    assert load_policy(name).policy.name == name
    assert name in shipped()


def test_a_shipped_policy_is_as_trustworthy_as_the_code() -> None:
    """A checkout under umask 002 has group-writable files; the code beside them has the same."""
    assert not any("test" in name for name in shipped())
    assert load_policy(shipped()["baseline"]).policy.name == "baseline"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match="baseline, chest-xray, genomics, tabular-ehr"):
        load_policy("chest-x-ray")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such file"):
        load_policy(tmp_path / "none.toml")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_could_change_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(PolicyError, match="chmod go-w"):
        load_policy(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, 12345, 12345)
    with pytest.raises(PolicyError, match="belongs to another user"):
        load_policy(file)


def test_a_link_that_leaves_its_folder_is_refused(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    link = folder / "link.toml"
    link.symlink_to(file)
    with pytest.raises(PolicyError, match="leaves its folder"):
        load_policy(link)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    """Kubernetes mounts a file as a link to a folder that is itself a link."""
    data = tmp_path / "..2026_11_20"
    data.mkdir()
    real = data / "p.toml"
    real.write_text(TEXT, encoding="utf-8")
    real.chmod(0o644)
    (tmp_path / "..data").symlink_to(data.name)
    (tmp_path / "p.toml").symlink_to("..data/p.toml")
    assert load_policy(tmp_path / "p.toml").policy.name == "mine"


def test_a_broken_link_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.symlink_to("nowhere.toml")
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe, 0o600)
    for path, sentence in ((broken, "no such file"), (tmp_path, "plain"), (pipe, "plain file")):
        with pytest.raises(PolicyError, match=sentence):
            load_policy(path)


def test_a_file_over_the_size_cap_is_refused(file: Path) -> None:
    file.write_bytes(TEXT.encode() + b"#" * MAX_BYTES)
    with pytest.raises(PolicyError, match="larger than"):
        load_policy(file)


def test_what_is_wrong_inside_is_told_with_the_path(file: Path) -> None:
    file.write_text("schema = 1\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"mine\.toml: name: is missing"):
        load_policy(file)
