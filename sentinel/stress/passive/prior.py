"""What an attacker knows about pictures of a class before it sees an update.

Fitted on public pictures: a Gaussian in the directions in which they vary most (probabilistic
principal components, without the remainder). A picture is mean + latent x directions, with a
standard normal latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImagePrior:
    """Mean and main directions of each class.

    Attributes:
        means: [classes, 1, H, W], the mean picture of each class.
        directions: [classes, K, H * W], scaled by the standard deviation along them.
    """

    means: Tensor
    directions: Tensor

    @property
    def components(self) -> int:
        """Latent values per picture."""
        return int(self.directions.shape[1])

    def decode(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Pictures [N, 1, H, W] of latents [N, K], each of its class; differentiable."""
        offsets = torch.einsum("nk,nkp->np", latent, self.directions[labels])
        return self.means[labels] + offsets.view(-1, *self.means.shape[1:])

    def deviations(self, pictures: Tensor, label: int) -> Tensor:
        """[N, H * W]: pictures minus the class mean, centred, scaled to norm 1."""
        flat = (pictures - self.means[label]).flatten(1)
        flat = flat - flat.mean(dim=1, keepdim=True)
        size: Tensor = flat.norm(dim=1, keepdim=True)
        return flat / size.clamp_min(1e-12)  # a flat picture stays zero


def fit_prior(pictures: Tensor, labels: Tensor, components: int) -> ImagePrior:
    """Fit the prior on public pictures.

    Args:
        pictures: [N, 1, H, W], pixels from 0 to 1; none of them behind any attacked update.
        labels: [N], classes numbered from 0, each with more pictures than components.
        components: directions per class.

    Raises:
        MisuseError: a class has too few pictures.
    """
    means, directions = [], []
    for label in range(int(labels.max()) + 1):
        own = pictures[labels == label]
        if not 0 < components < len(own):
            msg = f"a prior of {components} components needs more pictures than that in each class"
            raise MisuseError(msg)
        mean = own.mean(dim=0)
        _, sizes, axes = torch.linalg.svd((own - mean).flatten(1), full_matrices=False)
        means.append(mean)
        directions.append(axes[:components] * (sizes[:components, None] / (len(own) - 1) ** 0.5))
    return ImagePrior(torch.stack(means), torch.stack(directions))
