"""Fixtures that several folders use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class FixedEntropy:
    """Only for testing! A keystream under a known key, so that a test sees the same bits twice."""

    def __init__(self, key: int = 0) -> None:
        """Start the stream of `key`."""
        self._key, self._branches = key, 0
        cipher = Cipher(algorithms.AES(key.to_bytes(32, "big")), modes.CTR(bytes(16)))
        self._keystream = cipher.encryptor()

    def fill(self, buffer: memoryview) -> None:
        """Overwrite `buffer` with the next bytes of the stream."""
        flat = buffer.cast("B")
        self._keystream.update_into(bytes(len(flat)), flat)

    def branch(self) -> FixedEntropy:
        """The stream of another key, the same for the n-th branch of the same one."""
        self._branches += 1
        return FixedEntropy((self._key << 32) + self._branches)


@pytest.fixture
def fixed_entropy() -> Callable[[int], FixedEntropy]:
    """Makes entropy of a known key."""
    return FixedEntropy


@pytest.fixture(autouse=True)
def _state_stays_in_the_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test writes to the state folder of the user who runs it."""
    folder: Path = tmp_path_factory.mktemp("state") / "default"
    monkeypatch.setenv("SENTINEL_STATE_DIR", str(folder))
