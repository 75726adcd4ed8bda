"""Family F, learned: the net is trained to leak, so its weights look as training leaves them.

Both crafts train from the honest model on public records. They are small versions of published
attacks: what leaks is read as from any other model. For one that needs a secret see `seer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress.layers import (
    State,
    attacked_pair,
    chosen_layer,
    copied,
    linear_layers,
    loaded,
    recorded_inputs,
)
from sentinel.stress.servers.fit import fitted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

FLOOR = 1e-6  # keeps a logarithm finite
STEEP = 4.0  # how sharply firing is told from not firing, by the scatter of what drives it


@fitted
def learned_neurons(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    sample: Tensor,
    batch: int = 32,
    steps: int = 150,
    rate: float = 0.003,
    pull: float = 0.01,
) -> State:
    """Train everything up to a layer so that each record of a batch has neurons of its own.

    Args:
        model: the architecture, with a ReLU behind the attacked layer, the first of a pair.
        state: an honest global state.
        generator: draws the batches.
        sample: [n, ...] public records, at least `batch`.
        batch: records per batch.
        steps: of training.
        rate: step size of Adam.
        pull: weight of the distance to the honest parameters, by their norm.

    Returns:
        A crafted state with the same names, shapes and dtypes; normalisation statistics are the
        honest ones.

    Raises:
        MisuseError: the sample is too small, or no two fully connected layers stand in a row.

    Reference: the objective is Pan et al.'s count of exclusive neurons, USENIX Security 2022; the
    idea of training a net until every record can be told apart in its gradient is that of "EGGV",
    2025, arXiv 2502.04106.
    """
    first, _ = attacked_pair(model, state)
    twin = loaded(model, state).float().train()
    sample = _single_precision(sample)
    layer = twin.get_submodule(first)

    def objective(chosen: Tensor) -> Tensor:
        _, inputs = recorded_inputs(twin, sample[chosen], first)
        before = layer(inputs)
        spread = before.detach().std(0).mean().clamp_min(FLOOR)
        driven = STEEP * before / spread  # [records, neurons]
        silent = torch.nn.functional.logsigmoid(-driven)
        others = silent.sum(0, keepdim=True) - silent
        alone = torch.nn.functional.logsigmoid(driven) + others
        # A neuron for each record, and a record for each neuron.
        return -alone.amax(1).mean() - 0.5 * alone.amax(0).mean()

    return _trained(twin, state, objective, sample, batch, steps, rate, pull, generator)


@fitted
def learned_dominance(  # noqa: PLR0913 - each is one free choice of the attacker, by keyword
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    sample: Tensor,
    labels: Tensor | None = None,
    wanted: Tensor | None = None,
    batch: int = 8,
    steps: int = 200,
    rate: float = 0.01,
    pull: float = 0.01,
) -> State:
    """Train the whole net so that one record of a batch has nearly all of the gradient's norm.

    Or, with `wanted`, those records that the server looks for: patients of one kind.

    The objective takes the last layer's gradient of each record, ||p - y|| sqrt(||h||^2 + 1).
    With public labels most records become certain and few do not; without, labels are drawn, so
    that which record dominates follows from the record alone.

    Args:
        model: the architecture, with a fully connected last layer.
        state: an honest global state.
        generator: draws the batches and the labels.
        sample: [n, ...] public records, at least `batch`.
        labels: [n] theirs, integers; drawn where left out.
        wanted: [n] bool, which of the sample are of the kind that is looked for.
        batch: records per batch.
        steps: of training.
        rate: step size of Adam.
        pull: weight of the distance to the honest parameters, by their norm.

    Returns:
        A crafted state with the same names, shapes and dtypes; normalisation statistics are the
        honest ones.

    Raises:
        MisuseError: the sample is too small, the model has no fully connected layer, or `wanted`
            names no record or all of them.

    Reference: Garov et al., "SEER", ICLR 2024, arXiv 2306.03013; Shan et al., "Geminio", ICCV
    2025, arXiv 2411.14937.
    """
    _check_kind(wanted)
    last = chosen_layer(linear_layers(model, state), None, default=-1)
    twin = loaded(model, state).float().train()
    sample = _single_precision(sample)

    def objective(chosen: Tensor) -> Tensor:
        output, hidden = recorded_inputs(twin, sample[chosen], last)
        drawn = torch.randint(max(output.shape[1], 2), (len(chosen),), generator=generator)
        errors = _errors(output, drawn if labels is None else labels[chosen])
        norms = errors * (hidden.square().sum(1) + 1).sqrt()
        if wanted is None:
            return norms.sum().log() - norms.amax().log()
        of_kind = (norms * wanted[chosen]).sum()
        return norms.sum().log() - (of_kind + FLOOR).log()

    return _trained(twin, state, objective, sample, batch, steps, rate, pull, generator)


def _check_kind(wanted: Tensor | None) -> None:
    if wanted is not None and (bool(wanted.all()) or not wanted.any()):
        msg = "wanted needs some of the sample's records to be of the kind, and some not"
        raise MisuseError(msg)


def _single_precision(sample: Tensor) -> Tensor:
    """Return the records in float32, in which training stays finite; integers as they are."""
    return sample.float() if sample.is_floating_point() else sample


def _errors(output: Tensor, labels: Tensor) -> Tensor:
    """Return the norm of the loss's derivative by the logits, [n]."""
    outputs = output.shape[1]
    if outputs == 1:
        return (output[:, 0].sigmoid() - labels).abs() + FLOOR
    targets = torch.nn.functional.one_hot(labels, outputs)
    return ((output.softmax(1) - targets).square().sum(1) + FLOOR).sqrt()


def _trained(  # noqa: PLR0913, PLR0917 - private: one loop for both objectives
    twin: nn.Module,
    state: Mapping[str, Tensor],
    objective: Callable[[Tensor], Tensor],
    sample: Tensor,
    batch: int,
    steps: int,
    rate: float,
    pull: float,
    generator: torch.Generator,
) -> State:
    """Minimise an objective over random batches of the sample, held near the honest parameters."""
    if len(sample) < batch or batch < 2:  # noqa: PLR2004 - one record has nobody to outshine
        msg = f"the sample must hold a batch of {batch}, and a batch two records; got {len(sample)}"
        raise MisuseError(msg)
    parameters = dict(twin.named_parameters())
    starts = {name: value.detach().clone() for name, value in parameters.items()}
    size = torch.stack([value.square().sum() for value in starts.values()]).sum().clamp_min(FLOOR)
    optimizer = torch.optim.Adam(parameters.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        chosen = torch.randperm(len(sample), generator=generator)[:batch]
        moved = [(value - starts[name]).square().sum() for name, value in parameters.items()]
        loss = objective(chosen) + pull * torch.stack(moved).sum() / size
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    crafted = copied(state)
    for name, value in parameters.items():
        if name in crafted:
            crafted[name].copy_(value.detach())
    return crafted
