"""Differences whose values a test knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.source import Differences

if TYPE_CHECKING:
    from collections.abc import Mapping


def moved_by(tensors: Mapping[str, torch.Tensor]) -> Differences:
    """What a site sends that moved each tensor from zero to the one given."""
    return Differences(
        tensors, tensors, {name: torch.zeros_like(value) for name, value in tensors.items()}
    )
