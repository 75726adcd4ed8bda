"""Rounds of two real processes over gloo: one release, one draw, one charge, one answer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import scenarios
import torch
from ranks import Net, all_in_turn, state_of, together

from sentinel.distributed import Guard
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from pathlib import Path

    Ended = dict[tuple[object, ...], list[Any]]

KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp"])
MISUSES = {
    "sharded": ["MisuseError", "MisuseError"],  # shards, to a guard of one process
    "private": ["MisuseError", "MisuseError"],
    "private in one": ["MisuseError", "MisuseError"],  # a guard of one process, in a group
    "fsdp1": ["MisuseError", "MisuseError"],
    "number": ["MisuseError", "MisuseError"],
    "no state": ["MisuseError", "ok"],  # only the leader needs it
}
CALLS = [
    *(
        (scenario, {"kind": kind})
        for kind in ("ddp", "fsdp")
        for scenario in (
            scenarios.same_as_one_process,
            scenarios.same_as_one_process_by_parts,
            scenarios.a_bound_that_follows,
            scenarios.only_the_leader_gets_it,
            scenarios.noise_alone,
            scenarios.noise_of_a_promise_alone,
            scenarios.a_budget_that_is_spent,
            scenarios.not_finite_on_one_rank,
            scenarios.charges_under_a_promise,
            scenarios.replay,
            scenarios.the_global_state_on_the_leader_alone,
        )
    ),
    *((scenarios.misuse, {"what": what}) for what in MISUSES),
    (scenarios.own_streams, {}),
    (scenarios.odd_tensors, {}),
    (scenarios.probes_of_a_sharded_model, {}),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What both ranks returned, of each scenario; they run in one pair of processes."""
    return all_in_turn(tmp_path_factory.mktemp("rounds"), CALLS)


TIED = ("head.weight", "twin.weight")


@KINDS
@pytest.mark.parametrize("rules", ["same_as_one_process", "same_as_one_process_by_parts"])
def test_two_ranks_release_what_one_process_would(rules: str, kind: str, ended: Ended) -> None:
    """The norm is of the whole update, and replicas, shards and ties do not show in it."""
    leader, other = ended[rules, kind]
    assert leader["expected"] == leader["released"] == other["released"]
    for rank in (leader, other):
        assert rank["loaded"]
        assert rank["trained"]
        assert rank["order"]
        assert not rank["replayed"]


@KINDS
def test_a_bound_that_follows_is_that_of_one_process(kind: str, ended: Ended) -> None:
    """It moves from round to round, by what left alone; the leader remembers it for all ranks."""
    leader, other = ended["a_bound_that_follows", kind]
    assert leader["expected"] == leader["released"] == other["released"]
    assert len(set(leader["released"])) == 4
    assert leader["alone"] == leader["bounds"] == other["bounds"]
    (kept,) = [json.loads(bounds)["rules"]["baseline"] for bounds in leader["bounds"]]
    assert kept["number"] == 3
    assert 0.05 <= kept["norm"] <= 2.0
    assert kept["norm"] != pytest.approx(math.sqrt(0.05 * 2.0), rel=0.1)  # where it began


@KINDS
def test_only_the_leader_gets_the_release_where_nobody_asks_for_more(
    kind: str, ended: Ended
) -> None:
    leader, other = ended["only_the_leader_gets_it", kind]
    assert safetensors.torch.load(leader["release"]).keys() == state_of().keys()
    assert other["release"] is None
    assert leader["inspected"]
    assert not other["inspected"]
    assert leader["metrics"] == other["metrics"] == []
    assert leader["probed"] is (kind == "ddp")
    assert leader["read"] == sorted(state_of())
    assert other["read"] == []


@KINDS
def test_each_coordinate_gets_exactly_one_draw_of_the_right_size(kind: str, ended: Ended) -> None:
    """Two draws that were averaged would halve the variance, two that were summed double it."""
    leader, other = ended["noise_alone", kind]
    assert leader == other  # one draw for all ranks, not one each
    states = [safetensors.torch.load(released) for released in leader]
    noised = [name for name, _ in Net().named_parameters()]
    size = sum(states[0][name].numel() for name in noised)
    drawn = torch.stack([torch.cat([s[name].flatten() for name in noised]) for s in states])
    expected = 0.5 / math.sqrt(size)  # noise_ratio x max_norm / sqrt(D)
    # 20 x 513 draws: the sample deviation is within 4 x 0.7 % of the true one.
    assert float(drawn.double().std()) == pytest.approx(expected, rel=0.03)
    assert all(torch.equal(s[TIED[0]], s[TIED[1]]) for s in states)
    correlation = torch.corrcoef(drawn.double())
    assert float((correlation - torch.eye(20)).abs().max()) < 0.25  # rounds are independent


@KINDS
def test_under_a_promise_too_each_coordinate_gets_exactly_one_draw(kind: str, ended: Ended) -> None:
    """Of standard deviation clip_norm x noise_multiplier = 1, the same for all ranks."""
    leader, other = ended["noise_of_a_promise_alone", kind]
    assert leader == other
    states = [safetensors.torch.load(released) for released in leader]
    # Each parameter once: `twin.weight` is `head.weight`.
    noised = [name for name, _ in Net().named_parameters()]
    drawn = torch.stack([torch.cat([s[name].flatten() for name in noised]) for s in states])
    assert float(drawn.double().std()) == pytest.approx(1.0, rel=0.03)
    assert all(torch.equal(s[TIED[0]], s[TIED[1]]) for s in states)
    between = torch.corrcoef(drawn.double().t()[:40])  # of coordinates, over 20 rounds
    assert float((between - torch.eye(40)).abs().max()) < 0.95  # none is drawn twice


@KINDS
def test_a_spent_budget_keeps_the_round_closed_on_all_ranks(kind: str, ended: Ended) -> None:
    """Before training: nothing is loaded, and nothing more is charged."""
    for rank in ended["a_budget_that_is_spent", kind]:
        assert rank == {
            "first": "ok",
            "second": "Withheld budget-exhausted",
            "charges": 1,
            "untouched": True,
        }


@KINDS
def test_a_value_that_is_not_finite_on_one_rank_withholds_and_charges_on_all(
    kind: str, ended: Ended
) -> None:
    """NaN in a shard that the leader does not hold is seen as well."""
    for rank in ended["not_finite_on_one_rank", kind]:
        assert rank["release"] == "Withheld not-finite"
        assert rank["again"] == "MisuseError"
        assert rank["charges"] == 1


def test_replicas_of_shards_release_what_one_process_would(tmp_path: Path) -> None:
    """Four ranks, two copies in two shards each: every shard is read once."""
    ranks = together(scenarios.same_as_one_process, tmp_path, world=4, kind="hsdp")
    assert {rank["released"] for rank in ranks} == {ranks[0]["expected"]}
    assert all(rank["loaded"] and rank["trained"] for rank in ranks)


@KINDS
def test_a_round_of_two_ranks_is_charged_once(kind: str, ended: Ended) -> None:
    """Two rounds of two ranks: two charges, two releases."""
    leader, other = ended["charges_under_a_promise", kind]
    assert leader["records"].count("update.released") == 2
    assert leader["charges"] == other["charges"] == 2


def test_no_two_ranks_and_no_forked_child_share_a_stream_of_entropy(ended: Ended) -> None:
    streams = [stream for rank in ended["own_streams",] for stream in rank]
    assert len(set(streams)) == 4
    assert all(len(stream) == 32 for stream in streams)


@KINDS
def test_a_released_round_gives_the_stored_bytes_to_every_rank(kind: str, ended: Ended) -> None:
    """The local state is not looked at again: replicas that ran apart since do not matter."""
    leader, other = ended["replay", kind]
    assert len({*leader["states"], *other["states"]}) == 1
    assert leader["replayed"]
    assert other["replayed"]
    assert leader["records"].count("update.released") == 1
    assert leader["records"].count("update.replayed") == 2


def test_the_first_rank_of_a_subgroup_leads_it(tmp_path: Path) -> None:
    outside, leader, other = together(scenarios.a_subgroup, tmp_path, world=3)
    assert outside == "MisuseError"
    assert leader == (True, True)
    assert other == (True, False)


@KINDS
def test_the_global_state_may_be_on_the_leader_alone(kind: str, ended: Ended) -> None:
    leader, other = ended["the_global_state_on_the_leader_alone", kind]
    assert leader == (True, True)
    assert other == (True, False)


def test_a_sharded_model_is_probed_where_its_architecture_is_given(ended: Ended) -> None:
    leader, _ = ended["probes_of_a_sharded_model",]
    assert leader == (False, True)


def test_tensors_of_every_kind_arrive_as_they_were(ended: Ended) -> None:
    assert list(ended["odd_tensors",]) == [True, True]


def test_a_guard_of_one_process_does_not_import_the_sharded_tensors() -> None:
    """They take half a second to import."""
    code = "import sys, sentinel; sentinel.Guard; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_a_process_group_the_guard_of_one_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"sentinel\.Guard"):
        Guard("tabular-ehr", tmp_path / "state")


@pytest.mark.parametrize(("what", "expected"), MISUSES.items())
def test_what_cannot_be_right_is_refused_as_misuse(
    what: str, expected: list[str], ended: Ended
) -> None:
    assert list(ended["misuse", what]) == expected
