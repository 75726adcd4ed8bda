"""What is changed in model or optimizer after guard.private is refused, in a round or between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from sentinel import MisuseError, Withheld

from .test_training import Site, mlp, withheld

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def half_frozen(tmp_path: Path, *, all_held: bool) -> Site:
    """A site whose first layer is frozen; the optimizer holds it all the same, or does not."""
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    held = model if all_held else model[2]
    site = Site(tmp_path)
    site.wrap(model, lambda _, lr: torch.optim.SGD(held.parameters(), lr=lr))
    return site


def thaw(site: Site) -> None:
    site.model[0].requires_grad_(requires_grad=True)


def thaw_and_add(site: Site) -> None:
    thaw(site)
    site.optimizer.add_param_group({"params": list(site.model[0].parameters())})


def add_frozen(site: Site) -> None:
    site.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def freeze(site: Site) -> None:
    site.model[2].bias.requires_grad_(requires_grad=False)


def replace_parameter(site: Site) -> None:
    site.model[2].bias = nn.Parameter(torch.zeros(1))


def add_parameter(site: Site) -> None:
    site.model[2].register_parameter("scale", nn.Parameter(torch.ones(1)))


def take_out_group(site: Site) -> None:
    site.optimizer.param_groups.clear()


def put_in_batch_norm(site: Site) -> None:
    site.model[1] = nn.BatchNorm1d(16, affine=False, track_running_stats=False)


def append_layer(site: Site) -> None:
    site.model.append(nn.Sigmoid())


THAWED = "frozen, thawed, added or replaced"
ORDINARY = "A parameter has an ordinary gradient"
OTHERS = "holds other parameters"
LAYERS = "Layers of the model were changed"
# What is changed, whether the optimizer holds the frozen layer, and what is said of it: where the
# round is not open yet, and where it is.
CHANGES = [
    (thaw, True, THAWED, ORDINARY),
    (thaw, False, THAWED, ORDINARY),
    (thaw_and_add, False, THAWED, ORDINARY),
    (freeze, True, THAWED, "frozen, thawed or replaced"),
    (replace_parameter, True, f"{THAWED}|requires", "frozen, thawed or replaced"),
    (add_parameter, True, "not in the global model", THAWED),
    (add_frozen, True, OTHERS, OTHERS),
    (take_out_group, True, OTHERS, OTHERS),
    (put_in_batch_norm, True, LAYERS, LAYERS),
    (append_layer, True, LAYERS, LAYERS),
]


@pytest.mark.parametrize("rounds", [0, 1], ids=["before the first round", "between rounds"])
@pytest.mark.parametrize(
    ("change", "held", "word"), [(change, held, before) for change, held, before, _ in CHANGES]
)
def test_a_change_before_a_round_keeps_the_round_closed(
    tmp_path, change: Callable[[Site], None], held, word, rounds
) -> None:
    site = half_frozen(tmp_path, all_held=held)
    for _ in range(rounds):
        site.release(steps=1)
    change(site)
    with pytest.raises((MisuseError, Withheld), match=word), site.round():
        pass
    assert len(site.events) == rounds


@pytest.mark.parametrize(
    ("change", "held", "word"), [(change, held, within) for change, held, _, within in CHANGES]
)
def test_a_change_within_a_round_is_withheld(
    tmp_path, change: Callable[[Site], None], held, word
) -> None:
    """Gradual unfreezing released raw gradients where nobody looked again."""
    site = half_frozen(tmp_path, all_held=held)
    start = site.state["0.weight"].clone()
    with site.round() as rnd:
        site.train(1)
        change(site)
        with pytest.raises((MisuseError, Withheld), match=word):
            site.train(1)
    withheld(site, rnd)
    assert torch.equal(site.model[0].weight, start)  # no raw step was taken either


def test_an_ordinary_gradient_of_a_frozen_parameter_is_refused(tmp_path) -> None:
    """An optimizer steps on any gradient, also that of a frozen parameter."""
    site = half_frozen(tmp_path, all_held=True)
    with site.round() as rnd:
        for x, y in site.loader:
            nn.functional.binary_cross_entropy_with_logits(site.model(x), y).backward()
            site.model[0].weight.grad = torch.ones_like(site.model[0].weight)
            with pytest.raises(MisuseError, match="ordinary gradient"):
                site.optimizer.step()
            break
    withheld(site, rnd)


def test_a_gradient_left_from_before_is_cleared_when_a_round_begins(tmp_path) -> None:
    site = half_frozen(tmp_path, all_held=True)
    weight = site.model[0].weight
    weight.grad = torch.ones_like(weight)
    start = weight.detach().clone()
    site.release(steps=2)
    assert torch.equal(weight, start)


def test_after_a_change_the_model_may_be_made_private_again(tmp_path) -> None:
    """What the error says to do works: gradual unfreezing, on the same budget."""
    site = half_frozen(tmp_path, all_held=True)
    first = site.release(steps=2)
    thaw(site)
    site.wrap(site.model)
    second = site.release(steps=2)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert len(site.events) == 2


def test_a_layers_setting_that_mixes_records_later_is_seen_when_a_round_begins(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(nn.Sequential(nn.Linear(13, 4), nn.Softmax(dim=1), nn.Linear(4, 1)))
    site.release(steps=1)
    site.model[1].dim = 0
    with pytest.raises(MisuseError, match="dimension 0"), site.round():
        pass


@pytest.mark.parametrize("kind", ["register_step_pre_hook", "register_step_post_hook"])
def test_step_hooks_of_others_are_refused(tmp_path, kind) -> None:
    site = Site(tmp_path)

    def hooked(params: Any, lr: float) -> torch.optim.Optimizer:
        made = torch.optim.SGD(params, lr=lr)
        getattr(made, kind)(lambda *_: None)
        return made

    with pytest.raises(MisuseError, match="step hook"):
        site.wrap(optimizer=hooked)
    site.wrap()
    with site.round() as rnd:
        site.train(1)
        getattr(site.optimizer, kind)(lambda *_: None)
        with pytest.raises(MisuseError, match="step hook"):
            site.train(1)
    withheld(site, rnd)


def test_a_learning_rate_that_follows_the_loss_is_refused(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(site.optimizer, patience=0)
    with site.round() as rnd, pytest.raises(MisuseError, match="LambdaLR"):  # noqa: PT012 - a loop fails in it
        for loss, (x, y) in enumerate(site.loader):
            site.step(x, y)
            scheduler.step(float(loss))
    withheld(site, rnd)


def test_a_learning_rate_that_is_set_after_the_last_step_is_withheld(tmp_path) -> None:
    """It would choose the next round's steps."""
    site = Site(tmp_path)
    site.wrap()
    with site.round() as rnd:
        site.train(1)
        site.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(Withheld, match="settings"):
        rnd.release()
    assert not site.events


def test_settings_may_be_changed_before_the_first_batch_of_a_round(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap()
    for rate in (0.1, 0.05):
        site.optimizer.param_groups[0]["lr"] = rate
        with site.round() as rnd:
            site.optimizer.param_groups[0]["weight_decay"] = rate
            site.train(2)
        site.state = rnd.release()
    assert len(site.events) == 2
