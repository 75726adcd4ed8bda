"""Updates of known leakage, on architectures that the sensitivity score was not trained on.

Each is one local round: of one record to 256, in one step or several, honest or on a crafted model,
raw or noised. What it leaks is measured twice: as the score defines it, and by exact reads of the
stress lab's own attacker, which the score's training knows nothing of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.detection import build_reference, score_update
from sentinel.detection.rounds import Spec, local_round, measured_leakage
from sentinel.errors import MisuseError
from sentinel.stress import servers
from sentinel.stress.bench.baselines import duplicate_rows, effective_rank
from sentinel.stress.bench.crafted import ground_of
from sentinel.stress.layers import loaded, recorded_inputs
from sentinel.stress.servers.raw import count_read, read_layer, viewed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from sentinel.detection import Detector, Reference
    from sentinel.stress.bench.crafted import Ground
    from sentinel.stress.bench.nets import Net, Site
    from sentinel.stress.layers import State

STAGES = (0, 12)  # rounds before the one that is looked at
OUTSIDERS = 64  # records that no round uses
NOISES = (0.2, 1.0, 5.0)  # norm of the noise by that of the update
RATE = 0.05
CRAFTS = ("binning-mean", "trap-weights", "qbi")
SPECS: tuple[Spec, ...] = (
    *(Spec(count, count, rate=RATE) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    Spec(4, 4, 3, RATE),
    Spec(16, 8, 2, RATE),
    Spec(64, 16, 2, RATE),
    Spec(200, 32, 2, RATE),
    Spec(1, 1, 4, 1e-3, adam=True),
    Spec(64, 16, 2, 1e-3, adam=True),
    Spec(200, 32, 2, 1e-3, adam=True),
)
NOISED = tuple(spec for spec in SPECS if spec.records in {1, 8, 64} and spec.epochs == 1)


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """One update.

    Attributes:
        modality: what records are.
        net: the architecture.
        stage: rounds of training before it.
        craft: "honest", or the recipe of the model that it was made on.
        records: how many stand behind it.
        steps: local steps.
        adam: whether they were Adam's.
        noise: norm of the noise by that of the update, 0 for none.
        score: with a reference of this model.
        generic: without.
        sharpness: what the score says of itself.
        leak: share of the records read, as the score defines it.
        exact: share of the rows that the lab's attacker reads to 1 %; None where it reads no layer.
        flat: how far the update's flattest matrix is from full rank, 0 to 1: a plain rule.
        twins: largest share of parallel rows in a matrix of the update: another.
        seconds: that scoring took.
    """

    modality: str
    net: str
    stage: int
    craft: str
    records: int
    steps: int
    adam: bool
    noise: float
    score: float
    generic: float
    sharpness: str
    leak: float
    exact: float | None
    flat: float
    twins: float
    seconds: float


def modality(net: Net) -> str:
    """Return what the records of a net are."""
    if net.words is not None:
        return "text"
    if net.counts:
        return "genotypes"
    return {1: "tables", 2: "signals"}.get(len(net.shape), "images")


def update_rows(
    net: Net, seed: int, detector: Detector | None = None, stages: tuple[int, ...] = STAGES
) -> list[UpdateRow]:
    """Make and score updates of one architecture.

    Args:
        net: the architecture.
        seed: of everything.
        detector: the shipped bundle where left out.
        stages: rounds of training before each.

    Returns:
        Rows; none for a model in which no leak can be measured.
    """
    rows: list[UpdateRow] = []
    for stage in stages:
        where = ground_of(net, stage, seed + stage)
        for place, (craft, state) in enumerate(_models(where, seed)):
            generator = torch.Generator().manual_seed(seed * 31 + 7 * stage + place)
            rows += _of_model(where, stage, craft, state, generator, detector)
    return rows


def _models(where: Ground, seed: int) -> Iterator[tuple[str, State]]:
    """Yield the honest model, and those crafts that fit it."""
    yield "honest", where.honest
    for name in CRAFTS:
        craft = servers.recipe(name).craft(where.elsewhere)
        generator = torch.Generator().manual_seed(seed)
        try:
            yield name, craft(where.module, where.honest, generator=generator)
        except MisuseError:
            continue


def _of_model(  # noqa: PLR0913, PLR0917 - private: one model and how it is looked at
    where: Ground,
    stage: int,
    craft: str,
    state: State,
    generator: torch.Generator,
    detector: Detector | None,
) -> Iterator[UpdateRow]:
    reference = build_reference(where.module, state, sample=where.net.shape)
    scorer = _Scorer(where, stage, craft, state, reference, detector)
    site = replace(where.site, generator=generator)
    for spec in SPECS if craft == "honest" else NOISED:
        made = scorer.made(site, spec)
        if made is None:
            continue
        yield from scorer.row(made, spec, 0.0)
        for noise in NOISES if spec in NOISED and craft == "honest" else ():
            yield from scorer.row(_noised(made, noise, generator), spec, noise)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A local round.

    Attributes:
        deltas: the update.
        inside: records behind it.
        outside: records that were not used.
    """

    deltas: State
    inside: Tensor
    outside: Tensor


def _noised(made: _Made, ratio: float, generator: torch.Generator) -> _Made:
    """Add noise of `ratio` times the update's norm, in expectation."""
    size = torch.stack([delta.square().sum() for delta in made.deltas.values()]).sum().sqrt()
    count = sum(delta.numel() for delta in made.deltas.values())
    spread = ratio * float(size) / count**0.5
    deltas = {
        name: delta + spread * torch.randn(delta.shape, generator=generator)
        for name, delta in made.deltas.items()
    }
    return _Made(deltas, made.inside, made.outside)


class _Scorer:
    """One model, its reference, and what its updates leak."""

    def __init__(  # noqa: PLR0913, PLR0917 - private: all of it is one model
        self,
        where: Ground,
        stage: int,
        craft: str,
        state: State,
        reference: Reference,
        detector: Detector | None,
    ) -> None:
        self._where, self._stage, self._craft = where, stage, craft
        self._state, self._reference, self._detector = state, reference, detector
        self._twin = loaded(where.module, state).eval()

    def made(self, site: Site, spec: Spec) -> _Made | None:
        """Train one local round; None where it does not stay finite."""
        inside, labels = site.draw(spec.records)
        outside, _ = site.draw(OUTSIDERS)
        deltas = local_round(self._twin, inside, labels, spec)
        if not all(bool(delta.isfinite().all()) for delta in deltas.values()):
            return None
        return _Made(deltas, inside, outside)

    def row(self, made: _Made, spec: Spec, noise: float) -> Iterator[UpdateRow]:
        """Score an update; nothing where no leak can be measured."""
        leak = measured_leakage(self._twin, self._state, made.deltas, made.inside, made.outside)
        if leak is None:
            return
        start = time.perf_counter()
        seen = score_update(made.deltas, self._reference, detector=self._detector)
        seconds = time.perf_counter() - start
        pooled = score_update(made.deltas, detector=self._detector)
        matrices = [delta.flatten(1) for delta in made.deltas.values() if delta.ndim > 1]
        net = self._where.net
        yield UpdateRow(
            modality(net),
            net.name,
            self._stage,
            self._craft,
            spec.records,
            spec.epochs * -(-spec.records // spec.batch),
            spec.adam,
            noise,
            seen.overall,
            pooled.overall,
            seen.sharpness,
            leak,
            exact_reads(self._twin, self._state, made.deltas, made.inside),
            1.0 - min(map(effective_rank, matrices), default=1.0),
            max(map(duplicate_rows, matrices), default=0.0),
            seconds,
        )


def exact_reads(
    model: nn.Module, state: State, deltas: Mapping[str, Tensor], records: Tensor
) -> float | None:
    """Return the share of the rows that the lab's attacker reads to 1 % from an update.

    Args:
        model: the architecture, in evaluation mode.
        state: the global model.
        deltas: the update, of any number of steps: the attacker takes it for one gradient.
        records: behind it.

    Returns:
        0 to 1, or None where the model has no fully connected layer with a bias.
    """
    try:
        layer = read_layer(model, state, None)
    except MisuseError:
        return None
    with torch.no_grad():
        rows = recorded_inputs(model, records, layer)[1]
    values = {name: -delta for name, delta in deltas.items()}
    return count_read(viewed(model, state, values, layer), rows) / len(rows)
