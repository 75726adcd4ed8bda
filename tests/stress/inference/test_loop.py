"""The replayed loop is SGD, and influences add up to the update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.errors import MisuseError
from sentinel.stress.inference.loop import Loop, midway
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.records import Records


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hearts(count: int = 40) -> Records:
    cohort = cohorts.load("cleveland")
    return Records(cohort.rows[:count], cohort.labels[:count])


def made(**figures: int) -> tuple[Loop, State]:
    model = network(13, 16, seeded())
    return Loop(model, binary_loss, 0.05, **figures), copied(model.state_dict())


def test_the_loop_ends_where_the_optimizer_of_torch_does() -> None:
    loop, sent = made(epochs=2, batch=16)
    data, order = hearts(), seeded(1)
    model = network(13, 16, seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        for chosen in torch.split(torch.randperm(40, generator=order), 16):
            optimizer.zero_grad()
            binary_loss(model(data.inputs[chosen]), data.labels[chosen]).backward()
            optimizer.step()
    trained = loop.train(sent, data, seeded(1))
    for name, value in model.state_dict().items():
        assert torch.allclose(trained[name], value, atol=1e-7)


def test_the_sent_state_is_left_as_it_was() -> None:
    loop, sent = made(epochs=2, batch=16)
    before = copied(sent)
    loop.train(sent, hearts(), seeded())
    assert all(torch.equal(sent[name], before[name]) for name in sent)


def test_influences_of_one_full_step_add_up_to_the_update() -> None:
    loop, sent = made()
    data = hearts(32)
    update = loop.flatten(loop.train(sent, data, seeded())) - loop.flatten(sent)
    added = loop.influences([sent], data, 32).sum(0)
    assert torch.allclose(added, update, atol=1e-6)


def test_influences_of_many_small_steps_nearly_add_up() -> None:
    """What is left out, the effect on later steps, is under a tenth."""
    loop, sent = made(epochs=2, batch=8)
    data = hearts(40)
    path = loop.path(sent, data, seeded())
    update = loop.flatten(path[-1]) - loop.flatten(sent)
    missed = loop.influences(midway(path, 5), data, 40).sum(0) - update
    assert float(missed.norm()) < 0.1 * float(update.norm())


def test_gradients_are_those_of_each_record_alone() -> None:
    loop, sent = made()
    data = hearts(5)
    found = loop.gradients(sent, data)
    for place in range(5):
        leaves = {name: sent[name].clone().requires_grad_() for name in loop.names}
        answers = torch.func.functional_call(loop.model, leaves, (data.inputs[place : place + 1],))
        binary_loss(answers, data.labels[place : place + 1]).backward()
        alone = torch.cat([leaves[name].grad.flatten() for name in loop.names])  # type: ignore[union-attr]  # backward has run
        assert torch.allclose(found[place], alone, atol=1e-6)


def test_gradients_of_a_convolution_come_in_any_number_of_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = xray_net()
    initialise(model, seeded())
    loop = Loop(model, nn.CrossEntropyLoss(), 0.1)
    data = Records(torch.rand(6, 1, 28, 28, generator=seeded()), torch.arange(6) % 2)
    sent = copied(model.state_dict())
    whole = loop.gradients(sent, data)
    monkeypatch.setattr("sentinel.stress.inference.loop._MOST_VALUES", 2 * whole.shape[1])
    assert torch.allclose(loop.gradients(sent, data), whole, atol=1e-6)


def test_losses_average_to_the_loss_of_the_batch() -> None:
    loop, sent = made()
    data = hearts()
    with torch.no_grad():
        together = binary_loss(loop.model(data.inputs), data.labels)
    assert float(loop.losses(sent, data).mean()) == pytest.approx(float(together), rel=1e-5)


def test_an_update_and_the_state_it_leads_to_are_inverse() -> None:
    loop, sent = made()
    moved = loop.moved(sent, torch.arange(loop.flatten(sent).numel()).float())
    assert torch.allclose(
        loop.flatten(moved) - loop.flatten(sent),
        torch.arange(loop.flatten(sent).numel()).float(),
        atol=1e-4,
    )


def test_points_lie_midway_and_never_at_the_end() -> None:
    states: list[State] = [{"w": torch.tensor(float(step))} for step in range(11)]
    assert [int(state["w"]) for state in midway(states, 2)] == [2, 7]
    assert [int(state["w"]) for state in midway(states[:2], 3)] == [0]


@pytest.mark.parametrize("figures", [{"epochs": 0}, {"batch": 0}])
def test_a_training_of_nothing_is_refused(figures: dict[str, int]) -> None:
    with pytest.raises(MisuseError, match="at least one"):
        made(**figures)
