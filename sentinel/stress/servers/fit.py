"""Whether a craft fits the model it is given, said in a sentence where it does not."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sentinel.stress.layers import State

    P = ParamSpec("P")
    Crafting = Callable[Concatenate[nn.Module, Mapping[str, Tensor], P], State]


class Eager(nn.Module):
    """A compiled model, run as it was before; its entries keep their names."""

    def __init__(self, inner: nn.Module) -> None:
        """Hold the model under the name that the compiler gives it."""
        super().__init__()
        self._orig_mod = inner

    def forward(self, records: Tensor) -> Tensor:
        """Map as the model does."""
        output: Tensor = self._orig_mod(records)
        return output


def eager(model: nn.Module) -> nn.Module:
    """Return the model, or what stands in for it where `torch.compile` wraps it."""
    inner = getattr(model, "_orig_mod", None)
    return Eager(inner) if isinstance(inner, nn.Module) else model


def check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that cannot be attacked by the names of its layers.

    Raises:
        MisuseError: a lazy layer has no shape yet, the model is one layer without a name, or the
            state is another model's.
    """
    if any(is_lazy(value) for value in model.state_dict().values()):
        msg = "the model has a lazy layer without a shape; run one record through it first"
        raise MisuseError(msg)
    if isinstance(model, nn.Linear):
        msg = (
            "the model is one torch.nn.Linear, and this attack needs layers with names; put it "
            "in a torch.nn.Sequential"
        )
        raise MisuseError(msg)
    own = {name: value.shape for name, value in model.state_dict().items()}
    odd = own.items() ^ {(name, value.shape) for name, value in state.items()}
    if odd:
        msg = (
            f"the state needs the entries of the model, {len({name for name, _ in odd})} differ; "
            "take it from model.state_dict()"
        )
        raise MisuseError(msg)


def fitted(craft: Crafting[P]) -> Crafting[P]:
    """Return the crafting function with its checks: of the model, and of entries that are shared.

    A weight that two names share stays shared: both get what the craft made of either.

    Raises:
        MisuseError: see `check_fit`; or the craft makes two things of one shared weight; or the
            model does not take the public records.
    """

    @functools.wraps(craft)
    def checked(
        model: nn.Module, state: Mapping[str, Tensor], /, *args: P.args, **kwargs: P.kwargs
    ) -> State:
        plain = eager(model)
        check_fit(plain, state)
        try:
            crafted = craft(plain, state, *args, **kwargs)
        except MisuseError as error:
            left_out = _parametrized(plain)
            if not left_out:
                raise
            msg = f"{error}; left out, since their weights are parametrized: {', '.join(left_out)}"
            raise MisuseError(msg) from error
        except RuntimeError as error:
            if not _refuses(plain, kwargs.get("sample")):
                raise
            msg = "the model needs public records of the shape and dtype that it takes"
            raise MisuseError(msg) from error
        return _shared(plain, state, crafted)

    return checked


def _parametrized(model: nn.Module) -> list[str]:
    """Return the fully connected layers whose weight is computed from something else."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_parametrized(module, "weight")
    ]


def _shared(model: nn.Module, state: Mapping[str, Tensor], crafted: State) -> State:
    """Give all names of one shared parameter the same value, in place."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    for group in (group for group in names.values() if len(group) > 1):
        bent = [name for name in group if not crafted[name].equal(state[name])]
        if any(not crafted[name].equal(crafted[bent[0]]) for name in bent):
            msg = f"this attack needs {' and '.join(group)} apart, which are one shared weight"
            raise MisuseError(msg)
        for name in group if bent else ():
            crafted[name] = crafted[bent[0]].clone()
    return crafted


def _refuses(model: nn.Module, sample: object) -> bool:
    """Whether it is the records that the model cannot take."""
    if not isinstance(sample, Tensor):
        return False
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(sample[:2])
    except RuntimeError:
        return True
    return False
