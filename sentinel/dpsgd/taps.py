"""Taps: what went into each layer, and the gradient at what came out, row by row.

While a model is tapped, its parameters stand outside the graph: the backward pass computes no
ordinary gradient of them at all. Whatever still reaches a parameter by another way than its own
layer (a weight that is used as a mere tensor, a penalty added to the loss) is thereby seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sentinel.dpsgd.layers import (
    is_lookup,
    layers_to_tap,
    own_parameters,
    require_along_records,
    works_along,
)
from sentinel.dpsgd.precision import require_full_products, require_no_autocast
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sentinel.dpsgd.chance import Chance

# Layers whose backward pass does not need their output: it may be marked as written in place.
_OUTPUT_UNUSED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
)


@dataclass(slots=True)
class Capture:
    """What one layer saw of some rows of a batch, in one forward and backward pass.

    Attributes:
        layer: the layer.
        first: the batch's row that row 0 here is.
        inputs: what went in, (rows, ...).
        grads: gradient of the loss at what came out, (rows, ...).
        scale: by which `grads` become those of each record's own loss: the rows of the call where
            the loss is a mean.
    """

    layer: nn.Module
    first: int
    inputs: Tensor
    grads: Tensor
    scale: float

    def seen(self, first: int, end: int) -> tuple[Tensor, Tensor] | None:
        """Inputs and gradients of some of the batch's rows; None where it did not see them all."""
        first, end = first - self.first, end - self.first
        if first < 0 or end > self.inputs.shape[0]:
            return None
        return self.inputs[first:end], self.grads[first:end]


@dataclass(slots=True)
class Call:
    """One forward pass of the whole model.

    Attributes:
        batch: of which batch; None where no batch is open.
        turn: how often the batch had been through the model before.
        first: the batch's row that its row 0 is.
        rows: how many.
        uses: how often each layer was run in it so far.
    """

    batch: int | None
    turn: int
    first: int
    rows: int
    uses: Counter[nn.Module] = field(default_factory=Counter)


@dataclass(slots=True)
class OpenBatch:
    """The batch whose gradients are being gathered.

    Attributes:
        number: tells it from all others.
        rows: how many it has.
        given: the tensors that the loader gave out for it.
        seen: rows that went through the model so far.
        calls: turn and first row of each forward pass.
        captures: by layer, and by turn, place and use within a call.
    """

    number: int
    rows: int
    given: tuple[Tensor, ...] = ()
    seen: int = 0
    calls: set[tuple[int, int]] = field(default_factory=set)
    captures: dict[tuple[nn.Module, int, int, int], Capture] = field(default_factory=dict)

    def call(self, inputs: Tensor) -> Call:
        """The next forward pass, over as many of its rows as `inputs` has.

        Raises:
            MisuseError: more rows than are left, or the batch's rows in another order.
        """
        rows = len(inputs)
        turn, first = divmod(self.seen, max(1, self.rows))
        if first + rows > self.rows:
            raise MisuseError(
                "The model was given other records than the batch that the private loader gave: "
                f"{first + rows} rows, and the batch has {self.rows}. Run every record of the "
                "batch through the model, in its order, and no others."
            )
        for given in self.given:
            if _is_reordered(given[first : first + rows], inputs, given):
                raise MisuseError(
                    "The rows of the batch came to the model in another order, some twice, or with "
                    "some left out between. Rows are told apart by their place: run every record, "
                    "in the order of the private loader; one that is not to count gets the weight "
                    "0 in the loss."
                )
        self.seen += rows
        if rows:
            self.calls.add((turn, first))
        return Call(self.number, turn, first, rows)

    def require_whole(self) -> None:
        """Refuse a step for which not every row went through the model and back.

        Raises:
            MisuseError: rows were left out, or a forward pass had no backward pass.
        """
        if not self.seen or self.seen % self.rows:
            raise MisuseError(
                "Not every record of the batch went through the model. Run them all, in the "
                "order of the private loader: a record that is not to count (a missing label) is "
                "kept and gets the weight 0 in the loss, "
                "`(weight * loss_of_each).mean()` with NaN replaced first."
            )
        if self.calls != {(turn, first) for _, turn, first, _ in self.captures}:
            raise MisuseError(
                "A forward pass over records of the batch had no backward pass. Call backward() "
                "on every one, also where its loss looks odd: to leave it out would be a choice "
                "by the data. Evaluate under torch.no_grad()."
            )


class Taps:
    """Taps on every layer of a model that holds trainable parameters.

    Attributes:
        batch: the batch whose gradients are gathered; None where none is open.
        active: whether a forward pass is to be tapped at all.
    """

    def __init__(self, model: nn.Module, *, mean_loss: bool, chance: Chance | None = None) -> None:
        """Set the taps; `chance` is where the model's own randomness comes from, torch's if None.

        Raises:
            MisuseError: a layer that private training refuses.
        """
        self.active = False
        self.batch: OpenBatch | None = None
        self._mean_loss, self._chance = mean_loss, chance
        self._call: Call | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._held: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        _require_own_hooks(model)
        self._layers = dict.fromkeys(layer for _, layer in layers_to_tap(model))
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self._end), always_call=True),
        ]
        for layer in filter(works_along, model.modules()):
            self._handles.append(layer.register_forward_pre_hook(_Hook(self._along)))
        for layer in self._layers:
            self._handles += [
                layer.register_forward_pre_hook(_Hook(self._before)),
                layer.register_forward_hook(_Hook(self._after), prepend=True, always_call=True),
            ]

    def remove(self) -> None:
        """Take the taps off."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def restore(self) -> None:
        """Put back what a forward pass that was interrupted has left set aside."""
        while self._held:
            layer, parameters = self._held.pop()
            layer._parameters.update(parameters)  # noqa: SLF001 - torch has no other way to set one aside
        self._end()

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401 - whatever the model takes
        self.restore()
        if not (self.active and torch.is_grad_enabled()):
            return
        _require_own_hooks(model)
        inputs = _records(args, kwargs)
        require_full_products(inputs.device)
        if self.batch is None:
            self._call = Call(None, 0, 0, len(inputs))
            return
        self._call = self.batch.call(inputs)
        if self._chance is not None:
            self._chance.begin(inputs.device)

    def _end(self, *_: object) -> None:
        self._call = None
        if self._chance is not None:
            self._chance.end()

    def _along(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._call is not None and args and isinstance(args[0], Tensor):
            require_along_records(layer, args[0].dim())

    def _before(self, layer: nn.Module, _: object) -> None:
        """Put the layer's parameters outside the graph."""
        if not (self.active and torch.is_grad_enabled()):
            return
        if self._call is None:
            raise MisuseError(
                f"A {type(layer).__name__} of the model was run by itself; while it is trained "
                "privately, run the whole model, which was given to guard.private."
            )
        parameters = layer._parameters  # noqa: SLF001 - torch has no other way to set one aside
        self._held.append((layer, dict(parameters)))
        for name, parameter in own_parameters(layer).items():
            parameters[name] = parameter.detach()  # type: ignore[assignment]  # a plain tensor, on purpose

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401 - as torch hands them over
        """Put them back, and tap what came out."""
        if not self._held or self._held[-1][0] is not layer:
            return None
        _, parameters = self._held.pop()
        layer._parameters.update(parameters)  # noqa: SLF001 - as above
        call = self._call
        if call is None or output is None:
            return None
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise MisuseError(
                f"A {type(layer).__name__} takes or gives something else than one tensor; private "
                "training cannot tell its gradients apart by record."
            )
        _require_rows(layer, args[0], output, call.rows)
        require_no_autocast(output)
        number, call.uses[layer] = call.uses[layer], call.uses[layer] + 1
        place = (self, call, layer, number)
        return _Tap.apply(output, self._anchor, args[0].detach(), place)  # type: ignore[no-untyped-call]  # torch has no types there

    def take(self, call: Call, layer: nn.Module, use: int, seen: tuple[Tensor, Tensor]) -> None:
        """Keep what one layer saw.

        Raises:
            MisuseError: the batch is not the one that is open.
        """
        batch = self.batch
        if batch is None or call.batch != batch.number:
            raise MisuseError(
                "A backward pass came without an open batch of the private loader, or after its "
                "step. Train on the batches of the loader that guard.private gave, inside a "
                "round, one optimizer.step() for each; evaluate under torch.no_grad()."
            )
        inputs, grads = seen
        require_no_autocast(grads)
        key = (layer, call.turn, call.first, use)
        known = batch.captures.get(key)
        if known is None:
            scale = float(call.rows) if self._mean_loss else 1.0
            batch.captures[key] = Capture(layer, call.first, inputs, grads, scale)
        else:  # a second backward pass over the same forward pass
            known.grads = known.grads + grads


class _Hook:
    """A hook that a copy of the model does not carry: probes run on copies."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:  # noqa: ANN401 - as torch hands them over
        return self._run(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _no_hook, ()


def _require_own_hooks(model: nn.Module) -> None:
    """Refuse hooks of others: what they make of a batch is seen by nothing here.

    Raises:
        MisuseError: a layer has one.
    """
    for name, layer in model.named_modules():
        for hooks in (
            layer._forward_pre_hooks,  # noqa: SLF001 - torch lists hooks nowhere else
            layer._forward_hooks,  # noqa: SLF001 - as above
            layer._backward_pre_hooks,  # noqa: SLF001 - as above
            layer._backward_hooks,  # noqa: SLF001 - as above
        ):
            if not all(isinstance(hook, _Hook) for hook in hooks.values()):
                raise MisuseError(
                    f"Layer {name!r} has a hook, which may mix the records of a batch or change "
                    "gradients. Take it off (handle.remove()) while the model is trained privately."
                )


def _nothing(*_: object) -> None:
    """Stand where a hook was."""


def _no_hook() -> Callable[..., None]:
    return _nothing


class _Tap(torch.autograd.Function):
    """The identity; hands over the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, place: Any) -> Tensor:  # noqa: ANN401, ARG004 - as torch calls it; the anchor asks for gradients
        ctx.place = place
        ctx.save_for_backward(inputs)
        if isinstance(place[2], _OUTPUT_UNUSED):
            ctx.mark_dirty(output)
            return output
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ANN401 - torch types neither
        taps, call, layer, use = ctx.place
        taps.take(call, layer, use, (ctx.saved_tensors[0], grad.detach()))
        return grad, None, None, None


def _records(args: Any, kwargs: Any) -> Tensor:  # noqa: ANN401 - whatever the model takes
    """The records that a call is about: the first tensor in it."""
    found = next(tensors_in((args, kwargs)), None)
    if found is None or found.dim() == 0:
        raise MisuseError("The model was called without a tensor whose first dimension is records.")
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 - whatever the model takes
    """The tensors in a batch or in the arguments of a call, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def _is_reordered(due: Tensor, inputs: Tensor, given: Tensor) -> bool:
    """Whether `inputs` are rows of `given`, bit by bit, but not those that are due.

    Rows that the loop has changed (augmented, scaled, moved to a GPU) cannot be recognised.
    """
    if (inputs.shape, inputs.dtype, inputs.device) != (due.shape, due.dtype, due.device):
        return False
    if inputs.data_ptr() == due.data_ptr() and inputs.stride() == due.stride():
        return False
    if inputs.device.type != "cpu" or not inputs.numel() or torch.equal(inputs, due):
        return False
    found = _rows_of(inputs)
    return found != _rows_of(due) and set(found) <= set(_rows_of(given))


def _rows_of(tensor: Tensor) -> list[int]:
    """Each row by its bytes."""
    flat = tensor.detach().contiguous().reshape(len(tensor), -1).view(torch.uint8)
    return [hash(row.tobytes()) for row in flat.numpy()]


def _require_rows(layer: nn.Module, inputs: Tensor, output: Tensor, rows: int) -> None:
    """Refuse a layer whose first dimension is not the records: their parts could not be told."""
    single = inputs.dim() == 1 and not is_lookup(layer)  # features, most likely
    if single or any(tensor.dim() == 0 or len(tensor) != rows for tensor in (inputs, output)):
        raise MisuseError(
            f"A {type(layer).__name__} saw a tensor whose first dimension is not the records of "
            "the batch. Keep the records first in every layer (batch_first=True; expand what all "
            "records share, such as positions, to one row for each)."
        )
