"""Hidden traps and the dead model of a suppression are tried, and their fate is in the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.policy import load_policy
from sentinel.stress.lab.exchange import Site, raw
from sentinel.stress.lab.loading import load_subject, subject_of
from sentinel.stress.lab.plan import make_plan
from sentinel.stress.lab.record import record
from sentinel.stress.lab.runner import Options, run_lab
from sentinel.stress.lab.servers import LATE, SERVERS, misfit
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.stress.lab.words import sentences, servers_tried

if TYPE_CHECKING:
    from sentinel.stress.lab.result import Result, Row
    from sentinel.stress.lab.subject import Subject

HIDDEN = tuple(name for name in LATE if name != "suppression")


def hearts() -> Subject:
    """The perceptron and the patients of the demo."""
    home = "sentinel.demo.subjects"
    return load_subject(f"{home}:heart_net", f"{home}:hearts", torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """The test of the shipped policy; made once."""
    return {}


@pytest.fixture
def late(results, monkeypatch) -> dict[str, Row]:
    """What came of the servers that are tried last; the others are left out, to be quick."""
    if "hearts" not in results:
        few = {name: SERVERS[name] for name in (HONEST, *LATE)}
        monkeypatch.setattr("sentinel.stress.lab.plan.SERVERS", few)
        options = Options(("rows",), seconds=600.0, curves=False)
        results["hearts"] = run_lab(hearts(), load_policy("tabular-ehr"), options)
    rows = results["hearts"].rows
    return {row.item.setting.server: row for row in rows if row.item.setting.server in LATE}


def test_every_hidden_trap_and_the_dead_model_is_tried_on_the_hearts_perceptron(late) -> None:
    assert tuple(late) == LATE
    assert all(row.raw.updates == row.item.updates > 0 for row in late.values())
    assert all(row.error is None for row in late.values())


def test_hidden_traps_that_are_read_raw_are_let_through_and_the_result_says_so(
    late, results
) -> None:
    """Whichever of them the inspection notices, what was done with each update is counted."""
    reading = [name for name in HIDDEN if not late[name].proves_nothing]
    assert len(reading) >= 2
    assert late["binning-gaussian, jittered"].raw.finding.main.mean > 0.2
    for row in late.values():
        assert row.policy.updates == row.item.updates
        assert row.alone.updates == sum(row.policy.kept.values())
    passed = [name for name in reading if late[name].policy.released]
    assert passed
    assert all(late[name].policy.finding.main.mean < 0.1 for name in passed)
    said = next(one for one in sentences(results["hearts"]) if "did not refuse every time" in one)
    assert all(name in said for name in passed)
    assert "suppression" not in said
    told = {row["server"]: row for row in record([results["hearts"]])["subjects"][0]["attacks"]}
    for name in HIDDEN:
        released = told[name]["released"]
        assert released["released"] + sum(released["kept_in"].values()) > 0


def test_the_dead_model_of_a_suppression_is_refused_and_by_itself_proves_nothing(late) -> None:
    assert late["suppression"].policy.kept == {"crafted-model": late["suppression"].item.updates}
    assert late["suppression"].proves_nothing


def test_a_dead_model_leaves_the_sum_of_two_clients_what_the_other_one_sent(table) -> None:
    """In every weight, which is why the lab tries the one that is left under an honest server."""
    site = Site(table, torch.Generator().manual_seed(0))
    one = raw(site.update(Setting(records=32), SERVERS[HONEST])).delta
    other = raw(site.update(Setting("suppression", records=32), SERVERS["suppression"])).delta
    for name, value in one.items():
        assert torch.allclose(value + other[name], value) is (name != "2.bias"), name


def test_hidden_traps_come_after_all_others_and_a_short_plan_is_as_without_them(
    table, plain
) -> None:
    def servers(seconds: float, *, core: bool) -> list[str]:
        plan = make_plan(table, plain(), ("rows",), seconds, torch.Generator().manual_seed(0))
        items = plan.items[: plan.core] if core else plan.items
        return [item.setting.server for item in items]

    everything = servers(600.0, core=False)
    assert everything[-len(LATE) :] == list(LATE)
    assert set(servers(20.0, core=True)) >= {HONEST, "binning-gaussian"}
    assert not set(servers(20.0, core=True)) & set(LATE)


def test_a_hidden_trap_fits_where_its_plain_one_does() -> None:
    """And says of a net that has no place for it what the plain one says."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(128, 1, 8, 8, generator=generator)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    subject = subject_of(narrow, (pictures, torch.arange(128) % 2), generator, "pictures")
    for name in HIDDEN:
        plain = misfit(name.split(",")[0], subject, torch.Generator())
        assert misfit(name, subject, torch.Generator()) == plain
    assert misfit("binning-gaussian, jittered", subject, torch.Generator()) is not None
    assert misfit("fishing-class, mixed", subject, torch.Generator()) is None


@pytest.mark.usefixtures("late")
def test_a_reader_is_told_how_a_trap_was_hidden(results) -> None:
    told = dict(servers_tried(results["hearts"]))
    assert "half its size" in told["binning-gaussian, jittered"]
    assert "the dead model that the others get" in told["suppression"]
    assert all(title.endswith(")") for name, title in told.items() if name != HONEST)
