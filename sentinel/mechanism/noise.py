"""Noise: Gaussian, in float64, from an entropy argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sentinel.chunks import chunks
from sentinel.mechanism.entropy import uniform

if TYPE_CHECKING:
    from sentinel.mechanism.entropy import Entropy


def standard_normal(count: int, entropy: Entropy, device: torch.device) -> torch.Tensor:
    """`count` independent draws of N(0, 1): float64 (count,) on `device`.

    Two 53-bit uniforms, 128 random bits, give two draws (Box and Muller 1958). Draws reach 8.5
    standard deviations; what a float32 uniform would cut off at 5.77 is there.
    """
    pairs = (count + 1) // 2
    points = uniform(2 * pairs, entropy, device)
    radius = points[:pairs].log_().mul_(-2.0).sqrt_()
    angle = points[pairs:].mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def add_noise_(tensor: torch.Tensor, std: float, step: float, entropy: Entropy) -> None:
    """Round `tensor` to multiples of `step` and add Gaussian noise, in place.

    Args:
        tensor: contiguous, float32 or float64, any shape.
        std: standard deviation of the noise per coordinate, in the units of the tensor.
        step: the grid, a power of two; the norm bound must allow for the rounding.
        entropy: where the randomness comes from.

    Guarantees:
        Value and noise are summed as whole multiples of `step` in float64, which is exact below
        2^53 multiples, and rounded once to the dtype of the tensor. Each coordinate gets one draw.
        The global generators are not touched. `std` 0 leaves the tensor as it is.
    """
    if std == 0.0:
        return
    for piece in chunks(tensor):
        noise = standard_normal(piece.numel(), entropy, piece.device).mul_(std / step).round_()
        piece.copy_(piece.double().div_(step).round_().add_(noise).mul_(step))
