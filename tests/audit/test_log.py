"""The log says only what its types allow, and every change to it is seen."""

from __future__ import annotations

import enum
import io
import json
import os
import subprocess
import sys
import types
import typing

import pytest
from pydantic import ValidationError

from sentinel.audit import (
    AlertEvent,
    Alerts,
    AuditLog,
    RoundAborted,
    UpdateDecided,
    UpdateReleased,
    UpdateWithheld,
    read_log,
    score_step,
    verify_log,
)
from sentinel.audit.log import FILE_NAME
from sentinel.audit.records import RECORD_TYPES
from sentinel.errors import Withheld
from sentinel.terms import Reason, Sharpness, Unit

if typing.TYPE_CHECKING:
    from pathlib import Path

ZERO = "0" * 64
BASE = {"at": 1, "process": "a" * 32, "ledger_seq": 0, "ledger_head": ZERO}


def aborted(at: int = 1) -> RoundAborted:
    return RoundAborted(**{**BASE, "at": at}, round="b" * 64)


def decided(**changes: object) -> UpdateDecided:
    fields = {
        "round": "b" * 64,
        "promised": False,
        "sensitivity": 3,
        "sharpness": Sharpness.REFERENCE,
        "suspicion": 0,
        "budget_spent": 0,
        "rules": (0, 2),
        "released": 4,
        "withheld": 0,
        "coordinates": 12,
        "clipped": True,
    }
    return UpdateDecided(**BASE, **{**fields, **changes})


def write(folder: Path, count: int) -> Path:
    log = AuditLog(folder)
    for at in range(count):
        log.append(lambda at=at: aborted(at))
    return folder / FILE_NAME


def leaves(annotation: object) -> list[object]:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return []
    if origin in (tuple, typing.Union, types.UnionType, typing.Annotated):
        return [leaf for part in typing.get_args(annotation) for leaf in leaves(part)]
    return [annotation]


@pytest.mark.parametrize("record", RECORD_TYPES)
def test_a_record_has_no_field_that_could_hold_content(record: type) -> None:
    """Enums, booleans, bounded integers, digests and ids; no free text, float, bytes or dict."""
    for name, field in record.model_fields.items():
        for leaf in leaves(field.annotation):
            if leaf in (bool, type(None), Ellipsis) or not isinstance(leaf, type):
                continue
            if issubclass(leaf, enum.Enum):
                continue
            assert leaf in (int, str), name
        text = str(field.annotation) + str(field.metadata)
        if "<class 'str'>" in text:
            assert "pattern" in text, name
        if "<class 'int'>" in text:
            assert "le=" in text or "Le(" in text, name


def test_a_record_refuses_other_text_floats_and_unknown_fields() -> None:
    for change in (
        {"round": "patient 12"},
        {"round": "b" * 64 + "\n"},
        {"sensitivity": 0.5},
        {"sensitivity": 21},
        {"note": "x"},
        {"rules": [0]},
    ):
        with pytest.raises(ValidationError):
            decided(**change)


def test_bits_of_the_raw_update_are_counted_and_none_under_a_promise() -> None:
    assert decided().data_bits == 14  # log2(21) + log2(257) + 1
    assert decided(promised=True, clipped=None).data_bits == 0
    assert aborted().data_bits == 0
    assert UpdateWithheld(**BASE, round="b" * 64, reason=Reason.NOT_FINITE).data_bits <= 5


def test_a_record_says_whom_the_promise_is_for_and_how_many_steps() -> None:
    promised = {"promised": True, "clipped": None}
    assert decided(**promised, unit=Unit.SITE).steps is None
    assert decided(**promised, unit=Unit.PATIENT, steps=40).steps == 40
    assert decided(**promised, unit=Unit.RECORD, steps=1).data_bits == 0
    for wrong in (
        {"unit": Unit.SITE},  # nothing is promised
        {"steps": 4},
        {**promised, "unit": Unit.SITE, "steps": 4},
        {**promised, "unit": Unit.PATIENT},
        {**promised, "unit": Unit.PATIENT, "steps": 0},
        {**promised, "unit": Unit.PATIENT, "steps": 10**9 + 1},
        {**promised, "unit": Unit.PATIENT, "steps": 1.0},
    ):
        with pytest.raises(ValidationError):
            decided(**wrong)


def test_a_line_from_before_unit_and_steps_were_told_still_verifies(tmp_path: Path) -> None:
    """Byte for byte as it was written then; and one that says nothing is written so today."""
    old = (
        '{"at":1,"budget_spent":0,"clipped":null,"coordinates":12,"data_bits":0,"ledger_head":"'
        + ZERO
        + '","ledger_seq":0,"level":"L0","previous":"'
        + ZERO
        + '","process":"'
        + "a" * 32
        + '","promised":true,"released":4,"round":"'
        + "b" * 64
        + '","rules":[0,2],"sensitivity":3,"seq":1,"sharpness":"reference","suspicion":0,'
        '"type":"update.decided","withheld":0}\n'
    )
    log = AuditLog(tmp_path)
    (tmp_path / FILE_NAME).write_text(old)
    (tmp_path / FILE_NAME).chmod(0o600)
    unsaid = decided(promised=True, clipped=None)
    assert verify_log(tmp_path).records == 1
    assert [entry.record for entry in read_log(tmp_path)] == [unsaid]
    log.append(lambda: decided(promised=True, clipped=None, unit=Unit.PATIENT, steps=40))
    assert verify_log(tmp_path).records == 2
    AuditLog(tmp_path / "new").append(lambda: unsaid)
    assert (tmp_path / "new" / FILE_NAME).read_text() == old
    for said in ('"unit":null,', '"steps":null,'):
        (tmp_path / FILE_NAME).write_text(old.replace('"withheld"', said + '"withheld"'))
        with pytest.raises(Withheld):
            verify_log(tmp_path)


def test_scores_are_rounded_up_to_a_twentieth() -> None:
    assert [score_step(score) for score in (0.0, 0.01, 0.05, 0.51, 1.0)] == [0, 1, 1, 11, 20]


def test_records_chain_and_verify(tmp_path: Path) -> None:
    path = write(tmp_path / "audit", 4)
    found = verify_log(tmp_path / "audit")
    assert found.records == 4
    assert found.types == {"round.aborted": 4}
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3, 4]
    assert json.loads(lines[0])["previous"] == ZERO
    assert path.stat().st_mode & 0o077 == 0


def test_every_change_of_one_byte_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "audit", 2)
    whole = path.read_bytes()
    head = verify_log(tmp_path / "audit").head
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            changed = verify_log(tmp_path / "audit").head
        except Withheld:
            continue
        assert changed != head  # the last line may be rewritten whole; its head then differs


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_a_line_that_is_missing_is_seen(tmp_path: Path, drop: int) -> None:
    path = write(tmp_path / "audit", 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:drop] + lines[drop + 1 :]))
    with pytest.raises(Withheld, match="line") as caught:
        verify_log(tmp_path / "audit")
    assert caught.value.reason is Reason.LOG_DAMAGED


def test_a_torn_line_is_dropped_and_the_log_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "audit", 2)
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        AuditLog(tmp_path / "audit").append(aborted)
        types_seen = [entry.record.type for entry in read_log(tmp_path / "audit")]
        assert types_seen == ["round.aborted", "log.recovered", "round.aborted"]


def test_a_log_whose_first_line_is_torn_begins_again(tmp_path: Path) -> None:
    path = write(tmp_path / "audit", 1)
    path.write_bytes(path.read_bytes()[:30])
    AuditLog(tmp_path / "audit").append(aborted)
    assert verify_log(tmp_path / "audit").records == 2


def test_a_record_that_names_a_ledger_row_which_is_not_there_is_seen(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append(lambda: RoundAborted(**{**BASE, "ledger_seq": 5}, round="b" * 64))
    with pytest.raises(Withheld) as caught:
        verify_log(tmp_path / "audit", lambda seq: ZERO if seq == 0 else None)
    assert caught.value.reason is Reason.LEDGER_BEHIND_LOG


def test_a_log_that_lacks_what_the_ledger_names_is_seen(tmp_path: Path) -> None:
    """Cut short, deleted, or rewritten whole with hashes that fit one another."""
    folder = tmp_path / "audit"
    path = write(folder, 4)
    noted = [(entry.seq, entry.hash) for entry in read_log(folder)][1:3]
    assert verify_log(folder, noted=noted).records == 4
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:2]))
    log = AuditLog(tmp_path / "other")
    for at in range(4):
        log.append(lambda at=at: aborted(at + 100))
    for damaged in (folder, tmp_path / "other", tmp_path / "gone"):
        with pytest.raises(Withheld, match="ledger names") as caught:
            verify_log(damaged, noted=noted)
        assert caught.value.reason is Reason.LOG_DAMAGED


def test_a_record_is_found_from_the_end_and_through_several_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    path = write(folder, 400)
    assert path.stat().st_size > 2 << 16
    log = AuditLog(folder)
    entries = {entry.seq: entry.hash for entry in read_log(folder)}
    assert {seq: log.hash_at(seq) for seq in entries} == entries
    assert log.hash_at(0) == ZERO
    assert log.hash_at(401) is None
    path.write_bytes(path.read_bytes() + b'{"torn')
    assert log.hash_at(400) == entries[400]


def test_the_log_knows_which_rounds_were_released(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append(lambda: UpdateReleased(**BASE, round="b" * 64, released=ZERO))
    assert log.was_released("b" * 64)
    assert not log.was_released("c" * 64)


WRITER = """
import sys
from pathlib import Path
from sentinel.audit import AuditLog, RoundAborted
log = AuditLog(Path(sys.argv[1]))
for at in range(50):
    log.append(lambda: RoundAborted(at=at, process="a" * 32, ledger_seq=0, ledger_head="0" * 64,
                                    round="b" * 64))
"""


def test_processes_append_to_one_log_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])  # noqa: S603 - our own code
        for _ in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert verify_log(folder).records == 150


@pytest.mark.parametrize("failing", ["write", "fdatasync"])
def test_a_record_that_could_not_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = write(tmp_path / "audit", 1)
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(Withheld) as caught:
        AuditLog(tmp_path / "audit").append(aborted)
    monkeypatch.undo()
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", ["link", "open to others"])
def test_a_folder_that_is_not_ours_alone_is_refused(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "audit"
    if make == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "real")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(Withheld) as caught:
        AuditLog(folder)
    assert caught.value.reason is Reason.STATE_UNSAFE


def test_an_alert_is_one_line_of_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    Alerts().send(AlertEvent.ROUND_REFUSED, reason=Reason.CRAFTED_MODEL, round=12)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert 'event="round refused"' in line
    assert "reason=crafted-model" in line
    assert "round=12" in line


def test_a_closed_stream_keeps_no_refusal_from_being_raised() -> None:
    stream = io.StringIO()
    stream.close()
    Alerts(stream).send(AlertEvent.ROUND_REFUSED, reason=Reason.CRAFTED_MODEL)


@pytest.mark.parametrize(
    "fields",
    [{"reason": "free text"}, {"update": Reason.NOT_FINITE}, {"round": 1.5}, {"round": True}],
)
def test_an_alert_refuses_anything_else_and_writes_nothing(
    fields: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match="reason codes"):
        Alerts().send(AlertEvent.UPDATE_WITHHELD, **fields)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("read", ["last", "hash_at", "was_released"])
def test_a_log_that_cannot_be_read_withholds(tmp_path: Path, monkeypatch, read: str) -> None:
    """A failing disk is a refusal with a reason, never a bare OSError."""
    log = AuditLog(tmp_path / "audit")
    log.append(aborted)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.open", broken)
    monkeypatch.setattr(os, "open", broken)
    asked = {"last": log.last, "hash_at": lambda: log.hash_at(1)}
    with pytest.raises(Withheld) as caught:
        asked.get(read, lambda: log.was_released("b" * 64))()
    assert caught.value.reason is Reason.STORAGE_FAILED
