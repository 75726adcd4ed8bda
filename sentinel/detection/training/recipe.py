"""Recipes: the few numbers that reproduce a bundle, as a TOML file inside it."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from pathlib import Path


class Recipe(BaseModel):
    """How a bundle is made.

    Attributes:
        detector: pyod detector whose graph is shipped.
        trees: in its forest.
        seed: of everything.
        honest_runs: runs of global models to train on (global-model).
        rounds: global models per run (global-model).
        test_runs: runs to count false alarms on (global-model).
        crafted: crafted models per family to measure detection on (global-model).
        nets: how many of the corpus's architectures (update-sensitivity).
        repeats: models per architecture, kind of task and training stage (update-sensitivity).
        kinds: kinds of task per architecture, from the first (update-sensitivity).
        stages: training stages, from the first (update-sensitivity).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    detector: str = "IForest"
    trees: int = Field(default=100, ge=1)
    seed: int = Field(default=1, ge=0)
    honest_runs: int = Field(default=48, ge=2)
    rounds: int = Field(default=8, ge=1)
    test_runs: int = Field(default=60, ge=2)
    crafted: int = Field(default=60, ge=1)
    nets: int = Field(default=15, ge=3)
    repeats: int = Field(default=1, ge=1)
    kinds: int = Field(default=3, ge=1)
    stages: int = Field(default=3, ge=1)

    def quick(self) -> Recipe:
        """Return the same on a small corpus: to see that it works, not for use."""
        small = {"honest_runs": 8, "rounds": 3, "test_runs": 4, "crafted": 1}
        return self.model_copy(
            update={**small, "nets": 3, "repeats": 1, "trees": 20, "kinds": 1, "stages": 1}
        )

    def text(self, name: str) -> str:
        """Write as TOML."""
        lines = [f"# sentinel detectors train {name}"]
        for key, value in self.model_dump().items():
            lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}")
        return "\n".join(lines) + "\n"


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        MisuseError: no TOML, an unknown key, or a value of the wrong kind.
    """
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        msg = f"{path.name} is no recipe: keys of the shipped recipe.toml were expected"
        raise MisuseError(msg) from error
