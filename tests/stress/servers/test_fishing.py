"""Magnification leaves the gradient to one class, one record, or to each class its own neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import measure
from sentinel.stress.servers.raw import gradient_of

if TYPE_CHECKING:
    from sentinel.stress.layers import State


SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Module:
    return nets.drawn(lambda: nets.mlp(*widths), seeded(sum(widths)))


def gradients(model: nn.Module, state: State, rows: Tensor, labels: Tensor) -> State:
    return gradient_of(model, state, (rows, labels), "0").values


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("target", [0, 1])
def test_fishing_for_a_class_leaves_no_gradient_to_the_others(outputs: int, target: int) -> None:
    model = mlp(13, 32, outputs)
    state = servers.copied(model.state_dict())
    crafted = servers.fishing_class(model, state, generator=seeded(), target=target)
    labels = torch.arange(40) % max(outputs, 2)
    shares = [
        gradients(model, crafted, SAMPLE[labels == label], labels[labels == label])[
            "0.weight"
        ].norm()
        for label in range(max(outputs, 2))
    ]
    others = [share for label, share in enumerate(shares) if label != target]
    assert shares[target] > 1e-3
    assert all(share < 1e-6 * shares[target] for share in others)


def test_fishing_for_a_feature_silences_the_records_past_the_threshold() -> None:
    model = mlp(13, 32, 3)
    state = servers.copied(model.state_dict())
    hidden = servers.layer_inputs(model, state, SAMPLE, "2")
    feature = int(hidden.std(0).argmax())
    cut = float(hidden[:, feature].quantile(0.7))
    crafted = servers.fishing_feature(
        model, state, generator=seeded(), target=1, feature=feature, threshold=cut
    )
    norms = torch.stack(
        [gradients(model, crafted, row[None], torch.tensor([1]))["2.bias"].norm() for row in SAMPLE]
    )
    past, before = hidden[:, feature] > cut + 0.05, hidden[:, feature] < cut - 0.05
    assert past.sum() > 4
    assert norms[past].max() < 1e-3
    assert norms[before].min() > 0.9


@pytest.mark.parametrize("widths", [(13, 64, 3), (13, 64, 32, 5)])
def test_fishing_for_a_feature_with_a_sample_reduces_a_batch_of_one_class_to_about_one(
    widths: tuple[int, ...],
) -> None:
    model = mlp(*widths)
    state = servers.copied(model.state_dict())
    crafted = servers.fishing_feature(
        model, state, generator=seeded(), target=1, sample=SAMPLE, batch=16
    )
    batches = [
        (torch.randn(16, 13, generator=seeded(seed)), torch.ones(16).long())
        for seed in range(20, 30)
    ]
    leak = measure(model, state, crafted, batches)
    assert leak.honest_effective > 10
    assert leak.effective < 2.5
    assert leak.fishes


def test_fishing_refuses_a_class_that_is_not_there() -> None:
    model = mlp(13, 32, 3)
    state = servers.copied(model.state_dict())
    with pytest.raises(MisuseError, match="class must be from 0 to 2"):
        servers.fishing_class(model, state, generator=seeded(), target=3)
    with pytest.raises(MisuseError, match="sink must be from 0 to 2"):
        servers.class_separation(model, state, generator=seeded(), sink=3)


def test_class_separation_keeps_each_class_in_neurons_of_its_own() -> None:
    model = mlp(13, 64, 5)
    crafted = servers.class_separation(model, model.state_dict(), generator=seeded(), sample=SAMPLE)
    owners = crafted["2.weight"][1:].argmax(0) + 1
    for label in range(5):
        gradient = gradients(model, crafted, SAMPLE, torch.full((40,), label))["0.bias"]
        assert bool(gradient[owners == label].any()) is (label != 0)
        assert not gradient[owners != label].any()


def test_class_separation_reads_a_lone_record_of_a_class_where_there_is_one_layer_only() -> None:
    """A ResNet has no bins, yet each row of its last layer is then one class's."""
    model = nets.drawn(lambda: nets.resnet18(8, 8, norm=nets.group_norm), seeded(1))
    state = servers.copied(model.state_dict())
    crafted = servers.class_separation(model, state, generator=seeded())
    images = torch.rand(8, 1, 28, 28, generator=seeded(4))
    leak = measure(model, state, crafted, [(images, torch.arange(8))])
    assert leak.read >= 6  # all but the sink's; twins are not counted
    assert leak.honest_read == 0


def test_class_separation_refuses_a_single_output() -> None:
    model = mlp(13, 32, 1)
    with pytest.raises(MisuseError, match="an output for each class"):
        servers.class_separation(model, model.state_dict(), generator=seeded())
