"""What the attacker is told of a release is what the guard did."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sentinel import Guard
from sentinel.demo.hearts import network
from sentinel.errors import MisuseError, Withheld
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.passive.local_training import LocalTraining
from sentinel.stress.passive.released import let_out

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("known_noise")
POLICY = """
schema = 1
name = "test"
[limits]
min_patients = 4
[[rule]]
id = "all"
max_norm = 0.01
noise_ratio = {ratio}
keep = {keep}
"""


def trained() -> tuple[LocalTraining, Tensor]:
    draw = torch.Generator().manual_seed(0)
    model = network(13, 256, draw)
    rows = torch.randn(8, 13, generator=draw)
    labels = (rows[:, 0] > 0).float()
    whole = (torch.arange(8),)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    return LocalTraining(model, start, labels, whole, 1.0, loss=binary_loss), rows


def guard(folder: Path, ratio: float, keep: float) -> Guard:
    policy = folder / "policy.toml"
    policy.write_text(POLICY.format(ratio=ratio, keep=keep))
    policy.chmod(0o600)
    return Guard(policy, folder / "state", unsafe_skip_inspection=True, alerts=io.StringIO())


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_figures_explain_what_left(tmp_path: Path, keep: float) -> None:
    """What is left after the simulated treatment has the noise's deviation, and no signal."""
    training, rows = trained()
    seen = let_out(guard(tmp_path, 2.0, keep), 1, training, rows, patients=8)
    raw = training.update(rows, differentiable=False)
    assert seen.keep == keep
    assert seen.scale == pytest.approx(0.01 / float(raw.norm()), rel=1e-3)
    assert float((seen.values != 0).float().mean()) == pytest.approx(keep, abs=0.05)
    kept = seen.values != 0
    left = (seen.values - seen.sanitize(raw))[kept]
    assert float(left.std()) == pytest.approx(seen.noise_std / keep, rel=0.1)


def test_too_few_patients_are_withheld(tmp_path: Path) -> None:
    training, rows = trained()
    with pytest.raises(Withheld):
        let_out(guard(tmp_path, 2.0, 1.0), 1, training, rows, patients=3)


def test_a_number_that_was_released_before_is_refused(tmp_path: Path) -> None:
    training, rows = trained()
    once = guard(tmp_path, 2.0, 1.0)
    let_out(once, 1, training, rows, patients=8)
    with pytest.raises(MisuseError, match="fresh round number"):
        let_out(once, 1, training, rows, patients=8)
