"""Normalisation: what a training plan does to pictures before the model sees them.

It is public, so that attackers undo it: they search pixels from 0 to 1, and pictures are compared
and shown as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.passive.local_training import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from sentinel.stress.passive.local_training import LocalTraining
    from sentinel.stress.records import Records

_ROUNDING = 0.01  # of the pixel range: what half precision may lose


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What the model takes is (pixels - mean) / std; where nothing is given, the pixels.

    Attributes:
        mean: one value, or one for each channel.
        std: likewise; above 0.

    Raises:
        MisuseError: values that are not finite, a std that is not above 0, or none at all.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what cannot be undone."""
        whole = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if not (self.mean and self.std and whole and min(self.std) > 0.0):
            raise MisuseError("mean and std must hold finite numbers, and those of std be above 0.")

    @classmethod
    def measured(cls, parts: Sequence[Tensor]) -> Normalisation:
        """Take the range of each channel for 0 to 1; nothing is done where all lie there already.

        Args:
            parts: pictures, [N, channels, H, W] each.
        """
        low = torch.stack([part.amin((0, 2, 3)) for part in parts]).amin(0).double()
        high = torch.stack([part.amax((0, 2, 3)) for part in parts]).amax(0).double()
        if float(low.min()) >= 0.0 and float(high.max()) <= 1.0:
            return cls()
        span = torch.where(high > low, high - low, 1.0)  # a channel without contrast has no range
        return cls(tuple((-low / span).tolist()), tuple((1.0 / span).tolist()))

    @property
    def identity(self) -> bool:
        """Whether the model takes pixels as they are."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0}

    def require_fit(self, parts: Sequence[Tensor]) -> None:
        """Check that these pictures, [N, channels, H, W] each, were normalised so.

        Raises:
            MisuseError: another number of channels, or pixels that do not lie from 0 to 1.
        """
        channels = parts[0].shape[1]
        if not {len(self.mean), len(self.std)} <= {1, channels}:
            raise MisuseError(
                f"mean and std take one value, or one for each of the {channels} channels; got "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if not self.identity and _lie_within(parts, 0.0):
            raise MisuseError(
                "The pictures lie from 0 to 1 and are not normalised; leave mean and std out, or "
                "let the loader give the pictures as the model takes them."
            )
        if not _lie_within([self.to_pixels(part) for part in parts], _ROUNDING):
            raise MisuseError(
                "By this mean and std the pixels do not lie from 0 to 1; give those that the "
                "training plan uses, divided by 255 where they are of pixels up to 255, or leave "
                "both out: the range of the pictures is then taken for 0 to 1."
            )

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Pixels of what the model takes, or of a guess at it, [..., channels, H, W]."""
        if self.identity:
            return inputs
        return inputs * _by_channel(self.std, inputs) + _by_channel(self.mean, inputs)

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """What the model takes of pixels [..., channels, H, W]; differentiable."""
        if self.identity:
            return pixels
        return (pixels - _by_channel(self.mean, pixels)) / _by_channel(self.std, pixels)

    def pictures(self, records: Records) -> Records:
        """The same records in pixels from 0 to 1."""
        if self.identity:
            return records
        return replace(records, inputs=self.to_pixels(records.inputs).clamp(0.0, 1.0))

    def replayed(self, training: LocalTraining) -> LocalTraining:
        """The same training, of pixels."""
        return training if self.identity else replace(training, forward=self._forward)

    def _forward(
        self, model: nn.Module, parameters: Mapping[str, Tensor], pixels: Tensor
    ) -> Tensor:
        return plain(model, parameters, self.to_inputs(pixels))


def _by_channel(values: tuple[float, ...], pictures: Tensor) -> Tensor:
    """[channels, 1, 1], or [1, 1, 1]; in the pictures' type."""
    return torch.tensor(values, dtype=pictures.dtype, device=pictures.device)[:, None, None]


def _lie_within(parts: Sequence[Tensor], slack: float) -> bool:
    """Whether all lie from 0 to 1, or so far beyond at most."""
    return all(float(part.min()) >= -slack and float(part.max()) <= 1.0 + slack for part in parts)
