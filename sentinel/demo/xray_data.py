"""The chest X-rays shipped with the demo: a hospital's, others to hide among, and public ones."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures and their classes.

    Attributes:
        images: [N, 1, 28, 28], float32, pixels from 0 to 1.
        labels: [N], int64; 1 is pneumonia.
    """

    images: Tensor
    labels: Tensor

    def of_class(self, label: int) -> Tensor:
        """The pictures of one class, [M, 1, 28, 28]."""
        return self.images[self.labels == label]

    def split(self, count: int) -> tuple[Pictures, Pictures]:
        """The first `count` pictures of each class, and the others."""
        rank = torch.empty_like(self.labels)
        for label in set(self.labels.tolist()):
            own = self.labels == label
            rank[own] = torch.arange(int(own.sum()))
        return self._take(rank < count), self._take(rank >= count)

    def _take(self, which: Tensor) -> Pictures:
        return Pictures(self.images[which], self.labels[which])


@dataclass(frozen=True, slots=True)
class XrayData:
    """What is shipped; no picture is in two parts.

    Attributes:
        hospital: 32 of each class, behind the update.
        decoys: 99 of each class, from the same source and not behind it.
        public: 140 of each class, which the attacker has.
    """

    hospital: Pictures
    decoys: Pictures
    public: Pictures


def load() -> XrayData:
    """Read the shipped pictures."""
    shipped = resources.files("sentinel.demo") / "data" / "xrays.npz"
    with (
        resources.as_file(shipped) as path,
        np.load(path, allow_pickle=False) as arrays,
    ):
        return XrayData(
            **{
                part: Pictures(
                    torch.from_numpy(arrays[f"{part}_images"]).float().div(255).unsqueeze(1),
                    torch.from_numpy(arrays[f"{part}_labels"]).long(),
                )
                for part in ("hospital", "decoys", "public")
            }
        )
