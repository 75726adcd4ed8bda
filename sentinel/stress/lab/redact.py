"""Redaction: what may stand in a report that others see, in the place of a record.

An error map at full size is a picture of the record wherever the guess is flat, so that errors are
averaged over coarse blocks and told in steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.finding import Exhibit

BLOCKS = 4  # blocks of an error map, on a side
STEPS = (0.02, 0.05, 0.1, 0.2)  # errors in units of the pixel range: the edges of five shades
EXACT, NEAR = 0.01, 0.30  # relative errors of a value of a row


def error_map(exhibit: Exhibit, *, guess: Tensor | None = None) -> Tensor:
    """How wrong a guess at a picture is, block by block.

    Args:
        exhibit: a picture [1, H, W] and a guess at it.
        guess: another guess at the same picture.

    Returns:
        [BLOCKS, BLOCKS] of shades 0 (right), .25, .5, .75, 1 (wrong).

    Guarantees:
        16 values of five steps each: at most 38 bits about a picture, and no outline of it.
    """
    shown = exhibit.guess if guess is None else guess
    errors = (exhibit.truth.double() - shown.double()).abs().mean(0, keepdim=True)
    blocks = F.adaptive_avg_pool2d(errors, BLOCKS)[0]
    return torch.bucketize(blocks, torch.tensor(STEPS, dtype=blocks.dtype)).double() / len(STEPS)


def error_words(exhibit: Exhibit) -> list[str]:
    """How wrong each value of a guessed row is: "read", "close" or "wrong".

    The numbers of words are near nothing: they are read or wrong.
    """
    if not exhibit.truth.is_floating_point():
        right = (exhibit.truth == exhibit.guess).flatten().tolist()
        return ["read" if one else "wrong" for one in right]
    truth, guess = exhibit.truth.flatten().double(), exhibit.guess.flatten().double()
    errors = (truth - guess).abs() / truth.abs().clamp_min(1.0)
    return [
        "read" if error < EXACT else "close" if error < NEAR else "wrong"
        for error in errors.tolist()
    ]
