"""What the noise of a policy costs nets of several widths and depths, at the four hospitals.

    python tests/benchmarks/width_utility.py [--policy P] [--splits N] [--nets 64 256 1024 128,128]

The federations of `membership.py --data hearts --share 0.7`, nobody attacked: every update of a
policy goes through a guard of its own hospital. Points of AUC and accuracy lost on patients outside
training, raw less policy, paired by split; 95 % intervals are Student's t over splits. A net is
named by the widths of its hidden layers.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from membership import hearts, hearts_score, memory, seeded
from torch import nn
from trade_off import told

from sentinel.crew import one_thread
from sentinel.stress.inference.federation import Doors, federate
from sentinel.stress.layers import copied

ROUNDS = 20


def perceptron(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """ReLU layers of these widths and one output, with torch's own initial spread."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip([13, *widths], [*widths, 1], strict=True):
        layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
        spread = 1 / math.sqrt(inputs)
        for values in (layer.weight, layer.bias):
            nn.init.uniform_(values, -spread, spread, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def scores(widths: list[int], policy: str | None, splits: int) -> torch.Tensor:
    """AUC and accuracy of each split, [splits, 2]."""
    found = []
    with tempfile.TemporaryDirectory(dir=memory()) as home:
        for number in range(splits):
            split = hearts(1, 0.7)(number)  # the patients; the net is another
            loop = replace(split.loop, model=perceptron(widths, seeded(number, 2)))
            start = copied(loop.model.state_dict())
            guards = Doors(split.sites, Path(home), policy).open(f"split-{number}")
            order = seeded(number, 1)
            watched = federate(loop, start, split.sites, guards, rounds=ROUNDS, order=order)
            found.append(hearts_score(replace(split, loop=loop), watched))
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    """A line for each net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="tabular-ehr")
    parser.add_argument("--splits", type=int, default=16)
    parser.add_argument("--nets", nargs="*", default=["64", "256", "1024", "128,128"])
    asked = parser.parse_args()
    print("| hidden layers | values | AUC lost | accuracy lost |\n|---|---|---|---|", flush=True)
    with one_thread():
        for name in asked.nets:
            widths = [int(width) for width in name.split(",")]
            values = sum(value.numel() for value in perceptron(widths, seeded(0)).parameters())
            raw, treated = (scores(widths, policy, asked.splits) for policy in (None, asked.policy))
            lost = [told(raw[:, place] - treated[:, place], 2, 100.0) for place in (0, 1)]
            print(f"| {name} | {values:,} | {' | '.join(lost)} |", flush=True)


if __name__ == "__main__":
    main()
