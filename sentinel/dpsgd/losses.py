"""Losses: refuses those of torch.nn whose divisor is computed from the whole batch.

A mean that divides by the batch's sum of class weights, or by how many targets are not ignored,
makes each record's gradient depend on who else is in the batch. torch's loss modules are seen when
they run; a loss that is a function or a formula is not (docs/private-training.md says what to do).
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


class LossWatch:
    """Looks at every torch.nn loss that runs while a batch is open, and remembers what was wrong.

    Guarantees:
        Of the losses of torch.nn that run in a batch, none that is a mean over weights or over a
        count of its targets passes `require_plain`. Losses written by hand are not looked at.

    Edges:
        class weights, with reduction "mean":           raises
        a target of the class `ignore_index`, the same: raises
        neither of them, or any other loss:             passes
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
        if not isinstance(layer, nn.CrossEntropyLoss | nn.NLLLoss) or layer.reduction != "mean":
            return
        output = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if not (isinstance(output, Tensor) and isinstance(target, Tensor) and output.requires_grad):
            return
        if target.is_floating_point():  # shares of the classes: divided by the rows
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
