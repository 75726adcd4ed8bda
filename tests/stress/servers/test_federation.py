"""A server that turns has the honest server's methods, and is honest in all other rounds."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import FedAvgServer, MaliciousServer
from sentinel.stress.servers.raw import gradient_of

if TYPE_CHECKING:
    from sentinel.stress.layers import State


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nets.drawn(lambda: nets.mlp(13, 32, 1), seeded(1))


def same(first: State, second: State) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_honest_server_takes_the_weighted_mean() -> None:
    server = FedAvgServer({"w": torch.zeros(2), "n": torch.tensor(5)})
    states = {"a": {"w": torch.ones(2), "n": torch.tensor(9)}}
    states["b"] = {"w": torch.tensor([4.0, 7.0]), "n": torch.tensor(9)}
    server.aggregate(1, states, {"a": 3.0, "b": 1.0, "absent": 5.0})
    after = server.global_state(2)
    assert torch.allclose(after["w"], torch.tensor([1.75, 2.5]))
    assert after["n"] == 5
    server.aggregate(2, {}, {"a": 3.0})
    assert torch.equal(server.global_state(3)["w"], after["w"])


def test_what_a_client_does_to_its_global_model_does_not_reach_the_server() -> None:
    server = FedAvgServer({"w": torch.zeros(2)})
    server.global_state(1)["w"].add_(1)
    assert torch.equal(server.global_state(1)["w"], torch.zeros(2))


def test_a_hospital_calls_both_servers_alike() -> None:
    for name in ("global_state", "aggregate"):
        honest, evil = (getattr(server, name) for server in (FedAvgServer, MaliciousServer))
        assert inspect.signature(honest) == inspect.signature(evil)


def test_the_malicious_server_turns_in_one_round_and_is_honest_before_and_after() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    evil = MaliciousServer(start, model, servers.binning, turns_at=2, generator=seeded())
    honest = FedAvgServer(start)
    for number in (1, 2, 3):
        sent = [evil.global_state(number, client) for client in ("a", "b")]
        assert same(sent[0], honest.global_state(number)) is (number != 2)
        assert same(*sent)
        local = {name: value + 1 for name, value in sent[0].items()}
        evil.aggregate(number, {"a": local}, {"a": 1.0})
        if number != 2:
            honest.aggregate(number, {"a": local}, {"a": 1.0})
    assert same(evil.global_state(4), honest.global_state(4))


def test_one_round_in_three_is_crafted_and_no_other() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    evil = MaliciousServer(start, model, servers.qbi, turns_at=2, every=3, generator=seeded())
    crafted = [number for number in range(10) if not same(evil.global_state(number), start)]
    assert crafted == [2, 5, 8]


def test_one_client_only_is_attacked_and_the_others_get_the_honest_model() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    evil = MaliciousServer(
        start,
        model,
        servers.honest,
        turns_at=1,
        generator=seeded(),
        clients={"target": servers.binning},
    )
    for _ in range(2):  # asked again, it gives the same
        assert same(evil.global_state(1, "other"), start)
        assert same(evil.global_state(1), start)
        sent = evil.global_state(1, "target")
        assert not same(sent, start)
        assert same(sent, evil.global_state(1, "target"))
    assert same(evil.global_state(2, "target"), start)


def test_a_scan_sends_its_parts_in_turn_from_the_same_model() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    parts = [functools.partial(servers.scan, part=number, parts=3) for number in range(3)]
    evil = MaliciousServer(start, model, parts, turns_at=1, every=1, generator=seeded())
    sent = []
    for number in range(1, 5):
        sent.append(evil.global_state(number))
        evil.aggregate(number, {"a": {name: value + 1 for name, value in start.items()}}, {"a": 1})
    assert not same(sent[0], sent[1])
    assert not same(sent[1], sent[2])
    assert same(sent[0], sent[3])


def test_a_search_is_told_what_the_client_sent_back_and_only_of_its_own_rounds() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    rows, labels = torch.randn(24, 13, generator=seeded(2)), torch.arange(24) % 2
    search = servers.Search(sample=torch.randn(500, 13, generator=seeded(3)))
    assert isinstance(search, servers.Learner)
    evil = MaliciousServer(
        start,
        model,
        servers.honest,
        turns_at=1,
        every=2,
        generator=seeded(),
        clients={"target": search},
    )
    sent, left = [], []
    for number in (1, 2, 3):
        received = evil.global_state(number, "target")
        evil.global_state(number, "other")
        sent.append(received)
        values = gradient_of(model, received, (rows, labels), "0").values
        local = {name: value - values[name] for name, value in received.items()}
        evil.aggregate(number, {"target": local, "other": start}, {"target": 1.0, "other": 1.0})
        left.append(search.open)
    assert left[0] > left[2]
    assert left[1] == left[0]
    assert not same(sent[0], sent[2])


def test_one_round_in_fifty_is_the_only_one_that_is_crafted() -> None:
    model = mlp()
    start = servers.copied(model.state_dict())
    evil = MaliciousServer(start, model, servers.qbi, turns_at=7, every=50, generator=seeded())
    crafted = [number for number in range(150) if not same(evil.global_state(number), start)]
    assert crafted == [7, 57, 107]


def test_a_server_without_a_craft_or_with_a_bad_pace_is_refused() -> None:
    model = mlp()
    for crafts, every in (((), None), (servers.qbi, 0)):
        with pytest.raises(MisuseError, match="needs a craft"):
            MaliciousServer(
                model.state_dict(), model, crafts, turns_at=1, every=every, generator=seeded()
            )
