"""Ours is right in every row, and docs/conformance.md says what runs now."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import private_steps
import pytest
import torch
from contests import OURS, PEERS, contest, contest_apart
from judging import Claims, Finding, judge
from odd_inputs import CASES, Case, Wants, ordinary

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
BY_ID = {case.id: case for case in CASES}


def rows() -> dict[str, list[str]]:
    """Title of each row of the document -> what it has to be, and the cells."""
    found = re.findall(r"^\| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    cells = [line.split(" | ") for line in found]
    return {title: rest for title, *rest in cells if len(rest) == 1 + len(PEERS) + len(OURS)}


@pytest.fixture(autouse=True)
def _prototype_layouts_warn() -> None:
    """Torch says of nested tensors that they are a prototype; that is why they are here."""
    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor|.*quantiz")


@pytest.mark.parametrize("place", range(len(OURS)), ids=list(OURS))
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_ours_is_right_and_the_document_says_so(case: Case, place: int) -> None:
    found = contest(list(OURS)[place], case)
    assert found.word in {"right", "n/a"}, found
    told = rows()[case.title][1 + len(PEERS) + place]
    if not found.measured.startswith("norm"):
        assert told == str(found)
        return
    word, _, norm = told.partition(": norm ")
    assert word == found.word
    assert math.isclose(float(norm), float(found.measured.split()[1]), rel_tol=0.25)


def test_the_document_has_every_row_and_no_other() -> None:
    head, *others = rows().items()
    assert head == ("input", ["has to be", *PEERS.values(), *OURS.values()])
    assert [(title, cells[0]) for title, cells in others] == [
        (case.title, case.wants.value) for case in CASES
    ]


@pytest.mark.soak
@pytest.mark.filterwarnings("default")  # an overflow that numpy warns of is not a crash of theirs
@pytest.mark.parametrize("name", PEERS)
def test_the_document_says_what_the_peers_do(name: str) -> None:
    """Words only: noise moves the numbers."""
    pytest.importorskip(name.partition("-")[0].replace("flower", "flwr"))
    place = 1 + list(PEERS).index(name)
    for case in CASES:
        told = rows()[case.title][place].replace("*", "")
        assert contest_apart(name, case).word == told.partition(":")[0], case.id


def test_a_record_of_nan_spoils_no_private_step() -> None:
    found = private_steps.sentinel_private()
    assert found.word == "right"
    line = next(t for t in DOCUMENT.read_text().splitlines() if private_steps.TITLE in t)
    assert line.endswith(f"| {private_steps.HAS_TO_BE} | {opacus_cell()} | {found} |")


def opacus_cell() -> str:
    """What Opacus does, run now where it is installed; else as the document says."""
    try:
        found = private_steps.opacus()
    except ModuleNotFoundError:
        text = DOCUMENT.read_text()
        return str(re.findall(r"counts for nothing.*?\| (\*\*wrong.*?) \|", text)[0])
    assert found.word == "wrong"
    return str(found)


# The judge can say every word, and says it for the right reason.

CLAIMS = Claims(1.0, 0.05)
NOISELESS = Claims(1.0, 0.0)


def noised(scale: float, std: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """The ordinary update scaled, plus noise."""
    base, local = ordinary()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: base[name]
        + scale * (local[name] - base[name])
        + std * torch.randn(base[name].shape, generator=generator)
        for name in base
    }


def judged(left: dict, right: dict, claims: Claims = CLAIMS, case: str = "ordinary") -> Finding:
    return judge(BY_ID[case], claims, [left, right])


def test_the_judge_calls_a_clipped_and_noised_update_right() -> None:
    assert judged(noised(0.1, 0.05), noised(0.1, 0.05, seed=2)).word == "right"


@pytest.mark.parametrize(
    ("scale", "std", "seeds", "word"),
    [
        (1.0, 0.0, (1, 2), "raw leak"),
        (0.5, 0.05, (1, 2), "unclipped"),
        (0.1, 0.1, (1, 2), "unclipped"),
        (0.0, 0.05, (1, 2), "wrong"),  # nothing left of the update
        (0.1, 0.05, (1, 1), "wrong"),  # the same noise twice
        (0.1, 0.02, (1, 2), "wrong"),  # too little noise
    ],
)
def test_the_judge_sees_what_is_not_right(scale, std, seeds, word) -> None:
    left, right = (noised(scale, std, seed) for seed in seeds)
    assert judged(left, right).word == word


@pytest.mark.parametrize("case", ["nan", "meta", "other-shape"])
def test_the_judge_wants_a_refusal_where_one_is_due(case: str) -> None:
    assert judged(noised(0.1, 0.05), noised(0.1, 0.05, 2), case=case).word == "wrong"
    assert judged(noised(1.0, 0.05), noised(1.0, 0.05, 2), case=case).word == "unclipped"


def spoil(case: str, name: str, value: torch.Tensor, claims: Claims = NOISELESS) -> Finding:
    """Judge a right release in which one entry was replaced."""
    base, _ = BY_ID[case].make()
    out = base | noised(0.1, 0.0) | {name: value}
    return judged(out, out, claims, case)


def test_the_judge_sees_counters_statistics_dtypes_and_lost_entries() -> None:
    counter, four = "norm.num_batches_tracked", torch.tensor(4000)
    assert spoil("step-counter", counter, torch.tensor(0)).word == "right"
    assert spoil("step-counter", counter, four).word == "raw leak"
    assert spoil("step-counter", counter, torch.tensor(17)).word == "wrong"
    assert spoil("ordinary", "layer.bias", torch.full((40,), torch.nan)).word == "wrong"
    assert spoil("ordinary", "layer.bias", noised(0.1, 0.0)["layer.bias"].double()).word == "wrong"
    assert spoil("ordinary", "layer.bias", torch.zeros(1)).word == "wrong"
    assert spoil("ordinary", "more", torch.zeros(1)).word == "wrong"
    negative = torch.full((64,), -0.1)
    assert spoil("variance-near-zero", "norm.running_var", negative).word == "wrong"
    raw = spoil("scalar-parameter", "temperature", torch.tensor(1234.5))
    assert raw == Finding("raw leak", "1234.5 in, 1234.5 out")


def test_the_judge_sees_two_draws_of_noise_for_one_tensor() -> None:
    base, local = BY_ID["tied"].make()
    once = {name: base[name] + 0.1 * (local[name] - base[name]) for name in base}
    assert judged(once, once, NOISELESS, "tied").word == "right"
    twice = once | {"head.weight": once["head.weight"] + 0.01}
    assert judged(twice, twice, NOISELESS, "tied").measured == "one tensor, two draws of noise"


def test_a_contestant_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr("contests.PATIENCE", 0.2)
    monkeypatch.setattr("ours.run", forever)
    assert contest_apart("no-promise", BY_ID["ordinary"]).word == "hang"


def test_every_case_that_leaves_is_over_the_bound_or_says_why_not() -> None:
    """A case whose update is under the bound would let a sanitizer that does nothing pass."""
    small = {"nothing-learned", "negative-zero", "subnormal"}
    for case in CASES:
        if case.wants is Wants.LEAVES and case.id not in small:
            base, local = case.make()
            change = sum(
                float((local[name].detach().double() - base[name].double()).square().sum())
                for name in base
                if base[name].is_floating_point()
            )
            assert change > 5.0**2, case.id
