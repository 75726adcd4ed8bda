"""Synthetic local rounds: what a site would compute, on records that nobody has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name, entry_name
from sentinel.detection.readout import candidates, leakage
from sentinel.detection.synthetic import foreign, run, undisturbed

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
        rate: learning rate.
        adam: Adam instead of plain SGD.
    """

    records: int
    batch: int
    epochs: int = 1
    rate: float = 0.05
    adam: bool = False


def loss_of(output: Tensor, labels: Tensor, records: Tensor) -> Tensor:
    """Cross-entropy; for one output binary cross-entropy; for the input's shape squared error.

    Args:
        output: [n, ..., classes]; places between are averaged over.
        labels: [n], integers.
        records: [n, ...], what went in: an output of that shape is a reconstruction.
    """
    if output.shape == records.shape and records.is_floating_point():
        return nn.functional.mse_loss(output, records)
    if output.ndim > 2:  # noqa: PLR2004  # [n, classes] already
        output = output.flatten(1, -2).mean(1)
    if output.ndim == 1 or output.shape[-1] == 1:
        flat = output.reshape(-1)
        return nn.functional.binary_cross_entropy_with_logits(flat, labels.to(flat.dtype))
    return nn.functional.cross_entropy(output, labels)


def losses_of(output: Tensor, labels: Tensor, records: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each record as `loss_of` takes it, [n].

    Args:
        output: [n, ..., classes].
        labels: [n], integers.
        records: [n, ...], what went in.
        targets: of the output's shape, what a reconstruction is compared with: its own input is
            what it has learned, and tells nothing.
    """
    if output.shape == records.shape and records.is_floating_point():
        return (output - targets).square().flatten(1).mean(1)
    if output.ndim > 2:  # noqa: PLR2004  # [n, classes] already
        output = output.flatten(1, -2).mean(1)
    if output.ndim == 1 or output.shape[-1] == 1:
        flat = output.reshape(-1)
        return nn.functional.binary_cross_entropy_with_logits(
            flat, labels.to(flat.dtype), reduction="none"
        )
    return nn.functional.cross_entropy(output, labels, reduction="none")


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
    with torch.no_grad():
        output = run(module, inside)
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
        Name -> local - global, float32, for every parameter.

    Raises:
        ModelError: the model's own code fails, forward or backward.
    """
    start = {name: value.detach() for name, value in module.named_parameters()}
    now = {name: value.clone().requires_grad_() for name, value in start.items()}
    step = _Adam(spec.rate) if spec.adam else _Sgd(spec.rate)
    for _ in range(spec.epochs):
        for first in range(0, len(records), spec.batch):
            rows = records[first : first + spec.batch]
            targets = labels[first : first + spec.batch]
            loss = loss_of(run(module, rows, now), targets, rows)
            with undisturbed(), foreign():
                grads = torch.autograd.grad(loss, list(now.values()), allow_unused=True)
            with torch.no_grad():
                for (name, value), grad in zip(now.items(), grads, strict=True):
                    if grad is not None:
                        step(name, value, grad)
    return {name: now[name].detach() - start[name] for name in now}


class _Sgd:
    """Plain gradient descent."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def __call__(self, _name: str, value: Tensor, grad: Tensor) -> None:
        value.sub_(grad, alpha=self._rate)


class _Adam:
    """Adam with the usual decays (Kingma and Ba, 2015, algorithm 1)."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def __call__(self, name: str, value: Tensor, grad: Tensor) -> None:
        zero = torch.zeros_like(grad)
        first, second, steps = self._moments.get(name, (zero, zero, 0))
        first, second, steps = first.lerp(grad, 0.1), second.lerp(grad.square(), 0.001), steps + 1
        self._moments[name] = (first, second, steps)
        size = (second / (1.0 - 0.999**steps)).sqrt() + 1e-8
        value.sub_(first / size, alpha=self._rate / (1.0 - 0.9**steps))


def dense_input(module: nn.Module, records: Tensor) -> tuple[str, Tensor] | None:
    """Return the first dense layer with a bias that is reached, and what reaches it, [n, d]."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, part: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def remember(_part: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.append((name, args[0].detach()))

        return part.register_forward_pre_hook(remember)

    handles = [
        watch(name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.bias is not None
    ]
    try:
        with torch.no_grad():
            run(module, records)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return None
    name, values = seen[0]
    return name, values.reshape(-1, values.shape[-1])


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
        0 to 1, or None where the model has no dense layer with a weight and a bias of its own.
    """
    reached = dense_input(module, inside)
    other = dense_input(module, outside)
    if reached is None or other is None:
        return None
    weight = entry_name(reached[0], "weight")
    bias = bias_name(weight)
    if not {weight, bias} <= state.keys() & deltas.keys():  # a parametrized layer has others
        return None
    norms = state[weight].float().norm(dim=1).clamp_min(1e-12)
    thresholds = state[bias].float() / norms
    guesses = candidates(deltas[weight], deltas[bias], thresholds)
    return leakage(guesses, reached[1], other[1])
