"""Family F, with a secret: records come apart in mixtures of neurons that the server alone knows.

Few neurons fire for few records, and few updates of a neuron hold a record. Groups of neurons fire
together for all records but those of one thin slice of a line; a group's secret mixture of updates
is zero for what fires all of them, and so holds the records of its slice alone. In the published
attack a net and its decoder learn this together, which takes far longer than a round. Here slices
and mixtures are laid, and only what comes behind them is fitted, in one step, so that the model
answers as the honest one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import State, attacked_pair, copied, loaded, recorded_inputs
from sentinel.stress.servers.fit import fitted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

GROUP = 3  # neurons of one mixture: in twos, a client could try all pairs
NOISE = 0.5  # of a slice's width by which the neurons of a group may disagree
RIDGE = 1e-3  # by the mean square of what the next layer is fitted on
FLOOR = 1e-4  # of the mean energy, below which no direction is taken for empty


def seer_secret(neurons: int, generator: torch.Generator, group: int = GROUP) -> Tensor:
    """Draw the secret mixtures, [neurons // group, neurons]: `group` entries in each, none small.

    Args:
        neurons: width of the attacked layer.
        generator: the attacker's randomness.
        group: neurons of one mixture, at least 2.

    Raises:
        MisuseError: the layer is too narrow, or a group too small.
    """
    if not 2 <= group <= neurons:  # noqa: PLR2004 - one neuron has nobody to mix with
        msg = f"a mixture needs 2 to {neurons} of the layer's neurons, got {group}"
        raise MisuseError(msg)
    count = neurons // group
    owners = torch.randperm(neurons, generator=generator)[: count * group].view(count, group)
    drawn = torch.randn(count, group, generator=generator)
    return torch.zeros(count, neurons).scatter_(1, owners, drawn + 0.5 * drawn.sign())


@fitted
def seer(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    sample: Tensor,
    batch: int = 32,
    secret: Tensor | None = None,
    noise: float = NOISE,
) -> State:
    """Lay a slice of one record in a batch under each secret mixture, and fit what comes behind.

    Args:
        model: the architecture, with a ReLU behind the attacked layer, the first of a pair.
        state: an honest global state.
        generator: draws the secret where it is left out, before all else; then the slices.
        sample: [n, ...] public records, at least `batch`.
        batch: records per batch, at least 2.
        secret: [mixtures, neurons], as `seer_secret` draws it; the server keeps it to read by.
        noise: by how much of a slice's width the neurons of a group differ, along directions that
            the public records hardly take, so that their rows need not look alike.

    Returns:
        A crafted state with the same names, shapes and dtypes.

    Raises:
        MisuseError: the sample is too small, or no two fully connected layers stand in a row.

    Reference: after Garov et al., "Hiding in Plain Sight" (SEER), ICLR 2024, arXiv 2306.03013.
    """
    first, following = attacked_pair(model, state)
    if len(sample) < batch or batch < 2:  # noqa: PLR2004 - one record needs no slice
        msg = f"the sample must hold a batch of {batch}, and a batch two records; got {len(sample)}"
        raise MisuseError(msg)
    crafted = copied(state)
    weight = crafted[f"{first}.weight"]
    mixtures = seer_secret(len(weight), generator) if secret is None else secret
    twin = loaded(model, state).eval()
    with torch.no_grad():
        inputs = recorded_inputs(twin, sample, first)[1].float().cpu()
        behind = recorded_inputs(twin, sample, following)[1].float().cpu()
    wanted = behind @ state[f"{following}.weight"].float().T + state[f"{following}.bias"].float()
    quiet = _quiet_directions(inputs)
    for mixture in mixtures:
        group = torch.nonzero(mixture)[:, 0]
        rows, biases = _slice(weight[group].float(), inputs, quiet, batch, noise, generator)
        weight[group] = rows.to(weight)
        crafted[f"{first}.bias"][group] = biases.to(weight)
    twin = loaded(model, crafted).eval()
    with torch.no_grad():
        fires = recorded_inputs(twin, sample, following)[1].float().cpu()
    columns, bias = _fitted_behind(fires, wanted, mixtures)
    crafted[f"{following}.weight"].copy_(columns)
    crafted[f"{following}.bias"].copy_(bias)
    return crafted


def _quiet_directions(inputs: Tensor) -> Tensor:
    """Return directions as columns, [width, width], the longer the less the records take them."""
    energy, directions = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    scaled: Tensor = directions / (energy.clamp_min(0) + FLOOR * energy.mean()).sqrt()
    return scaled


def _slice(  # noqa: PLR0913, PLR0917 - private: one group of the layer
    rows: Tensor,
    inputs: Tensor,
    quiet: Tensor,
    batch: int,
    noise: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return rows [group, width] that scan one line, the last cutting it one slice later."""
    along = inputs @ rows[0]
    level = float(torch.rand(1, generator=generator)) * (1 - 1 / batch)
    low, high = (float(torch.quantile(along, part)) for part in (level, level + 1 / batch))
    drawn = torch.randn(rows.shape, generator=generator) @ quiet.T
    sizes = (inputs @ drawn.T).square().mean(0).sqrt()
    spread = (
        noise * (high - low) * drawn / sizes.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    )
    biases = torch.full((len(rows),), -low)
    biases[-1] = -high
    return rows[0] + spread, biases


def _fitted_behind(fires: Tensor, wanted: Tensor, mixtures: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next layer's weight and bias, by ridge regression under the secret's constraint.

    All columns of a group but the last are fitted freely, and the last makes the mixture of all of
    them zero. So the records that fire the whole group leave no trace in it.

    Args:
        fires: [n, neurons] what the crafted layer gives for the public records.
        wanted: [n, outputs] what the honest next layer gives.
        mixtures: [mixtures, neurons].
    """
    neurons = mixtures.shape[1]
    free = torch.eye(neurons)  # [neurons, free columns]: the weight is its product with them
    last = [int(torch.nonzero(mixture)[-1]) for mixture in mixtures]
    for mixture, place in zip(mixtures, last, strict=True):
        free[place] = -mixture / mixture[place]
    kept = [place for place in range(neurons) if place not in set(last)]
    free = free[:, kept]
    seen = torch.cat([fires @ free, torch.ones(len(fires), 1)], 1).double()
    normal = seen.T @ seen / len(seen)
    normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    solved = torch.linalg.solve(normal, seen.T @ wanted.double() / len(seen)).float()
    return solved[:-1].T @ free.T, solved[-1]
