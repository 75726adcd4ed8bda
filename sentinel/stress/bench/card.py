"""The card of an evaluation: every figure with its count; where an aim is missed, by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.stress.bench import figures
from sentinel.stress.bench.crafted import LEARNED
from sentinel.stress.bench.figures import FPRS, SENTINEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sentinel.stress.bench.evaluate import Size
    from sentinel.stress.bench.figures import Group, Quiet, Rate, Seen

WORST_AIM = (0.001, 0.99)  # false-alarm rate, share caught: worst handcrafted family
HIDDEN_AIM = (0.01, 0.90)  # handcrafted models that hide
LEARNED_AIM = (0.01, 0.90)
LARGE = 10_000_000  # parameters from which a time scales
SPEED_AIM = 0.1  # seconds for 1e8 parameters, weights alone

FAMILY_NAMES = {
    "A": "binning",
    "B": "sparse activation",
    "C": "magnification",
    "D": "transformer traps",
    "E": "inconsistency",
    "F": "learned",
    "G": "multi-round",
}


def card(seen: Seen, size: Size, digest: str) -> str:
    """Write the evaluation as Markdown.

    Args:
        seen: what was measured.
        size: how much of it.
        digest: of the detector's manifest.
    """
    quick = QUICK_WARNING if size.name == "quick" else ""
    parts = [
        HEAD.format(digest=digest[:16], quick=quick),
        "## Against the aims\n",
        markdown_table(("aim", "measured", "met"), _aims(seen)),
        "## Crafted models, by family\n",
        CRAFTED,
        markdown_table(GROUP_HEAD, _groups(figures.by_family(seen), FAMILY_NAMES)),
        "![Share caught against share of honest rounds refused](curves.svg)\n",
        "![Distribution of suspicion](suspicion.svg)\n",
        "### By recipe\n",
        markdown_table(GROUP_HEAD, _groups(figures.by_variant(seen))),
        "### By family and way of hiding\n",
        markdown_table(GROUP_HEAD, _groups(figures.by_wrapper(seen))),
        "### By setting\n",
        markdown_table(GROUP_HEAD, _groups(figures.by_setting(seen))),
        "### By architecture\n",
        markdown_table(GROUP_HEAD, _groups(figures.by_net(seen))),
        "## Honest models\n",
        _honest(seen),
        markdown_table(QUIET_HEAD, _quiet(figures.quiet_by(seen, lambda row: row.kind))),
        markdown_table(QUIET_HEAD, _quiet(figures.quiet_by(seen, lambda row: row.net))),
        markdown_table(QUIET_HEAD, _quiet(figures.quiet_by(seen, figures.stage_of))),
        "## Beside the baselines\n",
        BASELINES,
        *_baselines(seen),
        "## Rounds to detection\n",
        SIEGES,
        markdown_table(SIEGE_HEAD, _sieges(seen)),
        "## Time and memory\n",
        COST,
        markdown_table(COST_HEAD, _costs(seen)),
        "## An architecture left out of the learned part\n",
        _left_out(seen),
        LIMITS,
    ]
    return "\n".join(part for part in parts if part)


def said(rate: Rate) -> str:
    """Return "hits of trials (low to high %)", with the 95 % Wilson interval."""
    if not rate.trials:
        return "none"
    low, high = 100 * rate.low, 100 * rate.high
    return f"{rate.hits} of {rate.trials} ({low:.1f} to {high:.1f} %)"


def _aims(seen: Seen) -> Iterator[tuple[str, str, str]]:
    worst = figures.worst(seen, WORST_AIM[0])
    if worst is not None:
        rate = worst.at[WORST_AIM[0]]
        name = f"worst handcrafted family ({worst.name}): 99 % caught at 0.1 % false alarms"
        yield name, said(rate), _met(rate, WORST_AIM[1])
    hidden = figures.hidden(seen, HIDDEN_AIM[0])
    yield "handcrafted models that hide: 90 % at 1 %", said(hidden), _met(hidden, HIDDEN_AIM[1])
    for group in figures.by_family(seen):
        if group.name == LEARNED:
            rate = group.at[LEARNED_AIM[0]]
            yield "learned: 90 % at 1 %", said(rate), _met(rate, LEARNED_AIM[1])
    behind = [one for one in figures.ahead(seen, 0.01) if one.word != "ahead"]
    words = ", ".join(f"{one.word} in {one.family}" for one in behind)
    yield (
        "ahead of every baseline in every family, at 1 %",
        words or "ahead in all",
        "no" if behind else "yes",
    )
    for cost in [cost for cost in seen.costs if cost.parameters >= LARGE][-1:]:
        seconds = cost.alone[0] * 1e8 / cost.parameters
        yield (
            "weights alone, 100 ms for 100 M parameters",
            f"{1000 * seconds:.0f} ms ({cost.net}, scaled)",
            "yes" if seconds <= SPEED_AIM else "no",
        )


def _met(rate: Rate, aim: float) -> str:
    """Say whether the share reaches the aim, and whether its interval does."""
    if not rate.trials:
        return "not measured"
    if rate.low >= aim:
        return "yes"
    short = f"{100 * (aim - rate.share):.1f} points short"
    return short if rate.share < aim else "the share does, its interval does not"


def _groups(found: Iterable[Group], names: dict[str, str] | None = None) -> Iterator[list[str]]:
    for one in found:
        label = f"{one.name} {names[one.name]}" if names else one.name
        yield [
            label,
            said(one.shipped),
            *(said(one.at[fpr]) for fpr in FPRS),
            said(one.alone),
            said(one.verdicts),
            str(one.harmless),
        ]


def _quiet(found: Iterable[Quiet]) -> Iterator[list[str]]:
    for one in found:
        yield [
            one.name,
            said(one.rounds),
            f"{one.runs.hits} of {one.runs.trials}",
            str(one.broken),
            f"{one.most:.2f}",
        ]


def _honest(seen: Seen) -> str:
    everything = figures.quiet("all", seen.honest)
    runs = figures.long_runs(seen)
    lines = [HONEST.format(rounds=said(everything.rounds), runs=said(everything.runs))]
    if everything.broken:
        lines.append(DIVERGED.format(broken=everything.broken))
    if runs:
        alarms = [one.rounds.hits for one in runs]
        lines.append(
            f"False alarms per run of 100 rounds: {sum(alarms) / len(alarms):.2f} on average over "
            f"{len(runs)} such runs; {sum(map(bool, alarms))} had any.\n"
        )
    return "\n".join(lines)


def _baselines(seen: Seen) -> Iterator[str]:
    families = figures.present(seen)
    for fpr in FPRS:
        rows = [
            [
                one.detector,
                *(said(one.families[family]) for family in families),
                f"{one.cut.above} of {one.cut.rounds}",
            ]
            for one in figures.against(seen, fpr)
        ]
        yield f"At {100 * fpr:g} % of the honest rounds:\n"
        yield markdown_table(("detector", *families, "honest rounds above"), rows)
    for fpr in FPRS:
        yield f"Ahead of the best baseline at {100 * fpr:g} %?\n"
        yield markdown_table(
            ("family", SENTINEL, "best baseline", "it catches", ""),
            (
                [one.family, said(one.own), one.best, said(one.other), one.word]
                for one in figures.ahead(seen, fpr)
            ),
        )


def _sieges(seen: Seen) -> Iterator[list[str]]:
    for row in seen.sieges:
        if not row.warned:
            word = f"never ({row.trained} trained on)"
        elif row.late:
            word = f"by the honest round after {row.trained} crafted"
        else:
            word = f"by crafted round {row.trained + 1}"
        yield [row.family, row.recipe, row.net, str(row.sent), word]


def _costs(seen: Seen) -> Iterator[list[str]]:
    for row in seen.costs:
        extra = "not told here" if row.extra is None else f"{row.extra:.0f} MiB"
        yield [
            row.net,
            f"{row.parameters / 1e6:.2f} M",
            *(f"{1000 * value:.1f}" for value in (*row.alone, *row.probed)),
            extra,
        ]


def _left_out(seen: Seen) -> str:
    if not seen.left_out:
        return "Not measured in this run (it needs the extra `train`, and the full form).\n"
    rows = [
        [
            row.net,
            f"{row.alarms} of {row.rounds}",
            f"{row.most:.2f}",
            f"{row.detected} of {row.crafted}",
        ]
        for row in seen.left_out
    ]
    return LEFT_OUT + markdown_table(
        ("left out", "false alarms", "largest suspicion", "detected"), rows
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


GROUP_HEAD = (
    "",
    "caught at .5",
    "at 0.1 %",
    "at 1 %",
    "at 5 %",
    "state alone, .5",
    "right verdict",
    "leak nothing",
)
QUIET_HEAD = ("", "false alarms", "runs with any", "diverged", "largest suspicion")
SIEGE_HEAD = ("family", "recipe", "net", "crafted", "warned")
COST_HEAD = ("net", "parameters", "alone p50 ms", "p95", "with probes p50 ms", "p95", "extra")

HEAD = """\
# global-model, evaluated

Written by `sentinel detectors evaluate global-model`; detector manifest `{digest}`. {quick}Every
model was made for this run from a seed, on architectures that the learned part was not trained on.
Intervals are Wilson's at 95 %; rounds of one run resemble one another, so read the runs as well.
"""
QUICK_WARNING = "**Quick form: shows that the protocol runs; its figures mean little.** "
CRAFTED = """\
Only models that were measured to leak count: at least ten points or twice what the
honest model gives away, or a gradient of half as many records. The others stand in the last column.
"At 0.1 %" means at the lowest threshold above which at most that share of the honest rounds below
lies. "Right verdict" is out of those caught at .5; a part of a scan may be called binning.
"""
HONEST = """\
At the shipped threshold (suspicion of .5, or unhealthy): {rounds} rounds, {runs} runs.
"""
DIVERGED = """\
{broken} rounds of models whose loss had run away are in no rate: to call those unhealthy
is right.
"""
BASELINES = """\
Each rule is cut at the same rate on the same honest rounds (those of nets below a
million parameters) and counted on the same crafted models. D-SNR on true records looks at what no
guard may look at. The best baseline of each family is chosen with hindsight, family by family.
"""
SIEGES = """\
A server is honest for twenty rounds, then sends one crafted model in fifty rounds (a scan:
four on end). Which round warned a guard that sees every round with its history?
"""
COST = """\
Seconds depend on the machine; the ratio between rows does less.
"""
LEFT_OUT = """\
The forest was refitted without each architecture of its own corpus, and rules and forest
together were measured on that one.

"""
LIMITS = """\
## Limits

- The nets are narrow and the tasks synthetic, so that thousands of rounds take minutes.
- Honest federations have two to four sites and a few local steps a round.
- Recipes and wrappers are those of the stress lab. The rules of the detector were written with the
  families in mind, so this is no proof for a family that nobody has thought of.
- In family E the models counted are those that silence the other clients. The one client that is
  aimed at is sent an honest model; only sites that compare digests tell that from an honest server.
- The rules have no training, so no family can be left out of them; the learned part has seen no
  crafted model at all.
- The learned attacks are small versions of the published ones, trained for 150 to 200 steps.
"""
