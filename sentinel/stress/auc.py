"""AUC: the area under the ROC curve, from scores and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def auc(scores: Tensor, labels: Tensor) -> float:
    """Return the share of (ill, healthy) pairs in the right order; a tie counts half.

    Args:
        scores: [n], larger means more likely ill.
        labels: [n], 0 or 1, both present.
    """
    ill, healthy = scores[labels == 1], scores[labels == 0]
    ahead = ill[:, None] - healthy[None, :]
    return float((ahead > 0).double().mean() + 0.5 * (ahead == 0).double().mean())
