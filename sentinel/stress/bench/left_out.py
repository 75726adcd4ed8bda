"""Leave one architecture out: the learned part refitted without it, then measured on it alone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from sentinel.stress import corpus

ALARM = 0.5


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One architecture that the learned part had not seen.

    Attributes:
        net: which.
        rounds: honest rounds of it.
        alarms: how many were refused.
        most: largest suspicion among them.
        crafted: models of the textbook recipes on it.
        detected: how many were refused.
    """

    net: str
    rounds: int
    alarms: int
    most: float
    crafted: int
    detected: int


def left_out(runs: int, rounds: int, crafted: int, trees: int) -> list[LeftOut]:
    """Refit the forest without each architecture of its corpus, and inspect models of that one.

    The whole inspection is measured, rules and learned part together.

    Args:
        runs: honest runs over all architectures, of which those of one are left out.
        rounds: of each.
        crafted: models per family, over all architectures.
        trees: in each forest.

    Raises:
        ImportError: the extra `train` is not installed.
    """
    from sentinel.detection.training import ModelCorpus, train_global_model  # noqa: PLC0415 - an extra
    from sentinel.detection.training.recipe import Recipe  # noqa: PLC0415 - an extra

    train = list(corpus.honest_runs(runs, rounds, 1))
    test = list(corpus.honest_runs(runs, rounds, 1001))
    models = list(corpus.crafted_models(crafted, 2001))
    recipe = Recipe(trees=trees, honest_runs=runs, rounds=rounds)
    found = []
    for net in corpus.NETS:
        own = [run for run in test if run.net.name == net.name]
        made = ModelCorpus(
            honest=[run for run in train if run.net.name != net.name],
            test=own,
            crafted=[one for one in models if one.net.name == net.name],
            harder=(),
        )
        with tempfile.TemporaryDirectory() as draft:
            figures = train_global_model(recipe, made, Path(draft) / "global-model")
        honest = [value for values in figures.honest.values() for value in values]
        caught = [row[0] for rows in figures.crafted.values() for row in rows]
        found.append(
            LeftOut(
                net.name,
                len(honest),
                sum(value >= ALARM for value in honest),
                max(honest),
                len(caught),
                sum(value >= ALARM for value in caught),
            )
        )
    return found
