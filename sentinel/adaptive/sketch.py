"""Sketch: a global model in 256 numbers, from which the size of its next step can be told.

Adding up the values under random signs keeps inner products: the sketch of a difference is the
difference of the sketches, and its squared norm is that of the difference, within 9 % (one standard
deviation). The signs come of a hash of the parameter's name, so that any process makes the same
ones. A server that knows them can make a step look smaller or larger than it is; it can as well
send a step of any size.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WIDTH = 256
_PIECE = 1 << 16  # values per hash; a multiple of WIDTH. Part of what a sketch is: never change it


def sketch(state: Mapping[str, torch.Tensor], names: Iterable[str]) -> tuple[float, ...]:
    """The sketch of some tensors of a state, in float64.

    Args:
        state: a global model; public.
        names: floating tensors of it; their order does not matter, up to rounding.

    Returns:
        `WIDTH` numbers; not finite where the state is not.

    Guarantees:
        Linear: the sketch of a difference is the difference of the sketches. The same in every
        process and version. The state is not written to.

    Edges:
        no names, or empty tensors: zeros
        a 0-d tensor:               one value
        float16 or bfloat16:        added up in float64
        NaN or Inf:                 numbers that are not finite; such a step counts as none

    Reference: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002.
    """
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for name in sorted(names):
        flat = state[name].detach().reshape(-1)
        for number, piece in enumerate(torch.split(flat, _PIECE)):
            signed = piece.double().cpu() * _signs(name, number, len(piece))
            whole = len(signed) - len(signed) % WIDTH
            total += signed[:whole].view(-1, WIDTH).sum(0)
            total[: len(signed) - whole] += signed[whole:]
    return tuple(total.tolist())


def _signs(name: str, number: int, count: int) -> torch.Tensor:
    """+1 or -1 for each value of one piece: float64 (count,)."""
    stream = hashlib.shake_128(f"sentinel sketch\0{name}\0{number}".encode())
    noise = np.frombuffer(stream.digest((count + 7) // 8), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(noise, count=count))
    return bits.double().mul_(2.0).sub_(1.0)
