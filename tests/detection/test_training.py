"""Training: the same recipe gives the same bundle, and a trained bundle works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import spearmanr

from sentinel.detection import load_detector
from sentinel.detection.training.recipe import Recipe, read_recipe
from sentinel.detection.training.sensitivity import spearman
from sentinel.detection.training.table import said
from sentinel.errors import MisuseError
from sentinel.paths import bundled
from sentinel.stress import corpus

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["update-sensitivity", "global-model"])
def test_the_shipped_recipe_reads_and_its_figures_are_of_a_full_run(name: str) -> None:
    recipe = read_recipe(bundled("detectors") / name / "recipe.toml")
    assert recipe != recipe.quick()
    assert recipe.test_runs >= 40
    assert recipe.test_runs * recipe.rounds >= 400
    assert recipe.crafted >= 50


def test_a_recipe_survives_its_own_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe(seed=9).text("global-model"))
    assert read_recipe(path) == Recipe(seed=9)


@pytest.mark.parametrize("text", ["seed = 'x'", "unknown = 1", "="])
def test_a_recipe_that_cannot_be_used_is_misuse(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(MisuseError, match="recipe"):
        read_recipe(path)


def test_spearman_agrees_with_scipy_on_ties() -> None:
    generator = np.random.default_rng(0)
    left = generator.integers(0, 5, 200).astype(float)
    right = left + generator.integers(0, 4, 200)
    assert spearman(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert spearman(np.ones(200), left) == 0.0
    assert np.isnan(spearman(left, np.ones(200)))


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    for one, other in zip(corpus.crafted_models(1, 5), corpus.crafted_models(1, 5), strict=True):
        assert all(one.state[name].equal(other.state[name]) for name in one.state)


def test_both_detectors_are_loaded_from_where_they_ship() -> None:
    assert load_detector("global-model").manifest.detector == "IForest"
    assert load_detector("update-sensitivity").manifest.detector == "KNN"


def test_a_share_is_said_with_its_interval() -> None:
    assert said(0, 10) == "0 of 10 (0.0 to 27.8 %)"
    assert said(381, 381) == "381 of 381 (99.0 to 100.0 %)"
    assert said(0, 0) == "none tried"
