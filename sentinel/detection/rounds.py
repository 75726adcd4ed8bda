"""Synthetic local rounds: what a site would compute, on records that nobody has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name
from sentinel.detection.readout import candidates, leakage
from sentinel.detection.synthetic import undisturbed

if TYPE_CHECKING:
    from collections.abc import Mapping

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Spec:
    """How one site trains in one round.

    Attributes:
        records: how many it has.
        batch: records per step.
        epochs: passes over the records.
        rate: learning rate of plain SGD.
    """

    records: int
    batch: int
    epochs: int = 1
    rate: float = 0.05


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; for a single output binary cross-entropy on the logit.

    Args:
        output: [n, ..., classes]; places between are averaged over.
        labels: [n], integers.
    """
    if output.ndim > 2:  # noqa: PLR2004  # [n, classes] already
        output = output.flatten(1, -2).mean(1)
    if output.ndim == 1 or output.shape[-1] == 1:
        flat = output.reshape(-1)
        return nn.functional.binary_cross_entropy_with_logits(flat, labels.to(flat.dtype))
    return nn.functional.cross_entropy(output, labels)


def drawn_labels(
    module: nn.Module, inside: Tensor, generator: torch.Generator, *, likely: bool
) -> Tensor:
    """Draw a label for each record, [n].

    Args:
        module: holds the global model.
        inside: [n, ...], the records.
        generator: draws.
        likely: draw what the model itself expects, so that a trained model finds most records easy
            and few hard, as it does on real ones; otherwise each label is as likely.
    """
    with torch.no_grad(), undisturbed():
        output = module(inside)
    if output.ndim > 2:  # noqa: PLR2004  # [n, classes] already
        output = output.flatten(1, -2).mean(1)
    logits = output.reshape(len(inside), -1)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    if not likely or not bool(torch.isfinite(logits).all()):
        logits = torch.zeros_like(logits)
    return torch.multinomial(torch.softmax(logits.float(), dim=1), 1, generator=generator)[:, 0]


def local_round(module: nn.Module, records: Tensor, labels: Tensor, spec: Spec) -> State:
    """Train on the records, in order, and return the update.

    Args:
        module: a copy in evaluation mode that holds the global state; left as it was.
        records: [spec.records, ...].
        labels: [spec.records].
        spec: how to train.

    Returns:
        Name -> local - global, float32, for every parameter that has a gradient.
    """
    start = {name: value.detach() for name, value in module.named_parameters()}
    now = {name: value.clone().requires_grad_() for name, value in start.items()}
    with undisturbed():
        for _ in range(spec.epochs):
            for first in range(0, len(records), spec.batch):
                rows = records[first : first + spec.batch]
                targets = labels[first : first + spec.batch]
                output = torch.func.functional_call(module, now, (rows,))
                grads = torch.autograd.grad(
                    loss_of(output, targets), list(now.values()), allow_unused=True
                )
                with torch.no_grad():
                    for value, grad in zip(now.values(), grads, strict=True):
                        if grad is not None:
                            value.sub_(grad, alpha=spec.rate)
    return {name: now[name].detach() - start[name] for name in now}


def dense_input(module: nn.Module, records: Tensor) -> tuple[str, Tensor] | None:
    """Return the first dense layer with a bias that is reached, and what reaches it, [n, d]."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, part: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        return part.register_forward_pre_hook(lambda _, args: seen.append((name, args[0].detach())))

    handles = [
        watch(name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.bias is not None
    ]
    try:
        with torch.no_grad(), undisturbed():
            module(records)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return None
    name, values = seen[0]
    return name, values.flatten(0, -2)


def measured_leakage(
    module: nn.Module,
    state: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    inside: Tensor,
    outside: Tensor,
) -> float | None:
    """Return the share of the records that linear read-out of the first dense layer gives away.

    Args:
        module: the copy that the update was computed with.
        state: its global state.
        deltas: the update.
        inside: the records behind the update.
        outside: records that were not used: what is read of them is met by chance.

    Returns:
        0 to 1, or None where the model has no dense layer with a bias.
    """
    reached = dense_input(module, inside)
    other = dense_input(module, outside)
    if reached is None or other is None:
        return None
    weight = f"{reached[0]}.weight"
    bias = bias_name(weight)
    norms = state[weight].float().norm(dim=1).clamp_min(1e-12)
    thresholds = state[bias].float() / norms
    guesses = candidates(deltas[weight], deltas[bias], thresholds)
    return leakage(guesses, reached[1], other[1])
