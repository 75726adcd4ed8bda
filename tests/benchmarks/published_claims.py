"""What published reports say of three defences, measured on this data.

    python tests/benchmarks/published_claims.py [PART ...] [--xrays FILE] [--quick] [--json F]

(a) "Random sparsification reduces reconstruction fidelity by 40 to 60 %."
(b) "Top-k sparsification of 90 % costs 8 % accuracy."
(c) "Noise at epsilon <= 1.5 brings reconstruction under 5 % at 90 % utility."

Three parts:

- `pictures`: one chest X-ray's gradient, the small CNN at its start. Four attackers: *untold*, who
  does not know that the update was treated; *untuned*, who knows mask and noise and searches with
  the setting that does best on raw gradients; *tuned*, with the setting that does best on this
  treatment; *prior*, the best estimate under a prior that was fitted on public pictures. Which
  setting does best is settled with the truth at hand. Reductions are those of the mean SSIM, and of
  what it has above the class mean of public pictures, which takes no update.
- `rows`: one gradient of 8 patients of Fed-Heart-Disease, a perceptron of 64 hidden units: patients
  read exactly, and nearly, by single neurons (untuned), with pairs of neurons, filters and filled
  masks (tuned), and by a search under the marginals of other patients (prior).
- `utility`: four sites, 20 rounds of two local epochs; everything drawn anew by seed, and paired by
  seed. Hearts are four hospitals; X-rays are dealt to four sites by chance.

Random masks are what the guard's `keep` does, and went through a guard. No policy can keep the
largest values alone, since their places depend on the data: that defence exists here for the
comparison only, as published (what is left out is lost) and with what is left out carried over to
the next round. Noise at an epsilon is private training through `guard.private`, unit "record",
delta 1e-5, as many steps as the federation takes, with its linear heads
(docs/private-training.md); the attacked update is one such step of the attacked net, where
everybody takes part and the attacker knows the clip.

FILE is pneumoniamnist.npz of MedMNIST or a file with its arrays; without it there are the demo's
542 pictures, 400 of them for training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import image_attacks
import torch
from claimed_utility import utility
from defences import STEPS, Case, treatments
from torch import Tensor, nn
from trade_off import line, reduction

from sentinel.crew import one_thread
from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import network
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import copied
from sentinel.stress.passive import tabular
from sentinel.stress.passive.columns import Table
from sentinel.stress.passive.estimate import most_likely
from sentinel.stress.passive.inversion import Matching, match_direction
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import filled_prior, fit_prior
from sentinel.stress.passive.reidentify import ranked_first
from sentinel.stress.passive.relaxation import Relaxation, relax
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.stress.passive.prior import ImagePrior

# The weights of total variation among which raw gradients find theirs, then what noise asks for.
SHARP = tuple(
    Matching(iterations=300, total_variation=weight) for weight in (1e-3, 2e-3, 5e-3, 1e-2)
)
SEARCHES = (
    *SHARP,
    Matching(iterations=300, total_variation=5e-2),
    Matching(iterations=150, total_variation=1e-1, smoothing=0.7),
    Matching(iterations=150, total_variation=3e-1, smoothing=1.0),
    Matching(iterations=150, total_variation=1.0, smoothing=1.0),
)
RELAXED = Relaxation(restarts=4, iterations=300, step=0.1, hardness=(5.0, 20.0, 80.0))


# Pictures.


@dataclass(frozen=True)
class Likeness:
    """What one attacker got under one treatment.

    Attributes:
        ssim: [pictures].
        first: share of the pictures that came first among 100 of their class.
    """

    ssim: Tensor
    first: float


@dataclass(frozen=True)
class Scene:
    """The attacked pictures, and all that attackers have.

    Attributes:
        data: where the pictures and those to find them among are.
        chosen: which of the hospital's are attacked.
        prior: fitted on public pictures.
        model: the global model.
        searches: settings of the attackers without prior, those for raw gradients first.
    """

    data: xray_data.XrayData
    chosen: list[int]
    prior: ImagePrior
    model: nn.Module
    searches: tuple[Matching, ...]

    @classmethod
    def of(cls, count: int, *, quick: bool) -> Scene:
        """So many pictures of the demo; quick searches are poor ones."""
        data = xray_data.load()
        prior = fit_prior(data.public.images, data.public.labels, 60)
        model = image_attacks.sent("cnn", 0, data.public, 0)
        searches = tuple(replace(one, iterations=40) if quick else one for one in SEARCHES)
        return cls(data, image_attacks.chosen(count), prior, model, searches)

    def class_means(self) -> Tensor:
        """SSIM of each picture to the mean of public pictures of its class, [pictures]."""
        own, chosen = self.data.hospital, torch.tensor(self.chosen)
        return ssim(self.prior.means[own.labels[chosen]], own.images[chosen])


def pictures(asked: argparse.Namespace) -> dict[str, object]:
    """The table of pictures."""
    scene = Scene.of(2 if asked.quick else asked.pictures, quick=asked.quick)
    means = scene.class_means()
    print(f"\nOne chest X-ray, {len(means)} of them; SSIM of the class mean {means.mean():.3f}.\n")
    print(line("attacker", "treatment", "SSIM", "first of 100", "SSIM lost, %", "of gain, %"))
    print("|---|---|---|---|---|---|", flush=True)
    made: dict[str, dict[str, Likeness]] = {}
    usual: Matching | None = None
    for treatment in treatments(quick=asked.quick):
        made[treatment], usual = attacked(treatment, scene, usual)
        for attacker, got in made[treatment].items():
            before = made["raw"].get(attacker, made["raw"]["untuned"])
            print(likeness_row(attacker, treatment, got, before, means), flush=True)
    return {
        treatment: {attacker: [*got.ssim.tolist(), got.first] for attacker, got in some.items()}
        for treatment, some in made.items()
    }


def likeness_row(
    attacker: str, treatment: str, got: Likeness, before: Likeness, means: Tensor
) -> str:
    """One line: reductions in percent, with their intervals."""
    lost = [reduction(before.ssim, got.ssim, floor) for floor in (None, means)]
    shares = [f"{100 * s:.0f} [{100 * i.low:.0f}, {100 * i.high:.0f}]" for s, i in lost]
    if got is before:
        shares = ["-", "-"]
    return line(attacker, treatment, f"{got.ssim.mean():.3f}", f"{got.first:.2f}", *shares)


def attacked(
    treatment: str, scene: Scene, usual: Matching | None
) -> tuple[dict[str, Likeness], Matching]:
    """Every attacker under one treatment, and the setting that does best on raw gradients.

    `usual` is that setting; where it is None this treatment is none, and it is settled here.
    """
    tried: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    decoys = tuple(scene.data.decoys.of_class(label) for label in (0, 1))
    for index in scene.chosen:
        site, picture, _ = image_attacks.alone(scene.model, scene.data, index)
        seen = Case(site, picture, STEPS["pictures"]).seen(treatment)
        for key, found in guesses(site, seen, scene, usual, index):
            hit = ranked_first(found, picture, site.labels, decoys, scene.prior).count.hits
            tried[key].append((float(ssim(found, picture)), hit))
    if usual is None:
        sharp = [fmean(one for one, _ in tried["tuned", number]) for number in range(len(SHARP))]
        usual = scene.searches[sharp.index(max(sharp))]
    made = {"untold": likeness(tried["untold", 0])} if ("untold", 0) in tried else {}
    made["untuned"] = likeness(tried["tuned", scene.searches.index(usual)])
    return made | {who: best(tried, who) for who in ("tuned", "prior")}, usual


def guesses(
    site: LocalTraining, seen: Seen, scene: Scene, usual: Matching | None, seed: int
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Attacker and number of its setting, and what it makes of the update."""
    size, generator = image_attacks.SIZE, torch.Generator().manual_seed(seed)
    for number, search in enumerate(scene.searches):
        yield ("tuned", number), match_direction(site, seen, search, size, generator)
    if usual is not None:
        yield ("untold", 0), match_direction(site, Seen(seen.values), usual, size, generator)
    priors = (scene.prior, filled_prior(scene.prior))
    settings = [(known, how) for known in priors for how in image_attacks.WITH_PRIOR]
    for number, (known, how) in enumerate(settings):
        yield ("prior", number), most_likely(site, seen, known, how, generator)


def likeness(found: list[tuple[float, int]]) -> Likeness:
    """Of one setting, by picture."""
    alike = torch.tensor([one for one, _ in found], dtype=torch.float64)
    return Likeness(alike, fmean(hit for _, hit in found))


def best(tried: dict[tuple[str, int], list[tuple[float, int]]], attacker: str) -> Likeness:
    """The setting with the highest mean, and the most pictures that any setting found."""
    every = [likeness(found) for (who, _), found in tried.items() if who == attacker]
    most = max(every, key=lambda one: float(one.ssim.mean()))
    return Likeness(most.ssim, max(one.first for one in every))


# Rows.


def rows(asked: argparse.Namespace) -> dict[str, object]:
    """The table of rows."""
    seeds, relaxed = (2, 1) if asked.quick else (asked.draws, max(1, asked.draws // 7))
    print(f"\nOne gradient of 8 patients; {seeds} draws, {relaxed} for the attacker with prior.\n")
    print(line("attacker", "treatment", "exact", "near", "near, others under the same guesses"))
    print("|---|---|---|---|---|", flush=True)
    pooled: dict[tuple[str, str], tabular.Reads] = defaultdict(tabular.Reads)
    cohort = cohorts.load("cleveland")
    for treatment in treatments(quick=asked.quick):
        for seed in range(seeds):
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(cohort), generator=draw)
            own, others = cohort.take(order[:8]), cohort.rows[order[8:]]
            model = network(13, 64, draw)
            whole = (torch.arange(8),)
            training = LocalTraining(
                model, copied(model.state_dict()), own.labels, whole, 0.05, loss=binary_loss
            )
            seen = Case(training, own.rows, STEPS["rows"]).seen(treatment)
            for attacker, found in read(
                training, seen, seed < relaxed and not asked.quick, cohort, order, draw
            ):
                reads = tabular.measure_reads(found, own.rows, others)
                pooled[attacker, treatment] += reads
        for attacker in ("untuned", "tuned", *(() if asked.quick else ("prior",))):
            reads = pooled[attacker, treatment]
            exact = f"{reads.exact / reads.records:.2f}"
            near, apart = f"{reads.near_share:.2f}", f"{reads.held_out_share:.3f}"
            print(line(attacker, treatment, exact, near, apart), flush=True)
    return {
        f"{attacker}, {treatment}": [reads.exact, reads.near, reads.records, reads.held_out_share]
        for (attacker, treatment), reads in pooled.items()
    }


def read(  # noqa: PLR0913, PLR0917 - the update, and all that attackers have
    training: LocalTraining,
    seen: Seen,
    relaxes: bool,  # noqa: FBT001 - whether the slow attacker runs
    cohort: cohorts.Cohort,
    order: Tensor,
    draw: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """Attacker, and its guesses [guesses, 13]."""
    sent = {name: value.double() for name, value in training.global_state.items()}
    parts = seen.values.double().split([value.numel() for value in sent.values()])
    named = zip(sent.items(), parts, strict=True)
    received = {name: value + part.view_as(value) for (name, value), part in named}
    view = tabular.view(sent, received, "0", "2")
    known = tabular.Sanitizer(seen.noise_std / seen.keep, seen.keep)
    yield "untuned", tabular.read_outs(view, known)
    together = [tabular.guess_rows(view, known), tabular.differences(view, known)]
    yield "tuned", torch.cat([*together, tabular.guess_rows_untold(view)])
    if relaxes:
        table = Table.learnt(cohort.rows[order[100:]])
        yield "prior", relax(training, seen, table, RELAXED, draw).best


PARTS = {"pictures": pictures, "rows": rows, "utility": utility}


def main() -> None:
    """Run the parts that are named; all where none is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all where left out")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--draws", type=int, default=14, help="of 8 patients")
    parser.add_argument("--seeds", type=int, default=5, help="federations")
    parser.add_argument("--xrays", type=Path, help="pneumoniamnist.npz of MedMNIST")
    parser.add_argument("--quick", action="store_true", help="a few of everything")
    parser.add_argument("--json", type=Path, help="file for all figures")
    asked = parser.parse_args()
    made, begin = {}, time.process_time()
    with one_thread():
        for part in asked.parts or PARTS:
            made[part] = PARTS[part](asked)
            print(f"\n{time.process_time() - begin:.0f} CPU s so far", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(made))


if __name__ == "__main__":
    main()
