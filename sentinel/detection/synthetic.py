"""Synthetic records for a model whose input nobody described, and a copy of it to run them through.

The copy takes every parameter and buffer from the global state, carries none of the hooks of the
user's model, and the user's model is never run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

IMAGE_SIDES = (28, 32, 64, 224)
LENGTHS = (32, 128, 1024, 16_000)
VOLUME_SIDES = (16, 32, 64)
TOKENS = 16
HIDDEN = 16  # of the causes behind the columns of a table
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names


DERIVED = ("_orig", "_g")  # endings of the parameters that torch.nn.utils derives a weight from


class ModelError(Exception):
    """The model's own code failed, or gave nothing that a loss can be taken of."""


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Turn whatever the model's own code raises into `ModelError`; nothing else belongs inside."""
    try:
        yield
    except Exception as error:
        msg = "the model's own code raised an exception"
        raise ModelError(msg) from error


@dataclass(frozen=True, slots=True)
class Twin:
    """A copy of a model.

    Attributes:
        module: the copy, in evaluation mode.
        names: name in the copy -> name in the global state it was filled from.
    """

    module: nn.Module
    names: Mapping[str, str]


def twin(model: nn.Module, state: Mapping[str, Tensor]) -> Twin | None:
    """Return a copy of `model` that holds `state`, in float32 on the CPU, without hooks.

    Args:
        model: the architecture; wrappers (DataParallel, torch.compile) are taken off.
        state: the global state, whose names may carry a wrapper's prefix or not.

    Returns:
        The copy, or None where one cannot be made: the state does not fit, the model is not
        initialised yet, or it has tensors that are in no state and so might hold anything.
    """
    inner = unwrapped(model)
    if _is_unfinished(inner):
        return None
    memo: dict[int, object] = {}
    for tensor in itertools.chain(inner.parameters(), inner.buffers()):
        # Neither values nor gradients of the user's model are copied.
        blank = torch.empty_like(tensor, device="cpu", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(blank) if isinstance(tensor, nn.Parameter) else blank
    try:
        with foreign():
            copied = copy.deepcopy(inner, memo)
        for module in copied.modules():
            for hooks in _HOOKS:
                getattr(module, hooks).clear()
        with foreign():
            names = matched(copied.state_dict().keys(), state.keys())
        if names is None:
            return None
        with foreign():
            copied.load_state_dict({own: state[given] for own, given in names.items()}, strict=True)
            return Twin(copied.float().eval(), names)
    except ModelError:
        return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of DataParallel and torch.compile."""
    while True:
        parts = dict(model.named_children())
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = parts["module"]
        elif list(parts) == ["_orig_mod"]:
            model = parts["_orig_mod"]
        else:
            return model


def is_uninitialised(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a lazy module that has seen no input, so that it has no shape."""
    return bool(nn.parameter.is_lazy(tensor))


def matched(own: Collection[str], given: Collection[str]) -> dict[str, str] | None:
    """Match a model's names with those of a state that may carry wrappers' prefixes, or lack them.

    Returns:
        Own name -> given name, or None where they do not match one to one.
    """
    if set(own) == set(given):
        return {name: name for name in own}
    for extra in _prefixes(given):
        if {extra + name for name in own} == set(given):
            return {name: extra + name for name in own}
    for extra in _prefixes(own):
        if {extra + name for name in given} == set(own):
            return {extra + name: name for name in given}
    return None


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """Yield what wrappers may have put before every name, shortest first."""
    rest = next(iter(names), "")
    prefix = ""
    while wrapper := next((word for word in WRAPPERS if rest.startswith(word)), ""):
        prefix, rest = prefix + wrapper, rest.removeprefix(wrapper)
        yield prefix


def _is_unfinished(model: nn.Module) -> bool:
    """Whether the model has tensors without a shape, or some that its state does not hold.

    Weights that a hook derives from others (the older weight_norm, pruning) are among the latter.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return any(map(is_uninitialised, tensors)) or any(
        module._non_persistent_buffers_set  # noqa: SLF001  # PyTorch has no public way to ask
        or any(
            hasattr(module, f"{name}{mark}")
            for name, value in vars(module).items()
            for mark in DERIVED
            if isinstance(value, Tensor)
        )
        for module in model.modules()
    )


def input_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes that one input of `model` may have, likeliest first; `()`-free, no batch."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Bilinear):
            width = module.in_features if isinstance(module, nn.Linear) else module.in1_features
            yield (width,)
            yield (TOKENS, width)
            return
        if isinstance(module, nn.RNNBase):
            yield (TOKENS, module.input_size)
            return
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield (TOKENS,)
            return
        if isinstance(module, nn.Conv1d):
            yield from ((module.in_channels, side) for side in LENGTHS)
            return
        if isinstance(module, nn.Conv2d):
            yield from ((module.in_channels, side, side) for side in IMAGE_SIDES)
            return
        if isinstance(module, nn.Conv3d):
            yield from ((module.in_channels, side, side, side) for side in VOLUME_SIDES)
            return


def vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens the model knows where its input is tokens, else None."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return module.num_embeddings
        if isinstance(module, nn.Linear | nn.RNNBase | nn.modules.conv._ConvNd):  # noqa: SLF001  # the common base of all convolutions
            return None
    return None


def records(
    count: int, shape: Sequence[int], generator: torch.Generator, *, tokens: int | None = None
) -> Tensor:
    """Draw synthetic records, [count, *shape].

    Tabular rows are standard normal; images and signals are smooth fields, each stretched to 0..1,
    as scans are after scaling; text is uniform over the vocabulary.
    """
    if tokens is not None:
        return torch.randint(tokens, (count, *shape), generator=generator)
    if len(shape) < 2:  # noqa: PLR2004  # a plain row
        return torch.randn(count, *shape, generator=generator)
    if len(shape) == 2 and shape[0] == TOKENS:  # noqa: PLR2004  # a sequence of rows
        return torch.randn(count, *shape, generator=generator)
    if len(shape) > 4:  # noqa: PLR2004  # more sides than anything interpolates
        return torch.rand(count, *shape, generator=generator)
    channels, *sides = shape
    coarse = [min(side, 7) for side in sides]
    field = torch.rand(count, channels, *coarse, generator=generator)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    smooth = nn.functional.interpolate(field, size=tuple(sides), mode=mode)
    flat = smooth.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-6)).view_as(smooth)


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a table that nobody scaled: each with its unit, its usual value and its company.

    Attributes:
        offset: [d], usual value of each column.
        mix: [hidden, d], how the columns go together.
        scatter: [d], what each column has of its own.
        binary: [d], columns that hold 0 or 1.
    """

    offset: Tensor
    mix: Tensor
    scatter: Tensor
    binary: Tensor

    @classmethod
    def drawn(cls, width: int, generator: torch.Generator) -> Columns:
        """Draw a table of `width` columns."""
        hidden = min(width, HIDDEN)
        unit = 10.0 ** (2.0 * torch.rand(width, generator=generator))
        mix = torch.randn(hidden, width, generator=generator) / hidden**0.5
        offset = 2.0 + 4.0 * torch.rand(width, generator=generator)
        binary = torch.rand(width, generator=generator) < 0.4  # noqa: PLR2004  # share of such columns
        return cls(offset * unit, 0.7 * mix * unit, 0.7 * unit, binary)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw records, [count, d]."""
        company = torch.randn(count, len(self.mix), generator=generator) @ self.mix
        own = torch.randn(count, len(self.offset), generator=generator) * self.scatter
        rows = company + own
        return torch.where(self.binary, (rows > 0).to(rows), rows + self.offset)


def run(module: nn.Module, rows: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Run a copy on records and return its output, [n, ...].

    Args:
        module: the copy.
        rows: [n, ...], records.
        parameters: name -> value in place of the copy's own.

    Raises:
        ModelError: it fails, or its output is no floating tensor (nor a tuple that has one, nor
            has `logits`) of one row per record.
    """
    with undisturbed(), foreign():
        output = torch.func.functional_call(module, dict(parameters or {}), (rows,))
        found = _tensor_of(output)
    fits = found is not None and found.is_floating_point() and found.ndim > 0
    if found is None or not fits or len(found) != len(rows) or not found.numel():
        msg = "the model gave no floating tensor of one row per record"
        raise ModelError(msg)
    return found


def _tensor_of(output: object) -> Tensor | None:
    """Return the tensor itself, the first of a tuple, or what is called `logits`."""
    if isinstance(output, tuple | list):
        return next((part for part in output if isinstance(part, Tensor)), None)
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


def fitting_shape(
    model: nn.Module, generator: torch.Generator, sample: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Return the first input shape the model takes, or None; `sample` is the only one tried."""
    tokens = vocabulary(model)
    for shape in [tuple(sample)] if sample is not None else input_shapes(model):
        try:
            with torch.no_grad():
                run(model, records(2, shape, generator, tokens=tokens))
        except ModelError:
            continue
        return shape
    return None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the global generator as it was, though a strange model may draw from it in forward."""
    with torch.random.fork_rng(devices=[]):
        yield
