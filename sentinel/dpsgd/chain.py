"""Chain: each private step starts where the last one ended, and the first from the global model.

What the last step left is kept as a copy in memory and compared bit by bit: the version counters of
torch do not see `p.data`, a hash costs more than the comparison on any device, and a copy never
takes two states for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.errors import Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Chain:
    """What a model and its optimizer must be when the next private step begins.

    Guarantees:
        `require` passes only where every value that a forward pass or the optimizer may use is, bit
        by bit, what the last private step left, or the global model's: parameters, buffers, and the
        optimizer's state. What is changed and put back before the next step is not seen, nor what
        code of the model keeps in plain attributes.

    Edges:
        a trainable parameter changed, by whatever way: raises
        a frozen parameter or a buffer changed:         raises
        an entry of the optimizer's state changed:      raises
        a parameter frozen, thawed or replaced:         raises
        a value that is NaN and stays so:               passes
        nothing changed:                                passes
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, base: Mapping[str, Tensor]
    ) -> None:
        """Begin at the global state, which `model` has just been loaded with."""
        self._optimizer = optimizer
        self._holders = _holders(model)
        self._trainable = _trainable(model)
        named = _named(model)
        self._rest = {
            name: (tensor, _constant(tensor, base.get(name)))
            for name, tensor in named.items()
            if name not in self._trainable
        }
        self._last = {name: p.detach().clone() for name, p in self._trainable.items()}
        self._memory = optimizer_state(optimizer)

    def note(self) -> None:
        """Keep what a private step has left."""
        for name, parameter in self._trainable.items():
            self._last[name].copy_(parameter.detach())
        _copy(optimizer_state(self._optimizer, copy=False), self._memory)

    def require(self) -> None:
        """Compare with what was kept.

        Raises:
            Withheld: PROMISE_NOT_KEPT; what was changed, never how.
        """
        if not all(holder.holds() for holder in self._holders):
            raise broken("a parameter or buffer of the model was frozen, thawed or replaced")
        if not all(_same(p, self._last[name]) for name, p in self._trainable.items()):
            raise broken("parameters of the model were changed outside the private steps")
        if not all(_same(now, before) for now, before in self._rest.values()):
            raise broken("frozen parameters or buffers of the model are not the global model's")
        if not same_memory(optimizer_state(self._optimizer, copy=False), self._memory):
            raise broken("the optimizer's state was changed outside the private steps")

    def require_local(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refuse a local state that is not what the last step left.

        Returns:
            The same state, as it was kept: whoever trains on does not change it.

        Raises:
            Withheld: PROMISE_NOT_KEPT.
        """
        expected = self._last | {name: value for name, (_, value) in self._rest.items()}
        first = {id(p): name for name, p in self._trainable.items()}
        for holder in self._holders:  # other names of tied parameters
            if holder.trainable:
                expected[holder.full_name] = expected[first[id(holder.tensor)]]
        for name, value in local.items():
            if name not in expected or not _same(value, expected[name]):
                raise broken("the local state is not what the last private step left")
        return {name: expected[name] for name in local}

    @property
    def memory(self) -> dict[tuple[int, str], object]:
        """The optimizer's state after the last step."""
        return self._memory


def broken(what: str) -> Withheld:
    """The answer to a chain that does not hold."""
    return Withheld(
        Reason.PROMISE_NOT_KEPT,
        f"The update is not from private training alone: {what}. Nothing of this round can be "
        "released; train only through the model, optimizer and loader that guard.private gave.",
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, *, copy: bool = True
) -> dict[tuple[int, str], object]:
    """The optimizer's state by place of the parameter and name of the entry."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[tuple[int, str], object] = {}
    for place, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            kept = value.detach() if isinstance(value, Tensor) else value
            found[place, name] = kept.clone() if copy and isinstance(kept, Tensor) else kept
    return found


def same_memory(
    left: Mapping[tuple[int, str], object], right: Mapping[tuple[int, str], object]
) -> bool:
    """Whether two optimizer states are the same, bit by bit."""
    if left.keys() != right.keys():
        return False
    for key, value in left.items():
        other = right[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if not _same(value, other):
                return False
        elif type(value) is not type(other) or value != other:
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Holder:
    """Where a layer holds a parameter or buffer, and which."""

    layer: nn.Module
    name: str
    full_name: str
    tensor: Tensor
    trainable: bool

    def holds(self) -> bool:
        """Whether it is still the same one there, trained or frozen as before."""
        layer, name = self.layer, self.name
        held = layer._parameters.get(name, layer._buffers.get(name))  # noqa: SLF001 - no attribute access: it may run code
        return held is self.tensor and self.tensor.requires_grad == self.trainable


def _holders(model: nn.Module) -> list[_Holder]:
    return [
        _Holder(layer, name, f"{prefix}.{name}" if prefix else name, tensor, tensor.requires_grad)
        for prefix, layer in model.named_modules(remove_duplicate=False)
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]  # noqa: SLF001 - own ones only
        if tensor is not None
    ]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Everything else that a forward pass may use; buffers that are not saved too."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor for name, tensor in named if not tensor.requires_grad}


def _copy(now: Mapping[tuple[int, str], object], kept: dict[tuple[int, str], object]) -> None:
    """Bring what is kept of the optimizer's state up to date, in its own memory."""
    for key in kept.keys() - now.keys():
        del kept[key]
    for key, value in now.items():
        before = kept.get(key)
        if (
            isinstance(value, Tensor)
            and isinstance(before, Tensor)
            and (value.shape, value.dtype, value.device)
            == (before.shape, before.dtype, before.device)
        ):
            before.copy_(value)
        else:
            kept[key] = value.clone() if isinstance(value, Tensor) else value


def _constant(tensor: Tensor, base: Tensor | None) -> Tensor:
    """What a tensor that is not trained has to stay: the global model's value, as it was loaded."""
    if base is None:
        return tensor.clone()
    return base.detach().to(device=tensor.device, dtype=tensor.dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether shape, type and every bit are the same."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach(), right.detach().to(left.device)
    if not left.is_floating_point():
        return torch.equal(left, right)
    bits = _SAME_WIDTH[left.element_size()]
    return torch.equal(left.view(bits), right.view(bits))
