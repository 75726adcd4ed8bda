"""States that change while their update is being released: nothing raw slips into what leaves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sentinel import Guard, Withheld
from sentinel.terms import Reason

if TYPE_CHECKING:
    from pathlib import Path

release = importlib.import_module("sentinel.release")

POLICY = """
schema = 1
name = "race"
[privacy]
unit = "{unit}"
epsilon = 1000.0
delta = 1e-6
clip_norm = 1.0
noise_multiplier = 4.0
{more}
[[rule]]
id = "baseline"
"""


def guard_of(folder: Path, unit: str, more: str = "") -> Guard:
    file = folder / "policy.toml"
    file.write_text(POLICY.format(unit=unit, more=more))
    file.chmod(0o600)
    return Guard(file, folder / "state")


@pytest.mark.parametrize("name", ["w", "bn.running_mean"])
@pytest.mark.parametrize("step", ["transform", "decide"])
def test_a_global_state_that_is_trained_in_during_the_release_withholds(
    name: str, step: str, tmp_path: Path, monkeypatch
) -> None:
    """What leaves is made of it: its new values would leave without clip and noise."""
    base = {"w": torch.zeros(30, 30), "bn.running_mean": torch.zeros(5)}
    local = {key: value + 0.01 for key, value in base.items()}
    with guard_of(tmp_path, "site").round(0, base) as rnd:
        pass
    carried_out = getattr(release, step)

    def meanwhile(*args: object, **kwargs: object) -> object:
        base[name].fill_(7.0)
        return carried_out(*args, **kwargs)

    monkeypatch.setattr(release, step, meanwhile)
    with pytest.raises(Withheld) as caught:
        rnd.release(local)
    assert caught.value.reason is Reason.GLOBAL_MODEL_CHANGED
    assert not list((tmp_path / "state" / "releases").glob("*.safetensors"))


def test_a_model_that_is_trained_on_after_its_private_steps_were_checked_stays_out(
    tmp_path: Path, monkeypatch
) -> None:
    """What is released is the copy that was compared, not the model that goes on changing."""
    model = torch.nn.Linear(10, 2)
    rows = TensorDataset(torch.randn(64, 10), torch.randint(0, 2, (64,)))
    guard = guard_of(tmp_path, "record", "patients = 64\nbatch = 16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = guard.private(model, optimizer, DataLoader(rows, batch_size=16))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with guard.round(0, start, model) as rnd:
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    trained = model.weight.detach().clone()
    read = release._read

    def meanwhile(*args: object) -> object:
        with torch.no_grad():
            model.weight.fill_(123.0)
        return read(*args)

    monkeypatch.setattr(release, "_read", meanwhile)
    assert torch.allclose(rnd.release()["weight"], trained, atol=1e-6)
