"""What a round trains: a model of this process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError, Withheld
from sentinel.terms import Reason
from sentinel.trainee import OwnModel, require_one_process


def test_a_model_shares_its_own_state_and_not_a_copy() -> None:
    model = nn.Linear(3, 2)
    trainee = OwnModel(model)
    assert trainee.shares(model.state_dict())
    assert not trainee.shares({name: value.clone() for name, value in model.state_dict().items()})


def test_a_buffer_that_two_modules_share_has_both_names() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    assert {"0.running_mean", "1.running_mean"} <= set(OwnModel(model).buffers)


def test_a_global_state_of_another_structure_does_not_fit() -> None:
    with pytest.raises(Withheld) as caught:
        OwnModel(nn.Linear(3, 2)).require_fit(nn.Linear(3, 3).state_dict())
    assert caught.value.reason is Reason.STRUCTURE_MISMATCH


def test_a_wrapped_model_is_refused_with_the_inner_one_named() -> None:
    wrapped = nn.Sequential()
    wrapped.module = nn.Linear(3, 2)
    base = {name: value.clone() for name, value in wrapped.state_dict().items()}
    OwnModel(wrapped).require_fit(base)  # the server's own model is wrapped as well
    with pytest.raises((MisuseError, Withheld)):
        OwnModel(wrapped).require_fit(wrapped.module.state_dict())


def test_loading_and_reading_give_the_models_own_tensors() -> None:
    model = nn.Linear(3, 2)
    base = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    trainee = OwnModel(model)
    trainee.load(base)
    assert all(torch.equal(value, base[name]) for name, value in trainee.state().items())


def test_private_training_is_open_to_a_process_without_a_group() -> None:
    require_one_process()
