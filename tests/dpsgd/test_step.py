"""What the taps and the clipping make of a batch, against ordinary gradients, unit by unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sentinel.dpsgd import clipping
from sentinel.dpsgd import step as steps
from sentinel.dpsgd.clipping import Bound
from sentinel.dpsgd.step import noised_average
from sentinel.errors import MisuseError
from sentinel.terms import Adjacency

from .conftest import Clipper, count, gradient_of, mean_of_squares

if TYPE_CHECKING:
    from collections.abc import Callable

ALONE = [0, 1, 2, 3, 4, 5, 6, 7]
GROUPS = [0, 0, 0, 1, 2, 2, 3, 3]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="circular"),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


class Attention(nn.Module):
    """One block of a transformer out of Linear and LayerNorm."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.mix = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run it."""
        x = self.words(tokens)
        query, key, value = self.mix(x).chunk(3, dim=-1)
        x = self.norm(x + self.out(nn.functional.scaled_dot_product_attention(query, key, value)))
        return self.head(x)


class Tied(Attention):
    """The same, where the head's weight is the embedding's."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.head.weight = self.words.weight


class Twice(nn.Module):
    """One layer, run twice in a forward pass."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.layer(torch.tanh(self.layer(x)))


class Scale(nn.Module):
    """A layer that no rule knows."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return torch.sin(x * self.factor)


def unknown() -> nn.Module:
    return nn.Sequential(Scale(), nn.Linear(6, 5), nn.PReLU(), nn.RMSNorm(5))


def transposed() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.ConvTranspose1d(3, 2, 3))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    model[2].bias.requires_grad_(requires_grad=False)
    return model


MODELS = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 8, 8)),
    "attention": (Attention, None),
    "tied": (Tied, None),
    "twice": (Twice, (6,)),
    "unknown": (unknown, (6,)),
    "transposed": (transposed, (2, 9)),
    "frozen": (frozen, (6,)),
}


def inputs_of(shape: tuple[int, ...] | None, rows: int = 8, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if shape is None:
        return torch.randint(0, 11, (rows, 7), generator=generator)
    return torch.randn(rows, *shape, generator=generator) * scale


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("units", [ALONE, GROUPS], ids=["records", "patients"])
def test_the_sum_is_that_of_ordinary_gradients_summed_by_unit_and_then_clipped(
    name, units, clipper
) -> None:
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    found = clipper.sum(model, inputs, units)
    assert found.values.allclose(clipper.by_hand(model, inputs, units), rtol=1e-4, atol=2e-6)
    assert found.not_finite == 0


@pytest.mark.parametrize("name", MODELS)
def test_gradients_far_below_the_clip_norm_are_left_as_they_are(name) -> None:
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    total = Clipper(clip_norm=1e4).sum(model, inputs, GROUPS)
    plain = sum(gradient_of(model, inputs[row : row + 1]) for row in range(8))
    assert (total.values * 1e4).allclose(plain, rtol=1e-4, atol=1e-5)
    assert total.unclipped == 4


def test_sum_then_clip_is_not_clip_then_sum(clipper) -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[50.0, 0.0], [0.0, 70.0]])
    patient = clipper.sum(model, inputs, [0, 0]).values.norm()
    records = clipper.sum(model, inputs, [0, 1]).values.norm()
    assert float(patient) == pytest.approx(1.0, rel=0.01)
    assert float(records) == pytest.approx(2**0.5, rel=0.01)


def test_a_mean_and_a_sum_over_the_batch_give_the_same_where_the_loop_says_which() -> None:
    """Each record's own gradient, whatever the loss does over the batch."""
    model, inputs = seeded(cnn), inputs_of((2, 8, 8))
    large = Clipper(clip_norm=1e4)
    mean = large.sum(model, inputs, ALONE).values
    added = large.sum(
        model, inputs, ALONE, loss=lambda out: 8 * mean_of_squares(out), mean_loss=False
    ).values
    assert added.allclose(mean, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "tied"])
def test_a_batch_that_goes_through_in_two_calls_is_the_same_batch(name, cut) -> None:
    """Gradient accumulation: also where the cut runs through a patient."""
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    whole = Clipper().sum(model, inputs, GROUPS)
    parts = Clipper().sum(model, inputs, GROUPS, calls=[slice(0, cut), slice(cut, None)])
    assert parts.values.allclose(whole.values, rtol=1e-5, atol=1e-6)


def test_two_passes_over_a_batch_add_up_before_the_clip(clipper) -> None:
    model, inputs = seeded(mlp), inputs_of((6,))
    large = Clipper(clip_norm=1e4)
    once = large.sum(model, inputs, ALONE).values
    twice = large.sum(model, inputs, ALONE, calls=[slice(None), slice(None)]).values
    assert twice.allclose(2 * once, rtol=1e-4, atol=1e-10)
    clipped = clipper.sum(model, inputs[:1], [0], calls=[slice(None), slice(None)]).values
    assert float(clipped.norm()) <= 1.0


@pytest.mark.parametrize("name", MODELS)
def test_how_many_units_are_written_out_at_a_time_changes_nothing(name, monkeypatch) -> None:
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    whole = Clipper().sum(model, inputs, GROUPS).values
    monkeypatch.setattr(steps, "_WRITTEN_OUT", 1)
    monkeypatch.setattr(steps, "_MOST_ROWS", 1)
    assert Clipper().sum(model, inputs, GROUPS).values.allclose(whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn", "unknown"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_counts_for_nothing_and_spoils_nothing(name, bad) -> None:
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    spoiled = inputs.clone()
    spoiled[3] = bad  # all of unit 1
    found = Clipper().sum(model, spoiled, GROUPS)
    kept = [0, 1, 2, 4, 5, 6, 7]
    expected = Clipper().sum(model, inputs[kept], [0, 0, 0, 1, 1, 2, 2]).values
    assert found.values.allclose(expected, rtol=1e-4, atol=2e-6)
    assert found.not_finite == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "unknown"])
@pytest.mark.parametrize("scale", [1e10, 1e20, 1e38])
def test_a_huge_record_moves_the_sum_by_no_more_than_any_other(name, scale, clipper) -> None:
    make, shape = MODELS[name]
    model, inputs = seeded(make), inputs_of(shape)
    huge = inputs.clone()
    huge[7] *= scale
    with_it = clipper.sum(model, huge, ALONE).values
    without = clipper.sum(model, huge[:7], ALONE[:7]).values
    assert float((with_it - without).norm()) <= 1.0


def test_one_bad_record_takes_its_whole_patient_out(clipper) -> None:
    model, inputs = seeded(mlp), inputs_of((6,))
    inputs[1, 2] = float("nan")
    found = clipper.sum(model, inputs, GROUPS)
    expected = clipper.sum(model, inputs[3:], [0, 1, 1, 2, 2])
    assert found.values.allclose(expected.values, rtol=1e-5, atol=1e-7)


def test_rows_of_nobody_count_for_nobody(clipper) -> None:
    model, inputs = seeded(cnn), inputs_of((2, 8, 8), rows=1)
    assert not clipper.sum(model, inputs, [-1]).values.any()


def test_zero_gradients_stay_zero(clipper) -> None:
    model = nn.Linear(3, 2, bias=False)
    found = clipper.sum(model, torch.zeros(4, 3), [0, 1, 2, 3])
    assert not found.values.any()
    assert found.unclipped == 4


SCALES = st.floats(-30.0, 30.0)


@settings(max_examples=8, deadline=None)
@given(scales=st.lists(SCALES, min_size=8, max_size=8), seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_adding_a_patient_moves_the_sum_by_at_most_the_clip_norm(name, scales, seed) -> None:
    """By brute force, for gradients from 2^-30 to 2^30 and every patient of a batch."""
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    generator = torch.Generator().manual_seed(seed)
    if shape is None:
        inputs = torch.randint(0, 11, (8, 7), generator=generator)
        for parameter in model.head.parameters():
            parameter.data.mul_(2.0 ** scales[0])
    else:
        inputs = torch.randn(8, *shape, generator=generator)
        inputs *= torch.tensor(scales).exp2().view(-1, *[1] * len(shape))
    step = Clipper().bound(count(model)).step
    whole = rounded(Clipper().sum(model, inputs, GROUPS).values, step)
    for unit in range(4):
        others = [row for row, owner in enumerate(GROUPS) if owner != unit]
        owners = [owner - (owner > unit) for owner in GROUPS if owner != unit]
        less = rounded(Clipper().sum(model, inputs[others], owners).values, step)
        assert float((whole - less).norm()) <= 1.0


def rounded(values: Tensor, step: float) -> Tensor:
    return (values / step).round() * step


def test_records_that_cancel_do_not_slip_under_the_clip(clipper) -> None:
    """Two gradients of norm 1e7 that differ by 50: their inner products round 50 away."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(model.weight)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(64, generator=generator)
    other = row + 50 * torch.randn(64, generator=generator) / 1e6
    target = torch.randn(64, generator=generator) * 1e4

    def opposed(output: Tensor) -> Tensor:
        return (output * torch.stack([target, -target])).sum() / 2

    found = clipper.sum(model, torch.stack([row, other]), [0, 0], loss=opposed)
    difference = torch.outer(target.double(), row.double() - other.double())
    assert float(difference.norm()) > 5
    assert float(found.values.norm()) <= 1.0


class TiedButBias(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.second(torch.tanh(self.first(x)))


def bias_only() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)
    model[2].weight.requires_grad_(requires_grad=False)
    return model


@pytest.mark.parametrize("units", [ALONE, GROUPS], ids=["records", "patients"])
@pytest.mark.parametrize("make", [bias_only, TiedButBias])
def test_a_weight_that_is_not_summed_there_does_not_count_in_the_norm(make, units) -> None:
    """Else large inputs would clip a bias by a gradient that is not there."""
    model, inputs = seeded(make), 30 * inputs_of((6,))
    small = Clipper(clip_norm=0.5)
    found = small.sum(model, inputs, units)
    assert found.values.allclose(small.by_hand(model, inputs, units), rtol=1e-4, atol=2e-6)


def test_the_bound_travels_with_the_sum(clipper) -> None:
    total = clipper.sum(seeded(mlp), inputs_of((6,)), ALONE)
    assert total.sensitivity(Adjacency.ADD_OR_REMOVE) == 1.0
    assert total.sensitivity(Adjacency.REPLACE) == 2.0
    assert 0.99 < total.bound.target < 1.0


@pytest.mark.parametrize("coordinates", [1, 10**4, 10**8])
@pytest.mark.parametrize("batch", [1, 64, 8192])
def test_the_target_leaves_room_for_every_error(coordinates, batch) -> None:
    clip = Bound(3.0, coordinates, 1.0, batch)
    grid = clip.step * coordinates**0.5
    assert clip.target + grid + 2 * 2.0**-12 + 2 * batch * 2.0**-20 <= 1 + 1e-12
    clipping.require_possible(clip)


def test_a_batch_too_large_for_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 8192"):
        clipping.require_possible(Bound(1.0, 10, 1.0, 8193))


def test_the_noise_has_the_scale_of_the_clip_norm_whatever_the_batch(fixed_entropy) -> None:
    """Accepted at the right scale, refused at two thirds and three halves of it."""
    clip = Bound(0.5, 200_000, 1.5, 20)
    average = noised_average(clipping.empty_sum(clip), 20, fixed_entropy(4))
    expected = 0.5 * 1.5 / 20
    assert float(average.std()) == pytest.approx(expected, rel=0.01)
    for wrong in (2 / 3, 3 / 2):
        assert float(average.std()) != pytest.approx(wrong * expected, rel=0.2)
    steps_on_grid = (average / (0.5 / 20)) / clip.step
    assert (steps_on_grid - steps_on_grid.round()).abs().max() < 1e-6


def test_a_loss_over_too_many_rows_is_refused(clipper) -> None:
    with pytest.raises(MisuseError, match="other records"):
        clipper.sum(seeded(mlp), inputs_of((6,)), ALONE, calls=[slice(0, 5), slice(0, 5)])


def test_a_second_backward_pass_adds_to_the_first() -> None:
    model, inputs = seeded(mlp), inputs_of((6,))
    large = Clipper(clip_norm=1e4)

    class Both:
        def __call__(self, output: Tensor) -> Tensor:
            mean_of_squares(output).backward(retain_graph=True)
            return mean_of_squares(output)

    twice = large.sum(model, inputs, ALONE, loss=Both()).values
    once = large.sum(model, inputs, ALONE).values
    assert twice.allclose(2 * once, rtol=1e-4, atol=1e-10)
