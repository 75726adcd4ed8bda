"""Pictures and rows of the same patients, out of one update of a net that takes both.

Both halves are varied at once: pixels between 0 and 1, with total variation, and columns as for
tables. Each half is also an anchor for the other, since the same errors at the answer weigh both;
how much that helps is measured by giving the attacker the truth of one half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sentinel.stress.passive.inversion import blur, total_variation
from sentinel.stress.passive.relaxation import softened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentinel.stress.passive.columns import Table
    from sentinel.stress.passive.local_training import LocalTraining, Seen


class TwoBranches(nn.Module):
    """A small net on pictures and one on rows, whose features meet in the last layers."""

    def __init__(self, columns: int, side: int = 28, classes: int = 2, width: int = 64) -> None:
        """Make the layers; their values are set by whoever uses them.

        Args:
            columns: features of a row.
            side: of a picture, a multiple of 4.
            classes: outputs.
            width: features that each branch hands on.
        """
        super().__init__()
        with torch.device("meta"):
            self.eye = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(16 * (side // 4) ** 2, width),
                nn.ReLU(),
            )
            self.chart = nn.Sequential(nn.Linear(columns, width), nn.ReLU())
            self.head = nn.Linear(2 * width, classes)
        self.to_empty(device="cpu")

    def forward(self, pictures: Tensor, rows: Tensor) -> Tensor:
        """[N, 1, side, side] and [N, columns] to [N, classes]."""
        answer: Tensor = self.head(torch.cat([self.eye(pictures), self.chart(rows)], dim=1))
        return answer


@dataclass(frozen=True, slots=True)
class Pair:
    """Pictures and rows of the same patients.

    Attributes:
        pictures: [N, 1, side, side], pixels from 0 to 1.
        rows: [N, features].
    """

    pictures: Tensor
    rows: Tensor

    def packed(self) -> Tensor:
        """Both in one tensor [N, side * side + features], as `together` makes a net take them."""
        return torch.cat([self.pictures.flatten(1), self.rows], dim=1)


def together(training: LocalTraining, side: int) -> LocalTraining:
    """The same training of a net of (pictures, rows) that takes both packed in one tensor."""

    def forward(model: nn.Module, parameters: Mapping[str, Tensor], packed: Tensor) -> Tensor:
        pictures = packed[:, : side * side].reshape(-1, 1, side, side)
        answer: Tensor = functional_call(
            model, dict(parameters), (pictures, packed[:, side * side :])
        )
        return answer

    return replace(training, forward=forward)


@dataclass(frozen=True, slots=True)
class JointSearch:
    """How the attacker searches.

    Attributes:
        iterations: Adam steps for each hardness.
        pixel_step: first step of the pixels, in units of their range, on the gradient's signs.
        step: first step of the columns.
        total_variation: its weight.
        smoothing: standard deviation of the final blur, in pixels; 0 for none.
        hardness: of the soft rectifiers, one after the other; the true net comes last.
    """

    iterations: int = 300
    pixel_step: float = 0.1
    step: float = 0.06
    total_variation: float = 5e-3
    smoothing: float = 0.0
    hardness: tuple[float, ...] = (20.0,)


@dataclass(frozen=True, slots=True)
class Known:
    """What the attacker has beforehand.

    Attributes:
        pictures: the truth of this half; the other half is searched alone.
        rows: likewise.
        start: pictures that the search starts from, such as class means of public ones; random
            ones where left out.
    """

    pictures: Tensor | None = None
    rows: Tensor | None = None
    start: Tensor | None = None


NOTHING = Known()


def recover(  # noqa: PLR0913, PLR0917 - each is one thing that the attacker has
    training: LocalTraining,
    seen: Seen,
    table: Table,
    side: int,
    search: JointSearch,
    generator: torch.Generator,
    known: Known = NOTHING,
) -> Pair:
    """Reconstruct pictures and rows behind one update.

    Args:
        training: what `together` gave, labels included.
        seen: the update, with the figures of its sanitizer.
        table: what is known of the columns.
        side: of a picture.
        search: settings.
        generator: of the random start; the only randomness.
        known: halves that are given, and where to start.
    """
    count = len(training.labels)
    pictures = torch.rand((count, 1, side, side), generator=generator)
    latents = table.start((count,), generator)
    if known.start is not None:
        pictures = known.start
    if known.pictures is not None:
        pictures = known.pictures
    for stage in (*(softened(training, hardness) for hardness in search.hardness), training):
        pictures, latents = _descend(stage, seen, table, search, (pictures, latents), known)
    rows = table.snapped(table.soften(latents)) if known.rows is None else known.rows
    return Pair(pictures if known.pictures is not None else blur(pictures, search.smoothing), rows)


def _descend(  # noqa: PLR0913, PLR0917 - private, passed on
    training: LocalTraining,
    seen: Seen,
    table: Table,
    search: JointSearch,
    start: tuple[Tensor, Tensor],
    known: Known,
) -> tuple[Tensor, Tensor]:
    """One descent of both halves from `start`; a half that is known stays."""
    pictures, latents = (half.clone().requires_grad_() for half in start)
    adam = torch.optim.Adam(
        [
            {"params": [pictures], "lr": search.pixel_step * (known.pictures is None)},
            {"params": [latents], "lr": search.step * (known.rows is None)},
        ]
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, search.iterations)
    for _ in range(search.iterations):
        rows = table.soften(latents) if known.rows is None else known.rows + 0 * latents.sum()
        simulated = training.update(Pair(pictures, rows).packed())
        objective = _objective(simulated, seen, search, pictures)
        objective = objective + _surprise(latents, table, seen)
        pictures.grad, latents.grad = torch.autograd.grad(objective, (pictures, latents))
        pictures.grad = pictures.grad.sign()
        adam.step()
        decay.step()
        with torch.no_grad():
            pictures.clamp_(0.0, 1.0)
    return pictures.detach(), latents.detach()


def _objective(simulated: Tensor, seen: Seen, search: JointSearch, pictures: Tensor) -> Tensor:
    rough = search.total_variation * total_variation(pictures)
    treated = seen.sanitize(simulated)
    return 1 - nn.functional.cosine_similarity(treated, seen.values, dim=0) + rough


def _surprise(latents: Tensor, table: Table, seen: Seen) -> Tensor:
    """What the marginals weigh beside a cosine, whose noise is about 1 / sqrt(D)."""
    noise = seen.error_std * math.sqrt(seen.values.numel())
    share = noise / (noise + seen.signal_norm)
    return share / math.sqrt(seen.values.numel()) * table.surprise(latents).sum()
