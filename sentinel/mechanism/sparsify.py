"""Sparsify: a random mask that does not look at the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.chunks import chunks
from sentinel.mechanism.entropy import uniform

if TYPE_CHECKING:
    import torch

    from sentinel.mechanism.entropy import Entropy


def keep_(tensor: torch.Tensor, share: float, entropy: Entropy) -> None:
    """Keep each coordinate with probability `share`, times 1 / share; zero the others. In place.

    Args:
        tensor: contiguous, floating, any shape; after noise, so that signal and noise alike are
            rescaled (rescaling before the noise would raise what each seen value gives away).
        share: greater than 0, up to 1; 1 leaves the tensor as it is.
        entropy: where the mask comes from; the tensor's values have no part in it.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError("the share of coordinates kept must be greater than 0 and at most 1")
    if share == 1.0:
        return
    for piece in chunks(tensor):
        mask = uniform(piece.numel(), entropy, piece.device) <= share
        piece.mul_(mask.to(piece.dtype).div_(share))
