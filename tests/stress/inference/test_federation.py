"""The federation is federated averaging, and a guard of each hospital's own is at its door."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.stress.inference.federation import Doors, Site, Watched, federate
from sentinel.stress.inference.loop import Loop
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import copied
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("known_noise")


def sites(counts: dict[str, int]) -> dict[str, Site]:
    """Hospitals of which the first so many patients are members."""
    made = {}
    for name, count in counts.items():
        cohort = cohorts.load(name)
        members = torch.arange(len(cohort)) < count
        made[name] = Site(Records(cohort.rows, cohort.labels), members)
    return made


def run(home: Path, policy: str | None, counts: dict[str, int], rounds: int = 2) -> Watched:
    model = network(13, 16, torch.Generator().manual_seed(0))
    start, hospitals = copied(model.state_dict()), sites(counts)
    guards = Doors(hospitals, home, policy).open("run")
    order = torch.Generator().manual_seed(1)
    return federate(
        Loop(model, binary_loss, 0.1), start, hospitals, guards, rounds=rounds, order=order
    )


def test_one_full_step_of_bare_sites_is_one_step_on_all_their_members(tmp_path: Path) -> None:
    """Reference: SGD on the pooled members; averages weighted by cohort are means over all."""
    counts = {"cleveland": 60, "va": 20}
    watched = run(tmp_path, None, counts, rounds=1)
    model = network(13, 16, torch.Generator().manual_seed(0))
    parts = [site.train for site in sites(counts).values()]
    rows, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("inputs", "labels"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    binary_loss(model(rows), labels).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(watched.final[name], value, atol=1e-6)


def test_the_server_sees_every_round_of_every_site(tmp_path: Path) -> None:
    watched = run(tmp_path, None, {"cleveland": 60, "va": 20}, rounds=3)
    assert {name: len(seen) for name, seen in watched.seen.items()} == {"cleveland": 3, "va": 3}
    assert watched.withheld == 0
    first, second = watched.seen["va"][:2]
    assert not torch.equal(first.sent["0.weight"], second.sent["0.weight"])


def test_guarded_sites_release_with_the_noise_of_their_policy(tmp_path: Path) -> None:
    watched = run(tmp_path, "tabular-ehr", {"cleveland": 60, "va": 20})
    for seen in watched.seen.values():
        assert all(float(one.std.min()) > 0.0 for one in seen)
        assert all(0.5 < float(one.released.norm()) < 2.0 for one in seen)


def test_what_a_guard_withholds_is_counted_and_not_averaged(tmp_path: Path) -> None:
    """Eight patients are fewer than the policy's minimum."""
    watched = run(tmp_path, "tabular-ehr", {"cleveland": 60, "va": 8})
    assert watched.withheld == 2
    assert watched.seen["va"] == []
    assert len(watched.seen["cleveland"]) == 2
