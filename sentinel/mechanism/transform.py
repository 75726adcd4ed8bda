"""Transform: carry out a plan on the tensors of an update, in one pass."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sentinel.chunks import sum_of_squares
from sentinel.crew import share_out
from sentinel.mechanism.clip import clip_factor
from sentinel.mechanism.grid import grid_step, rounding_reach
from sentinel.mechanism.noise import treat_each
from sentinel.mechanism.recipe import Recipe
from sentinel.memory import room
from sentinel.spans import parted
from sentinel.terms import Action, NormBound, Treatment

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sentinel.mechanism.entropy import Entropy
    from sentinel.memory import Rooms
    from sentinel.spans import Span
    from sentinel.terms import Plan
    from sentinel.update import Kind, State, Update


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan in figures: all that is known before the pass over the values.

    Attributes:
        recipes: name -> what its values go through; of the names that leave.
        noised: those of them that carry noise.
        clipped: whether any tensor is scaled down to meet a bound.
    """

    recipes: dict[str, Recipe]
    noised: frozenset[str]
    clipped: bool

    @property
    def released(self) -> frozenset[str]:
        """Names whose tensors leave."""
        return frozenset(self.recipes)


def prepare(update: Update, plan: Plan, *, base_std: float) -> Prepared:
    """Work out what every tensor of the update goes through.

    Args:
        update: deltas, their sums of squares, and which are tied (the stricter of both counts).
        plan: what to do with every name that could leave.
        base_std: standard deviation of the noise that is in the deltas already.

    Guarantees:
        Every bound of the plan holds for the deltas before noise, the rounding to the grid counted
        in. The noise in a released tensor has at least the standard deviation of its treatment.

    Edges:
        an update of zeros, or without values:   nothing is clipped; noise as asked for
        a norm under a bound that is not finite: ValueError
        several bounds on one tensor:            the smallest factor
        a bound on single values:                counts before the norm is taken
        tied tensors:                            the strictest treatment and every bound of their
                                                 names
        noise that is there already:             what is missing of the treatment's is added, and no
                                                 more
        a tensor that is withheld:               no recipe
    """
    treatments = _strictest(update, plan)
    bounds = [_resolve(bound, update.aliases) for bound in plan.bounds]
    recipes = _gridded(update, treatments, bounds, base_std)
    factors = _factors(update, recipes, bounds)
    scaled = functools.cache(lambda recipe, factor: replace(recipe, factor=factor))
    leaving = {
        name: scaled(recipes[name], factors[name])
        for name, treatment in treatments.items()
        if treatment.action is Action.RELEASE
    }
    return Prepared(
        leaving,
        frozenset(name for name, recipe in leaving.items() if max(recipe.std, base_std) > 0.0),
        any(recipe.factor < 1.0 for recipe in leaving.values()),
    )


def transform(
    update: Update, prepared: Prepared, *, kind: Kind, entropy: Entropy, rooms: Rooms = room
) -> State:
    """Limit, clip, noise and mask what leaves, in this order, and give the update back.

    Uses up deltas that are held. Noise and mask come from `entropy`; no value has a part in them.
    The state's memory comes from `rooms`.

    Guarantees:
        Of each tensor leaves what its recipe makes of the delta, under the names, shapes and dtypes
        of the global state. No value has a part in noise or mask.

    Edges:
        a tensor without a recipe:           the global model's value; 0 as a delta
        without noise:                       rounded toward the global value: no difference grows
        noise beyond the range of the dtype: the largest value of the dtype
        an empty tensor:                     as it is
        a tied tensor:                       the same values under each of its names
    """
    assembly = update.assembly(prepared.released, noised=prepared.noised, kind=kind, rooms=rooms)
    treat_each(update.deltas, prepared.recipes, entropy, assembly.put)
    return assembly.state()


def _gridded(
    update: Update,
    treatments: Mapping[str, Treatment],
    bounds: Iterable[NormBound],
    base_std: float,
) -> dict[str, Recipe]:
    """Recipes without their factors; each grid is as fine as its noise and its own bounds ask."""
    coordinates = sum(update.deltas.sizes.values())

    @functools.cache
    def recipe(treatment: Treatment, least: float) -> Recipe:
        std = _missing_std(treatment, base_std)
        step = grid_step(least, coordinates, std) if std > 0.0 else 0.0
        return Recipe(max(0.0, treatment.max_abs - step / 2), 1.0, std, step, treatment.keep)

    recipes = {}
    for name, treatment in treatments.items():
        norms = [bound.max_norm for bound in bounds if name in bound.names]
        recipes[name] = recipe(treatment, min(norms, default=math.inf))
    return recipes


def _limited(update: Update, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Sums of squares as they are once single values are bounded."""
    limits = {
        name: recipe.max_abs for name, recipe in recipes.items() if math.isfinite(recipe.max_abs)
    }

    def measure(spans: list[Span]) -> list[tuple[str, float]]:
        return [
            (span.name, sum_of_squares(part, limits[span.name]))
            for run, values in update.deltas.runs(spans, lambda _: None)
            for span, part in zip(run, parted(values, run), strict=True)
        ]

    squares = {name: 0.0 if name in limits else update.squares[name] for name in recipes}
    for found in share_out(update.deltas.blocks(limits), lambda: measure):
        for name, square in found:
            squares[name] += square
    return squares


def _missing_std(treatment: Treatment, base_std: float) -> float:
    """What has to be added to noise that is there already."""
    return math.sqrt(max(treatment.noise_std**2 - base_std**2, 0.0))  # NaN stays: it is refused


def _strictest(update: Update, plan: Plan) -> dict[str, Treatment]:
    """The treatment of each tensor: the strictest that any of its names asks for."""
    found = {name: plan.treatments[name] for name in update.deltas}
    for alias, name in update.aliases.items():
        one, other = found[name], plan.treatments[alias]
        found[name] = Treatment(
            action=max(one.action, other.action),
            max_abs=min(one.max_abs, other.max_abs),
            noise_std=max(one.noise_std, other.noise_std),
            keep=min(one.keep, other.keep),
        )
    return found


def _resolve(bound: NormBound, aliases: Mapping[str, str]) -> NormBound:
    return NormBound(frozenset(aliases.get(name, name) for name in bound.names), bound.max_norm)


def _factors(
    update: Update, recipes: Mapping[str, Recipe], bounds: Iterable[NormBound]
) -> dict[str, float]:
    """For each tensor the smallest factor of all bounds that it is under."""
    squares = _limited(update, recipes)
    factors = dict.fromkeys(squares, 1.0)
    for bound in bounds:
        members = [name for name in bound.names if name in squares]
        reach = _reach(update, {name: recipes[name] for name in members})
        factor = clip_factor([squares[name] for name in members], bound.max_norm - reach)
        for name in members:
            factors[name] = min(factors[name], factor)
    return factors


def _reach(update: Update, recipes: Mapping[str, Recipe]) -> float:
    """How far rounding to the grids can move these tensors together, in L2."""
    sizes = update.deltas.sizes
    return math.hypot(*(rounding_reach(recipes[name].step, sizes[name]) for name in recipes))
