"""Moves: another model in a calm federation is found, and what honest servers do passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from sentinel.detection import History, Kind, inspect_global_model
from sentinel.detection.history import places_of
from sentinel.detection.trace import LENGTH, NOWHERE, cosine, distances, joined
from sentinel.stress import corpus, servers
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    State = dict[str, Tensor]

NET = next(net for net in corpus.NETS if net.name == "mlp-30-128-64-5")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int) -> State:
    return servers.copied(corpus.fresh(NET, seeded(seed)).state_dict())


def nudged(state: State, size: float, seed: int) -> State:
    """Every value moved by `size` of its layer's root mean square, as training moves it."""
    generator = seeded(seed)
    return {
        name: value
        + size * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


def calm(rounds: int = 8, size: float = 0.01) -> tuple[list[State], History]:
    states = [drawn(1)]
    for number in range(rounds):
        states.append(nudged(states[-1], size, number))
    history = History.of(states[0])
    for state in states[1:]:
        history = history.after(state)
    return states, history


def kinds(state: State, history: History) -> set[Kind]:
    return {found.kind for found in inspect_global_model(state, history).findings}


def test_another_model_in_a_calm_federation_is_found() -> None:
    _, history = calm()
    found = inspect_global_model(drawn(2), history)
    assert found.verdict is Verdict.INCONSISTENCY
    assert found.suspicion > 0.9
    assert found.findings[0].kind is Kind.REPLACED


def test_one_round_in_fifty_is_found_when_it_comes_and_the_way_back_passes() -> None:
    states, history = calm(50)
    odd = inspect_global_model(drawn(2), history)
    assert odd.suspicion > 0.9
    assert inspect_global_model(nudged(states[-1], 0.01, 99), history).suspicion < 0.3
    assert inspect_global_model(states[-1], odd.history).suspicion < 0.3


def test_a_model_trained_far_on_from_the_last_round_is_weak_evidence_alone() -> None:
    states, history = calm()
    found = inspect_global_model(nudged(states[-1], 0.8, 9), history)
    assert Kind.RETRAINED in {finding.kind for finding in found.findings}
    assert 0.0 < found.suspicion < 0.5


def fresh_layer(state: State) -> State:
    return {**state, "4.weight": drawn(5)["4.weight"], "4.bias": drawn(5)["4.bias"]}


def rounded(state: State) -> State:
    return {
        name: (value / value.abs().max() * 7).round() / 7 * value.abs().max()
        for name, value in state.items()
    }


HONEST: dict[str, Callable[[list[State]], State]] = {
    "the first round again": lambda states: states[0],
    "the fourth round again": lambda states: states[3],
    "one fresh layer": lambda states: fresh_layer(states[-1]),
    "ten times the rate": lambda states: nudged(states[-1], 0.1, 7),
    "pruned by half": lambda states: corpus.pruned(states[-1], 0.5),
    "pruned by nine tenths": lambda states: corpus.pruned(states[-1], 0.9),
    "four bits": lambda states: rounded(states[-1]),
    "noise of .05": lambda states: {
        name: value + 0.05 * torch.randn(value.shape, generator=seeded(8))
        for name, value in states[-1].items()
    },
    "half precision": lambda states: {
        name: value.half().float() for name, value in states[-1].items()
    },
}


@pytest.mark.parametrize("kind", HONEST)
def test_what_honest_servers_do_after_calm_rounds_passes(kind: str) -> None:
    states, history = calm()
    assert inspect_global_model(HONEST[kind](states), history).suspicion < 0.4


def test_early_rounds_say_nothing_about_moves() -> None:
    history = History.of(drawn(1)).after(drawn(1))
    assert kinds(drawn(2), history) == set()


def test_frozen_layers_do_not_hide_the_others() -> None:
    states, history = [drawn(1)], History.of(drawn(1))
    for number in range(6):
        moved = nudged(states[-1], 0.01, number)
        states.append({**moved, "0.weight": states[0]["0.weight"]})
        history = history.after(states[-1])
    other = {**drawn(2), "0.weight": states[0]["0.weight"]}
    assert Kind.REPLACED in kinds(other, history)


def test_a_scan_over_rounds_is_named() -> None:
    module = corpus.fresh(NET, seeded(1))
    state = servers.copied(module.state_dict())
    parts = [servers.scan(module, state, generator=seeded(2), part=part) for part in range(3)]
    history = History.of(parts[0])
    for part in parts[1:]:
        found = inspect_global_model(part, history)
        assert found.verdict is Verdict.MULTI_ROUND
        assert found.suspicion > 0.9
        history = found.history


def test_thresholds_that_walk_before_rows_of_many_directions_pass() -> None:
    states, history = calm()
    walked = {**states[-1], "0.bias": states[-1]["0.bias"] - 0.3}
    assert Kind.SCANNED not in kinds(walked, history)


def test_a_trace_tells_moves_about_right_whatever_the_dtype() -> None:
    before = drawn(1) | {"many.weight": torch.randn(2500, 40, generator=seeded(6))}
    for size in (0.01, 0.1, 1.0):
        history = History.of(before)
        for move in history.moved(places_of(nudged(before, size, 3))):
            assert 0.4 * size < move < 2.0 * size
    for dtype in (torch.float64, torch.bfloat16):
        cast = {name: value.to(dtype) for name, value in before.items()}
        for one, other in zip(places_of(before).traces, places_of(cast).traces, strict=True):
            assert cosine(one, other) > 0.999


def test_traces_of_nothing_and_of_huge_values() -> None:
    assert places_of({"a.weight": torch.zeros(4, 5)}).traces == (NOWHERE,)
    huge = places_of({"a.weight": torch.full((4, 5), 1e30)})
    assert huge.scales[0] == pytest.approx(30.35, abs=0.01)
    assert len(huge.traces[0]) == LENGTH
    assert any(huge.traces[0])
    assert places_of({"a.weight": torch.full((4, 5), torch.inf)}).scales == (38.0,)
    assert cosine(NOWHERE, NOWHERE) == 0.0
    ones = np.ones((2, LENGTH))
    assert distances(ones, ones, np.array([0.5, 1.0])) == pytest.approx([0.5, 0.0])
    assert joined([]) == NOWHERE


def test_a_history_of_the_first_version_goes_on() -> None:
    states, history = calm(2)
    old = history.to_json().split(',"traces"')[0].replace('"version":2', '"version":1') + "}"
    read = History.from_json(old)
    assert read.scales == history.scales
    assert read.moves == 0
    for state in states:
        read = read.after(state)
    assert read.moves == len(states) - 1
    assert History.from_json(read.to_json()) == read


def test_a_history_of_many_layers_stays_small() -> None:
    state = {f"{place}.weight": torch.randn(8, 8, generator=seeded(place)) for place in range(100)}
    history = History.of(state)
    for number in range(70):
        history = history.after(nudged(state, 0.1, number))
    assert len(history.to_json()) < 100 * 800 + 7000
    assert len(history.marks) == len(history.scales) == 64


@pytest.mark.parametrize(
    ("old", "new"),
    [('"moves":2', '"moves":-1'), ('"peaks":[', '"peaks":[1,'), ('"marks":"', '"marks":"*')],
)
def test_a_history_that_does_not_fit_together_is_refused(old: str, new: str) -> None:
    text = calm(2)[1].to_json()
    assert old in text
    with pytest.raises(Exception, match="history"):
        History.from_json(
            text.replace(old, new) if old in text else text.replace('"marks":"', '"marks":"*')
        )


def test_rows_that_grow_from_zero_in_one_direction_are_no_bins_with_a_history() -> None:
    start = drawn(1)
    start["2.weight"].zero_()
    start["2.bias"].zero_()
    history = History.of(start)
    line, sides = torch.randn(128, generator=seeded(2)), torch.randn(64, generator=seeded(3))
    for step in (0.01, 0.02, 0.03):
        grown = {**start, "2.weight": step * sides[:, None] * line, "2.bias": 3 * step * sides}
        found = inspect_global_model(grown, history)
        assert found.suspicion < 0.3
        history = found.history
