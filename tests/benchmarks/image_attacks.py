"""What the image attackers get back from one chest X-ray's gradient, as markdown tables.

    python tests/benchmarks/image_attacks.py nets [--only cnn,gn] [--stages 0,1,5] [--pictures 9]
    python tests/benchmarks/image_attacks.py noise [--only 0.2:1,0:0.1] [--pictures 12]
    python tests/benchmarks/image_attacks.py floor [--only 32,64] [--stages 0,1] [--draws 1]
    python tests/benchmarks/image_attacks.py crafted [--pictures 100]

`nets`: mean SSIM over pictures behind raw gradients, by net and by epochs that the global model was
trained before (plain SGD, batches of 8, rate .05, on the demo's public pictures), for each attacker
of `RAW` and for the best of them by picture. `noise`: the small CNN at its start behind noise (its
expected norm as a ratio to the update's) and a visible mask, for the attacker as published, with
total variation and smoothing tuned for the row, and with a prior fitted on public pictures; the
last columns are the share of pictures that come first among 100 of their class, by the best of
these reconstructions and for an attacker who holds those 100. Both settle which setting did best
with the truth at hand, in the attacker's favour.

`floor`: updates of one step on 32 and on 64 pictures, each through a guard with the shipped policy,
so fast a learning rate that the clip binds. For every attacker of `FLOOR`, and for one who holds
the candidates, what it gains over the mean public picture of the class, with 95 % interval, and how
many pictures come first among 100 of their class, with the chance of as many without any
information; beside it the same on raw updates. `--draws` releases each update so often, with fresh
noise. `crafted`: had a malicious server not been noticed, that sends a trained net with its last
layer magnified, so that the few pictures it misjudges have all of the gradient. What the shipped
policy does without its inspection, and what its noise does alone, without its rules with `when`, to
the one picture of 32 that has most of the update; beside it the same attack on an update that this
picture is not behind.

Each row is printed as soon as it is done; `--only` and `--stages` run the tables in pieces. Labels
are known. All randomness but the guard's comes from `--seed`.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel import Guard
from sentinel.crew import one_thread
from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.errors import RoundRefused, Withheld
from sentinel.interval import wilson
from sentinel.stress.lab.knobs import bare
from sentinel.stress.layers import copied
from sentinel.stress.passive.estimate import Estimation, most_likely
from sentinel.stress.passive.images import FLOOR, RAW, Gain, Truth, dealt
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import filled_prior, fit_prior
from sentinel.stress.passive.reidentify import Found, Recognition, influences, ranked_first
from sentinel.stress.passive.released import let_out
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sentinel.policy import LoadedPolicy
    from sentinel.stress.layers import State
    from sentinel.stress.passive.images import Attack
    from sentinel.stress.passive.prior import ImagePrior

SIZE = (28, 28)
CLIPPED = 5.0  # a learning rate at which one step is longer than the shipped policy lets it be
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
    header(
        *("noise ratio", "keep", "untuned", "TV + smoothing", "+ public prior", "first of 100"),
        "candidates held",
    )
    public = tuple(data.public.of_class(label) for label in (0, 1))
    for ratio, keep in only or ROWS:
        tried: dict[tuple[int, int], list[float]] = {}
        ranked: dict[tuple[int, int], list[int]] = {}
        held = []
        for index in chosen(options.pictures):
            site, picture, raw = alone(model, data, index)
            generator = torch.Generator().manual_seed(options.seed + index)
            seen = sanitized(raw, ratio, keep, generator)
            held.append(Recognition(site, seen, public).first(picture, decoys).count.share)
            for key, found in guesses(site, seen, prior, generator):
                tried.setdefault(key, []).append(float(ssim(found, picture)))
                hit = ranked_first(found, picture, site.labels, decoys, prior).count.hits
                ranked.setdefault(key, []).append(hit)
        means = [
            max(fmean(found) for key, found in tried.items() if key[0] == kind) for kind in range(3)
        ]
        row(ratio, keep, *means, max(fmean(hits) for hits in ranked.values()), fmean(held))


def guesses(
    site: LocalTraining, seen: Seen, prior: ImagePrior, generator: torch.Generator
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(kind of attacker, number of its setting), and what it makes of the update."""
    untuned = match_direction(site, seen, UNTUNED, SIZE, generator)
    yield (0, 0), untuned
    yield (1, 0), untuned
    for number, search in enumerate(TUNED, start=1):
        yield (1, number), match_direction(site, seen, search, SIZE, generator)
    settings = [(known, how) for known in (prior, filled_prior(prior)) for how in WITH_PRIOR]
    for number, (known, estimation) in enumerate(settings):
        yield (2, number), most_likely(site, seen, known, estimation, generator)


def pooled(data: xray_data.XrayData) -> tuple[Tensor, ...]:
    """The pictures of each class that a site may have: 131 that are not public."""
    return tuple(
        torch.cat([data.hospital.of_class(label), data.decoys.of_class(label)]) for label in (0, 1)
    )


def guarded(home: str, name: str, policy: str | LoadedPolicy, *, inspects: bool = True) -> Guard:
    """A guard with a state folder of its own."""
    return Guard(
        policy,
        Path(home) / name,
        federation="pictures",
        run="benchmark",
        unsafe_skip_inspection=not inspects,
        alerts=io.StringIO(),
    )


def floor(options: argparse.Namespace) -> None:
    """Print the table of the shipped policy's floor."""
    data = xray_data.load()
    prior = fit_prior(data.public.images, data.public.labels, 60)
    public = tuple(data.public.of_class(label) for label in (0, 1))
    sizes = [int(size) for size in (options.only or "32,64").split(",")]
    header("pictures", "epochs", "update", "attacker", "gain", "95 %", "first of 100", "by chance")
    with TemporaryDirectory() as home:
        for size in sizes:
            for epochs in (int(stage) for stage in options.stages.split(",")):
                model = sent("cnn", epochs, data.public, options.seed)
                guard = guarded(home, f"{size}-{epochs}", options.policy)
                generator = torch.Generator().manual_seed(options.seed)
                updates = dealt(pooled(data), size // 2, 99, generator)
                seen = behind_guard(guard, model, updates, options.draws)
                report(size, epochs, "released", attacked(seen, prior, public, generator), prior)
                raw = [(site, naked(site, truth), truth) for site, _, truth in seen[: len(updates)]]
                report(size, epochs, "raw", attacked(raw, prior, public, generator), prior)


Exposed = tuple[LocalTraining, Seen, Truth]  # how a site trained, what the server has, the truth


def naked(site: LocalTraining, truth: Truth) -> Seen:
    """The update as it is."""
    return Seen(site.update(truth.pictures, differentiable=False))


def stepping(model: nn.Module, state: State, truth: Truth) -> LocalTraining:
    """A site that takes one step on all of its pictures."""
    return LocalTraining(model, state, truth.labels, (torch.arange(len(truth.labels)),), CLIPPED)


def behind_guard(guard: Guard, model: nn.Module, updates: list[Truth], draws: int) -> list[Exposed]:
    """Release each update so often; all of them once before any of them again."""
    seen = []
    state = copied(model.state_dict())
    for truth in updates * draws:
        site = stepping(model, state, truth)
        out = let_out(guard, len(seen), site, truth.pictures, len(truth.labels))
        assert out.scale < 1.0, "the clip must bind: else the noise is stronger than it says"
        seen.append((site, out, truth))
    return seen


def attacked(
    seen: list[Exposed], prior: ImagePrior, public: tuple[Tensor, ...], generator: torch.Generator
) -> tuple[dict[str, list[tuple[Truth, Attack]]], Found]:
    """What every attacker makes of these updates; and who is found by holding the candidates."""
    results: dict[str, list[tuple[Truth, Attack]]] = {}
    recognised = []
    for site, out, truth in seen:
        for name, guesses in FLOOR.reconstruct(site, out, prior, generator):
            results.setdefault(name, []).append((truth, truth.score(guesses, prior)))
        recognised.append(Recognition(site, out, public).first(truth.pictures, truth.decoys))
    return results, Found.pooled(recognised)


def report(
    size: int,
    epochs: int,
    update: str,
    found: tuple[dict[str, list[tuple[Truth, Attack]]], Found],
    prior: ImagePrior,
) -> None:
    """Print a row for every attacker."""
    results, recognised = found
    for name, attacks in results.items():
        gain = Gain.over(attacks, prior)
        interval = f"[{gain.mean - gain.half:.4f}, {gain.upper:.4f}]"
        first = gain.found
        row(size, epochs, update, name, gain.mean, interval, share_of(first), first.by_chance)
    row(
        *(size, epochs, update, "holds the candidates", "", ""),
        *(share_of(recognised), recognised.by_chance),
    )


def share_of(found: Found) -> str:
    """Hits of trials, and the 95 % interval."""
    interval = wilson(found.count)
    hits, trials = found.count.hits, found.count.trials
    return f"{hits} of {trials}: {found.count.share:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def crafted(options: argparse.Namespace) -> None:
    """Print the table of a malicious server that was not noticed."""
    data = xray_data.load()
    prior = fit_prior(data.public.images, data.public.labels, 60)
    model = magnified(data, options.seed)
    state = copied(model.state_dict())
    generator = torch.Generator().manual_seed(options.seed)
    rows: dict[str, list[tuple[Tensor, Found]]] = {}
    reasons: list[str] = []
    with TemporaryDirectory() as home:
        print(f"with inspection: {inspected(guarded(home, 'on', options.policy), model)}\n")
        whole = guarded(home, "whole", options.policy, inspects=False)
        alone = guarded(home, "alone", bare(whole.policy), inspects=False)
        for number in range(options.pictures):
            # One update holds the picture that has most of it, and one does not.
            truths = [dealt(pooled(data), 16, 99, generator)[0] for _ in range(2)]
            sites = [stepping(model, state, truth) for truth in truths]
            reasons.append(withheld(whole, number, sites[0], truths[0]))
            target, label = loudest(sites[0], truths[0])
            for at, (behind, site, truth) in enumerate(zip(BEHIND, sites, truths, strict=True)):
                out = let_out(alone, 2 * number + at, site, truth.pictures, len(truth.labels))
                for update, seen in (("noise alone", out), ("raw", naked(site, truth))):
                    guess = caught(site, seen, label, prior, data.public)
                    gain = ssim(guess, target) - ssim(prior.means[label][None], target)
                    those = (torch.tensor([label]), truths[0].decoys, prior)
                    found = ranked_first(guess, target, *those)
                    rows.setdefault(f"{update}, {behind}", []).append((gain, found))
    for reason in sorted(set(reasons)):
        print(f"{reasons.count(reason)} of {len(reasons)}: {reason}\n")
    header("update", "gain", "95 %", "first of 100", "by chance")
    for name, found in rows.items():
        gains = Gain(torch.cat([gain for gain, _ in found]), Found.pooled([f for _, f in found]))
        interval = f"[{gains.mean - gains.half:.4f}, {gains.upper:.4f}]"
        row(name, gains.mean, interval, share_of(gains.found), gains.found.by_chance)


BEHIND = ("of it", "of other pictures")


def inspected(guard: Guard, model: nn.Module) -> str:
    """What the guard says of this global model before any training."""
    try:
        with guard.round(0, copied(model.state_dict()), model, patients=32):
            return "let in"
    except RoundRefused as error:
        return f"refused, {error.reason.value}"


def withheld(guard: Guard, number: int, site: LocalTraining, truth: Truth) -> str:
    """What the whole policy does, once its inspection is off."""
    try:
        seen = let_out(guard, number, site, truth.pictures, len(truth.labels))
    except Withheld as error:
        return f"withheld, {error.reason.value}"
    return f"let out, noise ratio {seen.noise_std * math.sqrt(len(seen.values)) / 0.25:.3g}"


def magnified(data: xray_data.XrayData, seed: int) -> nn.Module:
    """A trained net so sure of itself that only the pictures it misjudges have a gradient."""
    model = sent("cnn", 5, data.public, seed)
    head = model[-1]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(30.0)
    return model


def loudest(site: LocalTraining, truth: Truth) -> tuple[Tensor, int]:
    """The picture [1, 1, H, W] that has most of the update, and its label."""
    sizes = torch.stack(
        [
            influences(site, Seen(torch.zeros(1)), picture[None], int(label)).norm()
            for picture, label in zip(truth.pictures, truth.labels, strict=True)
        ]
    )
    at = int(sizes.argmax())
    return truth.pictures[at : at + 1], int(truth.labels[at])


def caught(
    site: LocalTraining, seen: Seen, label: int, prior: ImagePrior, public: xray_data.Pictures
) -> Tensor:
    """The picture of that label that would have left this update alone, [1, 1, H, W].

    From the public picture whose own gradient fits best: one on which the trap is silent has none.
    """
    known = public.of_class(label)
    fits = F.cosine_similarity(influences(site, seen, known, label), seen.values[None])
    start = known[fits.argmax()][None]
    alone = replace(
        site,
        labels=torch.tensor([label]),
        batches=(torch.arange(1),),
        learning_rate=site.learning_rate / len(site.labels),
    )
    generator = torch.Generator().manual_seed(0)
    if seen.noise_std > 0.0:
        return most_likely(alone, seen, prior, Estimation(), generator, start=start)
    fine = Estimation(rounds=10, products=40, least_noise=0.05, first_noise=1.0)
    return most_likely(alone, seen, filled_prior(prior), fine, generator, start=start)


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


TABLES: dict[str, tuple[Callable[[argparse.Namespace], None], int, str]] = {
    "nets": (nets, 9, "0,1,5"),
    "noise": (noise, 12, ""),
    "floor": (floor, 0, "0,1"),
    "crafted": (crafted, 100, ""),
}


def main(arguments: list[str]) -> None:
    """Run the table that is named."""
    parser = argparse.ArgumentParser(description="leakage of one chest X-ray's gradient")
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--only", default="", help="nets by name, rows as ratio:keep, or sizes")
    parser.add_argument("--stages", help="epochs trained before")
    parser.add_argument("--pictures", type=int, help="attacked one by one")
    parser.add_argument("--draws", type=int, default=1, help="releases of each update")
    parser.add_argument("--policy", default="chest-xray")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    table, pictures, stages = TABLES[options.table]
    options.pictures = options.pictures or pictures
    options.stages = options.stages or stages
    with one_thread():
        table(options)


if __name__ == "__main__":
    main(sys.argv[1:])
