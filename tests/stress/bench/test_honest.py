"""Honest runs are what their kind says, and the same from the same seed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.stress.bench.honest import (
    KINDS,
    Kind,
    Round,
    Run,
    Way,
    _turn,
    honest_run,
    honest_runs,
)
from sentinel.stress.bench.nets import LOW_RANK, NETS, World, net, sites

if TYPE_CHECKING:
    from sentinel.stress.layers import State

pytestmark = pytest.mark.usefixtures("one_thread")

MLP = net("mlp-20-96-3")


def run_of(name: str, architecture: str = "mlp-20-96-3", rounds: int | None = None) -> Run:
    kind = next(kind for kind in KINDS if kind.name == name)
    if rounds is not None:
        kind = replace(kind, rounds=rounds)
    return honest_run(kind, net(architecture), 0, torch.Generator().manual_seed(1))


def states_of(name: str, architecture: str = "mlp-20-96-3") -> list[State]:
    return [one.state for one in run_of(name, architecture).rounds]


@pytest.mark.parametrize("architecture", [one.name for one in NETS])
def test_every_architecture_trains_in_a_federation(architecture: str) -> None:
    run = honest_run(Kind("any", rounds=2), net(architecture), 1, torch.Generator().manual_seed(2))
    first, second = run.rounds
    assert not first.broken
    assert first.state.keys() == run.module.state_dict().keys()
    assert any(not first.state[name].equal(second.state[name]) for name in first.state)
    records, labels = run.site.draw(3)
    assert records.shape == (3, *net(architecture).shape)
    assert int(labels.max()) < net(architecture).classes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_gives_rounds_that_hold_together(kind: Kind) -> None:
    nets = [one for one in kind.nets if not one.costly and one.name != "resnet18-64"]
    chosen = replace(kind, before=min(kind.before, 2), rounds=4)
    run = honest_run(chosen, (nets or kind.nets)[0], 0, torch.Generator().manual_seed(3))
    rounds = list(run.rounds)
    assert [one.number for one in rounds] == list(range(chosen.before, chosen.before + 4))
    for one in rounds:
        finite = all(bool(value.isfinite().all()) for value in one.state.values())
        assert finite or one.broken


def test_the_same_seed_gives_the_same_rounds() -> None:
    def first(seed: int) -> list[Round]:
        return list(next(honest_runs(0.01, seed)).rounds)

    one, again, other = first(4), first(4), first(5)
    for left, right in zip(one, again, strict=True):
        assert all(left.state[name].equal(right.state[name]) for name in left.state)
    assert not one[0].state["0.weight"].equal(other[0].state["0.weight"])


def test_chunks_together_are_the_whole_corpus() -> None:
    """Which kinds, which architectures and which first values, whatever the chunks."""

    def made(first: int, step: int) -> list[tuple[str, str, float]]:
        kinds = [replace(kind, before=0) for kind in KINDS[:8]]
        runs = honest_runs(0.2, 4, kinds, (first, step))
        return [
            (run.kind, run.net.name, float(next(run.rounds).state.popitem()[1].double().sum()))
            for run in runs
        ]

    whole = made(0, 1)
    assert sorted(made(0, 3) + made(1, 3) + made(2, 3)) == sorted(whole)
    assert len({net for _, net, _ in whole}) > len(NETS) // 2


def test_every_costly_architecture_has_runs_in_the_full_corpus() -> None:
    nets = [
        _turn(kind.nets, index, place, 1.0)
        for place, kind in enumerate(KINDS)
        for index in range(kind.runs)
    ]
    for one in NETS:
        assert nets.count(one) >= (12 if one.costly else 24)


def test_the_full_corpus_has_what_the_protocol_asks_for() -> None:
    """3000 rounds from 300 runs, 100 rounds of each kind, 50 of nets over 5 M parameters."""
    assert sum(kind.runs for kind in KINDS) >= 300
    assert sum(kind.runs * kind.rounds for kind in KINDS) >= 3000
    for kind in KINDS:
        assert kind.runs * kind.rounds >= (50 if kind.name == "over 5 M parameters" else 100)


@pytest.mark.parametrize(("name", "share"), [("pruned 50 %", 0.5), ("pruned 90 %", 0.9)])
def test_a_pruned_model_stays_pruned(name: str, share: float) -> None:
    for state in states_of(name)[2:]:
        zeros = float((state["0.weight"] == 0.0).double().mean())
        assert zeros >= share - 0.01


def test_frozen_layers_do_not_move_and_the_others_do() -> None:
    first, *_, last = states_of("frozen layers")
    assert first["0.weight"].equal(last["0.weight"])
    assert not first["2.weight"].equal(last["2.weight"])


def test_a_rollback_sends_an_earlier_model_again() -> None:
    states = states_of("rollback")
    assert states[9]["0.weight"].equal(states[1]["0.weight"])
    assert not states[8]["0.weight"].equal(states[1]["0.weight"])


def test_four_bits_leave_fifteen_values() -> None:
    weight = states_of("4-bit")[-1]["0.weight"]
    assert len(weight.unique()) <= 15


def test_half_precision_is_sent_and_full_precision_kept() -> None:
    states = states_of("float16")
    assert states[-1]["0.weight"].dtype == torch.float16


def test_adapters_begin_at_zero_and_grow() -> None:
    kind = next(kind for kind in KINDS if kind.name.startswith("LoRA"))
    run = honest_run(kind, LOW_RANK[0], 0, torch.Generator().manual_seed(1))
    states = [one.state for one in run.rounds]
    assert not states[0]["0.lora_b.weight"].any()
    assert states[-1]["0.lora_b.weight"].any()


def test_a_tied_embedding_stays_tied() -> None:
    states = states_of("tied embeddings", "tied-text-60")
    assert "words.weight" in states[-1]
    assert not states[0]["words.weight"].equal(states[-1]["words.weight"])


def test_a_site_of_one_class_draws_no_other() -> None:
    generator = torch.Generator().manual_seed(1)
    for place, site in enumerate(sites(World(MLP, generator), 3, 0.0, generator)):
        assert set(site.draw(20)[1].tolist()) == {place}


def test_a_re_initialised_layer_differs_from_training() -> None:
    rounds = [one.state for one in run_of("a re-initialised layer").rounds]
    steps = [
        float((after["0.weight"] - before["0.weight"]).norm())
        for before, after in itertools.pairwise(rounds)
    ]
    assert max(steps) > 10 * sorted(steps)[len(steps) // 2]


def test_a_federation_that_runs_away_is_called_broken() -> None:
    """A learning rate far too high: nothing here may count as a false alarm."""
    kind = Kind("runaway", replace(Way(), factor=lambda _: 3000.0), rounds=4)
    run = honest_run(kind, MLP, 0, torch.Generator().manual_seed(1))
    assert [one.broken for one in run.rounds][-1]


def test_scaffold_draws_unlike_sites_together() -> None:
    """The control variates cancel the drift: after rounds of one-class sites, less is left."""

    def spread(scaffold: bool) -> float:  # noqa: FBT001 - both sides of one comparison
        way = replace(Way(), alpha=0.0, sites=3, steps=6, scaffold=scaffold)
        run = honest_run(Kind("any", way, rounds=25), MLP, 0, torch.Generator().manual_seed(1))
        states = [one.state["0.weight"] for one in run.rounds]
        return float((states[-1] - states[-5]).norm())

    assert spread(scaffold=True) > 0.0
    assert spread(scaffold=True) != spread(scaffold=False)
