"""What was released is kept whole, checked when it is given again, and never made twice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.durable import locked
from sentinel.errors import Withheld
from sentinel.memory import room
from sentinel.releases import Ending, Fate, Releases, RoundKey
from sentinel.scratch import Scratch
from sentinel.terms import Reason
from sentinel.update import model_digest

if TYPE_CHECKING:
    from pathlib import Path

KEY = RoundKey("f", "r", 1)
STATE = {
    "w": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "scale": torch.tensor(2.5),
    "steps": torch.tensor(7),
}


def release(folder: Path) -> tuple[Releases, Ending]:
    releases = Releases(folder)
    releases.store(KEY, STATE, lambda: None)
    ending = Ending(Fate.RELEASED, "g" * 64, model_digest(STATE))
    releases.end(KEY, ending)
    return releases, ending


def test_stored_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    releases, ending = release(tmp_path / "r")
    assert Releases(tmp_path / "r").ending(KEY) == ending
    back = releases.load(KEY, ending)
    assert set(back) == set(STATE)
    assert all(torch.equal(back[name], value) for name, value in STATE.items())
    assert all(back[name].dtype == value.dtype for name, value in STATE.items())


def test_a_name_that_the_file_format_keeps_for_itself_comes_back(tmp_path: Path) -> None:
    names = ["__metadata__", "___metadata__", "_metadata__", "metadata__", "a__metadata__", "w"]
    state = {name: torch.full((2,), float(place)) for place, name in enumerate(names)}
    releases = Releases(tmp_path / "r")
    releases.store(KEY, state, lambda: None)
    back = releases.load(KEY, Ending(Fate.RELEASED, "g" * 64, model_digest(state)))
    assert model_digest(back) == model_digest(state)


def test_what_fails_its_check_is_not_stored(tmp_path: Path) -> None:
    def check() -> None:
        raise Withheld(Reason.GLOBAL_MODEL_CHANGED, "changed")

    with pytest.raises(Withheld, match="changed"):
        Releases(tmp_path / "r").store(KEY, STATE, check)
    assert not list((tmp_path / "r").iterdir())


def test_rounds_of_other_names_are_other_rounds() -> None:
    keys = [
        RoundKey(*parts) for parts in [("f", "r", 1), ("f", "r", 2), ("fr", "", 1), ("", "fr", 1)]
    ]
    assert len({key.digest for key in keys}) == 4


def test_no_ending_before_there_is_one(tmp_path: Path) -> None:
    assert Releases(tmp_path / "r").ending(KEY) is None


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_what_cannot_be_given_again_is_refused_not_made_again(tmp_path: Path, damage: str) -> None:
    releases, ending = release(tmp_path / "r")
    path = next((tmp_path / "r").glob("*.safetensors"))
    if damage == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(Withheld) as caught:
        releases.load(KEY, ending)
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_only_the_newest_releases_are_kept_and_tombstones_of_the_others(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "r")
    assert not releases.holds_any()
    keys = [RoundKey("f", "r", number) for number in range(4)]
    for at, key in enumerate(keys):
        releases.store(key, STATE, lambda: None)
        releases.end(key, Ending(Fate.RELEASED, "g" * 64, model_digest(STATE)))
        os.utime(tmp_path / "r" / f"{key.digest}.safetensors", (at, at))
    releases.keep_newest(2)
    fates = [releases.ending(key).fate for key in keys]
    assert fates == [Fate.PRUNED, Fate.PRUNED, Fate.RELEASED, Fate.RELEASED]
    assert len(list((tmp_path / "r").glob("*.safetensors"))) == 2
    assert releases.holds_any()


def test_one_process_prunes_at_a_time(tmp_path: Path) -> None:
    """Otherwise a guard fails because another one removed the file it was looking at."""
    releases, _ = release(tmp_path / "r")
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "r" / "prune.lock"):
            waiting = pool.submit(Releases(tmp_path / "r").keep_newest, 0)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            assert releases.ending(KEY).fate is Fate.RELEASED
        waiting.result(timeout=10)
    assert releases.ending(KEY).fate is Fate.PRUNED


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"fate": "sold"}', '{"reason": null, "x": 1}'])
def test_an_ending_that_cannot_be_read_keeps_the_round_closed(tmp_path: Path, text: str) -> None:
    releases, _ = release(tmp_path / "r")
    next((tmp_path / "r").glob("*.json")).write_text(text)
    with pytest.raises(Withheld) as caught:
        releases.ending(KEY)
    assert caught.value.reason is Reason.ROUND_CLOSED


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    releases = Releases(tmp_path / "r")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentinel.releases.sync_file", full)
    with pytest.raises(OSError, match="No space"):
        releases.store(KEY, STATE, lambda: None)
    assert list((tmp_path / "r").iterdir()) == []


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "r")
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "r" / f"{KEY.digest}.lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"), releases.locked(KEY):
        pytest.fail("the lock may not be taken")
    assert target.read_text() == "mine"


def test_a_round_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "r")

    def hold() -> str:
        with Releases(tmp_path / "r").locked(KEY):
            return "held"

    with ThreadPoolExecutor(1) as pool:
        with releases.locked(KEY):
            waiting = pool.submit(hold)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert waiting.result(timeout=10) == "held"


def test_the_later_fate_stands(tmp_path: Path) -> None:
    releases, ending = release(tmp_path / "r")
    later = Ending(Fate.WITHHELD, ending.global_model, reason=Reason.NOT_FINITE)
    releases.end(KEY, later)
    assert releases.ending(KEY) == later


def test_where_no_release_is_kept_the_tombstones_are(tmp_path: Path) -> None:
    releases, ending = release(tmp_path / "r")
    releases.keep_newest(0)
    assert list((tmp_path / "r").glob("*.safetensors")) == []
    assert releases.ending(KEY).fate is Fate.PRUNED
    assert releases.holds_any()
    with pytest.raises(Withheld):
        releases.load(KEY, ending)


def test_tensors_of_a_round_that_has_not_ended_are_not_pruned(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "r")
    releases.store(KEY, STATE, lambda: None)
    releases.keep_newest(0)
    assert len(list((tmp_path / "r").glob("*.safetensors"))) == 1
    assert releases.ending(KEY) is None
    assert not releases.holds_any()


def test_a_fate_that_cannot_be_read_is_not_pruned(tmp_path: Path) -> None:
    releases, _ = release(tmp_path / "r")
    next((tmp_path / "r").glob("*.json")).write_text("{}")
    with pytest.raises(Withheld) as caught:
        releases.keep_newest(0)
    assert caught.value.reason is Reason.ROUND_CLOSED
    assert len(list((tmp_path / "r").glob("*.safetensors"))) == 1


def test_what_would_not_fit_finds_room_on_disk(tmp_path: Path, monkeypatch) -> None:
    """With little memory left, not with as much on disk as the machine has memory."""
    releases = Releases(tmp_path / "r")
    monkeypatch.setattr("sentinel.scratch.free", lambda: 6 << 20)
    assert releases.rooms(1 << 20) is room
    assert isinstance(releases.rooms(4 << 20), Scratch)
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r").chmod(mode)
    with pytest.raises(Withheld) as caught:
        Releases(tmp_path / "r")
    assert caught.value.reason is Reason.STATE_UNSAFE


def test_what_is_written_is_the_owners_alone(tmp_path: Path) -> None:
    release(tmp_path / "r")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "r").iterdir()}
    assert modes == {0o600}
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
