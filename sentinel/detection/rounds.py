"""Synthetic local rounds: what a site would compute, on records that nobody has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.layers import bias_name, entry_name
from sentinel.detection.readout import NEAR, candidates, leakage, thresholds_of, token_leakage
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
        momentum: share of the last step that SGD takes again.
    """

    records: int
    batch: int
    epochs: int = 1
    rate: float = 0.05
    adam: bool = False
    momentum: float = 0.0


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
    step = _Adam(spec.rate) if spec.adam else _Sgd(spec.rate, spec.momentum)
    for _ in range(spec.epochs):
        for first in range(0, len(records), spec.batch):
            rows = records[first : first + spec.batch]
            targets = labels[first : first + spec.batch]
            loss = loss_of(run(module, rows, now), targets, rows)
            with undisturbed(), foreign():
                grads = torch.autograd.grad(loss, list(now.values()), allow_unused=True)
            with torch.no_grad():
                for (name, value), grad in zip(now.items(), grads, strict=True):
                    if grad is not None:  # that of a sparse embedding is made dense
                        step(name, value, grad.to_dense() if grad.is_sparse else grad)
    return {name: now[name].detach() - start[name] for name in now}


class _Sgd:
    """Gradient descent, plain or with momentum as PyTorch has it."""

    def __init__(self, rate: float, momentum: float = 0.0) -> None:
        self._rate, self._momentum = rate, momentum
        self._last: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor, grad: Tensor) -> None:
        if self._momentum:
            last = self._last.get(name)
            grad = grad if last is None else grad.add(last, alpha=self._momentum)
            self._last[name] = grad
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


def reached(module: nn.Module, records: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Return the dense layers with a bias and the embeddings in the order they are reached.

    Returns:
        Name, layer, and what reaches it, [n, ...]; a layer once, as it is first reached.
    """
    seen: dict[str, tuple[nn.Module, Tensor]] = {}

    def watch(name: str, part: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def remember(_part: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, (part, args[0].detach()))

        return part.register_forward_pre_hook(remember)

    handles = [
        watch(name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) or (isinstance(part, nn.Linear) and part.bias is not None)
    ]
    try:
        with torch.no_grad():
            run(module, records)
    finally:
        for handle in handles:
            handle.remove()
    return [(name, part, values) for name, (part, values) in seen.items()]


def dense_input(module: nn.Module, records: Tensor) -> tuple[str, Tensor] | None:
    """Return the first dense layer with a bias that is reached, and what reaches it, [n, d]."""
    for name, part, values in reached(module, records):
        if isinstance(part, nn.Linear):
            return name, _rows(values)
    return None


@dataclass(frozen=True, slots=True)
class Readable:
    """What linear read-out of a model is measured by: the true inputs of its first layers.

    Attributes:
        dense: name of each dense layer with a bias in the order they are reached, its inputs by the
            records behind an update and by others, [n, d] each (a sequence gives one row per
            place).
        tokens: the same of the first embedding, [n, places] each; None without one.
    """

    dense: tuple[tuple[str, Tensor, Tensor], ...]
    tokens: tuple[str, Tensor, Tensor] | None

    @classmethod
    def of(cls, module: nn.Module, inside: Tensor, outside: Tensor) -> Readable:
        """Run a copy on the records behind an update and on others that were not used."""
        own, others = reached(module, inside), reached(module, outside)
        dense, tokens = [], None
        for (name, part, values), (_, _, rest) in zip(own, others, strict=True):
            if isinstance(part, nn.Embedding):
                tokens = tokens or (name, values.flatten(1), rest.flatten(1))
            else:
                dense.append((name, _rows(values), _rows(rest)))
        return cls(tuple(dense), tokens)

    def leakage(
        self, state: Mapping[str, Tensor], deltas: Mapping[str, Tensor], within: float = NEAR
    ) -> float | None:
        """Return the share of the records that linear read-out of an update gives away.

        Args:
            state: the global state.
            deltas: the update.
            within: distance that counts as read, see `readout.leakage`.

        Returns:
            0 to 1, the larger share of the embedding and of the first dense layer that moved; None
            where the model has neither a dense layer with a weight and a bias of its own nor an
            embedding.
        """
        found = [self._by_dense(state, deltas, within), self._by_tokens(deltas, within)]
        told = [share for share in found if share is not None]
        return max(told) if told else None

    def _by_dense(
        self, state: Mapping[str, Tensor], deltas: Mapping[str, Tensor], within: float
    ) -> float | None:
        found = None
        for name, inside, outside in self.dense:
            weight = entry_name(name, "weight")
            bias = bias_name(weight)
            if not {weight, bias} <= state.keys() & deltas.keys():  # parametrized: it has others
                continue
            if bool(deltas[bias].any()):
                thresholds = thresholds_of(state[weight], state[bias])
                guesses = candidates(deltas[weight], deltas[bias], thresholds)
                return leakage(guesses, inside, outside, within)
            found = 0.0
        return found

    def _by_tokens(self, deltas: Mapping[str, Tensor], within: float) -> float | None:
        if self.tokens is None:
            return None
        name, inside, outside = self.tokens
        weight = entry_name(name, "weight")
        return token_leakage(deltas[weight], inside, outside, within) if weight in deltas else None


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def measured_leakage(
    module: nn.Module,
    state: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    inside: Tensor,
    outside: Tensor,
) -> float | None:
    """Return the share of the records that linear read-out of the first layers gives away.

    Args:
        module: the copy that the update was computed with.
        state: its global state.
        deltas: the update.
        inside: the records behind the update.
        outside: records that were not used: what is read of them is met by chance.

    Returns:
        0 to 1, or None: see `Readable.leakage`.
    """
    return Readable.of(module, inside, outside).leakage(state, deltas)
