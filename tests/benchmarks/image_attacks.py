"""What the image attackers get back from one chest X-ray's gradient, as markdown tables.

    python tests/benchmarks/image_attacks.py nets [--only cnn,gn] [--stages 0,1,5] [--pictures 9]
    python tests/benchmarks/image_attacks.py noise [--only 0.2:1,0:0.1] [--pictures 12]

`nets`: mean SSIM over pictures behind raw gradients, by net and by epochs that the global model was
trained before (plain SGD, batches of 8, rate .05, on the demo's public pictures), for each attacker
of `RAW` and for the best of them by picture. `noise`: the small CNN at its start behind noise (its
expected norm as a ratio to the update's) and a visible mask, for the attacker as published, with
total variation and smoothing tuned for the row, and with a prior fitted on public pictures; the
last column is the share of pictures that come first among 100 of their class. Both settle which
setting did best with the truth at hand, in the attacker's favour.

Each row is printed as soon as it is done; `--only` and `--stages` run the tables in pieces. Labels
are known. All randomness comes from `--seed`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.crew import one_thread
from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.stress.layers import copied
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.images import RAW
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import filled_prior, fit_prior
from sentinel.stress.passive.reidentify import ranked_first
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sentinel.stress.passive.prior import ImagePrior

SIZE = (28, 28)
ROWS = ((0.2, 1.0), (1.0, 1.0), (2.0, 1.0), (5.0, 1.0), (10.0, 1.0), (0.0, 0.1))
UNTUNED = Matching(iterations=300, total_variation=1e-2)
TUNED = (
    Matching(iterations=300, total_variation=5e-2),
    Matching(iterations=150, total_variation=1e-1, smoothing=0.7),
    Matching(iterations=150, total_variation=3e-1, smoothing=1.0),
    Matching(iterations=150, total_variation=1.0, smoothing=1.0),
    Matching(iterations=150, total_variation=3.0, smoothing=1.5),
)
WITH_PRIOR = (
    Estimation(rounds=6, products=50, least_noise=0.1),
    Estimation(),
    Estimation(least_noise=2.0),
)


def strided(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """The small CNN with a normalisation after each convolution."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), norm(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), norm(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 2)),
    )


def lenet_sigmoid() -> nn.Sequential:
    """The net of Deep Leakage from Gradients."""
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(588, 2)),
    )


def max_pooled() -> nn.Sequential:
    """Max pooling in place of strides."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 2)),
    )


def average_pooled() -> nn.Sequential:
    """The small CNN with one average over all places before its head."""
    return nn.Sequential(
        *list(xray_net())[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "cnn": xray_net,
    "lenet_sigmoid": lenet_sigmoid,
    "bn_train": lambda: strided(nn.BatchNorm2d),
    "bn_eval": lambda: strided(nn.BatchNorm2d),
    "gn": lambda: strided(lambda channels: nn.GroupNorm(4, channels)),
    "maxpool": max_pooled,
    "gap": average_pooled,
}


def sent(name: str, epochs: int, public: xray_data.Pictures, seed: int) -> nn.Module:
    """The global model that the server sends."""
    generator = torch.Generator().manual_seed(seed)
    model = NETS[name]()
    initialise(model, generator)
    if name == "lenet_sigmoid":  # with default weights, sigmoids let next to nothing through
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(len(public.labels), generator=generator).split(8):
            optimizer.zero_grad()
            answers = model(public.images[batch])
            nn.CrossEntropyLoss()(answers, public.labels[batch]).backward()
            optimizer.step()
    return model.train(name != "bn_eval")


def chosen(count: int) -> list[int]:
    """Indices of so many hospital pictures, of both classes."""
    return [round(float(place)) for place in torch.linspace(0, 63, count)]


def alone(
    model: nn.Module, data: xray_data.XrayData, index: int
) -> tuple[LocalTraining, Tensor, Tensor]:
    """A site with one picture: its training, the picture, its raw update."""
    picture, label = data.hospital.images[index][None], data.hospital.labels[index][None]
    site = LocalTraining(model, copied(model.state_dict()), label, (torch.arange(1),), 1.0)
    return site, picture, site.update(picture, differentiable=False)


def nets(options: argparse.Namespace) -> None:
    """Print the table of nets and stages."""
    data = xray_data.load()
    prior = fit_prior(data.public.images, data.public.labels, 60)
    names = [*RAW.searches, *RAW.blind]
    header("net", "epochs", *names, "best", "seconds a picture")
    for name in options.only.split(",") if options.only else NETS:
        for epochs in (int(stage) for stage in options.stages.split(",")):
            model, started = sent(name, epochs, data.public, options.seed), time.thread_time()
            likeness: dict[str, list[float]] = {attacker: [] for attacker in names}
            for index in chosen(options.pictures):
                site, picture, raw = alone(model, data, index)
                generator = torch.Generator().manual_seed(options.seed + index)
                for attacker, found in RAW.reconstruct(site, Seen(raw), prior, generator):
                    likeness[attacker].append(float(ssim(found, picture)))
            spent = (time.thread_time() - started) / options.pictures
            best = fmean(max(row) for row in zip(*likeness.values(), strict=True))
            row(name, epochs, *(fmean(found) for found in likeness.values()), best, spent)


def noise(options: argparse.Namespace) -> None:
    """Print the table of noise ratios and masks."""
    data = xray_data.load()
    prior = fit_prior(data.public.images, data.public.labels, 60)
    decoys = tuple(data.decoys.of_class(label) for label in (0, 1))
    model = sent("cnn", 0, data.public, options.seed)
    only = [tuple(map(float, part.split(":"))) for part in options.only.split(",") if part]
    header("noise ratio", "keep", "untuned", "TV + smoothing", "+ public prior", "first of 100")
    for ratio, keep in only or ROWS:
        tried: dict[tuple[int, int], list[float]] = {}
        ranked: dict[tuple[int, int], list[int]] = {}
        for index in chosen(options.pictures):
            site, picture, raw = alone(model, data, index)
            generator = torch.Generator().manual_seed(options.seed + index)
            seen = sanitized(raw, ratio, keep, generator)
            for key, found in guesses(site, seen, prior, generator):
                tried.setdefault(key, []).append(float(ssim(found, picture)))
                hit = ranked_first(found, picture, site.labels, decoys, prior).count.hits
                ranked.setdefault(key, []).append(hit)
        means = [
            max(fmean(found) for key, found in tried.items() if key[0] == kind) for kind in range(3)
        ]
        row(ratio, keep, *means, max(fmean(hits) for hits in ranked.values()))


def guesses(
    site: LocalTraining, seen: Seen, prior: ImagePrior, generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(kind of attacker, number of its setting), and what it makes of the update."""
    for kind, searches in enumerate(((UNTUNED,), (UNTUNED, *TUNED))):
        for number, search in enumerate(searches):
            yield (kind, number), match_direction(site, seen, search, SIZE, generator)
    settings = [(known, how) for known in (prior, filled_prior(prior)) for how in WITH_PRIOR]
    for number, (known, estimation) in enumerate(settings):
        yield (2, number), most_likely(site, seen, known, estimation, generator)


def sanitized(raw: Tensor, ratio: float, keep: float, generator: torch.Generator) -> Seen:
    """The update behind noise and mask in the order of a release; the clip just touches it."""
    std = ratio * float(raw.norm()) / math.sqrt(raw.numel())
    values = raw + std * torch.randn(raw.shape, generator=generator)
    if keep < 1.0:
        values = values * (torch.rand(raw.shape, generator=generator) < keep) / keep
    return Seen(values, 1.0, std, keep)


def header(*names: str) -> None:
    """Print a table's head."""
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names), flush=True)


def row(*cells: str | float) -> None:
    """Print one row; shares and similarities to three digits."""
    text = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(text) + " |", flush=True)


def main(arguments: list[str]) -> None:
    """Run the table that is named."""
    parser = argparse.ArgumentParser(description="leakage of one chest X-ray's gradient")
    parser.add_argument("table", choices=["nets", "noise"])
    parser.add_argument("--only", default="", help="nets by name, or rows as ratio:keep")
    parser.add_argument("--stages", default="0,1,5", help="epochs trained before")
    parser.add_argument("--pictures", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with one_thread():
        {"nets": nets, "noise": noise}[options.table](options)


if __name__ == "__main__":
    main(sys.argv[1:])
