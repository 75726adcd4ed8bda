"""References: those of one guard; an architecture without one is not tried again every round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.detection.reference import architecture_digest, kept_or_built
from sentinel.detection.synthetic import ModelError
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sentinel.detection.reference import Reference

PAUSE = 32  # rounds until an architecture is tried again: the site may have been busy before


class References:
    """The references of the models that one guard sees."""

    def __init__(self, folder: Path) -> None:
        """Keep them in `folder`, by digest of the architecture."""
        self._folder = folder
        self._waits: dict[str, int] = {}  # rounds left, by architecture

    def of(self, model: nn.Module, global_state: Mapping[str, Tensor]) -> Reference | None:
        """Return the reference of this architecture; None where there is none, or not in good time.

        Args:
            model: the architecture; never run and never changed.
            global_state: the public global model.
        """
        try:
            digest = architecture_digest(model, global_state)
        except ModelError:
            return None
        if self._pauses(digest):
            return None
        try:
            return kept_or_built(model, global_state, digest, self._folder)
        except (ModelError, MisuseError):
            self._waits[digest] = PAUSE - 1
            return None

    def _pauses(self, digest: str) -> bool:
        left = self._waits.get(digest, 0)
        if left:
            self._waits[digest] = left - 1
        return left > 0
