"""Sites of the synthetic corpus: a global model to train on, and records to train with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sentinel.stress.corpus import NETS, Net, Task, fresh, train
from sentinel.stress.nets import mlp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

FLAT = Net("mlp-784-128-2", lambda: mlp(784, 128, 2), (784,), 2)  # images as plain rows
STAGES = (0, 30, 200)  # steps of training before the round
UNSCALED = 0.01  # learning rate on columns that nobody scaled, as a share of the usual one


@dataclass(frozen=True, slots=True)
class Site:
    """A site with a global model to train on, and records.

    Attributes:
        name: of the architecture.
        kind: of the task: "plain", "raw", "rare" or "flat" (images as plain rows).
        stage: index into `STAGES`.
        module: holds the global model.
        shape: of one record.
        task: where its records come from.
        pace: factor on the learning rates of plain SGD.
    """

    name: str
    kind: str
    stage: int
    module: nn.Module
    shape: tuple[int, ...]
    task: Task
    pace: float

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return records [count, *shape] and labels [count]."""
        records, labels = self.task.draw(count)
        return records.view(count, *self.shape), labels


def sites(nets: int, repeats: int, seed: int) -> Iterator[Site]:
    """Yield sites over architectures, kinds of task and training stages.

    Args:
        nets: how many architectures, from the first.
        repeats: sites per architecture, kind and stage.
        seed: of everything.
    """
    number = 0
    for net in (*NETS, FLAT)[:nets]:
        for kind in _site_kinds(net):
            for stage in range(len(STAGES)):
                for repeat in range(repeats):
                    generator = torch.Generator().manual_seed(seed * 100_003 + number)
                    number += 1
                    yield _site(net, kind, stage, repeat, generator)


def _site_kinds(net: Net) -> tuple[str, ...]:
    if net is FLAT:
        return ("flat",)
    return ("plain", "raw", "rare") if len(net.shape) == 1 else ("plain",)


def _site(net: Net, kind: str, stage: int, repeat: int, generator: torch.Generator) -> Site:
    module = fresh(net, generator, ("default", "kaiming")[repeat % 2])
    drawn_as = replace(net, shape=(1, 28, 28)) if kind == "flat" else net
    pace = UNSCALED if kind == "raw" else 1.0
    task = Task(drawn_as, generator, kind)
    site = Site(net.name, kind, stage, module, net.shape, task, pace)
    train(module, site, steps=STAGES[stage], rate=0.05 * pace)
    return site
