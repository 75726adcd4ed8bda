"""The replayed training is the site's: with batch normalisation in either mode, and masks."""

import math

import pytest
import torch
from torch import nn

from sentinel.stress.layers import copied
from sentinel.stress.passive.local_training import LocalTraining, Seen

INPUTS = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
BATCHES = (torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]))


def normed() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_normalisation_is_replayed_as_an_ordinary_loop_does_it(*, training: bool) -> None:
    """In evaluation mode with the statistics that the server sent, not the model's own."""
    model = normed().train(training)
    state = copied(model.state_dict())
    state["1.running_mean"] += 0.4
    state["1.running_var"] *= 2.0
    site = LocalTraining(model, state, LABELS, BATCHES, 0.2)
    replayed = site.update(INPUTS)
    assert replayed.requires_grad
    twin = normed().train(training)
    twin.load_state_dict(state)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2)
    for batch in BATCHES:
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(twin(INPUTS[batch]), LABELS[batch]).backward()
        optimizer.step()
    delta = {name: value - state[name] for name, value in twin.named_parameters()}
    assert torch.allclose(replayed, site.flatten(delta), atol=1e-6)


def test_a_replay_changes_neither_the_models_buffers_nor_the_servers() -> None:
    model = normed().train()
    state = copied(model.state_dict())
    before = copied(state)
    inputs = INPUTS.clone().requires_grad_()
    update = LocalTraining(model, state, LABELS, BATCHES, 0.2).update(inputs)
    torch.autograd.grad(update.square().sum(), inputs)  # twice through the normalisation
    for name, value in before.items():
        assert torch.equal(state[name], value)
        assert torch.equal(model.state_dict()[name], value)


def test_a_visible_mask_is_simulated_and_a_hidden_one_only_in_the_mean() -> None:
    values = torch.tensor([0.0, 2.0, 0.0, 4.0])
    visible = Seen(values, keep=0.5)
    hidden = Seen(values, keep=0.5, hidden_mask=True)
    assert visible.kept.tolist() == [False, True, False, True]
    assert hidden.kept.tolist() == [True] * 4
    assert visible.sanitize(torch.ones(4)).tolist() == [0.0, 2.0, 0.0, 2.0]
    assert hidden.sanitize(torch.ones(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("hidden", [False, True], ids=["visible", "hidden"])
def test_the_attacker_knows_how_far_values_lie_from_what_it_simulates(*, hidden: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    update = torch.randn(200_000, generator=generator)
    noised = update + 0.5 * torch.randn(update.shape, generator=generator)
    mask = torch.rand(update.shape, generator=generator) < 0.25
    seen = Seen(noised * mask / 0.25, 1.0, 0.5, 0.25, hidden)
    apart = (seen.values - seen.sanitize(update))[seen.kept]
    assert float(apart.std()) == pytest.approx(seen.error_std, rel=0.02)
    assert seen.signal_norm == pytest.approx(float(update.norm()) / math.sqrt(0.25), rel=0.02)
