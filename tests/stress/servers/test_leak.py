"""What counts as a leak is measured against the truth, and a variant that leaks nothing is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import Leak, measure, measure_sum
from sentinel.stress.servers.leak import effective_records, measure_rounds
from sentinel.stress.servers.raw import gradient_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Module:
    return nets.drawn(lambda: nets.mlp(*widths), seeded(sum(widths)))


def batch(size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 13, generator=seeded(seed)), torch.arange(size) % 2


def leak(read: int, honest: int, effective: float = 8.0) -> Leak:
    return Leak("0", 100, read, 100, honest, effective, 8.0, 0.1, 0.1)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (leak(60, 50), "reads"),  # a tenth of the records beyond the honest model's is enough
        (leak(59, 50), "nothing"),
        (leak(10, 50), "nothing"),  # what the honest model gives away is nobody's attack
        (leak(100, 95), "nothing"),  # nor is a batch that is read whole in any case
        (leak(100, 90), "reads"),
        (leak(9, 5), "nothing"),
        (leak(8, 4), "reads"),  # so is twice what the honest model gives
        (leak(2, 0), "reads"),
        (leak(1, 0), "nothing"),  # one row in fifty, at least
        (leak(0, 0), "nothing"),
        (leak(0, 0, 4.0), "fishes"),  # half as many records in the gradient
        (leak(0, 0, 4.1), "nothing"),
        (leak(0, 0, 0.0), "nothing"),  # no gradient at all gives nobody away
    ],
)
def test_an_attack_reads_a_tenth_more_or_twice_the_honest_share_or_halves_the_batch(
    found: Leak, verdict: str
) -> None:
    assert found.verdict == verdict
    assert found.is_attack is (verdict != "nothing")


def test_the_honest_model_against_itself_leaks_exactly_as_much() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    found = measure(model, state, state, [batch(8, seed) for seed in range(5)])
    assert found.rows == found.honest_rows == 40
    assert found.read == found.honest_read > 0
    assert found.effective == found.honest_effective


def test_a_batch_of_one_is_read_whole_and_its_gradient_is_one_record_s() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    found = measure(model, state, state, [batch(1, seed) for seed in range(5)])
    assert found.share == 1.0
    assert found.effective == pytest.approx(1.0)
    assert found.largest == found.alike == pytest.approx(1.0)


def test_nobody_beats_the_honest_model_at_a_batch_of_one() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    sent = servers.qbi(model, state, generator=seeded())
    found = measure(model, state, sent, [batch(1, seed) for seed in range(20)])
    assert found.honest_share == 1.0
    assert not found.reads


def test_a_layer_that_is_not_trained_cannot_be_measured() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    model.get_submodule("0").requires_grad_(requires_grad=False)
    with pytest.raises(MisuseError, match="layer '0' is frozen"):
        measure(model, state, state, [batch(8)])
    found = measure(model, state, state, [batch(8)], layer="2")
    assert found.rows == 8


def test_a_dead_model_leaks_nothing_and_is_no_attack() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    dead = servers.suppression(model, state, generator=seeded())
    found = measure(model, state, dead, [batch(8)])
    assert found.read == 0
    assert found.effective == found.largest == 0.0
    assert not found.is_attack


def test_a_gradient_is_the_mean_of_its_records_parts() -> None:
    model = mlp(13, 32, 16, 3)
    state = servers.copied(model.state_dict())
    records, labels = batch(6)
    whole = gradient_of(model, state, (records, labels), "0")
    single = [
        gradient_of(model, state, (records[i : i + 1], labels[i : i + 1]), "0") for i in range(6)
    ]
    mean = torch.stack([one.values["0.weight"] for one in single]).mean(0)
    assert torch.allclose(mean, whole.values["0.weight"], atol=1e-7)
    assert torch.allclose(torch.cat([one.norms for one in single]), whole.norms, rtol=1e-5)


def test_effective_records_are_one_for_one_and_n_for_n_alike() -> None:
    assert effective_records(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_records(torch.full((7,), 3.0)) == pytest.approx(7.0)
    assert effective_records(torch.zeros(4)) == 0.0


def test_measuring_leaves_the_model_its_mode_and_its_statistics_alone() -> None:
    model = nets.drawn(lambda: nets.resnet18(3, 8), seeded(1)).eval()
    before = servers.copied(model.state_dict())
    images = torch.rand(4, 1, 28, 28, generator=seeded(2))
    measure(model, before, before, [(images, torch.arange(4) % 3)])
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_a_row_that_stands_in_every_record_is_not_counted() -> None:
    """A class token is read from any update, and tells nothing of anybody."""
    build = nets.VisionTransformer(3, width=16, hidden=32, depth=1)
    model = nets.drawn(lambda: build.to("meta"), seeded(1))
    images = torch.rand(4, 1, 28, 28, generator=seeded(2))
    transparent = servers.transparent_attention(model, model.state_dict())
    seen = gradient_of(model, transparent, (images, torch.arange(4) % 3), "blocks.0.feed.0")
    assert len(seen.inputs) == 4 * 16  # of 4 x 17


def test_rounds_of_the_honest_model_add_nothing_to_one() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    once, thrice = (measure_rounds(model, state, [state] * count, batch(16)) for count in (1, 3))
    assert once.read == thrice.read == once.honest_read


def test_a_sum_over_honest_clients_gives_away_less_than_the_target_alone() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    several = [batch(8, seed) for seed in range(6)]
    alone = measure(model, state, state, several[:1])
    summed = measure_sum(model, state, state, state, several)
    assert summed.read < alone.read
    assert summed.effective > 4


def test_without_a_batch_nothing_is_measured() -> None:
    model = mlp(13, 64, 1)
    with pytest.raises(MisuseError, match="at least one batch"):
        measure(model, model.state_dict(), model.state_dict(), [])
