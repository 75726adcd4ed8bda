"""What would not fit into memory is put together on disk, without a name and without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import safetensors.torch
import torch

from sentinel import scratch
from sentinel.mechanism import prepare, transform
from sentinel.memory import LARGE, room
from sentinel.scratch import Scratch, free, rooms_for
from sentinel.terms import Action, NormBound, Plan, Treatment
from sentinel.update import Update

SHAPE = torch.Size((600, 700))  # over the size below which memory is taken anyway


def test_room_on_disk_is_memory_that_can_be_written_and_has_no_name(tmp_path: Path) -> None:
    tensor = Scratch(tmp_path, 4 * SHAPE.numel())(SHAPE, torch.float32)
    tensor.fill_(2.0)
    assert float(tensor.sum()) == 2.0 * SHAPE.numel()
    assert list(tmp_path.iterdir()) == []
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path) in mapped
    del tensor
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_where_files_must_have_names_theirs_is_gone_at_once(tmp_path: Path, monkeypatch) -> None:
    """Some file systems know no files without a name; the flag is what they refuse."""
    monkeypatch.setattr(scratch.os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)  # EISDIR
    tensor = Scratch(tmp_path, 8 * SHAPE.numel())(SHAPE, torch.float64)
    tensor.zero_()
    assert list(tmp_path.iterdir()) == []


def test_what_would_take_more_than_half_of_the_free_memory_goes_to_disk(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(scratch, "_of_process", lambda: 6 << 20)
    assert rooms_for(3 << 20, tmp_path) is room
    assert isinstance(rooms_for(4 << 20, tmp_path), Scratch)


def test_many_tensors_share_a_file_and_do_not_touch_one_another(tmp_path: Path) -> None:
    """A file each would use up the handles that a process may have."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    rooms = Scratch(tmp_path, 40 * (LARGE + 64))
    shapes = [torch.Size((LARGE // 4 + extra,)) for extra in range(40)]
    tensors = [rooms(shape, torch.float32).fill_(place) for place, shape in enumerate(shapes)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2
    assert all(bool((tensor == place).all()) for place, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


V1, V2 = "7:cpu,memory:/pods/ours\n3:pids:/other\n", "0::/pods/ours\n"


@pytest.mark.parametrize("groups", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("where", ["", "pods", "pods/ours"])
def test_the_limit_of_every_group_around_the_process_counts(
    groups: str, where: str, tmp_path: Path, monkeypatch
) -> None:
    assert 0 < free() < 1 << 50
    monkeypatch.setattr(scratch, "_GROUPS", tmp_path)
    monkeypatch.setattr(scratch, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(groups)
    folder = (tmp_path / "memory" if groups == V1 else tmp_path) / where
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("memory.limit_in_bytes" if groups == V1 else "memory.max")
    file.write_text("50000000\n")
    total = "total_rss" if groups == V1 else "anon"
    (folder / "memory.stat").write_text(f"file 99999999\n{total} 20000000\n")
    assert free() == 30_000_000
    file.write_text("max\n")
    assert free() > 30_000_000


@pytest.mark.parametrize("kind", ["weights", "delta"])
def test_a_state_made_on_disk_is_the_one_made_in_memory(kind, tmp_path, fixed_entropy) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "w": torch.randn(SHAPE, generator=generator),
        "half": torch.randn(SHAPE, generator=generator).bfloat16(),
        "kept": torch.randn(SHAPE, generator=generator),
        "bn.running_var": torch.ones(500_000),
    }
    local = {name: value + 0.01 for name, value in base.items()}
    treatments = {name: Treatment(noise_std=0.1, keep=0.5) for name in base}
    treatments["kept"] = Treatment(action=Action.WITHHOLD)
    plan = Plan(Action.RELEASE, treatments, (NormBound(frozenset(base), 1.0),), ())
    made = []
    for rooms in (room, Scratch(tmp_path, 1 << 20)):
        update = Update.from_states(base, local, statistics_as_parameters=True)
        prepared = prepare(update, plan, base_std=0.0)
        made.append(transform(update, prepared, kind=kind, entropy=fixed_entropy(1), rooms=rooms))
    assert all(torch.equal(made[0][name], made[1][name]) for name in base)


RELEASE = dedent("""
    import resource, signal, sys
    from pathlib import Path
    import safetensors.torch, torch
    import sentinel
    from sentinel.state import StateFolder

    folder, unit, headroom, largest = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

    def figure(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    def local_of(state):
        return {name: value + 0.01 for name, value in state.items()}

    guard = sentinel.Guard(folder / f"{unit}.toml", folder / unit)
    small = {"w": torch.zeros(300, 300)}
    with guard.round(0, small) as rnd:
        pass
    rnd.release(local_of(small))  # detectors, tables and threads are there

    base = safetensors.torch.load_file(folder / "global")
    local = safetensors.torch.load_file(folder / "local")
    size = sum(value.nbytes for value in base.values())
    held = figure("RssAnon")
    limit = figure("VmData") + headroom
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        with guard.round(1, base) as rnd:
            pass
        released = rnd.release(local)
    except sentinel.Withheld as withheld:
        print("withheld", withheld.reason, StateFolder(folder / unit).ledger.head().seq)
    else:
        norm = sum(float((released[n] - base[n]).square().sum()) for n in base) ** 0.5
        print("released", size, figure("RssAnon") - held, norm)
""")
POLICIES = {
    "none": """
schema = 1
name = "none"
[[rule]]
id = "baseline"
max_norm = 1.0
noise_ratio = 1.0
""",
    "site": """
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 50.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = 1.0
[[rule]]
id = "baseline"
""",
}


def release_in_little_memory(unit: str, folder: Path, largest: int) -> list[str]:
    """Release 160 MB, held in files, with room for 120 MB more; what came of it."""
    base = {f"l{i}.weight": torch.full((1000, 1000), 0.1 * i) for i in range(40)}
    local = {name: value + 0.01 for name, value in base.items()}
    safetensors.torch.save_file(base, folder / "global")
    safetensors.torch.save_file(local, folder / "local")
    (folder / f"{unit}.toml").write_text(POLICIES[unit])
    (folder / f"{unit}.toml").chmod(0o600)
    command = [sys.executable, "-c", RELEASE, str(folder), unit, str(120 << 20), str(largest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert not list((folder / unit / "releases").glob(".*"))
    return done.stdout.split()


@pytest.mark.parametrize("unit", ["none", "site"])
def test_an_update_larger_than_the_memory_left_is_released(unit: str, tmp_path: Path) -> None:
    word, size, grown, norm = release_in_little_memory(unit, tmp_path, largest=1 << 40)
    assert word == "released"
    assert int(grown) < 120 << 20 < int(size)
    assert 0.5 < float(norm) < 2.0 * 40_000_000**0.5


@pytest.mark.parametrize("unit", ["none", "site"])
def test_where_the_disk_has_no_room_for_it_nothing_leaves(unit: str, tmp_path: Path) -> None:
    """And nothing is charged but the round before it: a full disk says nothing about anybody."""
    assert release_in_little_memory(unit, tmp_path, largest=2 << 20) == [
        "withheld",
        "storage-failed",
        "1",
    ]
