"""SSIM: how alike two pictures look, from -1 (opposite) to 1 (the same).

The definition of Wang et al. with its usual constants: local means, variances and the covariance
under an 11 x 11 Gaussian window of standard deviation 1.5, K1 = .01, K2 = .03, pixels from 0 to 1.
Only windows that lie wholly inside the picture count, so that no padding is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 11  # pixels on a side
SPREAD = 1.5  # pixels, standard deviation of the window
C1 = 0.01**2  # steadies the quotient of means
C2 = 0.03**2  # steadies the quotient of variances
_PICTURES = 4  # axes of [count, channels, height, width]


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity of each pair of pictures.

    Args:
        first: [N, C, H, W], floating, pixels from 0 to 1; H and W at least 11. Of several channels,
            such as colours, each is compared by itself, and the mean is taken.
        second: the same shape; or N = 1 on either side, which is compared with all of the other.

    Returns:
        [N], at most 1; symmetric in its arguments; 1 for equal pictures.

    Raises:
        MisuseError: other shapes.

    Reference: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13 (2004) 600-612.
    """
    _require_pictures(first, second)
    window = gaussian_window(WINDOW, SPREAD).to(first)
    mean_a, mean_b = _local(first, window), _local(second, window)
    variance_a = _local(first * first, window) - mean_a**2
    variance_b = _local(second * second, window) - mean_b**2
    covariance = _local(first * second, window) - mean_a * mean_b
    light = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (light * structure).mean(dim=(1, 2, 3))


def gaussian_window(size: int, spread: float) -> Tensor:
    """Weights of a one-dimensional Gaussian window; they sum to 1."""
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-(offset**2) / (2 * spread**2))
    return weights / weights.sum()


def _local(pictures: Tensor, window: Tensor) -> Tensor:
    """Weighted mean under each window; the Gaussian separates into rows and columns."""
    rows = F.conv2d(pictures.flatten(0, 1)[:, None], window[None, None, None, :])
    means = F.conv2d(rows, window[None, None, :, None])
    return means.view(*pictures.shape[:2], *means.shape[2:])


def _require_pictures(first: Tensor, second: Tensor) -> None:
    if first.ndim != _PICTURES or second.ndim != _PICTURES:
        msg = "ssim compares pictures of shape [N, channels, H, W]"
        raise MisuseError(msg)
    same = first.shape[1:] == second.shape[1:]
    paired = first.shape[0] == second.shape[0] or 1 in (first.shape[0], second.shape[0])
    if not same or not paired or min(first.shape[2:]) < WINDOW:
        msg = f"ssim compares pictures of one size, at least {WINDOW} x {WINDOW} pixels"
        raise MisuseError(msg)
