"""A bound that is about a tensor of several names counts it once, by whichever name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import sentinel
from sentinel.bounds import learn
from sentinel.releases import RoundKey
from sentinel.terms import Evidence

if TYPE_CHECKING:
    from pathlib import Path

POLICY = """
schema = 1
name = "ties"
[[rule]]
id = "all"
max_norm = 3.0
[[rule]]
id = "follows"
match = [{match}]
max_norm = "auto"
max_norm_floor = 0.1
max_norm_ceiling = 10.0
"""


def learnt(folder: Path, match: str, *, tied: bool) -> dict[str, object]:
    """What is remembered after a release of half the bound, of a tensor with one name or two."""
    folder.mkdir()
    path = folder / "policy.toml"
    path.write_text(POLICY.format(match=match))
    path.chmod(0o600)
    guard = sentinel.Guard(path, folder / "site", unsafe_skip_inspection=True)
    weight = torch.zeros(400)
    out = torch.full((400,), 0.5 / 20)  # of norm 0.5
    names = ["w", "twin"] if tied else ["w"]
    evidence = Evidence(
        {"w": 400, "twin": 0} if tied else {"w": 400},
        sensitivity=0.0,
        suspicion=0.0,
        budget_spent=0.0,
        unhealthy=False,
        auto_norms={"follows": 1.0},
    )
    learn(
        guard._door.house,
        RoundKey("default", "default", 1),
        evidence,
        dict.fromkeys(names, weight),
        dict.fromkeys(names, out),
        deltas=False,
        aliases={"twin": "w"} if tied else {},
    )
    (file,) = (folder / "site" / "history").glob("*.bounds.json")
    found: dict[str, object] = json.loads(file.read_text())["rules"]["follows"]
    return found


@pytest.mark.parametrize("match", ['"w", "twin"', '"**"', '"twin"', '"w"'])
def test_a_tied_tensor_teaches_what_it_would_with_one_name(tmp_path: Path, match: str) -> None:
    one = learnt(tmp_path / "one", '"w"', tied=False)
    tied = learnt(tmp_path / "tied", match, tied=True)
    assert tied == one
    assert one["norm"] != 1.0
