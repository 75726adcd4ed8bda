"""`sentinel inspect`: verdict, findings and exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from sentinel.cli.inspect import inspect_command
from sentinel.stress import corpus, servers

if TYPE_CHECKING:
    from pathlib import Path

runner = CliRunner()
app = typer.Typer()
app.command()(inspect_command)


def inspect(*arguments: str | Path) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(1)
    module = corpus.fresh(corpus.NETS[0], generator)
    honest = servers.copied(module.state_dict())
    states = {
        "honest": honest,
        "crafted": servers.binning(module, honest, generator=generator, scale=0.01),
        "broken": {name: value * float("nan") for name, value in honest.items()},
        "other": {**honest, "extra": torch.zeros(2)},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in states}
    for name, state in states.items():
        save_file(state, paths[name])
    return paths


def test_an_honest_model_passes(files: dict[str, Path]) -> None:
    result = inspect(files["honest"], "--previous", files["honest"])
    assert result.exit_code == 0
    assert "honest" in result.stdout


def test_a_crafted_model_is_named_with_its_layer(files: dict[str, Path]) -> None:
    result = inspect(files["crafted"])
    assert result.exit_code == 1
    assert "binning" in result.stdout
    assert "0.weight has many units that look along one direction" in result.stdout


def test_json_holds_the_same(files: dict[str, Path]) -> None:
    result = inspect(files["crafted"], "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["verdict"] == "binning"
    assert document["suspicion"] > 0.8
    assert document["findings"][0]["name"] == "0.weight"
    for finding in document["findings"]:
        assert finding["sentence"].startswith(finding["name"])
        assert finding["sentence"].endswith(f"(strength {finding['strength']:.2f}).")


def test_a_broken_model_ends_with_one(files: dict[str, Path]) -> None:
    result = inspect(files["broken"])
    assert result.exit_code == 1
    assert result.stdout.count("unhealthy") == 1


def test_a_new_entry_is_named(files: dict[str, Path]) -> None:
    result = inspect(files["other"], "--previous", files["honest"])
    assert result.exit_code == 1
    assert "extra was added" in result.stdout


def test_a_missing_or_foreign_file_is_misuse(tmp_path: Path, files: dict[str, Path]) -> None:
    assert inspect(tmp_path / "none.safetensors").exit_code == 2
    (tmp_path / "text").write_text("no tensors")
    assert inspect(tmp_path / "text").exit_code == 2
    assert inspect(files["honest"], "--previous", tmp_path / "none").exit_code == 2
