"""The lab's architectures are the published ones, and drawing them touches no global randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.stress import nets

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGES = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "mlp": (lambda: nets.mlp(784, 32, 3), IMAGES.flatten(1)),
    "lenet": (lambda: nets.lenet(32, 3), IMAGES),
    "resnet18-bn": (lambda: nets.resnet18(3, 8), IMAGES),
    "resnet18-gn": (lambda: nets.resnet18(3, 8, norm=nets.group_norm), IMAGES),
    "densenet121": (lambda: nets.densenet121(3, 4), IMAGES),
    "vit": (lambda: nets.VisionTransformer(3, width=16, hidden=32, depth=2), IMAGES),
    "text": (lambda: nets.TextTransformer(3, width=16, hidden=32, depth=2), TEXTS),
}


def parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(value.numel() for value in build().parameters())


@pytest.mark.parametrize("name", SMALL)
def test_every_net_gives_one_finite_score_for_each_class_in_both_modes(name: str) -> None:
    build, records = SMALL[name]
    model = nets.drawn(build, torch.Generator().manual_seed(2))
    for mode in (True, False):
        scores = model.train(mode)(records)
        assert scores.shape == (2, 3)
        assert scores.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_a_net_is_fixed_by_its_generator_and_leaves_the_global_one_alone(name: str) -> None:
    build, _ = SMALL[name]
    before = torch.get_rng_state()
    first, again, other = (
        nets.drawn(build, torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_published_nets_have_the_published_numbers_of_parameters() -> None:
    """Three input channels and a thousand classes, as torchvision builds them."""
    assert parameters(lambda: nets.resnet18(1000, 64, 3)) == 11_689_512
    assert parameters(lambda: nets.densenet121(1000, 32, 3)) == 7_978_856


def test_drawn_values_spread_as_torch_spreads_its_own() -> None:
    """Evenly, as far as one over the root of the inputs to a unit."""
    for build in (lambda: nn.Linear(300, 200), lambda: nn.Conv2d(8, 32, 5)):
        drawn = nets.drawn(build, torch.Generator().manual_seed(5))
        reach = drawn.weight[0].numel() ** -0.5
        for value in drawn.state_dict().values():
            assert float(value.abs().max()) <= reach
        assert float(drawn.weight.detach().std()) == pytest.approx(reach / 3**0.5, rel=0.02)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            own = build()
        assert float(own.weight.detach().std()) == pytest.approx(reach / 3**0.5, rel=0.02)


def test_group_normalisation_mixes_no_records_and_batch_normalisation_does() -> None:
    """Changing one record changes another's scores only where the batch is normalised."""
    other = IMAGES.clone()
    other[0] = 1 - other[0]
    for name, mixes in (("resnet18-gn", False), ("resnet18-bn", True)):
        model = nets.drawn(SMALL[name][0], torch.Generator().manual_seed(2)).train()
        moved = (model(IMAGES)[1] - model(other)[1]).abs().max()
        assert bool(moved > 1e-6) is mixes
