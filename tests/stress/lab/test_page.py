"""The report needs nothing else, says what it is, and redacted shows nobody."""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from sentinel.stress.lab.attacks.membership import OTHERS
from sentinel.stress.lab.finding import Exhibit, Finding, Tally
from sentinel.stress.lab.knobs import Knob, Turned
from sentinel.stress.lab.page import page
from sentinel.stress.lab.plan import Skipped
from sentinel.stress.lab.record import record
from sentinel.stress.lab.redact import BLOCKS, error_map, error_words
from sentinel.stress.lab.result import Curves, Point, Result, Side
from sentinel.stress.lab.runner import Options, run_lab
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.utility import Utility
from sentinel.stress.lab.words import assurance, sentences, verdict

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Opens and closes tags as a browser does, and notes every address."""

    def __init__(self) -> None:
        """Nothing is open."""
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""
        self.tags.add(tag)
        self.addresses += [str(value) for key, value in attrs if key in {"src", "href", "data"}]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open it, unless it never holds anything."""
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close it; it must be the one that was opened last."""
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """One test of pictures and one of rows; made once."""
    return {}


@pytest.fixture
def pictures(images, plain, results, stop_after) -> Result:
    if "pictures" not in results:
        options = Options(("pictures",), seconds=600.0, curves=False)
        results["pictures"] = run_lab(images, plain(), options, stop_after(1))
    return results["pictures"]


@pytest.fixture
def rows(table, plain, results, stop_after) -> Result:
    if "rows" not in results:
        found = run_lab(table, plain(), Options(("rows",), 600.0, curves=False), stop_after(2))
        results["rows"] = replace(found, curves=some_curves(found))
    return results["rows"]


def some_curves(result: Result) -> Curves:
    """Curves of one point, made of what the test found."""
    row = result.rows[0]
    leak, learned = row.raw.finding.main, Utility("AUC", (0.8, 0.9))
    points = (
        Point(Turned(), leak, learned),
        Point(Turned(Knob.KEEP, 0.1), leak, learned),
        Point(Turned(Knob.NOISE_MULTIPLIER, 0.3), leak, learned),
        Point(Turned(Knob.KEEP, 0.2), None, learned, kept=3),
    )
    return Curves(row.item, leak, Utility("AUC", (0.85, 0.93)), points, planned=5)


def parsed(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def sizes(reader: Reader) -> set[tuple[int, int]]:
    """Width and height of every picture."""
    found = set()
    for address in reader.addresses:
        png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        found.add(struct.unpack(">II", png[16:24]))
    return found


@pytest.mark.parametrize("redacted", [True, False])
def test_the_page_parses_and_needs_nothing_else(rows, pictures, redacted) -> None:
    html = page([rows, pictures], "/where/it/lies", redacted=redacted)
    reader = parsed(html)
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not reader.tags & {"script", "link", "iframe", "object", "form"}
    assert not re.search(r"https?://|@import|url\(", html)
    assert "/where/it/lies" in html
    assert "svg" in reader.tags
    assert ">noise per value 0.3</text>" in html


def test_what_a_policy_costs_is_paired_with_the_same_federation_unguarded(rows) -> None:
    assert rows.curves.gained(rows.curves.points[0]) == pytest.approx((-0.05, -0.03))
    html = page([rows], "here", redacted=False)
    assert "0.850; -0.040, from -0.167 to +0.087 in 2 pairs" in html
    once = replace(rows.curves.points[0], utility=Utility("AUC", (0.8,)))
    short = replace(rows, curves=replace(rows.curves, points=(once,)))
    assert "in 1 pairs" not in page([short], "here", redacted=False)
    assert replace(rows.curves, utility=None).gained(once) == ()


def test_before_and_after_stand_side_by_side(pictures) -> None:
    html = page([pictures], "here", redacted=False)
    assert sizes(parsed(html)) == {(12, 12)}
    for label in ("records", "from the raw update", "from the released update"):
        assert f"<span>{label}</span>" in html


def test_redacted_no_picture_of_a_record_is_left(pictures) -> None:
    html = page([pictures], "here", redacted=True)
    assert sizes(parsed(html)) == {(BLOCKS, BLOCKS)}
    assert "error map" in html


def test_redacted_no_value_of_a_row_is_left(rows, table) -> None:
    worst = rows.rows[0].raw.finding.worst
    shown = f"{float(worst.truth[0]):.2f}"
    assert f">{shown}<" in page([rows], "here", redacted=False)
    html = page([rows], "here", redacted=True)
    cells = set(re.findall(r"<td[^>]*>(-?\d+\.\d\d)</td>", html))
    values = {f"{value:.2f}" for value in table.train.inputs.flatten().tolist()}
    assert not {cell for cell in cells if cell in values} - {"0.00", "1.00"}
    assert {"read", "wrong"} & set(re.findall(r">(read|close|wrong)<", html))


def test_an_error_map_says_how_wrong_and_not_what() -> None:
    """Five shades of sixteen blocks; two records with errors alike give the same map."""
    guess = torch.zeros(1, 12, 12)
    one, two = Exhibit(guess + 0.5, guess, 0.0), Exhibit(guess - 0.7, guess, 0.0)
    assert torch.equal(error_map(one), error_map(two))
    assert set(error_map(one).unique().tolist()) == {1.0}
    assert error_map(Exhibit(guess, guess, 1.0)).max() == 0.0
    row = Exhibit(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.4, 9.0]), 0.0)
    assert error_words(row) == ["read", "close", "wrong"]


def test_the_record_holds_figures_and_no_value_of_a_record(rows, pictures) -> None:
    found = record([rows, pictures])
    text = json.dumps(found, allow_nan=False)
    assert found["schema"] == 1
    assert len(found["subjects"]) == 2
    assert found["subjects"][0]["attacks"][0]["raw"]["measures"][1]["mean"] == 1.0
    numbers = set(re.findall(r"-?\d\.\d{4,}", text))
    truths = {f"{v:.6f}" for e in rows.rows[0].raw.finding.exhibits for v in e.truth.tolist()}
    assert not numbers & truths


def test_no_verdict_says_safe(rows, pictures) -> None:
    for result in (rows, pictures, replace(rows, rows=())):
        html = page([result], "here", redacted=True)
        assert not re.search(r"\bsafe\b|\bsecure\b", html)
        assert verdict(result)


def test_each_figure_of_what_was_let_out_has_its_interval(rows) -> None:
    html = page([rows], "here", redacted=True)
    found = rows.rows[0].policy.finding.main
    gain = found.interval(rows.confidence)
    assert f"from {max(-1.0, gain.low):.2f} to {min(1.0, gain.high):.2f}" in html
    assert f"rows {most_open(rows):.2f}" in html


def test_a_condition_that_leaves_much_open_is_not_hidden_behind_one_with_more_records(
    rows,
) -> None:
    """Nothing read of 2000 records, and half of 8."""
    many = Tally("read", (0.0,) * 2000, (0.0,) * 2000)
    few = Tally("read", (1.0, 0.0) * 4, (0.0,) * 8)
    row = rows.rows[0]
    sides = [Side(Finding((tally,)), released=1) for tally in (few, many)]
    both = replace(rows, rows=tuple(replace(row, policy=side, alone=Side()) for side in sides))
    high = min(1.0, few.interval(both.confidence).high)
    assert f"rows {high:.2f} (8 records)" in assurance(both)


def test_what_a_fooled_guard_leaves_is_among_the_comparisons_made(rows) -> None:
    """One of the policy and one of the fooled guard: 97.5 % each."""
    side = Side(Finding((Tally("read", (0.0,) * 8, (0.0,) * 8),)), released=1)
    row = replace(rows.rows[0], policy=side, alone=side)
    assert replace(rows, rows=(row,)).confidence == pytest.approx(0.975)


def test_what_needs_other_clients_or_rounds_is_listed_as_never_tried(rows) -> None:
    untried = page([rows], "here", redacted=True).split("What was not tried")[1]
    assert "scan" not in SERVERS
    assert "the server scan: " in untried
    assert "of suppression the dead model alone is sent" in untried


def test_an_attack_that_was_cut_short_says_nothing_of_how_little_it_could_get(rows) -> None:
    """It is weak for want of time, so that its small gain is no assurance."""
    cut = [
        replace(row, policy=replace(row.policy, finding=replace(row.policy.finding, cut=True)))
        for row in rows.rows
        if row.policy.finding
    ]
    assert assurance(rows) is not None
    assert assurance(replace(rows, rows=tuple(cut))) is None


def most_open(result: Result) -> float:
    """The largest gain that the rows attack may have, whatever the condition."""
    found = [row.policy.finding.main for row in result.rows if row.policy.finding]
    high = max(tally.interval(result.confidence).high for tally in found)
    return max(0.0, min(1.0, high))


def test_members_stand_beside_others_and_not_beside_nothing(rows) -> None:
    """Half of each is chance, so that .67 and .33 are not "where knowing nothing gives .33"."""
    tally = Tally("members called members", (1.0, 0.0), (0.0, 0.0), beside=OTHERS)
    row = replace(rows.rows[0], raw=Side(Finding((tally,)), released=1))
    said = " ".join(sentences(replace(rows, rows=(row,))))
    assert (
        "members called members: 0.50 on average over 2 records; others called members: 0.00"
        in said
    )


def controlled(rows: Result, *called: float) -> Result:
    """The first condition under a new name, with planted records of which so many were called."""
    planted = Tally("control", called, (0.0,) * len(called), beside=OTHERS)
    row = rows.rows[0]
    found = replace(row.raw.finding, control=planted)
    policy = replace(row.policy, kept={})
    return replace(rows, rows=(replace(row, raw=replace(row.raw, finding=found), policy=policy),))


def test_the_control_stands_beside_the_figures(rows) -> None:
    seen = controlled(rows, *[1.0] * 20)
    assert not seen.blind
    assert "Control of the attacker" in " ".join(sentences(seen))
    assert "all of these without guard" in page([seen], "here", redacted=True)
    side = record([seen])["subjects"][0]["attacks"][0]["raw"]
    assert side["control"]["mean"] == 1.0


def test_an_attacker_that_misses_planted_records_is_no_assurance(rows) -> None:
    missed = controlled(rows, 1.0, *[0.0] * 19)
    assert missed.blind
    assert "could not see even a planted record" in " ".join(sentences(missed))
    assert assurance(missed) is None
    assert missed.inconclusive
    assert "Nothing can be said" in verdict(missed)
    assert record([missed])["subjects"][0]["control_missed"]


def compared(rows: Result, raw: Tally, released: Tally) -> Result:
    """One comparison, made of these figures."""
    sides = [Side(Finding((tally,)), released=1) for tally in (raw, released)]
    item = replace(rows.rows[0].item, updates=1)
    row = replace(rows.rows[0], item=item, raw=sides[0], policy=sides[1], alone=Side())
    return replace(rows, rows=(row,), interrupted=False, skipped=(), curves=None)


def right(hits: int, count: int) -> Tally:
    """So many of the records are read, and none by chance."""
    values = (1.0,) * hits + (0.0,) * (count - hits)
    return Tally("read", values, (0.0,) * count)


def test_too_few_records_to_exclude_a_large_gain_are_inconclusive(rows) -> None:
    found = compared(rows, right(40, 40), right(0, 3))
    assert found.inconclusive
    assert verdict(found).startswith("Inconclusive")
    assert "rows (3 records)" in verdict(found)
    assert "more time" not in verdict(found)  # it would be of no use
    first = record([found])["subjects"][0]
    assert first["inconclusive"]
    assert first["attacks"][0]["shows_too_little"]
    assert "shows too little" in page([found], "here", redacted=True)


@pytest.mark.parametrize(("count", "expected"), [(5, True), (6, False)])
def test_fewer_values_than_the_least_show_nothing_however_alike(rows, count, expected) -> None:
    """All at .2, so that the interval has no width."""
    released = Tally("likeness", (0.2,) * count, (0.2,) * count, paired=True)
    assert compared(rows, right(40, 40), released).inconclusive is expected


def test_a_bound_above_a_half_shows_nothing_unless_so_much_is_not_to_be_had(rows) -> None:
    wide = Tally("right", (0.0, 1.0) * 4, (0.4,) * 8)
    coins = replace(wide, chances=(0.5,) * 8)
    assert compared(rows, right(40, 40), wide).inconclusive
    assert not compared(rows, right(40, 40), coins).inconclusive
    assert not compared(rows, right(40, 40), right(0, 40)).inconclusive


def test_an_attack_that_fails_without_a_guard_too_is_not_withstood(rows) -> None:
    found = compared(rows, right(0, 40), right(0, 40))
    assert found.through == ()
    assert found.inconclusive
    assert assurance(found) is None
    assert "this attack fails without a guard too" in page([found], "here", redacted=True)
    assert record([found])["subjects"][0]["attacks"][0]["proves_nothing"]
    strong = compared(rows, right(40, 40), right(0, 40))
    both = replace(strong, rows=(*strong.rows, *found.rows))
    assert both.through == strong.rows
    assert not both.inconclusive
    assert "1 kind of attack was" in verdict(both)


def test_numbers_of_words_are_read_or_wrong_and_never_close() -> None:
    """Word 100 is no nearer to word 101 than to any other."""
    one = Exhibit(torch.tensor([100, 7]), torch.tensor([101, 7]), 0.5)
    assert error_words(one) == ["wrong", "read"]


def test_the_strongest_read_out_is_shown_even_where_nothing_of_it_left(rows) -> None:
    first, second = rows.rows
    kept = replace(first, policy=Side(kept={"too-few-patients": 1}), alone=Side())
    html = page([replace(rows, rows=(kept, second))], "here", redacted=True)
    shown = html.split("Before and after")[1].split("Every figure")[0]
    assert first.item.setting.words in shown
    assert second.item.setting.words in shown


def test_a_partial_result_is_called_partial(rows) -> None:
    html = page([replace(rows, interrupted=True)], "here", redacted=True)
    assert "This report is partial. The test was stopped." in html
    late = Skipped("rows: more records", "no time", of_time=True)
    left = replace(rows, interrupted=False, curves=None, skipped=(late,))
    assert "larger --budget" in page([left], "here", redacted=True)
    told = record([left])
    assert told["partial"]
    assert told["subjects"][0]["more_time_would_help"]
    assert told["subjects"][0]["not_tried"][0]["for_want_of_time"]


def test_what_was_not_tried_is_listed(rows) -> None:
    html = page([rows], "here", redacted=True)
    assert rows.skipped
    assert all(one.why.split(";")[0][:20] in html for one in rows.skipped if "'" not in one.why)
    assert "Never part of this test" in html
