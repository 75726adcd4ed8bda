"""Names and sizes of a model's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from sentinel.errors import MisuseError
from sentinel.policy.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path


def test_parameters_statistics_and_the_rest_are_told_apart(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = {**net.state_dict(), "scale": torch.tensor(1.0, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "m.safetensors")
    manifest = read_manifest(tmp_path / "m.safetensors")
    parameters = {"0.weight": 6, "0.bias": 2, "1.weight": 2, "1.bias": 2, "scale": 1}
    assert manifest.parameters == parameters
    assert manifest.statistics == {"1.running_mean": 2, "1.running_var": 2}
    assert manifest.others == ("1.num_batches_tracked",)
    assert manifest.candidates("withhold") == parameters
    assert manifest.candidates("as-parameters") == {**parameters, **manifest.statistics}


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "m.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    for path in (broken, tmp_path / "none", tmp_path):
        with pytest.raises(MisuseError, match="expected a safetensors file"):
            read_manifest(path)
