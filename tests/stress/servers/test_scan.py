"""Scanning over rounds reads as a layer so many times wider would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers.leak import measure_rounds

if TYPE_CHECKING:
    from sentinel.stress.layers import State


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_four_rounds_read_most_of_a_batch_that_one_round_reads_little_of() -> None:
    """64 records in 32 neurons: one round has too few bins for them, four have enough."""
    model = nets.drawn(lambda: nets.mlp(13, 32, 1), seeded(1))
    state = servers.copied(model.state_dict())
    batch = torch.randn(64, 13, generator=seeded(2)), torch.arange(64) % 2
    sample = torch.randn(2000, 13, generator=seeded(3))

    def part(number: int, parts: int) -> State:
        return servers.scan(
            model, state, generator=seeded(), part=number, parts=parts, sample=sample
        )

    once = measure_rounds(model, state, [part(0, 1)], batch)
    scanned = measure_rounds(model, state, [part(number, 8) for number in range(8)], batch)
    assert once.share < 0.3
    assert scanned.share > 2 * once.share
    assert scanned.share > 0.6
    assert once.honest_share < 0.1


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_search_that_splits_what_it_found_reads_more_than_cuts_set_in_advance(
    outputs: int,
) -> None:
    """64 records in 32 neurons, eight rounds: .95 and .91 measured, .81 for fixed cuts."""
    model = nets.drawn(lambda: nets.mlp(13, 32, outputs), seeded(1))
    state = servers.copied(model.state_dict())
    batch = torch.randn(64, 13, generator=seeded(2)), torch.arange(64) % max(2, outputs)
    sample = torch.randn(2000, 13, generator=seeded(3))
    fixed = measure_rounds(
        model,
        state,
        [
            servers.scan(model, state, generator=seeded(), part=part, parts=8, sample=sample)
            for part in range(8)
        ],
        batch,
    )
    search = servers.Search(sample=sample)
    found = servers.measure_search(model, state, search, batch, 8, generator=seeded())
    assert found.share >= 0.88
    assert found.share > fixed.share
    assert search.open == 0


def test_a_search_leaves_alone_what_it_has_read_and_where_nobody_is() -> None:
    """Of 32 cuts the second round has none where the first found one record or none."""
    model = nets.drawn(lambda: nets.mlp(13, 32, 1), seeded(1))
    state = servers.copied(model.state_dict())
    rows = torch.randn(40, 13, generator=seeded(2))
    search = servers.Search(sample=torch.randn(500, 13, generator=seeded(3)))
    servers.measure_search(
        model, state, search, (rows, torch.arange(40) % 2), 1, generator=seeded()
    )
    sent = [search(model, state, generator=seeded()) for _ in range(2)]
    assert torch.equal(sent[0]["0.bias"], sent[1]["0.bias"])  # nothing came back in between
    line = sent[0]["0.weight"][0]
    places, cuts = rows @ line, -sent[0]["0.bias"]
    first = -servers.Search(sample=torch.randn(500, 13, generator=seeded(3)))(
        model, state, generator=seeded()
    )["0.bias"]
    held = torch.bucketize(places, first).bincount(minlength=33)[1:32]
    split = torch.bucketize((cuts[1:] + cuts[:-1]) / 2, first)[cuts.diff() > 0].unique() - 1
    assert search.open > 0
    assert float((held[split] > 1).float().mean()) > 0.7


def test_a_search_needs_a_round_to_learn_of_and_neurons_to_split_with() -> None:
    model = nets.drawn(lambda: nets.mlp(13, 2, 1), seeded(1))
    search = servers.Search(sample=torch.randn(20, 13, generator=seeded(3)))
    with pytest.raises(MisuseError, match="call it first"):
        search.learn(model.state_dict())
    with pytest.raises(MisuseError, match="at least 3 neurons"):
        search(model, model.state_dict(), generator=seeded())


def test_the_parts_tile_the_line_and_neighbours_share_a_cut() -> None:
    model = nets.drawn(lambda: nets.mlp(13, 32, 1), seeded(1))
    cuts = []
    for number in range(4):
        sent = servers.scan(
            model, model.state_dict(), generator=seeded(), part=number, parts=4, scale=1.0
        )
        cuts.append(-sent["0.bias"])
    assert all(torch.isclose(cuts[index][-1], cuts[index + 1][0]) for index in range(3))
    rising = torch.cat([cuts[0], *(part[1:] for part in cuts[1:])])
    assert (rising.diff() > 0).all()


def test_a_part_that_is_not_there_is_refused() -> None:
    model = nets.mlp(13, 32, 1)
    for part in (-1, 4):
        with pytest.raises(MisuseError, match="part must be from 0 to 3"):
            servers.scan(model, model.state_dict(), generator=seeded(), part=part, parts=4)
