"""A model's own randomness: no known seed reaches it, and the loop's generator stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.dpsgd import clipping
from sentinel.dpsgd.chance import Chance
from sentinel.dpsgd.step import add_batch_, slots_of
from sentinel.dpsgd.taps import OpenBatch, Taps

from .conftest import Clipper
from .test_training import Site, layered

CPU = torch.device("cpu")


def test_two_passes_under_one_known_seed_have_different_masks(fixed_entropy) -> None:
    chance = Chance(fixed_entropy(1))
    masks = []
    for _ in range(2):
        torch.manual_seed(0)
        chance.begin(CPU)
        masks.append(torch.rand(1000))
        chance.end()
    assert not torch.equal(*masks)


def test_the_masks_are_as_even_as_they_should_be(fixed_entropy) -> None:
    """Accepted as uniform; a state of few values would not be."""
    chance = Chance(fixed_entropy(2))
    firsts = []
    for _ in range(400):
        chance.begin(CPU)
        firsts.append(torch.rand(600))
        chance.end()
    drawn = torch.stack(firsts)
    counts = torch.histc(drawn, 64, 0.0, 1.0)
    expected = drawn.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 120  # 63 expected
    across = torch.corrcoef(drawn[:, :3].t())
    assert float((across - torch.eye(3)).abs().max()) < 0.25
    assert len(drawn[:, 0].unique()) > 390  # a pass does not repeat another


@pytest.mark.parametrize("ending", ["ends", "begins twice"])
def test_the_loops_generator_is_put_back_bit_by_bit(fixed_entropy, ending) -> None:
    before = torch.get_rng_state()
    chance = Chance(fixed_entropy(3))
    chance.begin(CPU)
    torch.rand(10)
    if ending == "begins twice":
        chance.begin(CPU)
    chance.end()
    chance.end()
    assert torch.equal(before, torch.get_rng_state())


def clipped(model: nn.Module, inputs: torch.Tensor, chance: Chance) -> torch.Tensor:
    """The clipped sum of a batch, each row a unit, after the loop has set its seed."""
    taps = Taps(model, mean_loss=True, chance=chance)
    slots = slots_of(list(model.parameters()))
    taps.active, taps.batch = True, OpenBatch(1, len(inputs))
    torch.manual_seed(0)
    (model(inputs) - 1).square().mean().backward()
    total = clipping.empty_sum(Clipper(batch=64).bound(slots[-1].end))
    add_batch_(total, slots, list(taps.batch.captures.values()), torch.arange(len(inputs)))
    taps.remove()
    return total.values


def test_the_sum_of_a_batch_does_not_follow_from_the_loops_seed(fixed_entropy) -> None:
    """Else one more record in front would shift the known masks of all others."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1))
    inputs = torch.randn(16, 8)
    chance = Chance(fixed_entropy(5))
    assert not torch.allclose(clipped(model, inputs, chance), clipped(model, inputs, chance))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_private_round_leaves_the_loops_generator_as_it_was(tmp_path, error) -> None:
    """Also where a forward pass fails or is interrupted in its middle."""
    site = Site(tmp_path)
    site.wrap(layered(nn.Dropout(0.5), nn.Tanh()))
    before = torch.get_rng_state()

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise error

    if error is None:
        site.release()
    else:
        site.model[2].forward = fail
        with pytest.raises(error), site.round():
            site.train(1)
    assert torch.equal(before, torch.get_rng_state())
