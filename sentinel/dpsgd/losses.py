"""Losses: refuses those of torch.nn that compute one record's part from the whole batch.

A mean that divides by the batch's sum of class weights, or by how many targets are not ignored,
makes each record's gradient depend on who else is in the batch; so does a column of outputs beside
a row of targets, which torch broadcasts to every pair of records. torch's loss modules are seen
when they run; a loss that is a function or a formula is not (docs/private-training.md says what to
do).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_EACH = (
    'Use reduction="none" and take the plain mean yourself: '
    '`(weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean()`.'
)


# Losses that take values one by one, and broadcast shapes that differ.
_BY_VALUE = (
    nn.MSELoss
    | nn.L1Loss
    | nn.SmoothL1Loss
    | nn.HuberLoss
    | nn.PoissonNLLLoss
    | nn.KLDivLoss
    | nn.SoftMarginLoss
    | nn.HingeEmbeddingLoss
)


class LossWatch:
    """Looks at every torch.nn loss that runs while a batch is open, and remembers what was wrong.

    Guarantees:
        Of the losses of torch.nn that run in a batch, none passes `require_plain` that is a mean
        over weights or over a count of its targets, or compares one record's output with another's
        target. Losses written by hand are not looked at.

    Edges:
        class weights, with reduction "mean":           raises
        a target of the class `ignore_index`, the same: raises
        a loss by value, targets of another shape:      raises
        none of them, or any other loss:                passes
        reduction "sum" or "none":                      passes
        targets that are shares:                        passes
        in evaluation (the input has no gradient):      passes
    """

    def __init__(self) -> None:
        """Nothing is looked at yet."""
        self._handle: RemovableHandle | None = None
        self._found: MisuseError | None = None

    def begin(self) -> None:
        """A batch is open."""
        self._found = None
        if self._handle is None:
            watch = weakref.ref(self)  # torch's list of hooks must not keep a training alive
            self._handle = nn.modules.module.register_module_forward_hook(
                lambda *seen: _look(watch(), *seen), with_kwargs=True
            )
            weakref.finalize(self, self._handle.remove)

    def end(self) -> None:
        """No batch is open."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def require_plain(self) -> None:
        """Refuse a step on a loss whose divisor depends on the batch.

        Raises:
            MisuseError: what to use in its place.
        """
        if self._found is not None:
            raise self._found

    def look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One module of whatever kind has run."""
        if not isinstance(layer, nn.CrossEntropyLoss | nn.NLLLoss | _BY_VALUE):
            return
        named = [kwargs.get(name) for name in ("input", "log_input", "target") if name in kwargs]
        output, target = [*args, *named, None, None][:2]
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return
        if not (output.requires_grad or target.requires_grad):
            return
        if isinstance(layer, nn.CrossEntropyLoss | nn.NLLLoss):
            self._look_at_count(layer, target)
        elif output.shape != target.shape:
            self._found = MisuseError(
                f"{type(layer).__name__} met outputs of shape {tuple(output.shape)[1:]} a record "
                f"and targets of shape {tuple(target.shape)[1:]}: torch compares every record's "
                "output with everybody's target. Bring the targets to the shape of the outputs, "
                "for example y[:, None] or model(x).squeeze(1)."
            )

    def _look_at_count(self, layer: nn.CrossEntropyLoss | nn.NLLLoss, target: Tensor) -> None:
        """A mean over targets: what does it divide by?"""
        if layer.reduction != "mean" or target.is_floating_point():  # shares: divided by the rows
            return
        kind = type(layer).__name__
        if layer.weight is not None:
            self._found = MisuseError(
                f"{kind} with class weights divides by the batch's sum of weights, so that one "
                f"patient changes everybody's gradient. {_EACH}"
            )
        elif bool((target == layer.ignore_index).any()):
            self._found = MisuseError(
                f"{kind} met targets that it ignores: it divides by how many are left in the "
                "batch, so that one patient changes everybody's gradient. Use "
                'reduction="none" (an ignored target then counts 0), and take the plain mean.'
            )


def _look(
    watch: LossWatch | None,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    _: object,
) -> None:
    if watch is not None:
        watch.look(layer, args, kwargs)
