"""`sentinel sanitize` on files that another tool wrote."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sentinel.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

POLICY = """
schema = 1
name = "files"
[[rule]]
id = "baseline"
max_norm = 0.5
noise_ratio = 1.0
[[rule]]
id = "crafted"
when = { suspicion = 0.5 }
action = "refuse-round"
"""


def write_by_hand(path: Path, tensors: dict[str, tuple[list[int], list[float]]]) -> None:
    """The format as its specification says, without any library of ours."""
    header, body = {"__metadata__": {"written_by": "another tool"}}, b""
    for name, (shape, values) in tensors.items():
        content = struct.pack(f"<{len(values)}f", *values)
        place = [len(body), len(body) + len(content)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": place}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "policy.toml").chmod(0o600)
    values = torch.randn(120, generator=torch.Generator().manual_seed(0)).tolist()
    write_by_hand(
        tmp_path / "global", {"a.weight": ([12, 10], values), "a.bias": ([12], [0.0] * 12)}
    )
    moved = [value + 0.1 for value in values]
    write_by_hand(tmp_path / "local", {"a.weight": ([12, 10], moved), "a.bias": ([12], [0.1] * 12)})
    return tmp_path


@pytest.fixture
def sanitize(files: Path) -> Callable[..., Result]:
    def run(*more: str, update: str = "local") -> Result:
        return CliRunner().invoke(
            app,
            [
                "sanitize",
                str(files / update),
                "--global",
                str(files / "global"),
                "--policy",
                str(files / "policy.toml"),
                "--out",
                str(files / "out"),
                "--state-dir",
                str(files / "state"),
                *more,
            ],
        )

    return run


def test_a_file_of_another_tool_comes_back_sanitized(sanitize, files) -> None:
    done = sanitize("--json")
    assert done.exit_code == 0, done.output
    base, out = load_file(files / "global"), load_file(files / "out")
    assert {n: v.shape for n, v in out.items()} == {n: v.shape for n, v in base.items()}
    norm = sum(float((out[n] - base[n]).pow(2).sum()) for n in base) ** 0.5
    assert 0.3 < norm < 1.2  # clip 0.5 and noise of about the same norm
    told = json.loads(done.output)
    assert told["promise"] is None
    assert 0 <= told["sensitivity"] <= 1
    assert (files / "out").stat().st_mode & 0o077 == 0


def test_a_named_round_gives_the_same_bytes_and_an_unnamed_one_never(sanitize, files) -> None:
    named = []
    for _ in range(2):
        assert sanitize("--round", "4").exit_code == 0
        named.append((files / "out").read_bytes())
    unnamed = []
    for _ in range(2):
        assert sanitize().exit_code == 0
        unnamed.append((files / "out").read_bytes())
    assert named[0] == named[1]
    assert unnamed[0] != unnamed[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_file_with_nan_is_refused_with_exit_1_and_nothing_written(sanitize, files, bad) -> None:
    tensors = load_file(files / "local")
    tensors["a.weight"][3, 3] = bad
    save_file(tensors, files / "broken")
    done = sanitize(update="broken")
    assert done.exit_code == 1
    assert "not finite" in done.output
    assert "a.weight" in done.output
    assert sorted(p.name for p in files.iterdir()) == [
        "broken",
        "global",
        "local",
        "policy.toml",
        "state",
    ]


def test_misuse_is_a_sentence_and_exit_2(sanitize, files) -> None:
    assert sanitize(update="nowhere").exit_code == 2
    (files / "text").write_text("no tensors")
    done = sanitize(update="text")
    assert done.exit_code == 2
    assert "safetensors" in done.output
    assert not (files / "out").exists()


def test_an_existing_file_stays_where_nothing_leaves(sanitize, files) -> None:
    (files / "out").write_bytes(b"earlier")
    tensors = load_file(files / "local")
    tensors["a.bias"][0] = float("nan")
    save_file(tensors, files / "broken")
    assert sanitize(update="broken").exit_code == 1
    assert (files / "out").read_bytes() == b"earlier"


def test_budget_and_audit_tell_what_was_done(sanitize, files) -> None:
    sanitize()
    state = ["--state-dir", str(files / "state"), "--json"]
    run = CliRunner().invoke
    shown = json.loads(run(app, ["budget", "show", *state]).output)
    assert shown["datasets"]["default"]["unbounded"] == 1
    verified = json.loads(run(app, ["audit", "verify", *state]).output)
    assert verified["types"]["update.released"] == 1
    records = json.loads(run(app, ["audit", "show", "--type", "update.decided", *state]).output)
    assert len(records) == 1
    assert records[0]["promised"] is False
    assert run(app, ["audit", "verify", "--since", verified["head"], *state]).exit_code == 0
    assert run(app, ["audit", "verify", "--since", "f" * 64, *state]).exit_code == 1
    log = files / "state" / "audit" / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"promised":false', b'"promised":true '))
    assert run(app, ["audit", "verify", *state]).exit_code == 1


def test_reading_state_that_is_not_there_is_misuse_and_makes_nothing(tmp_path) -> None:
    for command in (["budget", "show"], ["audit", "show"], ["audit", "verify"]):
        done = CliRunner().invoke(app, [*command, "--state-dir", str(tmp_path / "none")])
        assert done.exit_code == 2
    assert not (tmp_path / "none").exists()


def test_help_needs_no_torch() -> None:
    """`--help` and `policy check` stay quick: what is heavy is imported inside the commands."""
    code = (
        "import sys; from typer.testing import CliRunner; from sentinel.cli.main import app;"
        "print(CliRunner().invoke(app, ['--help']).exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "False"]


def test_an_output_that_cannot_work_is_misuse_before_anything_is_charged(sanitize, files) -> None:
    (files / "folder").mkdir()
    for out in ("nowhere/out", "folder", "global", "local"):
        done = sanitize("--out", str(files / out))
        assert done.exit_code == 2, out
        assert "Traceback" not in done.output
    assert not (files / "state").exists()


def test_a_released_round_that_could_not_be_written_can_be_asked_for_again(
    sanitize, monkeypatch
) -> None:
    write = safetensors.torch.save_file

    def full(state: object, path: Path) -> None:
        if "out" in path.name:
            raise SafetensorError("No space left on device")
        write(state, path)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = sanitize()
    assert done.exit_code == 1
    monkeypatch.undo()
    number, run = done.output.split("--round ")[1].rstrip(".\n").split(" --run ")
    again = sanitize("--round", number, "--run", run, "--json")
    assert again.exit_code == 0
    assert json.loads(again.output)["replayed"] is True


def test_audit_commands_refuse_what_they_cannot_mean(sanitize, files) -> None:
    sanitize()
    state = ["--state-dir", str(files / "state")]
    run = CliRunner().invoke
    unknown = run(app, ["audit", "show", "--type", "foo", *state])
    assert unknown.exit_code == 2
    assert "update.released" in unknown.output
    assert run(app, ["audit", "verify", "--since", "deadbeef", *state]).exit_code == 2


@pytest.mark.parametrize("damage", ["log gone", "log cut", "ledger gone"])
def test_verify_and_budget_see_what_the_guard_sees(sanitize, files, damage: str) -> None:
    for _ in range(2):
        sanitize()
    log = files / "state" / "audit" / "audit.jsonl"
    if damage == "log gone":
        log.unlink()
    elif damage == "log cut":
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    else:
        (files / "state" / "ledger.sqlite").unlink()
    for command in (["audit", "verify"], ["budget", "show"]):
        done = CliRunner().invoke(app, [*command, "--state-dir", str(files / "state")])
        assert done.exit_code == 1, (command, done.output)
