"""Synthetic records for a model whose input nobody described, and a copy of it to run them through.

The copy takes every parameter and buffer from the global state, carries none of the hooks of the
user's model, and the user's model is never run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

IMAGE_SIDES = (28, 32, 64, 224)
LENGTHS = (32, 128, 1024, 16_000)
VOLUME_SIDES = (16, 32, 64)
TOKENS = 16
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def twin(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module | None:
    """Return a copy of `model` that holds `state`, in float32 on the CPU, without hooks.

    Args:
        model: the architecture.
        state: the global state.

    Returns:
        The copy in evaluation mode, or None where one cannot be made: the state does not fit, or
        the model has buffers that are in no state and so might hold anything.
    """
    memo: dict[int, object] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # Neither values nor gradients of the user's model are copied.
        blank = torch.empty_like(tensor, device="cpu", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(blank) if isinstance(tensor, nn.Parameter) else blank
    try:
        twin_model = copy.deepcopy(model, memo)
        if _has_unsaved_buffers(twin_model):
            return None
        for module in twin_model.modules():
            for hooks in _HOOKS:
                getattr(module, hooks).clear()
        twin_model.load_state_dict(dict(state), strict=True)
    except Exception:  # noqa: BLE001  # any model may refuse in any way; then it is not probed
        return None
    return twin_model.float().eval()


def _has_unsaved_buffers(model: nn.Module) -> bool:
    return any(module._non_persistent_buffers_set for module in model.modules())  # noqa: SLF001  # PyTorch has no public way to ask


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
    channels, *sides = shape
    coarse = [min(side, 7) for side in sides]
    field = torch.rand(count, channels, *coarse, generator=generator)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    smooth = nn.functional.interpolate(field, size=tuple(sides), mode=mode)
    flat = smooth.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-6)).view_as(smooth)


def fitting_shape(
    model: nn.Module, generator: torch.Generator, sample: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Return the first input shape the model takes, or None; `sample` is the only one tried."""
    tokens = vocabulary(model)
    for shape in [tuple(sample)] if sample is not None else input_shapes(model):
        try:
            with torch.no_grad(), undisturbed():
                output = model(records(2, shape, generator, tokens=tokens))
        except Exception:  # noqa: BLE001, S112  # a shape that does not fit may raise anything
            continue
        if isinstance(output, Tensor) and len(output) == 2:  # noqa: PLR2004  # the two records
            return shape
    return None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the global generator as it was, though a strange model may draw from it in forward."""
    with torch.random.fork_rng(devices=[]):
        yield
