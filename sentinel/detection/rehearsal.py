"""Rehearsals: synthetic rounds of known size through the model at hand, with what leaks from each.

Whatever a site might train is tried in small: one step and several, plain SGD, momentum and Adam,
records of several styles, and updates that carry noise. What linear read-out takes from each is
measured, since the synthetic records are known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.features import Measured, update_features
from sentinel.detection.rounds import Readable, Spec, drawn_labels, local_round
from sentinel.detection.synthetic import TOKENS, Columns, records, run, vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Draw = Callable[[int], Tensor]

OUTSIDERS = 64  # records that no round uses
DIVERGED = 10.0  # largest change of a weight in one synthetic round; NaN is not below it either
LIKELY = 16  # records from which labels are those that the model expects
RAW_PACE = 0.02  # learning rate on columns that nobody scaled, as a share of the usual one
FEW = 8  # records that inversion by optimisation can still tell apart
CALM = 0.3  # noise beside an update below which it can
HEAVY = 2_000_000  # parameters or multiplications per record: rehearsals are fewer beyond
MOST_OF_HEAVY = 64  # records in a rehearsal of such a model
NOISES = (0.03, 0.1, 0.3, 1.0, 3.0)  # norm of the noise / norm of the update

SPECS: tuple[Spec, ...] = (
    *(Spec(count, count) for count in (1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 256)),
    Spec(1, 1, 4),
    Spec(2, 1, 2),
    Spec(4, 4, 3),
    Spec(8, 8, 4),
    Spec(8, 4, 2, momentum=0.9),
    Spec(16, 8, 2),
    Spec(32, 8, 2),
    Spec(64, 16, 2),
    Spec(64, 16, 2, momentum=0.9),
    Spec(128, 32, 2),
    Spec(200, 32, 2),
    # Only many: on few records Adam's signs defeat linear read-out, so that it says nothing there.
    Spec(64, 16, 2, 1e-3, adam=True),
    Spec(128, 32, 3, 1e-3, adam=True),
)


REHEARSED = repr((SPECS, NOISES, "plain raw field counts frequent dark standard"))


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """One synthetic round.

    Attributes:
        style: of the records.
        spec: how it was trained.
        noise: norm of the noise over that of the update.
        leakage: measured; None where it cannot be.
        measured: features of its update.
    """

    style: str
    spec: Spec
    noise: float
    leakage: float | None
    measured: list[Measured]

    @property
    def leaks(self) -> float:
        """Leakage as measured; where nothing can be read linearly, what inversion might give.

        There one record counts as read, few by their share, and none of a noised or larger round.
        """
        if self.leakage is not None:
            return self.leakage
        return 1.0 / self.spec.records if self.spec.records <= FEW and self.noise < CALM else 0.0


def _styles(
    module: nn.Module, shape: Sequence[int], generator: torch.Generator
) -> Mapping[str, tuple[Draw, float]]:
    """Return how records are drawn, by style, and the pace of SGD on them."""
    tokens = vocabulary(module)

    def plain(count: int) -> Tensor:
        return records(count, shape, generator, tokens=tokens)

    if tokens is not None:
        common = 1.0 / (3.0 + torch.arange(tokens).float())

        def frequent(count: int) -> Tensor:
            drawn = torch.multinomial(
                common.expand(count, -1), shape[0], replacement=True, generator=generator
            )
            return drawn.view(count, *shape)

        return {"plain": (plain, 1.0)} | ({"frequent": (frequent, 1.0)} if len(shape) == 1 else {})
    if len(shape) == 1:

        def field(count: int) -> Tensor:
            return records(count, (1, *shape), generator).view(count, *shape)

        def counts(count: int) -> Tensor:
            often = 0.05 + 0.45 * torch.rand(shape, generator=generator)
            return (torch.rand(2, count, *shape, generator=generator) < often).float().sum(0)

        return {
            "plain": (plain, 1.0),
            "raw": (
                lambda count: Columns.drawn(shape[0], generator).draw(count, generator),
                RAW_PACE,
            ),
            "field": (field, 1.0),
            "counts": (counts, 1.0),
        }
    if len(shape) == 2 and shape[0] == TOKENS:  # noqa: PLR2004  # a sequence of rows
        return {"plain": (plain, 1.0)}

    def dark(count: int) -> Tensor:
        return (plain(count) - 0.55).clamp_min(0.0) / 0.45

    def standard(count: int) -> Tensor:
        drawn = plain(count)
        return (drawn - 0.5 + 0.1 * torch.randn(drawn.shape, generator=generator)) / 0.25

    return {"plain": (plain, 1.0), "dark": (dark, 1.0), "standard": (standard, 1.0)}


def planned(module: nn.Module, shape: Sequence[int]) -> tuple[Spec, ...]:
    """Return the ways to train; for a model of much work each once, and no large round."""
    if not _is_heavy(module, shape):
        return SPECS
    return tuple(dict.fromkeys(spec for spec in SPECS if spec.records <= MOST_OF_HEAVY))


def _is_heavy(module: nn.Module, shape: Sequence[int]) -> bool:
    return max(sum(value.numel() for value in module.parameters()), _work(module, shape)) > HEAVY


def _work(module: nn.Module, shape: Sequence[int]) -> int:
    """Multiplications for one record, about: of each weight for each place of its output."""
    found = [0]

    def count(part: nn.Module, _args: object, output: object) -> None:
        weight = getattr(part, "weight", None)
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.ndim > 1:
            found[0] += output.numel() * weight[:1].numel()

    handles = [part.register_forward_hook(count) for part in module.modules()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            run(module, records(1, shape, generator, tokens=vocabulary(module)))
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def passes(module: nn.Module, shape: Sequence[int]) -> int:
    """Return how many records all rehearsals take forward and backward."""
    styles = _styles(module, shape, torch.Generator().manual_seed(0))
    specs = planned(module, shape)
    return len(styles) * sum(spec.records * spec.epochs for spec in specs)


def rehearse(
    module: nn.Module,
    shape: Sequence[int],
    generator: torch.Generator,
) -> Iterator[Rehearsal]:
    """Yield synthetic rounds and noised copies of them; those that diverge are left out.

    Args:
        module: a copy in evaluation mode that holds the global state; left as it was.
        shape: of one record.
        generator: draws everything.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    turn, specs = 0, planned(module, shape)
    for style, (draw, pace) in _styles(module, shape, generator).items():
        for spec in specs:
            # Drawn together: every table of raw columns is another one.
            drawn = draw(spec.records + OUTSIDERS)
            inside, outside = drawn[: spec.records], drawn[spec.records :]
            labels = drawn_labels(module, inside, generator, likely=spec.records >= LIKELY)
            paced = spec if spec.adam else replace(spec, rate=spec.rate * pace)
            deltas = finite_round(module, inside, labels, paced)
            if deltas is None:
                continue
            readable = Readable.of(module, inside, outside)
            turn += 1
            for noise in (0.0, NOISES[turn % len(NOISES)]):
                noised = with_noise(deltas, noise, generator)
                found = update_features(noised, generator)
                yield Rehearsal(style, spec, noise, readable.leakage(state, noised), found)


def with_noise(
    deltas: dict[str, Tensor], ratio: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Add Gaussian noise whose norm is `ratio` times that of the update, in expectation."""
    if not ratio:
        return deltas
    count = sum(delta.numel() for delta in deltas.values())
    norm = float(torch.stack([delta.norm() for delta in deltas.values()]).norm())
    scale = ratio * norm / max(count, 1) ** 0.5
    return {
        name: delta + scale * torch.randn(delta.shape, generator=generator)
        for name, delta in deltas.items()
    }


def finite_round(
    module: nn.Module, inside: Tensor, labels: Tensor, spec: Spec
) -> dict[str, Tensor] | None:
    """Train, more and more gently where it diverges; None where it always does."""
    for gentler in (1.0, 0.1, 0.01):
        milder = replace(spec, rate=spec.rate * gentler)
        deltas = local_round(module, inside, labels, milder)
        if all(bool(delta.abs().amax() < DIVERGED) for delta in deltas.values() if delta.numel()):
            return deltas
    return None
