"""Report: the demo's figures and pictures as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from sentinel.page.html import document, table
from sentinel.page.png import data_uri
from sentinel.terms import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from sentinel.demo.heart_result import Example, HeartsResult, Note
    from sentinel.demo.run import DemoResult
    from sentinel.demo.xray_result import XrayPictures, XrayResult
    from sentinel.stress.passive.tabular import Reads

# Letters beside the colours: some readers do not tell green from red.
_MARKS = {
    "released": ("S", "sanitized and released"),
    "refused": ("R", "refused before training"),
    "withheld": ("W", "withheld after it"),
}


def report_html(result: DemoResult) -> str:
    """The report of everything that was measured."""
    hearts, xrays = result.hearts, result.xrays
    body = "\n".join(
        [
            _opening(result),
            _summary(hearts, xrays),
            _utility(hearts),
            _rounds(hearts),
            _reads(hearts),
            _pictures(xrays),
            _limits(),
        ]
    )
    return document("Gradient Sentinel: demo", body)


def _opening(result: DemoResult) -> str:
    seconds = result.seconds_hearts + result.seconds_xrays
    return f"""<h1>What leaves a hospital</h1>
<p class="lead">Four real hospitals train one model together, and a radiology department sends an
update of its chest X-rays; each time without and with Gradient Sentinel at the door. Every figure
and picture was computed in this run ({seconds:.0f} s). The policies promise no formal guarantee:
what is shown is measured against the attackers named here, and says nothing about others.</p>"""


def _summary(hearts: HeartsResult, xrays: XrayResult) -> str:
    crafted = sum(note.crafted for note in hearts.notes)
    refused = f"round refused {hearts.rounds_refused} times in {crafted}"
    missed = f"{hearts.worst_uninspected.exact} had the inspection missed it"
    batch = f"Chest X-rays behind an update of {xrays.batch_size}"
    rows = [
        (
            "Patients read exactly from one update of each hospital, crafted model",
            f"{hearts.unguarded.exact} of {hearts.unguarded.records}",
            f"{hearts.guarded.exact} ({refused}); {missed}",
        ),
        (
            "AUC, mean over four hospitals",
            f"{hearts.auc_unguarded:.3f}",
            f"{hearts.auc_guarded:.3f}",
        ),
        (
            "A single chest X-ray from its gradient (SSIM, 1 is identical)",
            f"{xrays.ssim_raw:.2f}",
            "withheld" if xrays.lone_image_withheld else "released",
        ),
        (
            f"{batch} (SSIM; knowing nothing scores {xrays.ssim_class_mean:.2f})",
            f"{xrays.ssim_raw_batch:.2f}",
            f"{xrays.ssim_sanitized:.2f}",
        ),
        (
            "True X-ray found first among 100 of its class (chance: 1 in 100)",
            _of_all(xrays.reid_top1_raw, xrays),
            _of_all(xrays.reid_top1, xrays),
        ),
    ]
    return table(("", "without", "with the guard"), rows)


def _utility(hearts: HeartsResult) -> str:
    losses = hearts.auc_losses
    rows = [
        (site, f"{plain:.3f}", f"{hearts.auc_guarded_by_site[site]:.3f}")
        for site, plain in hearts.auc_unguarded_by_site.items()
    ]
    rows.append(("mean", f"{hearts.auc_unguarded:.3f}", f"{hearts.auc_guarded:.3f}"))
    spread = ", ".join(f"{loss:+z.3f}" for loss in losses)
    repeats, ends = hearts.settings.repeats, hearts.auc_lost
    averaged = f"mean of {repeats} repeats" if repeats > 1 else "one repeat"
    lost = ""
    if ends is not None:
        reach = f"{ends.low:+z.3f} to {ends.high:+z.3f}"
        lost = f" 95 % for their mean, over splits of the same patients: {reach}."
    return f"""<h2>Does the model still learn?</h2>
<p>Fed-Heart-Disease, federated averaging, {hearts.settings.rounds} rounds, one hidden layer of
{hearts.settings.hidden} units, policy <code>{escape(hearts.settings.policy)}</code>. AUC on
held-out patients, {averaged}, paired by split and start.</p>
{table(("hospital", "AUC without", "AUC with the guard"), rows)}
<p class="soft">Lost in each repeat, mean over hospitals: {spread}.{lost}</p>"""


def _rounds(hearts: HeartsResult) -> str:
    first = [note for note in hearts.notes if note.repeat == 0]
    sites = list(dict.fromkeys(note.site for note in first))
    lines = "".join(
        f'<span>{escape(site)}</span><div class="cells">'
        + "".join(_cell(note) for note in first if note.site == site)
        + "</div>"
        for site in sites
    )
    return f"""<h2>What was done, round by round</h2>
<p>First repeat; each cell is a round. {_legend()} In round
{hearts.settings.turns_at} the server sends a crafted model: it was refused
{hearts.rounds_refused} times in {sum(note.crafted for note in hearts.notes)}, and honest models
{hearts.false_refusals} times in {sum(not note.crafted for note in hearts.notes)}.</p>
<div class="rounds">{lines}</div>
<details><summary>What was decided in each round, and on what grounds</summary>
{_decisions(first, sites)}</details>
<p class="soft">The alert that operations get:</p>
<p class="note wide"><code>{escape(next(iter(hearts.alerts), "none"))}</code></p>"""


def _legend() -> str:
    said = ", ".join(
        f'<span class="mark {action}">{letter}</span> {meaning}'
        for action, (letter, meaning) in _MARKS.items()
    )
    return f"{said}."


def _cell(note: Note) -> str:
    letter, _ = _MARKS[note.outcome.action]
    told = escape(f"round {note.number}: {_decided(note)}")
    return f'<span class="mark {note.outcome.action}" title="{told}">{letter}</span>'


def _decisions(notes: Sequence[Note], sites: Sequence[str]) -> str:
    found = {(note.number, note.site): _decided(note) for note in notes}
    rows = [
        (str(number), *(found.get((number, site), "-") for site in sites))
        for number in sorted({note.number for note in notes})
    ]
    return table(("round", *sites), rows)


def _decided(note: Note) -> str:
    """Say what was done in one round at one hospital, and on what grounds."""
    outcome = note.outcome
    said = [outcome.action]
    if outcome.reason is not None:
        said.append(f"reason {outcome.reason}")
    if outcome.verdict not in (None, Verdict.HONEST):
        said.append(f"verdict {outcome.verdict}")
    if outcome.suspicion is not None:
        said.append(f"suspicion {outcome.suspicion:.2f}")
    if outcome.sensitivity is not None:
        said.append(f"sensitivity score {outcome.sensitivity:.2f}")
        said.append(_by_rules(outcome.rules) + (", clipped" if outcome.clipped else ""))
    return "; ".join(said)


def _reads(hearts: HeartsResult) -> str:
    rows = [
        ("without the guard", *_read_row(hearts.unguarded)),
        ("with the guard, all rounds", *_read_row(hearts.guarded)),
        *(
            (f"guard without inspection, layers x {scale:g}", *_read_row(reads))
            for scale, reads in hearts.uninspected.items()
        ),
    ]
    head = (
        "update",
        "patients",
        "read exactly",
        "near",
        "held-out near",
        "difference (95 % up to)",
    )
    return f"""<h2>What the malicious server reads</h2>
<p>In the crafted round the neurons of the first layer scan one direction in fine steps, and all
layers are scaled down so that several local epochs stay linear. The difference of two neighbouring
neurons is then a patient's row. <em>Exactly</em> is a relative error under 1 %, <em>near</em> under
30 %. Near counts only beyond what the same guesses score on patients of the same hospital who were
not behind the update. The attacker estimates the noise from the update, averages neighbouring bins,
and uses the rank-one matched filter over all neurons. "Without inspection" is one round of this
attack at three scales; a server that aims at one patient for many rounds is not part of it. The
bound takes patients as independent.</p>
{table(head, rows)}
<p>Patients whom the server read (public data):</p>
<div class="side">{"".join(_example(example) for example in hearts.examples)}</div>"""


def _read_row(reads: Reads) -> tuple[str, ...]:
    return (
        str(reads.records),
        str(reads.exact),
        f"{reads.near_share:.3f}",
        f"{reads.held_out_share:.3f}",
        f"{reads.advantage:z.3f} (up to {reads.interval.high:z.3f})",
    )


def _example(example: Example) -> str:
    read, guessed = _percent(example.unguarded_error), _percent(example.sanitized_error)
    rows = [
        (
            name,
            *(_value(part, name) for part in (example.truth, example.unguarded, example.sanitized)),
        )
        for name in example.truth
    ]
    columns = table((example.site, "patient", "read without", "best guess with"), rows)
    return f"""<figure>{columns}<figcaption>Relative error {read} without, {guessed} with the guard
(which withheld nothing here: the inspection was switched off).</figcaption></figure>"""


def _value(record: Mapping[str, float], name: str) -> str:
    return f"{record[name]:z.1f}" if name in record else "-"


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "no guess"


def _pictures(xrays: XrayResult) -> str:
    shown, done, lone = xrays.pictures, xrays.treatment, escape(str(xrays.lone_reason))
    attackers = [
        (name, f"{xrays.raw[name].ssim:.3f}" if name in xrays.raw else "-", f"{attack.ssim:.3f}")
        for name, attack in xrays.sanitized.items()
    ]
    return f"""<h2>What comes back of a chest X-ray</h2>
<p>The net: {escape(xrays.net)}; {xrays.parameters:,} parameters in all. It is attacked
{escape(xrays.stage)}. The attacker inverts gradients; labels, training and sanitizer are known to
it.</p>
<figure><div class="wide"><div class="strip"><span>one X-ray, and its reconstruction from the raw
gradient</span>{_image(shown.lone)}{_image(shown.lone_reconstructed)}</div></div>
<figcaption>SSIM {xrays.ssim_raw:.3f}, mean of {len(xrays.lone_ssims)}. The policy
<code>{escape(xrays.settings.policy)}</code>
{f"withholds this update ({lone})" if xrays.lone_image_withheld else "RELEASES this update"}.
</figcaption></figure>
<p>An update of {xrays.batch_size} X-rays is let out by {escape(_by_rules(done.rules))}: its norm of
{done.norm:.3f} is bounded by {done.max_norm:.3g}, noise of norm {done.noise_norm:.3g} is added, and
{"all coordinates are" if done.keep == 1 else f"{done.keep:.0%} of the coordinates are"} kept.</p>
{_strips(shown)}
{table(("attacker", "SSIM, raw", "SSIM, released"), attackers)}
<p>Knowing nothing but public images scores {xrays.ssim_class_mean:.3f} (the class mean); the best
attacker on the released update scores {xrays.ssim_sanitized:.3f}. Among 100 X-rays of its class it
ranks the true one first for {_of_all(xrays.reid_top1, xrays)}, and from the raw update for
{_of_all(xrays.reid_top1_raw, xrays)}; chance alone does so for 1 in 100 in the mean, and for
{_of_all(xrays.reid_chance_limit, xrays)} or fewer in 99 % of runs. Matching alone
lifts a guess: the same attacker, given the raw update of <em>other</em> X-rays, scores
{xrays.ssim_unrelated:.3f} on these.</p>"""


def _of_all(share: float, xrays: XrayResult) -> str:
    """Write a share of the pictures behind the update as a count."""
    return f"{round(share * xrays.batch_size)} of {xrays.batch_size}"


def _by_rules(rules: Sequence[str]) -> str:
    return f"{'rule' if len(rules) == 1 else 'rules'} {', '.join(rules)}"


def montage(xrays: XrayResult) -> NDArray[np.uint8]:
    """All pictures as one, for a page that cannot hold the report.

    Returns:
        uint8 [height, width], three times enlarged. Rows: originals, from the raw update, from the
        released update, guess without data. The first column is the X-ray that was alone behind
        its gradient: it, and what came back of the raw gradient; nothing was released of it.
    """
    shown = xrays.pictures
    blank = np.full_like(shown.lone, 255)
    rows = [
        [shown.lone, *shown.originals],
        [shown.lone_reconstructed, *shown.raw],
        [blank, *shown.sanitized],
        [blank, *shown.class_means],
    ]
    gap = ((2, 2), (2, 2))
    lines = [np.hstack([np.pad(p, gap, constant_values=255) for p in row]) for row in rows]
    return np.kron(np.vstack(lines), np.ones((3, 3), dtype=np.uint8))


def _strips(shown: XrayPictures) -> str:
    rows: Sequence[tuple[str, NDArray[np.uint8]]] = (
        ("originals", shown.originals),
        ("from the raw update", shown.raw),
        ("from the released update", shown.sanitized),
        ("guess without data", shown.class_means),
    )
    lines = "".join(
        f'<div class="strip"><span>{label}</span>{"".join(_image(one) for one in images)}</div>'
        for label, images in rows
    )
    return f'<figure class="wide">{lines}</figure>'


def _limits() -> str:
    return """<h2>What this does not show</h2>
<p>Other attackers may do better. The federation is small and the data are public. The policies used
here make no formal promise; a promise per site is possible today (unit <code>site</code>), per
patient it is not part of this version. Timing and the fact that an update was withheld are visible
to the server.</p>
<p class="soft">Data: Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano; UCI; CC BY 4.0).
PneumoniaMNIST (MedMNIST v2, Yang et al. 2023, after Kermany et al. 2018; CC BY 4.0).</p>"""


def _image(picture: NDArray[np.uint8]) -> str:
    return f'<img alt="chest X-ray" src="{data_uri(picture)}">'
