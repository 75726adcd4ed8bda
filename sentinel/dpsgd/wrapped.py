"""Wrapped: the model and the optimizer that guard.private took, and whether they still are so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sentinel.dpsgd.layers import require_separate
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_SUPPORTED = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
)
_AGAIN = (
    "Call guard.private again after such a change, with a fresh optimizer and the same data; the "
    "budget goes on."
)


class Wrapped:
    """A model and its optimizer.

    Attributes:
        trainable: the parameters that are trained, each once, in the model's order.

    Guarantees:
        `require_unchanged` passes only where both are, part by part, what guard.private took.
        `require_settings` passes where no setting changed since the round's first batch, or an
        LRScheduler is attached; with one, it does not tell who changed them.

    Edges:
        a parameter thawed, frozen, added or replaced: `require_unchanged` raises
        `add_param_group`, or a group taken away:      `require_unchanged` raises
        a layer put in, taken out or replaced:         `require_unchanged` raises
        a step hook of somebody else's:                `require_unchanged` raises
        a setting changed, with an LRScheduler:        `require_settings` passes
        the same without one, by the loss or by hand:  `require_settings` raises
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look at both.

        Raises:
            MisuseError: an optimizer that private training refuses.
        """
        _require_optimizer(optimizer, model)
        self._model, self._optimizer = model, optimizer
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._trained = {id(p) for p in self.trainable}
        self._layers = [(layer, list(layer._modules.values())) for layer in model.modules()]  # noqa: SLF001 - torch's own list, without its checks
        self._held = [p for group in optimizer.param_groups for p in group["params"]]
        known = {id(p): p for p in [*model.parameters(), *self._held]}
        self._parameters = list(known.values())
        self._handles: list[Any] = []
        self._settings = _settings(optimizer)

    def hook(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Take hold of the optimizer's steps."""
        self._handles = [
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]

    def remove(self) -> None:
        """Let go of the optimizer's steps."""
        for handle in self._handles:
            handle.remove()

    def require_unchanged(self) -> None:
        """Compare with what guard.private took.

        Raises:
            MisuseError: what was changed, and what to do.
        """
        if any(list(layer._modules.values()) != inner for layer, inner in self._layers):  # noqa: SLF001 - as above
            raise MisuseError(f"Layers of the model were changed since guard.private. {_AGAIN}")
        found = {
            id(p)
            for layer, _ in self._layers
            for p in layer._parameters.values()  # noqa: SLF001 - as above
            if p is not None and p.requires_grad
        }
        if found != self._trained:
            raise MisuseError(
                "Parameters of the model were frozen, thawed, added or replaced since "
                f"guard.private. {_AGAIN}"
            )
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        if len(held) != len(self._held) or any(
            now is not before for now, before in zip(held, self._held, strict=True)
        ):
            raise MisuseError(
                f"The optimizer holds other parameters than it did at guard.private. {_AGAIN}"
            )
        if len(_hooks(self._optimizer)) != len(self._handles):
            raise _foreign_hook()

    def require_separate(self) -> None:
        """Check every layer again, as guard.private did: settings of a layer can change.

        Raises:
            MisuseError: a layer mixes records.
        """
        for name, layer in self._model.named_modules():
            require_separate(name, layer)

    def require_no_gradients(self) -> None:
        """Refuse an ordinary gradient on any parameter that the model or the optimizer holds.

        Raises:
            MisuseError: there is one.
        """
        if any(p.grad is not None for p in self._parameters):
            raise MisuseError(
                "A parameter has an ordinary gradient: it is used outside its own layer, by a "
                "penalty in the loss, or was trained without the private loader. Use the "
                "optimizer's weight_decay for a penalty, and each weight through its own layer."
            )

    def clear_gradients(self) -> None:
        """Leave none behind."""
        for parameter in self._parameters:
            parameter.grad = None

    def note_settings(self) -> None:
        """The first batch of a round comes: what the settings are now does not depend on it."""
        self._settings = _settings(self._optimizer)

    def require_settings(self) -> None:
        """Refuse settings that changed in the midst of a round by other than an LRScheduler.

        Raises:
            MisuseError: they did.
        """
        now = _settings(self._optimizer)
        if now != self._settings and not hasattr(self._optimizer.step, "_wrapped_by_lr_sched"):
            raise MisuseError(
                "The optimizer's settings (such as lr) changed in the midst of a round, without a "
                "scheduler that goes by steps: ReduceLROnPlateau and rules that look at the loss "
                "choose by the data, which the promise does not cover. Use a scheduler of "
                "torch.optim.lr_scheduler such as LambdaLR, or set them before the first batch."
            )
        self._settings = now


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Everything in the optimizer's groups but the parameters."""
    return [
        {
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def _hooks(optimizer: torch.optim.Optimizer) -> list[object]:
    return [
        *optimizer._optimizer_step_pre_hooks.values(),  # noqa: SLF001 - torch has no other way to see them
        *optimizer._optimizer_step_post_hooks.values(),  # noqa: SLF001 - as above
    ]


def _foreign_hook() -> MisuseError:
    return MisuseError(
        "The optimizer has a step hook of its own (register_step_pre_hook or _post_hook), which "
        "could change gradients or parameters after the noise. Remove it; what it does belongs "
        "outside of private rounds."
    )


def _require_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse an optimizer whose step is more than a function of gradients, or not of this model."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer) or (
        getattr(torch.optim, kind, None) is not type(optimizer) or kind not in _SUPPORTED
    ):
        raise MisuseError(
            f"Private training takes an optimizer of torch.optim ({', '.join(_SUPPORTED)}), not a "
            f"{kind}."
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if {id(p) for p in held if p.requires_grad} != trainable or not trainable:
        raise MisuseError(
            "The optimizer must hold exactly the model's trainable parameters: a parameter that is "
            "to stay needs requires_grad_(False) before guard.private."
        )
    if optimizer.state:
        raise MisuseError("The optimizer has been used already; give guard.private a fresh one.")
    if _hooks(optimizer):
        raise _foreign_hook()
