"""The chain by itself: what counts as changed between two private steps, and what does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel import Withheld
from sentinel.dpsgd.chain import Chain, optimizer_state, same_memory
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable


class Net(nn.Module):
    """A trained layer, a frozen one, a tied head, and buffers: saved, not saved, and a counter."""

    def __init__(self) -> None:
        """Small."""
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)  # noqa: FBT003 - torch's own
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.first.weight
        self.register_buffer("saved", torch.tensor([1.0, 0.0]))
        self.register_buffer("unsaved", torch.tensor([3.0]), persistent=False)
        self.register_buffer("counter", torch.tensor(7))
        self.register_buffer("none", None)


class Link:
    """A model, an optimizer that has stepped, and the chain from there."""

    def __init__(self) -> None:
        """One step of Adam."""
        self.model = Net()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=0.1)
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.chain = Chain(self.model, self.optimizer, self.base)
        self.step()

    def step(self) -> None:
        """A step, which the chain notes."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        self.chain.note()

    def state(self, name: str = "exp_avg") -> torch.Tensor:
        """An entry of the optimizer's."""
        found: torch.Tensor = self.optimizer.state[self.model.first.weight][name]
        return found

    def holds(self) -> bool:
        """Whether the next step may begin."""
        try:
            self.chain.require()
        except Withheld as error:
            return error.reason is not Reason.PROMISE_NOT_KEPT
        return True


def replaced(model: nn.Module, name: str) -> None:
    """Another tensor of the same values in the place of a parameter or buffer."""
    layer, _, last = name.rpartition(".")
    holder = model.get_submodule(layer)
    held = getattr(holder, last)
    if isinstance(held, nn.Parameter):
        setattr(holder, last, nn.Parameter(held.detach().clone(), held.requires_grad))
    else:
        setattr(holder, last, held.clone())


def negative_zero(tensor: torch.Tensor) -> None:
    """The same number, in other bits."""
    tensor[1] = -0.0


CHANGES: dict[str, Callable[[Link], object]] = {
    "parameter, through data": lambda link: link.model.first.bias.data.add_(1e-7),
    "parameter, tied": lambda link: link.model.head.weight.data.mul_(2.0),
    "parameter, to NaN": lambda link: link.model.first.bias.data.fill_(math.nan),
    "frozen parameter": lambda link: link.model.frozen.bias.data.add_(1e-7),
    "buffer": lambda link: link.model.saved.add_(1.0),
    "buffer, in its bits alone": lambda link: negative_zero(link.model.saved),
    "buffer that is not saved": lambda link: link.model.unsaved.add_(1.0),
    "buffer of whole numbers": lambda link: link.model.counter.add_(1),
    "parameter replaced": lambda link: replaced(link.model, "first.bias"),
    "tied name replaced": lambda link: replaced(link.model, "head.weight"),
    "frozen parameter replaced": lambda link: replaced(link.model, "frozen.weight"),
    "buffer replaced": lambda link: replaced(link.model, "saved"),
    "buffer that is not saved replaced": lambda link: replaced(link.model, "unsaved"),
    "parameter frozen": lambda link: link.model.first.bias.requires_grad_(False),  # noqa: FBT003 - torch's own
    "parameter thawed": lambda link: link.model.frozen.bias.requires_grad_(True),  # noqa: FBT003 - as above
    "momentum": lambda link: link.state().add_(1e-7),
    "momentum replaced": lambda link: link.optimizer.state[link.model.first.weight].update(
        exp_avg=torch.ones(2, 2)
    ),
    "momentum of another kind": lambda link: link.optimizer.state[link.model.first.weight].update(
        exp_avg=link.state().double()
    ),
    "momentum as a number": lambda link: link.optimizer.state[link.model.first.weight].update(
        exp_avg=0.1
    ),
    "step count": lambda link: link.state("step").add_(1),
    "entry added": lambda link: link.optimizer.state[link.model.first.weight].update(mine=1),
    "entry taken away": lambda link: link.optimizer.state[link.model.first.weight].pop("exp_avg"),
    "state cleared": lambda link: link.optimizer.state.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_seen(change: str) -> None:
    link = Link()
    assert link.holds()
    CHANGES[change](link)
    assert not link.holds()


def test_what_a_step_itself_changed_is_the_next_start() -> None:
    """Momentum that comes and goes with it too."""
    link = Link()
    link.optimizer.state.clear()
    link.step()
    assert link.holds()
    del link.optimizer.state[link.model.first.bias]
    assert not link.holds()
    link.chain.note()
    assert link.holds()


def test_a_value_that_is_nan_and_stays_so_is_no_change() -> None:
    link = Link()
    link.model.first.bias.data.fill_(math.nan)
    link.chain.note()
    assert link.holds()


def test_the_copy_is_apart_from_model_and_optimizer() -> None:
    """A change in place does not change what it is compared with."""
    link = Link()
    kept = link.chain.memory
    now = optimizer_state(link.optimizer)
    assert same_memory(kept, now)
    link.state().add_(1.0)
    assert same_memory(kept, now)
    assert not same_memory(kept, optimizer_state(link.optimizer))


@pytest.mark.parametrize("name", ["saved", "frozen.weight", "counter"])
def test_buffers_and_frozen_parameters_are_the_global_ones_and_not_what_the_model_has(
    name: str,
) -> None:
    """A model whose loading leaves one of its own in place does not begin."""
    link = Link()
    link.base[name] = link.base[name] + 1
    chain = Chain(link.model, link.optimizer, link.base)
    with pytest.raises(Withheld, match="not the global model's"):
        chain.require()


@pytest.mark.parametrize("name", ["first.weight", "head.weight", "saved", "frozen.bias", "counter"])
def test_a_local_state_that_is_not_the_models_is_seen(name: str) -> None:
    """Of a tied parameter under each of its names."""
    link = Link()
    local = link.model.state_dict()
    link.chain.require_local(local)
    with pytest.raises(Withheld, match="not what the last private step left"):
        link.chain.require_local({**local, name: local[name] + 1})


def test_a_name_that_the_model_does_not_have_is_no_part_of_a_local_state() -> None:
    link = Link()
    with pytest.raises(Withheld, match="not what the last private step left"):
        link.chain.require_local({**link.model.state_dict(), "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ({(0, "a"): None}, {(0, "a"): None}, True),
        ({(0, "a"): None}, {(0, "a"): 0.0}, False),
        ({(0, "a"): 1}, {(0, "a"): 1.0}, False),
        ({(0, "a"): 1.0}, {(0, "a"): 2.0}, False),
        ({(0, "a"): 1.0}, {(1, "a"): 1.0}, False),
        ({(0, "a"): torch.tensor(1.0)}, {(0, "a"): 1.0}, False),
        ({(0, "a"): torch.zeros(2)}, {(0, "a"): torch.zeros(1, 2)}, False),
        ({(0, "a"): torch.zeros(2)}, {(0, "a"): torch.zeros(2, dtype=torch.float64)}, False),
        ({}, {(0, "a"): None}, False),
    ],
)
def test_two_memories_are_the_same_entry_by_entry(left, right, *, same: bool) -> None:
    assert same_memory(left, right) is same
    assert same_memory(right, left) is same
