"""The page on private training: what it shows runs, and what it says holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sentinel.crew import one_thread
from sentinel.dpsgd import clipping, layers
from sentinel.dpsgd.taps import OpenBatch, Taps
from sentinel.privacy import Ledger

from .test_step import MODELS, inputs_of, mean_of_squares

PAGE = (Path(__file__).parents[2] / "docs" / "private-training.md").read_text(encoding="utf-8")


def test_the_ten_minutes_of_the_page_run_as_they_stand(monkeypatch, tmp_path) -> None:
    policy = next(b for b in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[privacy]" in b)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heart.toml").write_text(policy)
    (tmp_path / "heart.toml").chmod(0o600)
    names: dict[str, object] = {}
    with one_thread():
        exec(compile(code, "private-training.md", "exec"), names)  # noqa: S102 - the page's own code
    (row,) = Ledger(tmp_path / "state" / "ledger.sqlite").rows("cleveland")
    assert (row.event.kind, row.event.unit, row.event.steps) == ("dp-sgd", "patient", 27)
    update = names["update"]
    assert isinstance(update, dict)
    assert len(update) == 4


def each_gradient(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Every row's gradient as the taps see it: (rows, values) float64."""
    taps = Taps(model, mean_loss=True)
    taps.active, taps.batch = True, OpenBatch(1, len(inputs))
    mean_of_squares(model(inputs)).backward()
    taps.active = False
    taps.remove()
    found = []
    for capture in taps.batch.captures.values():
        for name in layers.own_parameters(capture.layer):
            seen = capture.seen(0, len(inputs))
            assert seen is not None
            gradient = layers.gradients(capture.layer, *seen, name)
            found.append(gradient.flatten(1).double() * capture.scale)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "unknown"])
@pytest.mark.parametrize("seed", range(6))
def test_what_company_does_to_a_gradient_stays_under_what_is_left_free_for_it(
    name: str, seed: int
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    for rows in (2, 7, 33, 64, 65):
        inputs = inputs_of(shape, rows)
        alone, together = each_gradient(model, inputs[:-1]), each_gradient(model, inputs)[:-1]
        change = (together - alone).norm(dim=1) / together.norm(dim=1)
        assert float(change.max()) < clipping._COMPANY
