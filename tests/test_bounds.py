"""`max_norm = "auto"` as a training loop meets it: public history alone, each release once."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sentinel
from sentinel.bounds import learn
from sentinel.errors import RoundRefused, Withheld
from sentinel.releases import RoundKey
from sentinel.terms import Evidence, Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AUTO = """
schema = 1
name = "follows"
[limits]
keep_releases = 2
[[rule]]
id = "baseline"
max_norm = "auto"
max_norm_floor = 0.1
max_norm_ceiling = 10.0
noise_ratio = {ratio}
"""
LEAKY = '[[rule]]\nid = "leaky"\nwhen = { sensitivity = 0.5 }\nnoise_ratio = 4.0\nkeep = 0.5\n'
STAYS = '[[rule]]\nid = "stays"\nwhen = { sensitivity = 0.5 }\naction = "withhold-update"\n'
State = dict[str, torch.Tensor]


@pytest.fixture
def make_guard(tmp_path: Path) -> Callable[..., sentinel.Guard]:
    def make(text: str = "", ratio: float = 0.0, **options: Any) -> sentinel.Guard:
        path = tmp_path / "policy.toml"
        path.write_text(AUTO.format(ratio=ratio) + text)
        path.chmod(0o600)
        options.setdefault("unsafe_skip_inspection", True)
        return sentinel.Guard(path, tmp_path / "site", **options)

    return make


def model(seed: int = 0, values: int = 4000) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(values // 40, 40, generator=generator), "b": torch.zeros(10)}


def moved(state: State, norm: float, seed: int = 0) -> State:
    step = torch.randn(state["w"].shape, generator=torch.Generator().manual_seed(seed))
    return {**state, "w": state["w"] + step * (norm / step.norm())}


def take_part(
    guard: sentinel.Guard, number: int, base: State, local: State, **options: Any
) -> tuple[State, float]:
    """What left, and the bound that it was under."""
    with guard.round(number, base) as rnd:
        pass
    out = rnd.release(local, **options)
    return out, rnd.decided.evidence.auto_norms["baseline"] if rnd.decided else math.nan


def next_bound(guard: sentinel.Guard, run: str = "default") -> float:
    """The bound of the round after."""
    key = RoundKey("default", run, 10**6)
    (norm,) = guard._door.house.memory(key).norms(guard.policy.policy.autos).values()
    return norm


@pytest.mark.parametrize("kind", ["weights", "delta"])
@pytest.mark.parametrize(("ratio", "true"), [(0.0, 0.3), (0.0, 4.0), (1.0, 0.3), (1.0, 4.0)])
def test_the_bound_of_a_guarded_loop_finds_the_norm(
    make_guard, kind: str, ratio: float, true: float
) -> None:
    """From the middle of 0.1 to 10, within a factor of 2 in eight rounds; every bound holds."""
    guard, base, bounds = make_guard(ratio=ratio), model(), []
    for number in range(14):
        out, bound = take_part(guard, number, base, moved(base, true, number), kind=kind)
        bounds.append(bound)
        change = (out["w"] - base["w"] if kind == "weights" else out["w"]).norm()
        assert float(change) <= bound * (1 + 2 * ratio) + 1e-6
    assert bounds[0] == pytest.approx(1.0)
    assert all(true / 2 < bound < 2 * true for bound in bounds[8:]), bounds


def test_a_mask_and_a_rule_of_the_score_do_not_mislead_the_bound(make_guard) -> None:
    """All rounds are under a rule with keep and more noise, and the bound finds the norm still."""
    keep = LEAKY.replace("0.5 }", "0.0 }")
    guard, base = make_guard(keep, ratio=1.0), model(values=40_000)
    bounds = [take_part(guard, at, base, moved(base, 0.3, at))[1] for at in range(16)]
    assert 0.15 < bounds[-1] < 0.6, bounds


def test_the_next_bound_rests_on_what_left_and_on_nothing_else_of_the_update(make_guard) -> None:
    """Two raw updates, one far beyond the bound, that leave as the same bytes."""
    base = model()
    within = moved(base, 0.9)
    direction = within["w"] - base["w"]
    bounds, sent = [], []
    for run, scale in (("one", 10.0), ("other", 1e6)):
        guard = make_guard(run=run)
        beyond = {**base, "w": base["w"] + direction * scale}
        out, _ = take_part(guard, 1, base, beyond)
        sent.append(out["w"])
        bounds.append(next_bound(guard, run))
    assert torch.allclose(sent[0], sent[1], atol=1e-6)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)


def test_the_score_has_no_part_in_the_next_bound(make_guard) -> None:
    """The same released bytes, whatever score their update had: the same bound."""
    guard, base = make_guard(LEAKY, ratio=1.0), model()
    out, found = moved(base, 1.5), []
    for score in (0.0, 0.5, 1.0):
        evidence = Evidence(
            {"w": 4000, "b": 10}, score, 0.0, 0.0, unhealthy=False, auto_norms={"baseline": 1.0}
        )
        key = RoundKey("default", f"run-{score}", 1)
        learn(guard._door.house, key, evidence, base, out, deltas=False, aliases={})
        found.append(next_bound(guard, f"run-{score}"))
    assert found[0] == found[1] == found[2] != pytest.approx(1.0)


def test_a_round_that_is_given_again_counts_once(make_guard) -> None:
    guard, base = make_guard(), model()
    take_part(guard, 1, base, moved(base, 5.0))
    after = next_bound(guard)
    assert after > 1.0
    for _ in range(5):
        with guard.round(1, base) as rnd:
            pass
        rnd.release(moved(base, 0.001))
        assert rnd.replayed
    assert next_bound(make_guard()) == after


def test_a_round_that_was_withheld_or_refused_moves_nothing(make_guard) -> None:
    """By its score, since it was not finite, before training, or since it was never released."""
    guard, base = make_guard(STAYS.replace("0.5", "0.0")), model()
    with guard.round(1, base) as rnd:
        pass
    with pytest.raises(Withheld) as caught:
        rnd.release(moved(base, 5.0))
    assert caught.value.reason is Reason.WITHHELD_BY_RULE
    guard = make_guard()
    with guard.round(2, base) as rnd:
        pass
    with pytest.raises(Withheld):
        rnd.release({**base, "b": torch.full((10,), math.nan)})
    with guard.round(3, base):
        pass
    refuse = '[[rule]]\nid = "r"\nwhen = { suspicion = 0.0 }\naction = "refuse-round"\n'
    with pytest.raises(RoundRefused), make_guard(refuse).round(4, base):
        pass
    assert next_bound(make_guard()) == pytest.approx(1.0)


def test_each_run_and_each_dataset_has_a_bound_of_its_own(make_guard) -> None:
    guard, base = make_guard(run="one"), model()
    take_part(guard, 1, base, moved(base, 5.0))
    assert next_bound(guard, "one") > 1.0
    assert next_bound(make_guard(run="other"), "other") == pytest.approx(1.0)
    other = make_guard(run="one")
    path = other._state.memory(RoundKey("default", "one", 1), "elsewhere")
    assert path.norms(other.policy.policy.autos)["baseline"] == pytest.approx(1.0)


def test_a_damaged_memory_refuses_the_round_and_what_was_released_is_given_still(
    make_guard, tmp_path: Path
) -> None:
    """Before training; nothing is charged; the round stays open until it is mended."""
    guard, base = make_guard(), model()
    out, _ = take_part(guard, 1, base, moved(base, 5.0))
    (file,) = (tmp_path / "site" / "history").glob("*.bounds.json")
    whole = file.read_text()
    file.write_text(whole[:-20])
    charged = guard._state.ledger.head().seq
    with pytest.raises(Withheld, match="put the state folder back") as caught:
        take_part(guard, 2, base, moved(base, 5.0))
    assert caught.value.reason is Reason.STATE_UNSAFE
    assert guard._state.ledger.head().seq == charged
    again, _ = take_part(guard, 1, base, base)
    assert torch.equal(again["w"], out["w"])
    file.write_text(whole)
    take_part(guard, 2, base, moved(base, 5.0))


def test_a_memory_that_cannot_be_written_loses_the_look_and_not_the_release(
    make_guard, tmp_path: Path
) -> None:
    """As a crash would between release and memory: asked again, the same bytes, and no look."""
    guard, base = make_guard(), model()
    take_part(guard, 1, base, moved(base, 5.0))
    before = next_bound(guard)
    (lock,) = (tmp_path / "site" / "history").glob("*.bounds.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(Withheld) as caught:
        take_part(guard, 2, base, moved(base, 5.0))
    assert caught.value.reason is Reason.STORAGE_FAILED
    lock.rmdir()
    again, _ = take_part(guard, 2, base, base)
    assert float((again["w"] - base["w"]).norm()) == pytest.approx(before, rel=1e-4)
    assert next_bound(guard) == before


def test_the_memory_holds_no_tensor_and_no_name(make_guard, tmp_path: Path) -> None:
    """Some 520 numbers and digests for a model of 4010 values, in a file of the user's own."""
    guard, base = make_guard(ratio=1.0), model()
    for number in range(4):
        take_part(guard, number, base, moved(base, 5.0, number))
    (file,) = (tmp_path / "site" / "history").glob("*.bounds.json")
    (bound,) = json.loads(file.read_text())["rules"].values()
    numbers = [bound["norm"], bound["variance"], *bound["model"], *bound["step"]]
    assert len(numbers) + len(bound["coherent"]) <= 520
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_policy_without_auto_keeps_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('schema = 1\nname = "p"\n[[rule]]\nid = "all"\nmax_norm = 1\n')
    path.chmod(0o600)
    guard = sentinel.Guard(path, tmp_path / "site", unsafe_skip_inspection=True)
    with guard.round(1, model()) as rnd:
        pass
    rnd.release(moved(model(), 1.0))
    assert not list((tmp_path / "site" / "history").glob("*.bounds.*"))


def test_a_server_that_makes_updates_large_reaches_the_ceiling_and_no_further(make_guard) -> None:
    """It crafts models on which every update is huge, and sends huge steps besides.

    The bound rises by at most sqrt(2) per round, and each round leaves no more than the ceiling.
    """
    guard, base, bounds = make_guard(ratio=1.0), model(), []
    for number in range(30):
        out, bound = take_part(guard, number, base, moved(base, 1e4, number))
        bounds.append(bound)
        assert float((out["w"] - base["w"]).norm()) <= 10.0 * 2.2
        base = {name: value + 1e3 for name, value in base.items()}
    rises = [after / before for before, after in itertools.pairwise(bounds)]
    assert max(rises) <= math.sqrt(2) + 1e-9
    assert max(bounds) <= 10.0
    assert 7 <= next(at for at, bound in enumerate(bounds) if bound > 9.99) <= 25


def test_tied_tensors_count_once_and_buffers_not_at_all(make_guard) -> None:
    """Under the name of the first; the memory would be about another model otherwise."""
    net = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 30))
    net[1].weight = net[0].weight
    net.append(torch.nn.BatchNorm1d(30))
    guard = make_guard(ratio=1.0)
    for number in range(3):
        base = {name: value.clone() for name, value in net.state_dict().items()}
        with guard.round(number, base, net) as rnd, torch.no_grad():
            net[0].weight.add_(0.1)
        net.load_state_dict(rnd.release())
    (bound,) = guard._door.house.memory(rnd.key)._bounds(guard.policy.policy.autos).values()
    assert bound.number == 2
