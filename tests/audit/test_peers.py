"""Digests are all that sites show one another, and a comparison finds what differs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sentinel.audit import (
    AuditLog,
    RoundAborted,
    RoundOpened,
    RoundRefused,
    UpdateReleased,
    read_log,
)
from sentinel.audit.peers import (
    LARGEST,
    MOST_ROUNDS,
    Answer,
    Claims,
    Digests,
    RoundName,
    RoundSeen,
    claims_of,
    compare,
    digests_of,
    read_digests,
    repeated,
)
from sentinel.errors import MisuseError
from sentinel.terms import GENESIS, Reason, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from sentinel.audit import Record

BASE = {"at": 1, "process": "a" * 32, "ledger_seq": 0, "ledger_head": GENESIS}
HEAD = "e" * 64
ROUNDS = [f"{at:064x}" for at in range(1, 5)]
MODELS = [f"{at:064x}" for at in range(11, 14)]


def everything(_: RoundName) -> bool:
    return True


def opened(number: int, model: str) -> RoundOpened:
    judged = {"verdict": Verdict.HONEST, "suspicion": 0, "inspected": True}
    return RoundOpened(**BASE, round=ROUNDS[number], number=number, global_model=model, **judged)


def refused(number: int, model: str | None) -> RoundRefused:
    judged = {"verdict": None, "suspicion": None, "reason": Reason.CRAFTED_MODEL}
    return RoundRefused(**BASE, round=ROUNDS[number], number=number, global_model=model, **judged)


def shown(folder: Path, *records: Record) -> Digests:
    """What a log of these records shows."""
    log = AuditLog(folder)
    for record in records:
        log.append(lambda record=record: record)
    return digests_of(read_log(folder), everything)


def seen(*rows: tuple[int, str], head: str = HEAD) -> Digests:
    """Digests of rounds given as (number, global model)."""
    named = sorted({(number, ROUNDS[number], model) for number, model in rows})
    found = [
        RoundSeen(number=number, round=name, global_model=model) for number, name, model in named
    ]
    return Digests(log=head if found else GENESIS, rounds=tuple(found))


def numbers(names: tuple[RoundName, ...]) -> list[int]:
    return [name.number for name in names]


models = st.frozensets(st.tuples(st.integers(0, 3), st.sampled_from(MODELS)))


# ---- what a site shows


def test_digests_hold_rounds_and_models_and_nothing_else(tmp_path: Path) -> None:
    """The very fields, whatever else the log says: no time, no verdict, no process."""
    found = shown(
        tmp_path,
        refused(2, MODELS[2]),
        opened(0, MODELS[0]),
        UpdateReleased(**BASE, round=ROUNDS[0], released="f" * 64),
        RoundAborted(**BASE, round=ROUNDS[1]),
    )
    document = json.loads(found.to_bytes())
    last = list(read_log(tmp_path))[1]  # the last one of a round that is shown
    assert document == {
        "format": "sentinel-digests",
        "version": 1,
        "log": last.hash,
        "rounds": [
            {"number": 0, "round": ROUNDS[0], "global_model": MODELS[0]},
            {"number": 2, "round": ROUNDS[2], "global_model": MODELS[2]},
        ],
    }


def test_a_round_is_shown_once_for_each_of_its_models(tmp_path: Path) -> None:
    """A replay adds nothing; a second global model does; one that was not digested cannot."""
    found = shown(
        tmp_path,
        opened(1, MODELS[1]),
        opened(1, MODELS[0]),
        opened(1, MODELS[1]),
        refused(3, None),
    )
    assert [(row.number, row.global_model) for row in found.rounds] == [
        (1, MODELS[0]),
        (1, MODELS[1]),
    ]
    assert numbers(repeated(found.models)) == [1]


def test_a_log_without_a_round_shows_none(tmp_path: Path) -> None:
    empty = digests_of(read_log(tmp_path / "none"), everything)
    assert (empty.log, empty.rounds) == (GENESIS, ())
    assert read_digests(empty.to_bytes(), "b.json") == empty
    assert shown(tmp_path, RoundAborted(**BASE, round=ROUNDS[0])) == empty


def test_records_that_are_not_shown_change_nothing(tmp_path: Path) -> None:
    """Neither how many there are, nor that there are any: other federations, withheld updates."""
    before = shown(tmp_path, opened(0, MODELS[0]))
    log = AuditLog(tmp_path)
    for record in (opened(3, MODELS[1]), RoundAborted(**BASE, round=ROUNDS[0]), refused(2, None)):
        log.append(lambda record=record: record)
    after = digests_of(read_log(tmp_path), lambda name: name.number == 0)
    assert after.to_bytes() == before.to_bytes()


def test_only_the_rounds_that_are_wanted_are_shown(tmp_path: Path) -> None:
    whole = shown(tmp_path, opened(0, MODELS[0]), opened(1, MODELS[0]), opened(2, MODELS[0]))
    late = digests_of(read_log(tmp_path), lambda name: name.number >= 1)
    assert [row.number for row in late.rounds] == [1, 2]
    assert whole.only(lambda name: name.number >= 1) == late
    none = whole.only(lambda _: False)
    assert (none.rounds, none.log) == ((), whole.log)


def test_more_rounds_than_a_file_holds_are_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentinel.audit.peers.MOST_ROUNDS", 1)
    with pytest.raises(MisuseError, match="--from-round"):
        shown(tmp_path, opened(0, MODELS[0]), opened(1, MODELS[0]))


def test_the_longest_file_fits_the_bound() -> None:
    row = RoundSeen(number=2**53, round=ROUNDS[0], global_model=MODELS[0])
    one = Digests(log=HEAD, rounds=(row,))
    two = one.model_copy(update={"rounds": (row, row)})
    each = len(two.to_bytes()) - len(one.to_bytes())
    assert len(one.to_bytes()) + each * MOST_ROUNDS < LARGEST


# ---- what is read of others


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": [(1, 0), (0, 0)]},  # out of order
        {"rounds": [(0, 0), (0, 0)]},  # twice
        {"log": GENESIS},
        {"rounds": []},
        {"log_seq": 4},
        {"version": 2},
        {"format": "other"},
        {"note": "patient 12"},
        {"log": "E" * 64},
        {"version": "1"},
    ],
)
def test_digests_that_no_log_gives_are_refused(change: dict) -> None:
    rows = change.get("rounds", [(0, 0), (1, 0)])
    change["rounds"] = [
        {"number": number, "round": ROUNDS[number], "global_model": MODELS[model]}
        for number, model in rows
    ]
    whole = {"format": "sentinel-digests", "version": 1, "log": HEAD}
    text = json.dumps({**whole, **change}, indent=2, sort_keys=True) + "\n"
    with pytest.raises(ValidationError):
        Digests.model_validate_json(text)
    with pytest.raises(MisuseError, match="is not what `sentinel audit digests`") as caught:
        read_digests(text.encode(), "b.json")
    assert "patient" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"rounds": ' * 50_000,
        b'{"format": "sentinel-digests"}',
        b"NaN",
    ],
)
def test_what_is_of_another_kind_is_refused(content: bytes) -> None:
    with pytest.raises(MisuseError, match="is not what"):
        read_digests(content, "b.json")


def test_another_layout_or_a_second_key_is_refused() -> None:
    content = seen((0, MODELS[0])).to_bytes()
    whole = json.loads(content)
    twice = content.replace(b'"version": 1', b'"version": 1,\n  "version": 1')
    for other in (
        json.dumps(whole).encode(),
        content.replace(b"\n", b"\r\n"),
        content.rstrip(),
        b"\xef\xbb\xbf" + content,
        twice,
        content.replace(b'"number": 0', b'"number": 0.0'),
        content.replace(b'"number": 0', b'"number": 00'),
    ):
        with pytest.raises(MisuseError, match="byte for byte"):
            read_digests(other, "b.json")


@given(models, st.data())
def test_digests_are_read_as_written_and_no_change_passes_unseen(rows, data) -> None:
    """Cut short anywhere, or with any byte changed: refused, or plainly another statement."""
    digests = seen(*rows)
    content = digests.to_bytes()
    assert read_digests(content, "b.json") == digests
    at = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(MisuseError):
        read_digests(content[:at], "b.json")
    changed = (
        content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    )
    with contextlib.suppress(MisuseError):
        assert read_digests(changed, "b.json") != digests


READ = """
import resource, sys, time
from sentinel.audit.peers import LARGEST, Digests, RoundSeen, read_digests
from sentinel.errors import MisuseError
row = RoundSeen(number=1, round="1" * 64, global_model="2" * 64)
one = Digests(log="3" * 64, rounds=(row,)).to_bytes()
at, end = one.index(b"\\n    {"), one.index(b"\\n  ],")
kinds = {
    "zeros": lambda: b'{"rounds":[' + b"0," * (LARGEST // 2 - 8) + b"0]}",
    "nested": lambda: b"[" * LARGEST,
    "rows": lambda: one[:at] + one[at:end] + (b"," + one[at:end]) * 150_000 + one[end:],
    "digits": lambda: one.replace(b'"number": 1', b'"number": ' + b"1" * (LARGEST - 400)),
}
content = kinds[sys.argv[1]]()
assert 25 << 20 < len(content) <= LARGEST, len(content)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    read_digests(content, "b.json")
except MisuseError:
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(after - before, time.process_time() - start)
"""


@pytest.mark.parametrize("kind", ["zeros", "nested", "rows", "digits"])
def test_a_large_hostile_file_takes_little_memory_and_time(kind: str) -> None:
    """Refused before anything is made of it: a hundredth of the gigabytes that a parser takes."""
    command = [sys.executable, "-c", READ, kind]
    done = subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - our own code
    kibibytes, seconds = map(float, done.stdout.split())
    assert kibibytes < 40 << 10
    assert seconds < 5


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    with pytest.raises(MisuseError):
        read_digests(content, "b.json")


# ---- whom one compares with


def test_a_site_knows_its_own_file(tmp_path: Path) -> None:
    """Also what it showed earlier; and it is left to be compared."""
    early = shown(tmp_path, opened(0, MODELS[0]))
    AuditLog(tmp_path).append(lambda: opened(1, MODELS[0]))
    peers = [("b.json", seen((0, MODELS[0]))), ("own.json", early)]
    assert claims_of(peers, read_log(tmp_path)) == Claims(own=("own.json",))
    assert not claims_of(peers, ())  # no log at hand: it cannot be known


def test_files_of_one_log_are_told() -> None:
    one, other = seen((0, MODELS[0])), seen((0, MODELS[0]), head="d" * 64)
    peers = [("b.json", one), ("c.json", other), ("copy.json", one)]
    assert claims_of(peers, ()) == Claims(shared=(("b.json", "copy.json"),))


def test_digests_of_an_empty_log_are_nobodys_own(tmp_path: Path) -> None:
    empty = digests_of([], everything)
    assert not claims_of([("b.json", empty), ("c.json", empty)], read_log(tmp_path))
    assert compare(seen((0, MODELS[0])).models, empty.models).answer is Answer.NOT_COMPARED


def test_of_a_file_that_may_be_a_copy_only_differences_count() -> None:
    here, there = seen((0, MODELS[0]), (1, MODELS[0])), seen((0, MODELS[0]), (1, MODELS[1]))
    found = compare(here.models, there.models).differences_alone()
    assert (found.same, numbers(found.another), numbers(found.not_compared)) == ((), [1], [0])
    alike = compare(here.models, here.models).differences_alone()
    assert alike.answer is Answer.NOT_COMPARED


# ---- what differs


def test_the_one_round_that_differs_is_named() -> None:
    here = seen(*[(number, MODELS[0]) for number in range(4)])
    there = seen((0, MODELS[0]), (1, MODELS[0]), (2, MODELS[1]))
    found = compare(here.models, there.models)
    assert numbers(found.another) == [2]
    assert numbers(found.same) == [0, 1]
    assert numbers(found.not_compared) == [3]
    assert (found.compared, found.not_here, found.answer) == (3, 0, Answer.INCONSISTENCY)


def test_a_round_that_one_site_has_is_never_the_same() -> None:
    found = compare(seen((0, MODELS[0])).models, seen((1, MODELS[0])).models)
    assert (found.same, found.another, found.not_here) == ((), (), 1)
    assert found.answer is Answer.NOT_COMPARED


def test_one_digest_under_two_numbers_is_not_compared() -> None:
    false = RoundSeen(number=7, round=ROUNDS[0], global_model=MODELS[0])
    theirs = Digests(log=HEAD, rounds=(false,))
    assert compare(seen((0, MODELS[0])).models, theirs.models).answer is Answer.NOT_COMPARED


def test_two_global_models_of_one_round_are_told() -> None:
    one, both = seen((0, MODELS[0])), seen((0, MODELS[0]), (0, MODELS[1]))
    found = compare(one.models, both.models)
    assert numbers(found.another) == numbers(found.repeated) == [0]
    alike = compare(both.models, both.models)
    assert numbers(alike.same) == numbers(alike.repeated) == [0]
    assert alike.answer is Answer.INCONSISTENCY
    elsewhere = compare(seen((1, MODELS[0])).models, both.models)
    assert elsewhere.answer is Answer.NOT_COMPARED  # the peer's own round, which is not here
    assert (elsewhere.repeated, numbers(elsewhere.repeated_elsewhere)) == ((), [0])


@given(models, models)
@settings(max_examples=200)
def test_a_comparison_leaves_no_round_out_and_is_the_same_from_both_sides(here, there) -> None:
    own, theirs = seen(*here).models, seen(*there).models
    found, back = compare(own, theirs), compare(theirs, own)
    parts = (*found.same, *found.another, *found.not_compared)
    assert sorted(parts) == sorted(own)
    assert found.another == back.another
    assert found.same == back.same
    assert found.not_here == len(back.not_compared)
    assert all(own[name] == theirs[name] for name in found.same)
    assert all(own[name] != theirs[name] for name in found.another)
