"""Fixtures of the attacks' tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sentinel.mechanism.entropy import Entropy


@pytest.fixture
def known_noise(fixed_entropy: Callable[[int], Entropy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guard draws noise and masks from a known key, so that no test passes or fails by luck.

    That the noise has the right law, whatever the key, is proved where the mechanism is tested.
    """
    monkeypatch.setattr("sentinel.guard.SystemEntropy", fixed_entropy(0).branch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
