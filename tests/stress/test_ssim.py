"""SSIM agrees with its definition, written out pixel by pixel."""

import math

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.stress.ssim import ssim


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 1, 16, 14), generator=torch.Generator().manual_seed(seed))


def by_the_formula(first: torch.Tensor, second: torch.Tensor) -> float:
    """Wang et al., equations 13 to 17, with plain loops and no convolution."""
    weights = [
        [math.exp(-((r - 5) ** 2 + (c - 5) ** 2) / (2 * 1.5**2)) for c in range(11)]
        for r in range(11)
    ]
    total = sum(map(sum, weights))
    scores = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            cells = [
                (
                    weights[r][c] / total,
                    float(first[top + r, left + c]),
                    float(second[top + r, left + c]),
                )
                for r in range(11)
                for c in range(11)
            ]
            mx = sum(w * x for w, x, _ in cells)
            my = sum(w * y for w, _, y in cells)
            vx = sum(w * (x - mx) ** 2 for w, x, _ in cells)
            vy = sum(w * (y - my) ** 2 for w, _, y in cells)
            cov = sum(w * (x - mx) * (y - my) for w, x, y in cells)
            above = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
            scores.append(above / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return sum(scores) / len(scores)


def test_agrees_with_the_formula_written_out_in_loops() -> None:
    first, second = pictures(2).double(), pictures(2, seed=1).double()
    expected = [by_the_formula(a[0], b[0]) for a, b in zip(first, second, strict=True)]
    assert ssim(first, second).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_picture_is_wholly_like_itself_and_less_like_anything_else() -> None:
    first, second = pictures(3), pictures(3, seed=1)
    assert torch.allclose(ssim(first, first), torch.ones(3))
    assert (ssim(first, second) < 0.5).all()


def test_neither_argument_comes_first() -> None:
    first, second = pictures(3), pictures(3, seed=1)
    assert torch.allclose(ssim(first, second), ssim(second, first))


def test_flat_pictures_are_compared_by_their_light_alone() -> None:
    """Without any variance the structure's quotient is 1."""
    black, grey = torch.zeros(1, 1, 11, 11), torch.full((1, 1, 11, 11), 0.5)
    expected = 1e-4 / (0.25 + 1e-4)
    assert float(ssim(black, grey)) == pytest.approx(expected, rel=1e-4)


def test_a_negative_has_the_opposite_structure() -> None:
    first = pictures(1)
    assert float(ssim(first, 1 - first)) < -0.5


def test_more_noise_is_less_alike() -> None:
    clean, noise = (
        pictures(1),
        torch.randn(1, 1, 16, 14, generator=torch.Generator().manual_seed(3)),
    )
    scores = [float(ssim(clean, clean + size * noise)) for size in (0.05, 0.2, 0.8)]
    assert scores == sorted(scores, reverse=True)


def test_one_picture_is_compared_with_many() -> None:
    one, many = pictures(1), pictures(4, seed=1)
    assert torch.allclose(ssim(one, many), ssim(one.expand(4, -1, -1, -1), many))


def test_pictures_of_several_channels_are_as_alike_as_their_channels_in_the_mean() -> None:
    first, second = pictures(3), pictures(3, seed=1)
    apart = ssim(first, second).mean()
    assert float(ssim(first.transpose(0, 1), second.transpose(0, 1))) == pytest.approx(float(apart))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)),  # smaller than the window
        (torch.zeros(1, 1, 16, 14), torch.zeros(1, 1, 14, 16)),
        (torch.zeros(2, 1, 16, 14), torch.zeros(3, 1, 16, 14)),
        (torch.zeros(1, 3, 16, 14), torch.zeros(1, 1, 16, 14)),  # colour and grey
        (torch.zeros(16, 14), torch.zeros(16, 14)),
    ],
)
def test_other_shapes_are_refused(first: torch.Tensor, second: torch.Tensor) -> None:
    with pytest.raises(MisuseError, match="ssim compares"):
        ssim(first, second)
