"""`sentinel detectors`: list says what is fit, train makes bundles that load."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from sentinel.cli.detectors import app
from sentinel.detection import inspect_global_model, load_detector, score_update
from sentinel.paths import bundled
from sentinel.stress import corpus

if TYPE_CHECKING:
    from pathlib import Path

runner = CliRunner()


def test_list_names_both_detectors() -> None:
    result = runner.invoke(app, ["list", "--json"])
    assert result.exit_code == 0
    assert [row["name"] for row in json.loads(result.stdout)] == [
        "update-sensitivity",
        "global-model",
    ]


def test_list_ends_with_one_where_a_bundle_is_damaged(tmp_path: Path) -> None:
    shutil.copytree(bundled("detectors"), tmp_path / "d")
    (tmp_path / "d" / "global-model" / "card.md").write_text("changed")
    result = runner.invoke(app, ["list", "--folder", str(tmp_path / "d")])
    assert result.exit_code == 1
    assert "card.md" in result.stdout


def test_an_unknown_detector_is_misuse() -> None:
    assert runner.invoke(app, ["train", "nothing"]).exit_code == 2


@pytest.mark.parametrize("name", ["update-sensitivity", "global-model"])
def test_a_quick_training_gives_a_bundle_that_works_and_again_the_same(
    tmp_path: Path, name: str
) -> None:
    for out in ("one", "two"):
        command = ["train", name, "--quick", "--out", str(tmp_path / out)]
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "one" / name).iterdir())
    assert files == ["card.md", "manifest.json", "model.onnx", "recipe.toml"]
    for file in files:
        pair = [(tmp_path / out / name / file).read_bytes() for out in ("one", "two")]
        assert pair[0] == pair[1]
    detector = load_detector(name, folder=tmp_path / "one")
    crafted = next(iter(corpus.crafted_models(1, 3)))
    if name == "global-model":
        assert inspect_global_model(crafted.state, detector=detector).suspicion > 0.8
        assert inspect_global_model(crafted.honest, detector=detector).suspicion < 0.5
    else:
        deltas = {key: value for key, value in crafted.honest.items() if value.ndim}
        assert 0.0 <= score_update(deltas, detector=detector).overall <= 1.0


def test_what_is_no_detector_cannot_be_evaluated() -> None:
    assert runner.invoke(app, ["evaluate", "nothing"]).exit_code == 2


def evaluated(name: str, out: Path) -> dict[str, Any]:
    """What a quick evaluation of one detector wrote, which is what it printed."""
    result = runner.invoke(app, ["evaluate", name, "--quick", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads((out / name / "evaluation.json").read_text())
    assert json.loads(result.stdout) == document
    assert document["size"] == "quick"
    assert document["detector"] == load_detector(name).digest
    return document


@pytest.mark.slow
def test_a_quick_evaluation_of_global_models(tmp_path: Path) -> None:
    document = evaluated("global-model", tmp_path)
    files = sorted(path.name for path in (tmp_path / "global-model").iterdir())
    assert files == ["curves.svg", "evaluation.json", "evaluation.md", "suspicion.svg"]
    families = document["crafted"]["by_family"]
    assert set(families) == set("ABCDEFG")
    assert len(document["missed"]) == sum(
        one["shipped"]["trials"] - one["shipped"]["hits"] for one in families.values()
    )
    # Textbook binning is what the detector is there for; the share of all crafts is the card's.
    assert families["A"]["shipped"]["hits"] > 0
    rounds = document["honest"]["false_alarm_rounds"]
    assert rounds["hits"] < rounds["trials"] / 4


@pytest.mark.slow
def test_a_quick_evaluation_of_update_sensitivity(tmp_path: Path) -> None:
    document = evaluated("update-sensitivity", tmp_path)
    files = sorted(path.name for path in (tmp_path / "update-sensitivity").iterdir())
    assert files == ["evaluation.json", "evaluation.md", "leakage.svg"]
    assert set(document["sentinel"]["by_modality"]) == {"tables", "genotypes"}
    assert document["sentinel"]["all"]["all"]["spearman"] > 0.3
