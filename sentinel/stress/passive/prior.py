"""What an attacker knows about pictures of a class before it sees an update.

A Gaussian in the directions in which pictures vary most (probabilistic principal components,
without the remainder), fitted on public pictures; or, for an attacker who has none, one that only
knows that neighbouring pixels are alike. A picture is mean + latent x directions, with a standard
normal latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from torch import Tensor

_CONTRAST = 0.25  # standard deviation of a pixel, of a range of 1
_GRAIN = 2e-3  # variance of what neighbours do not share, as a ratio


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

    def encode(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """Latents [N, K] whose pictures are nearest to these [N, 1, H, W], each of its class."""
        offsets = (pictures - self.means[labels]).flatten(1).double()
        axes = self.directions.double()
        found = [
            torch.linalg.lstsq(axes[label].T, offset[:, None]).solution[:, 0]
            for label, offset in zip(labels.tolist(), offsets, strict=True)
        ]
        return torch.stack(found).to(pictures)

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


def filled_prior(prior: ImagePrior, *, remainder: float = 0.05, reach: float = 2.0) -> ImagePrior:
    """A fitted prior and, beside its directions, a smooth remainder that public pictures lack.

    Without it no picture is found that the directions cannot hold, however little the noise. The
    result has a direction for each pixel.

    Args:
        prior: as fitted.
        remainder: standard deviation of a pixel that the directions leave over, of a range of 1.
        reach: pixels over which the remainder's correlation falls to 1/e.
    """
    rest = _smooth(tuple(prior.means.shape[-2:]), reach) * remainder**2
    full = [
        torch.linalg.cholesky(axes.T @ axes + rest).T.float() for axes in prior.directions.double()
    ]
    return ImagePrior(prior.means, torch.stack(full))


def smooth_prior(size: tuple[int, int], classes: int, *, reach: float = 3.0) -> ImagePrior:
    """A prior for an attacker without any picture: pixels are grey, and neighbours are alike.

    A Gaussian field whose correlation falls as exp(-distance / reach), the same for each class. It
    has a direction for each pixel, so that it can hold any picture.

    Args:
        size: height and width.
        classes: of the model.
        reach: pixels over which the correlation falls to 1/e.
    """
    field = _smooth(size, reach) * _CONTRAST**2
    directions = torch.linalg.cholesky(field).T.float()
    grey = torch.full((classes, 1, *size), 0.5)
    return ImagePrior(grey, directions.expand(classes, -1, -1))


def _smooth(size: tuple[int, ...], reach: float) -> Tensor:
    """[pixels, pixels], float64: correlations that fall as exp(-distance / reach)."""
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).double()
    correlation = torch.exp(-torch.cdist(places, places) / reach)
    correlation.diagonal().add_(_GRAIN)  # what neighbours do not share
    return correlation
