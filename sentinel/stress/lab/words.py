"""Words: what was tried and what came of it, in plain sentences. No sentence says "safe"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.result import LEAST_COUNT, MOST_OPEN
from sentinel.stress.lab.servers import ALONE_NOTHING, SERVERS
from sentinel.stress.lab.setting import HONEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel.stress.lab.finding import Tally
    from sentinel.stress.lab.result import Result, Row, Side

# What an error of this type mostly is; its text is never told, since it may hold values.
_FAILURES = {
    "OutOfMemoryError": "memory ran out",
    "MemoryError": "memory ran out",
    "NotImplementedError": "torch cannot do one of its steps with this model",
    "RuntimeError": "torch refused one of its steps with this model",
    "IndexError": "the model's shapes are not those that it expects",
    "ValueError": "the model or the records are not of the form that it expects",
    "TypeError": "the model or the records are not of the type that it expects",
    "KeyError": "the model lacks a part that it expects",
}
SHOWS_TOO_LITTLE = "shows too little"
PROVES_NOTHING = "proves nothing"
MARKS = {
    PROVES_NOTHING: "this attack fails without a guard too, so that it was not withstood",
    SHOWS_TOO_LITTLE: "it leaves a gain above "
    f"{MOST_OPEN:g} open, or has fewer than {LEAST_COUNT} values",
}
_REASONS = 5  # that are printed where nothing was measured

# What no part of this test tries, whatever the plan.
NEVER_TRIED = (
    "attackers who combine the updates of many rounds",
    "several hospitals' updates put together: of suppression the dead model alone is sent",
    "servers that send each client another model",
    *(f"the server {name}: {why}" for name, why in ALONE_NOTHING.items()),
    "training code that wants to leak: the guard runs beside it and trusts it",
    "what timing, and the fact that an update was withheld, give away",
)


def verdict(result: Result) -> str:
    """The one sentence at the top."""
    if not result.rows:
        timely = result.dropped or result.interrupted
        why = "was through before the test ended" if timely else "fits this model and data"
        return f"Nothing was measured: no attack {why}."
    if result.withheld_entirely:
        return (
            "The policy let no update out, so the server got nothing from this site, and the "
            "federation learned nothing from it either."
        )
    leaks = result.leaks
    if not leaks:
        if result.inconclusive:
            return _inconclusive(result)
        tried = len({row.item.attack for row in result.through})
        kinds = "1 kind of attack was" if tried == 1 else f"{tried} kinds of attack were"
        return (
            f"From the updates that this policy let out, {kinds} not shown to get more than "
            "somebody who never saw them, beyond what passes. This holds for these attackers in "
            "this test; another attacker may do better."
        )
    row, tally = max(leaks, key=lambda one: one[1].gain)
    return (
        f"The policy lets through too much: {_share(tally)} "
        f"({row.item.setting.words}). In {len(leaks)} comparisons the attacker got more than "
        "somebody who never saw the update."
    )


def _inconclusive(result: Result) -> str:
    """Why neither a leak nor its absence was shown."""
    more = " Give it more time." if result.short else ""
    if not result.through:
        return (
            "Inconclusive. Nothing can be said: no attack that gets anything without a guard was "
            f"through on an update that this policy let out.{more}"
        )
    found: dict[str, list[Tally]] = {}
    for row in result.unshown:
        assert row.policy.finding is not None  # noqa: S101 - that is what `unshown` means
        found.setdefault(row.item.attack, []).append(row.policy.finding.main)
    told = ", ".join(
        f"{name} ({min(len(one.values) for one in tallies)} {tallies[0].of})"
        for name, tallies in found.items()
    )
    return (
        "Inconclusive. No leak was seen, but too little was measured to exclude a large one under "
        f"some condition: {told}.{more}"
    )


def failure(error: str) -> str:
    """An error that ended an attack: its kind, and its type in brackets."""
    return f"{_FAILURES.get(error, 'one of its steps failed')} ({error})"


def mark(result: Result, row: Row) -> str:
    """What stands beside a comparison that shows nothing; empty where it shows something."""
    if row.policy.finding is None:
        return ""
    if result.leaves_open(row):
        return SHOWS_TOO_LITTLE
    return PROVES_NOTHING if row.proves_nothing else ""


def sentences(result: Result) -> list[str]:
    """What was tried, with what knowledge, and how strong it was; a few plain sentences."""
    train, held_out, public = result.records
    beforehand = (
        f"The model has {result.parameters:,} parameters. Updates were made from {train} records "
        f"of this site; {held_out} more were held back as a yardstick. The attacker had "
        f"{public or 'no'} public records beforehand."
    )
    said = [beforehand]
    said += [
        f"Without the guard, at its strongest: {_share(tally)} ({row.item.setting.words})."
        for row, tally in _strongest(result)
    ]
    told = (
        _controlled(result),
        assurance(result),
        _kept(result),
        _unnoticed(result),
        _fooled(result),
    )
    said += [line for line in told if line]
    if result.promise is None:
        said.append(
            "The policy makes no formal promise: what is said here is measured, and holds for the "
            "attackers of this test only."
        )
    else:
        said.append(
            f"The policy promises privacy per {result.promise}; that promise rests on its proof, "
            "not on this test. These figures were made from real records and are outside it: do "
            "not publish them."
        )
    if result.partial:
        said.append(_short(result))
    return said


def _controlled(result: Result) -> str | None:
    """Whether an attack that found nothing could have found anything."""
    found = result.control
    if found is None:
        return None
    figures = (
        f"planted records are unlike any patient, and it called {100 * found.mean:.0f} % of them "
        f"members where they were in an update without a guard, {100 * found.chance:.0f} % where "
        f"they were not ({len(found.values)} of each)"
    )
    if result.blind:
        return (
            "The attacker of members could not see even a planted record, so that its figures say "
            f"nothing about the policy: {figures}."
        )
    return f"Control of the attacker of members: {figures}."


def assurance(result: Result) -> str | None:
    """How large a gain the figures leave open, for each attack where they leave most open."""
    most: dict[str, tuple[float, Tally]] = {}
    weak = (row for row in result.unshown if row.proves_nothing)  # the others are through
    for row in (*result.through, *weak):
        assert row.policy.finding is not None  # noqa: S101 - that is what `through` means
        tally, known = row.policy.finding.main, most.get(row.item.attack)
        high = tally.open_gain(result.confidence)
        if known is None or high > known[0]:
            most[row.item.attack] = (high, tally)
    if not most:
        return None
    told = ", ".join(
        f"{name} {high:.2f} ({len(tally.values)} {tally.of})"
        for name, (high, tally) in most.items()
    )
    return (
        "How much more than knowing nothing an attacker may still have got from what was let out, "
        f"at most, under the condition that leaves most open: {told}; 95 % for all comparisons "
        "together."
    )


def unmeasured(results: Sequence[Result]) -> list[str]:
    """Why nothing was measured: a sentence, some of the reasons, and what would help.

    Args:
        results: of the tests; none where it was stopped before one began.
    """
    attacks = [one for result in results for one in result.skipped if not one.of_server]
    said = ["Nothing was measured, so that nothing was written."]
    said += [f"  {one.what}: {one.why}." for one in attacks[:_REASONS]]
    if (more := len(attacks) - _REASONS) > 0:
        said.append(f"  And {more} more.")
    if not results or any(result.interrupted for result in results):
        said.append("The test was stopped.")
    elif any(one.of_time for one in attacks):
        said.append("Give it more time with --budget.")
    return said


def partial(result: Result) -> str | None:
    """Why a report is partial, and whether more time would help; None where it is not."""
    if not result.partial:
        return None
    said = ["This report is partial."]
    if result.interrupted:
        said.append("The test was stopped.")
    if any(row.error is not None for row in result.rows):
        kinds = {row.item.attack: row.error for row in result.rows if row.error is not None}
        said += [f"The attack {name} failed: {failure(kind)}." for name, kind in kinds.items()]
    if result.short and not result.interrupted:
        count = len(result.dropped)
        left = f"{count} of the things to try {'was' if count == 1 else 'were'} left out"
        short = left if count else "Some of it was cut short"
        said.append(f"{short} for want of time: with a larger --budget more is tried.")
    return " ".join(said)


def tried(result: Result) -> list[tuple[str, str, str]]:
    """Rows of (attack, what it looks for, what it knows) for everything that ran."""
    names = dict.fromkeys(row.item.attack for row in result.rows)
    return [(name, ATTACKS[name].title, ATTACKS[name].knows) for name in names]


def servers_tried(result: Result) -> list[tuple[str, str]]:
    """Rows of (server, what it does)."""
    names = dict.fromkeys(row.item.setting.server for row in result.rows)
    return [(name, SERVERS[name].title) for name in names]


def outcome(side: Side) -> str:
    """What became of the updates that took one way."""
    if side.updates == 0:
        return "not tried"
    kept = ", ".join(f"{count} kept in ({reason})" for reason, count in side.kept.items())
    return kept if side.released == 0 else f"{side.released} released" + (f", {kept}" * bool(kept))


def figure(side: Side, index: int = 0) -> str:
    """One measure of a side, beside its yardstick."""
    if side.finding is None:
        return outcome(side)
    tally = side.finding.tallies[index]
    cut = ", cut short" if side.finding.cut else ""
    return f"{tally.mean:.2f} ({tally.chance:.2f}{cut})"


def _share(tally: Tally) -> str:
    return (
        f"{tally.measure}: {tally.mean:.2f} on average over {len(tally.values)} {tally.of}; "
        f"{tally.beside}: {tally.chance:.2f}"
    )


def _strongest(result: Result) -> list[tuple[Row, Tally]]:
    """Each attack where it did best on raw updates; without one that does, the test says little."""
    best: dict[str, tuple[Row, Tally]] = {}
    for row in result.rows:
        if row.raw.finding is not None:
            tally, known = row.raw.finding.main, best.get(row.item.attack)
            if known is None or tally.gain > known[1].gain:
                best[row.item.attack] = (row, tally)
    return list(best.values())


def _kept(result: Result) -> str | None:
    reasons: dict[str, int] = {}
    for row in result.rows:
        for reason, count in row.policy.kept.items():
            reasons[reason] = reasons.get(reason, 0) + count
    if not reasons:
        return None
    listed = ", ".join(f"{reason} ({count} times)" for reason, count in reasons.items())
    return (
        f"The guard kept updates in, or refused the round: {listed}. What is kept in was not "
        "attacked."
    )


def _unnoticed(result: Result) -> str | None:
    """Malicious servers that got updates out of the guard, and would read them without it."""
    names = dict.fromkeys(
        row.item.setting.server
        for row in result.rows
        if row.policy.released and not row.proves_nothing and row.item.setting.server != HONEST
    )
    if not names:
        return None
    return (
        "Malicious servers that the guard did not refuse every time, from whose updates an attack "
        f"gets something without a guard: {'; '.join(names)}. What it got from what was let out is "
        "in the figures."
    )


def _fooled(result: Result) -> str | None:
    """What an attacker gets of what would have left, had a model or a count deceived the guard."""
    found = [
        (row, tally)
        for row in result.rows
        if row.alone.finding is not None and not row.proves_nothing
        for tally in row.alone.finding.tallies
    ]
    if not found:
        return None
    leaks = [(row, tally) for row, tally in found if tally.leaks(result.confidence)]
    start = "Had the guard been fooled (too many patients named, the malicious server not noticed)"
    if not leaks:
        return f"{start}, no gain from what would have left could be told from chance."
    row, tally = max(leaks, key=lambda one: one[1].gain)
    return f"{start}, its other rules would not do: {_share(tally)} ({row.item.setting.words})."


def _short(result: Result) -> str:
    return (
        f"{partial(result)} It took {result.seconds:.0f} s; what was cut short is marked, and what "
        "was not tried is listed below."
    )
