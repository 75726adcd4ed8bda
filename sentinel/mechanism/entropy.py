"""Entropy: where random bits come from. Never a global generator, never a seed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZEROS = bytes(1 << 20)  # 1 MiB: CTR mode turns zeros into keystream


class Entropy(Protocol):
    """A source of independent uniform random bits."""

    def fill(self, buffer: memoryview) -> None:
        """Overwrite every byte of `buffer` with fresh random bits."""

    def branch(self) -> Self:
        """A source of its own, for another thread, tensor or rank; independent of this one."""


class SystemEntropy:
    """AES-256-CTR keystream under a fresh key of the operating system.

    Guarantees:
        - The key comes from `os.urandom`, is held in memory only, and is never given out.
        - Nothing is read from or written to the generators of torch, numpy or `random`.
        - A branch has a key of its own. So has a child after a fork: no two processes share a
          stream.

    Source: NIST SP 800-38A (CTR mode). One key yields at most 2^68 bytes, far above any release.
    """

    def __init__(self) -> None:
        """Draw a key."""
        self._rekey()

    def _rekey(self) -> None:
        self._owner = os.getpid()
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._keystream = cipher.encryptor()

    def fill(self, buffer: memoryview) -> None:
        """Overwrite `buffer` (writable, any length) with keystream."""
        if os.getpid() != self._owner:
            self._rekey()
        flat = buffer.cast("B")
        for start in range(0, len(flat), len(_ZEROS)):
            piece = flat[start : start + len(_ZEROS)]
            self._keystream.update_into(memoryview(_ZEROS)[: len(piece)], piece)

    def branch(self) -> SystemEntropy:
        """Another source, under a key of its own."""
        return SystemEntropy()


def random_words(count: int, entropy: Entropy) -> NDArray[np.uint64]:
    """`count` words of 64 random bits: uint64 (count,)."""
    words = np.empty(count, np.uint64)
    if count:
        entropy.fill(words.data)
    return words


def uniform(count: int, entropy: Entropy, device: torch.device | str = "cpu") -> torch.Tensor:
    """`count` values in (0, 1], float64 (count,), on the grid of 2^-53."""
    values = ((random_words(count, entropy) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    return torch.from_numpy(values).to(device)
