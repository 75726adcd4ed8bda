"""Crafted models over architectures, stages and settings, each with what it really leaks.

A craft that leaks nothing is no attack, and figures count it apart: `Crafted.leaks` says so.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.errors import MisuseError
from sentinel.stress import servers
from sentinel.stress.bench.honest import Kind, Way, honest_run
from sentinel.stress.bench.nets import NETS, Net, Site, sites
from sentinel.stress.servers.leak import measure_rounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from sentinel.stress.layers import State
    from sentinel.stress.servers import Craft, Leak, Public, Recipe

PLAIN = "plain"
STAGES = {0: "first round", 6: "running federation", 49: "one round in fifty"}
PARTS = 4  # rounds of a scan
SAMPLE = 256  # public records of the attacker's
MEASURED = 32  # records of each batch on which the leak is measured
BATCHES = 2  # of them
FEW = 8  # the same on costly nets
CLIENTS = 4  # whose updates are summed where one of them is aimed at
ATTEMPTS = 3  # models that are crafted for each that is wanted to leak, at most
LEARNED = "F"
GROUNDS, REPEATS = 20_000, 4  # seeds of the grounds, which all families share
FAMILIES = ("A", "B", "C", "D", "E", "F", "G")
SECRETIVE = {"permuted", "scaled", "turned"}  # would move a secret's rows; the attacker moves both


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """An honest federation at the moment its server turns.

    Attributes:
        net: the architecture.
        module: a module of it.
        setting: name of the stage.
        past: the honest models of earlier rounds that the hospital has seen.
        honest: the model that an honest server would send now.
        site: the hospital.
        elsewhere: the attacker's own records of the same world.
        batch: how many records stand behind the hospital's step.
    """

    net: Net
    module: nn.Module
    setting: str
    past: tuple[State, ...]
    honest: State
    site: Site
    elsewhere: Public
    batch: int


@dataclass(frozen=True, slots=True, eq=False)
class Crafted:
    """One crafted model.

    Attributes:
        family: A to G of the catalogue.
        recipe: its name.
        wrapper: how it hides; "plain" for not at all.
        ground: where it was sent.
        state: the crafted model.
        leak: what it gave away.
    """

    family: str
    recipe: str
    wrapper: str
    ground: Ground
    state: State
    leak: Leak

    @property
    def leaks(self) -> bool:
        """Whether it is an attack at all."""
        return self.leak.is_attack


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe, how it hides, and which round of several it is.

    Attributes:
        recipe: of the catalogue.
        wrapper: name among `servers.WRAPPERS`, or "plain".
        part: of a scan.
    """

    recipe: Recipe
    wrapper: str
    part: int = 0


def ground_of(net: Net, stage: int, seed: int) -> Ground:
    """Train an honest federation up to a stage.

    Args:
        net: the architecture.
        stage: rounds before the one that is crafted; `STAGES` names those of the figures.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = Kind("ground", Way(), rounds=stage + 1)
    run = honest_run(kind, net, seed % 12, generator)
    *past, honest = [one.state for one in run.rounds]
    # The attacker's records are of the same world, and none of the hospital's.
    (other,) = sites(run.world, 1, None, torch.Generator().manual_seed(seed + 7))
    batch = FEW if net.costly else MEASURED
    sample, labels = other.draw(SAMPLE)
    public = servers.Public(sample=sample, labels=labels, batch=batch)
    setting = STAGES.get(stage, f"after {stage} rounds")
    return Ground(net, run.module, setting, tuple(past), honest, run.site, public, batch)


def variants(family: str) -> list[Variant]:
    """Return every recipe of a family, plain and in every wrapper, over all parts of a scan."""
    found = []
    for recipe in servers.RECIPES:
        if recipe.family != family:
            continue
        for wrapper in (PLAIN, *servers.WRAPPERS):
            if recipe.secret is not None and wrapper in SECRETIVE:
                continue
            parts = range(PARTS) if family == "G" else range(1)
            found += [Variant(recipe, wrapper, part) for part in parts]
    return found


def crafted_models(
    family: str, quota: int, seed: int, nets: Sequence[Net] = NETS, recipe: str | None = None
) -> Iterator[Crafted]:
    """Yield crafted models until `quota` of them leak, or three times as many were tried.

    Args:
        family: A to G.
        quota: how many that leak are wanted.
        seed: of the crafts; grounds are the same for all.
        nets: the architectures, in turn; for learned recipes costly ones a third as often, since
            their training takes long.
        recipe: one recipe of the family; all in turn where left out.
    """
    group = [one for one in variants(family) if recipe in {None, one.recipe.name}]
    if family == LEARNED:
        nets = [net for net in nets if not net.costly] * 3 + [net for net in nets if net.costly]
    yield from _until(group, quota, seed, nets)


def _until(
    group: Sequence[Variant], quota: int, seed: int, nets: Sequence[Net]
) -> Iterator[Crafted]:
    leaking = tried = 0
    for index in itertools.count():
        # Each turn of the walk takes every net once, and moves on in the variants.
        turn, place = divmod(index, len(nets))
        if leaking >= quota or tried >= ATTEMPTS * quota or turn > ATTEMPTS * quota:
            return
        net = nets[place]
        variant = group[(turn + 3 * place) % len(group)]
        stages = [stage for stage in STAGES if stage < 49 or not net.costly]  # noqa: PLR2004 - fifty costly rounds take minutes
        where = _ground(net, stages[(turn + place) % len(stages)], GROUNDS + turn // 6 % REPEATS)
        made = craft(variant, where, torch.Generator().manual_seed(seed * 7919 + index))
        if made is None:
            continue
        tried += 1
        leaking += made.leaks
        yield made


@functools.lru_cache(maxsize=512)
def _ground(net: Net, stage: int, seed: int) -> Ground:
    return ground_of(net, stage, seed)


def craft(variant: Variant, ground: Ground, generator: torch.Generator) -> Crafted | None:
    """Craft one model and measure what it leaks.

    Returns:
        The model, or None where the recipe does not fit the architecture, or breaks it.
    """
    secret = None
    recipe = variant.recipe
    # A ground is used again and again; what is drawn there depends on this craft alone.
    where = replace(ground, site=replace(ground.site, generator=generator))
    try:
        if recipe.secret is not None:
            first, _ = servers.attacked_pair(where.module, where.honest)
            secret = recipe.secret(len(where.honest[f"{first}.bias"]), generator)
        if recipe.family == "G":
            sent = [
                _hidden(variant, where, secret, part)(
                    where.module, where.honest, generator=generator
                )
                for part in range(PARTS)
            ]
        else:
            made = _hidden(variant, where, secret, None)
            sent = [made(where.module, where.honest, generator=generator)]
        leak = _measured(recipe.family, where, sent, secret)
    except MisuseError:
        return None
    state = sent[variant.part] if recipe.family == "G" else sent[0]
    return Crafted(recipe.family, recipe.name, variant.wrapper, ground, state, leak)


def _hidden(variant: Variant, where: Ground, secret: Tensor | None, part: int | None) -> Craft:
    """Return the craft with its choices made, in its wrapper."""
    bound = variant.recipe.craft(where.elsewhere, secret)
    if part is not None:
        bound = functools.partial(bound, part=part, parts=PARTS)  # type: ignore[call-arg]  # a scan's
    return bound if variant.wrapper == PLAIN else servers.WRAPPERS[variant.wrapper](bound)


def _measured(
    family: str, where: Ground, sent: Sequence[Mapping[str, Tensor]], secret: Tensor | None
) -> Leak:
    batches = [where.site.draw(where.batch) for _ in range(BATCHES)]
    if family == "E":  # the others' models are crafted, so that the target's update stands alone
        batches = [where.site.draw(FEW) for _ in range(CLIENTS)]
        return servers.measure_sum(where.module, where.honest, where.honest, sent[0], batches)
    if family == "G":
        return measure_rounds(where.module, where.honest, sent, batches[0])
    return servers.measure(where.module, where.honest, sent[0], batches, secret=secret)
