"""`sentinel detectors calibrate` and `drift` on the state of a guard that ran for some rounds."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import sentinel
from sentinel.audit import UpdateDecided, read_log
from sentinel.cli.detectors import app
from sentinel.detection import inspect_global_model
from sentinel.policy.store import parse_policy
from sentinel.privacy import Charge, GaussianEvent, Head
from sentinel.state import StateFolder
from sentinel.stress import corpus
from sentinel.terms import GENESIS, Adjacency, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 25  # enough for 1 in 20, and no more than it takes
POLICY = """
schema = 1
name = "plain"
[[rule]]
id = "baseline"
max_norm = 0.5
[[rule]]
id = "leaky"
when = { sensitivity = 0.5 }
keep = 0.5
[[rule]]
id = "crafted-model"
when = { suspicion = 0.5 }
action = "refuse-round"
"""
SITE = """
schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 20.0
delta = 1e-5
clip_norm = 0.5
noise_multiplier = 8.0
[[rule]]
id = "baseline"
"""
runner = CliRunner()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))


def run_rounds(site: Path, numbers: range, rows: int, policy: str = POLICY) -> None:
    """Rounds of one architecture, each from a fresh model and fresh rows: exchangeable."""
    guard = sentinel.Guard(written(site, policy), site / "state")
    for number in numbers:
        torch.manual_seed(number)
        model = net()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        with guard.round(number, start, model) as rnd:
            train(model, rows)
        rnd.release()


def train(model: nn.Module, rows: int) -> None:
    features = torch.randn(rows, 6)
    target = (features.sum(1, keepdim=True) > 0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(features), target).backward()
        optimizer.step()


def written(site: Path, policy: str) -> Path:
    site.mkdir(exist_ok=True)
    path = site / f"{hashlib.sha256(policy.encode()).hexdigest()[:8]}.toml"
    path.write_text(policy)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    site = tmp_path_factory.mktemp("calm") / "site"
    run_rounds(site, range(ROUNDS), rows=48)
    yield site
    shutil.rmtree(site)


@pytest.fixture
def site(calm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calm, tmp_path / "site"))


def call(command: str, site: Path, *more: str | Path, policy: str = POLICY) -> Result:
    paths = ["--policy", written(site, policy), "--state-dir", site / "state"]
    return runner.invoke(app, [command, *map(str, [*paths, *more])])


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code in (0, 1), result.output
    return {entry["score"]: entry for entry in json.loads(result.stdout)["scores"]}


def kept_file(site: Path) -> Path:
    return site / "state" / "calibration.json"


def changed(site: Path, **fields: object) -> None:
    """Change the calibration, in all entries or at the top, and leave it valid JSON."""
    file = kept_file(site)
    whole = json.loads(file.read_text())
    for name, value in fields.items():
        for part in (whole, *whole["kept"]):
            if name in part:
                part[name] = value
    file.write_text(json.dumps(whole))


def test_the_threshold_is_that_of_the_scores_in_the_log(site: Path) -> None:
    found = told(call("calibrate", site, "--alpha", "0.05", "--json"))
    logged = sorted(
        entry.record.sensitivity / 20
        for entry in read_log(site / "state" / "audit")
        if isinstance(entry.record, UpdateDecided)
    )
    assert len(logged) == ROUNDS
    assert found["sensitivity"]["rounds"] == found["suspicion"]["rounds"] == ROUNDS
    rank = math.ceil((ROUNDS + 1) * 0.95)
    assert found["sensitivity"]["threshold"] == logged[rank - 1]
    assert found["sensitivity"]["rate_expected"] == (ROUNDS + 1 - rank) / (ROUNDS + 1)
    assert found["sensitivity"]["rate_expected"] < found["sensitivity"]["rate_confident"] < 0.2


def test_the_file_is_its_owners_alone_and_names_no_tensor(site: Path) -> None:
    assert call("calibrate", site, "--alpha", "0.05").exit_code == 0
    assert kept_file(site).stat().st_mode & 0o777 == 0o600
    text = kept_file(site).read_text()
    assert not re.search(r"weight|bias", text)
    assert json.loads(text)["version"] == 1


def test_the_printed_rules_go_into_the_policy_as_they_are(site: Path) -> None:
    result = call("calibrate", site, "--alpha", "0.05")
    rules = result.stdout[result.stdout.index("[[rule]]") :]
    extended = parse_policy((POLICY + rules).encode(), "test").policy
    added = {rule.id: rule for rule in extended.rules[3:]}
    assert set(added) == {"calibrated-suspicion", "calibrated-sensitivity"}
    assert added["calibrated-suspicion"].when.suspicion < 0.5
    assert added["calibrated-sensitivity"].keep == 0.5


def test_too_few_rounds_say_how_many_it_takes_and_nothing_is_kept(site: Path) -> None:
    result = call("calibrate", site, "--alpha", "0.01")
    assert result.exit_code == 1
    assert f"at least 99 rounds, and there are {ROUNDS}" in result.stdout
    assert not kept_file(site).exists()


@pytest.mark.parametrize("alpha", ["0", "1", "nan"])
def test_an_alpha_that_is_no_rate_is_misuse(site: Path, alpha: str) -> None:
    assert call("calibrate", site, "--alpha", alpha).exit_code == 2


def test_newest_leaves_the_older_rounds_out(site: Path) -> None:
    found = told(call("calibrate", site, "--alpha", "0.05", "--newest", "20", "--json"))
    assert found["suspicion"]["rounds"] == 20


def test_a_folder_without_state_is_misuse(tmp_path: Path) -> None:
    assert call("calibrate", tmp_path).exit_code == 2
    assert call("drift", tmp_path).exit_code == 2


def test_drift_before_a_calibration_says_to_make_one(site: Path) -> None:
    result = call("drift", site)
    assert result.exit_code == 2
    assert "detectors calibrate" in result.stderr


def test_no_round_since_the_calibration_is_said(site: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    result = call("drift", site)
    assert result.exit_code == 0
    assert result.stdout.count("no round since the calibration") == 2


def test_rounds_alike_are_no_drift_and_rounds_of_two_records_are(site: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    run_rounds(site, range(100, 110), rows=48)
    changed(site, seed="7" * 64)  # the coins of a test are fixed
    calm = told(call("drift", site, "--json"))
    assert calm["sensitivity"]["rounds"] == calm["suspicion"]["rounds"] == 10
    assert calm["sensitivity"]["level"] is None
    run_rounds(site, range(200, 215), rows=2)
    result = call("drift", site, "--page", site / "drift.html")
    assert result.exit_code == 1
    assert "the calibration no longer describes these rounds (the new rounds score higher" in (
        result.stdout
    )
    page = (site / "drift.html").read_text()
    assert page.count("<polyline") == 2
    assert "no longer describes" in page
    found = told(call("drift", site, "--json"))
    assert found["sensitivity"]["alarms"] >= 10  # of 15
    assert found["suspicion"]["level"] is None  # the models are as ever


def test_ordinary_rounds_above_the_shipped_threshold_get_no_looser_one(tmp_path: Path) -> None:
    site = tmp_path / "site"
    run_rounds(site, range(20), rows=1)
    result = call("calibrate", site, "--alpha", "0.05")
    assert result.exit_code == 0
    assert "No looser one is advised" in result.stdout
    assert "calibrated-sensitivity" not in result.stdout
    found = told(call("calibrate", site, "--alpha", "0.05", "--json"))["sensitivity"]
    assert found["standing"]["exceeded"]
    assert found["standing"]["alarms"] > 10
    assert found["rule_threshold"] is None


def test_under_a_promise_updates_are_refused_and_the_reason_is_said(
    site: Path, tmp_path: Path
) -> None:
    save_file({"weight": torch.randn(8, 4)}, tmp_path / "u.safetensors")
    result = call("calibrate", site, "--updates", tmp_path, policy=SITE)
    assert result.exit_code == 2
    assert "post-processing" in result.stderr


def test_a_promise_in_the_ledger_counts_though_the_policy_makes_none(
    site: Path, tmp_path: Path
) -> None:
    call("calibrate", site, "--alpha", "0.05")
    state = StateFolder(site / "state")
    last = state.log.last()
    assert last is not None
    event = GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=2.0)
    head = Head(last.seq, last.hash)
    state.ledger.charge(Charge(last.record.at, "default", GENESIS, "0" * 64, event, head), None)
    save_file({"weight": torch.randn(8, 4)}, tmp_path / "u.safetensors")
    assert call("calibrate", site, "--updates", tmp_path).exit_code == 2
    drift = call("drift", site)
    assert drift.exit_code == 2
    assert "raw updates" in drift.stderr
    again = call("calibrate", site, "--alpha", "0.05")
    assert again.exit_code == 1  # suspicion alone has rounds that may be read
    assert f"under a promise: {ROUNDS}" in again.stdout
    assert [one["which"] for one in json.loads(kept_file(site).read_text())["kept"]] == [
        "suspicion"
    ]
    assert call("drift", site).exit_code == 0


def test_rounds_behind_a_promise_are_calibrated_from_the_log(tmp_path: Path) -> None:
    site = tmp_path / "site"
    run_rounds(site, range(20), rows=16, policy=SITE)
    result = call("calibrate", site, "--alpha", "0.05", "--json", policy=SITE)
    found = told(result)
    assert found["sensitivity"]["rounds"] == 20
    assert found["sensitivity"]["left_out"]["raw_under_a_promise"] == 0
    assert call("drift", site, policy=SITE).exit_code == 0


def test_global_models_of_a_folder_are_taken_in_the_order_of_their_numbers(
    site: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [corpus.fresh(corpus.NETS[0], generator).state_dict() for _ in range(11)]
    for number, state in enumerate(states):
        save_file(dict(state), tmp_path / f"round-{number}.safetensors")
    call("calibrate", site, "--alpha", "0.1", "--globals", tmp_path)
    history, expected = None, []
    for state in states:
        seen = inspect_global_model(state, history)
        expected.append(seen.suspicion)
        history = seen.history
    kept = {one["which"]: one for one in json.loads(kept_file(site).read_text())["kept"]}
    assert kept["suspicion"]["scores"] == expected
    assert kept["suspicion"]["source"] == "folder"
    assert kept["sensitivity"]["source"] == "log"


def test_updates_of_a_folder_are_scored_and_an_empty_folder_is_misuse(
    site: Path, tmp_path: Path
) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    for number in range(9):
        save_file({"weight": torch.randn(16, 20)}, full / f"{number}.safetensors")
    assert call("calibrate", site, "--updates", empty).exit_code == 2
    found = told(call("calibrate", site, "--alpha", "0.1", "--updates", full, "--json"))
    assert (found["sensitivity"]["rounds"], found["sensitivity"]["source"]) == (9, "folder")


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"threshold": 0.9},
        {"scores": [0.1] * 3},
        {"scores": [0.0] * ROUNDS},
        {"alpha": 0.2},
        {"seed": "short"},
        {"log_head": "e" * 64},
        {"kept": []},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_calibration_that_was_changed_is_of_no_use(site: Path, damage: dict[str, object]) -> None:
    call("calibrate", site, "--alpha", "0.05")
    changed(site, **damage)
    result = call("drift", site)
    assert result.exit_code == 1
    assert "Calibrate again" in result.stderr
    assert "state-unsafe" in result.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}'])
def test_a_damaged_calibration_is_of_no_use(site: Path, text: str) -> None:
    call("calibrate", site, "--alpha", "0.05")
    kept_file(site).write_text(text)
    assert call("drift", site).exit_code == 1


def test_a_link_in_the_place_of_the_calibration_is_not_followed(site: Path, tmp_path: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    kept_file(site).rename(tmp_path / "elsewhere")
    kept_file(site).symlink_to(tmp_path / "elsewhere")
    result = call("drift", site)
    assert result.exit_code == 1
    assert "state-unsafe" in result.stderr


def test_a_detector_that_was_replaced_asks_for_a_new_calibration(site: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    changed(site, bundle="f" * 64)
    result = call("drift", site)
    assert result.exit_code == 1
    assert result.stdout.count("the detector was replaced") == 2
    assert "Calibrate again" in result.stdout


def test_the_calibration_of_another_dataset_is_no_answer(site: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    other = POLICY.replace('name = "plain"', 'name = "plain"\ndataset = "other"')
    result = call("drift", site, policy=other)
    assert result.exit_code == 2
    assert "dataset" in result.stderr


def test_another_policy_than_the_guards_is_remarked_on(site: Path) -> None:
    own = call("calibrate", site, "--alpha", "0.05")
    assert "another policy file" not in own.stdout
    other = call("calibrate", site, "--alpha", "0.05", policy=POLICY + "# changed\n")
    assert "another policy file" in other.stdout


def test_a_log_that_was_cut_gives_no_answer(site: Path) -> None:
    call("calibrate", site, "--alpha", "0.05")
    log = site / "state" / "audit" / "audit.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:-5]) + b"\n")
    assert call("drift", site).exit_code == 1
    assert call("calibrate", site, "--alpha", "0.05").exit_code == 1
