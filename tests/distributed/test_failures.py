"""Ranks that differ, raise, die or hang: all fail closed, and the log says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import scenarios
from ranks import all_in_turn, together

if TYPE_CHECKING:
    from pathlib import Path

    Ended = dict[tuple[object, ...], list[Any]]

LOST, DISAGREE = "Withheld rank-lost", "Withheld ranks-disagree"
STARTS = ["policy", "run", "federation", "dataset", "inspection"]
ABOUT = ["number", "state", "patients", "model", "dtype"]
APART = ["parameter", "replicated DTensor", "statistic"]
CALLS = [
    *((scenarios.disagreeing, {"about": about}) for about in (*STARTS, *ABOUT)),
    *((scenarios.replicas_run_apart, {"where": where}) for where in APART),
    *(
        (scenarios.a_block_raises, {"rank": rank, "inside": inside})
        for rank in (0, 1)
        for inside in (False, True)
    ),
    *((scenarios.asking_for_different_things, {"what": what}) for what in ("kind", "everywhere")),
    (scenarios.a_release_on_the_leader_alone, {}),
    (scenarios.a_crafted_model, {}),
    (scenarios.withheld_by_a_rule, {}),
    (scenarios.a_leader_that_cannot_start, {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenarios keep their state."""
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def ended(folder: Path) -> Ended:
    """What both ranks returned, of each scenario in which nobody dies; in one pair of processes."""
    return all_in_turn(folder, CALLS)


@pytest.mark.parametrize("about", STARTS)
def test_guards_that_were_not_given_the_same_do_not_start(about: str, ended: Ended) -> None:
    assert list(ended["disagreeing", about]) == [{"start": DISAGREE}] * 2


@pytest.mark.parametrize("about", ABOUT)
def test_a_round_that_the_ranks_do_not_agree_on_is_refused_on_all(about: str, ended: Ended) -> None:
    """Nobody trains; the refusal is on record; the next round, which they agree on, goes on."""
    for rank in ended["disagreeing", about]:
        assert rank["first"] == DISAGREE
        assert rank["trained"] == []
        assert rank["then"] == "MisuseError"
        assert rank["after"] == "ok"
        assert "round.refused ranks-disagree" in rank["records"]
        assert rank["records"].count("update.released") == 1


@pytest.mark.parametrize("what", ["kind", "everywhere"])
def test_ranks_that_ask_for_different_things_get_nothing(what: str, ended: Ended) -> None:
    assert list(ended["asking_for_different_things", what]) == [DISAGREE] * 2


def test_a_release_that_only_the_leader_asks_for_is_withheld(ended: Ended) -> None:
    """The other rank is at the next round then; the two are not at the same step."""
    leader, other = ended["a_release_on_the_leader_alone",]
    assert leader == [DISAGREE, LOST]
    assert other == ["not asked", DISAGREE]


@pytest.mark.parametrize("where", ["parameter", "replicated DTensor"])
def test_a_replica_that_ran_apart_is_withheld_on_all_ranks(where: str, ended: Ended) -> None:
    leader, other = ended["replicas_run_apart", where]
    for rank in (leader, other):
        assert rank["release"] == DISAGREE
        assert rank["again"] == "MisuseError"
        assert rank["after"] == "ok"
    assert "update.withheld ranks-disagree" in leader["records"]
    assert "reason=ranks-disagree" in leader["alerts"]


def test_a_replica_of_a_shard_that_ran_apart_is_withheld_on_all_ranks(tmp_path: Path) -> None:
    """Of four ranks, two hold each shard; one of the four has changed its own."""
    ranks = together(scenarios.a_replica_of_a_shard_ran_apart, tmp_path, world=4)
    assert [rank["release"] for rank in ranks] == [DISAGREE] * 4
    assert "update.withheld ranks-disagree" in ranks[0]["records"]
    assert "update.released" not in ranks[0]["records"]


def test_running_statistics_may_differ_between_replicas(ended: Ended) -> None:
    """DDP keeps them per rank; they do not leave."""
    for rank in ended["replicas_run_apart", "statistic"]:
        assert rank["release"] == "ok"


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_that_raises_on_one_rank_aborts_the_round_on_all(
    rank: int, *, inside: bool, ended: Ended
) -> None:
    """That rank sees its own error at once, the other a reason code; the next round goes on."""
    ranks = ended["a_block_raises", rank, inside]
    raised, other = ranks[rank], ranks[1 - rank]
    assert raised["block"] == "ValueError"
    assert other["block"] == LOST
    record = "round.aborted" if rank == 0 else "update.withheld rank-lost"
    for one in ranks:
        assert one["after"] == "MisuseError"
        assert one["next"] == "ok"
        assert record in one["records"]
        assert one["records"].count("update.released") == 1


def test_no_text_of_an_error_crosses_ranks_or_is_written(ended: Ended, folder: Path) -> None:
    assert all("of the loader" not in str(rank) for rank in ended["a_block_raises", 1, False])
    files = [path for path in folder.rglob("state/**/*") if path.is_file()]
    assert files
    assert all(b"of the loader" not in path.read_bytes() for path in files)


def test_a_refused_global_model_is_refused_on_all_ranks_and_loaded_on_none(ended: Ended) -> None:
    for rank in ended["a_crafted_model",]:
        assert rank == {"entered": "RoundRefused crafted-model", "untouched": True}


def test_what_the_policy_withholds_is_withheld_on_all_ranks(ended: Ended) -> None:
    answers = ended["withheld_by_a_rule",]
    assert answers[0] == answers[1]
    assert answers[0] in ("Withheld too-sensitive", "Withheld withheld-by-rule")


def test_where_the_leader_cannot_start_no_rank_does(ended: Ended) -> None:
    assert list(ended["a_leader_that_cannot_start",]) == [
        "Withheld state-unsafe",
        LOST,
    ]


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        pytest.param("before the guard", "ddp", marks=pytest.mark.soak),
        pytest.param("before entering", "ddp", marks=pytest.mark.soak),
        pytest.param("while loading", "fsdp", marks=pytest.mark.soak),
        pytest.param("before release", "ddp", marks=pytest.mark.soak),
        pytest.param("gathering", "ddp", marks=pytest.mark.soak),
        ("gathering", "fsdp"),
        ("before taking the result", "fsdp"),
    ],
)
def test_where_a_follower_dies_the_leader_withholds(when: str, kind: str, tmp_path: Path) -> None:
    """Whenever it dies, no state comes out; the guard is used up."""
    leader, other = together(scenarios.a_rank_dies, tmp_path, when=when, rank=1, kind=kind)
    assert other is None
    assert leader["round"] == LOST
    assert "state" not in leader
    assert leader.get("next", LOST) == LOST
    if when != "before the guard":
        assert any(record.endswith("rank-lost") for record in leader["records"])
    released = leader.get("records", []).count("update.released")
    assert released == (1 if when == "before taking the result" else 0)


@pytest.mark.soak
def test_a_round_whose_follower_died_can_be_done_again(tmp_path: Path) -> None:
    """Nothing had been decided about its update: it was neither charged nor closed."""
    together(scenarios.a_rank_dies, tmp_path, when="gathering", rank=1, kind="ddp")
    first, second = together(scenarios.the_round_again, tmp_path, kind="ddp")
    assert not first["replayed"]
    assert first["state"] == second["state"] is not None
    assert first["charges"] == 1


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        pytest.param("before the guard", "ddp", marks=pytest.mark.soak),
        pytest.param("before entering", "ddp", marks=pytest.mark.soak),
        pytest.param("while loading", "fsdp", marks=pytest.mark.soak),
        pytest.param("before release", "ddp", marks=pytest.mark.soak),
        pytest.param("gathering", "fsdp", marks=pytest.mark.soak),
        ("before the result", "fsdp"),
    ],
)
def test_where_the_leader_dies_the_others_withhold(when: str, kind: str, tmp_path: Path) -> None:
    leader, other = together(scenarios.a_rank_dies, tmp_path, when=when, rank=0, kind=kind)
    assert leader is None
    assert other["round"] == LOST
    assert "state" not in other


@pytest.mark.parametrize(
    ("rank", "kind"),
    [
        pytest.param(0, "ddp", marks=pytest.mark.soak),
        pytest.param(1, "ddp", marks=pytest.mark.soak),
        pytest.param(0, "fsdp", marks=pytest.mark.soak),
        (1, "fsdp"),
    ],
)
def test_a_rank_that_dies_in_training_releases_nothing(
    rank: int, kind: str, tmp_path: Path
) -> None:
    """The living rank's own training fails; that error is its own, and the round is aborted."""
    ranks = together(scenarios.a_rank_dies, tmp_path, when="training", rank=rank, kind=kind)
    living = ranks[1 - rank]
    assert ranks[rank] is None
    assert living["round"] in ("RuntimeError", "DistBackendError")
    assert "state" not in living
    assert living["next"] == LOST
    assert living["records"].count("update.released") == 0
    if rank == 1:
        assert "round.aborted" in living["records"]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_a_release_whose_leader_died_is_given_to_all_ranks_by_the_next_job(
    kind: str, tmp_path: Path
) -> None:
    """It died after the record and before it told anybody: the stored bytes are the release."""
    died, other = together(
        scenarios.a_rank_dies, tmp_path, when="before the result", rank=0, kind=kind
    )
    assert died is None
    assert other["records"][-1] == "update.released"
    first, second = together(scenarios.the_round_again, tmp_path, kind=kind)
    assert first["replayed"]
    assert second["replayed"]
    assert first["state"] == second["state"]


@pytest.mark.parametrize(
    "when",
    [pytest.param(when, marks=pytest.mark.soak) for when in ("entering", "training")] + ["release"],
)
def test_a_rank_that_hangs_counts_as_lost_after_the_timeout(when: str, tmp_path: Path) -> None:
    leader, late = together(scenarios.a_rank_hangs, tmp_path, when=when)
    assert leader["round"] == LOST
    assert late["round"] == LOST
    assert any(record.endswith("rank-lost") for record in leader["records"])
    assert "update.released" not in late["records"]
