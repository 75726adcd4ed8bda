"""The heart-disease half of the demo measures what it says, with the real guard at the door."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from sklearn.metrics import roc_auc_score

from sentinel.demo import cohorts
from sentinel.demo.heart_result import HeartsResult, Settings
from sentinel.demo.hearts import auc, network, run_hearts
from sentinel.demo.hospitals import BareDoor, GuardedDoor, Loop, Site, update_norm
from sentinel.errors import MisuseError
from sentinel.stress.layers import copied
from sentinel.stress.servers import binning

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Settings(repeats=1, rounds=4, turns_at=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def site(patients: int | None = None) -> Site:
    train, held_out = cohorts.split(cohorts.load("cleveland"), 0.7, seeded())
    if patients is not None:
        train = train.take(torch.arange(patients))
    return Site("cleveland", train, held_out, Loop())


def norms(result: HeartsResult, number: int) -> list[float | None]:
    return [note.outcome.norm for note in result.notes if note.number == number]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> HeartsResult:
    return run_hearts(SMALL, state=tmp_path_factory.mktemp("state"))


def test_the_server_reads_patients_of_bare_hospitals_and_none_of_guarded_ones(
    small: HeartsResult,
) -> None:
    assert small.unguarded.exact >= 20
    # Protection that is measured on no guess is none: every form was attacked.
    assert small.guarded.guesses > 4 * 3 * 100
    assert all(reads.guesses > 4 * 100 for reads in small.uninspected.values())
    assert small.auc_guarded_by_site != small.auc_unguarded_by_site
    assert small.unguarded.interval.low > 0.1
    assert small.guarded.exact == 0
    assert small.worst_uninspected.exact == 0
    assert small.guarded.interval.high <= 0.02
    assert small.worst_uninspected.interval.high <= 0.02


def test_every_guarded_hospital_refuses_the_crafted_round_and_no_other(small: HeartsResult) -> None:
    assert small.rounds_refused == len(cohorts.SITES)
    assert small.false_refusals == 0
    assert len(small.notes) == 4 * len(cohorts.SITES)
    refused = [note for note in small.notes if note.outcome.action == "refused"]
    assert {(note.number, note.crafted) for note in refused} == {(3, True)}


def test_each_round_is_noted_with_what_was_measured_and_done(small: HeartsResult) -> None:
    released = [note.outcome for note in small.notes if note.outcome.action == "released"]
    assert len(released) >= 8
    for outcome in released:
        assert 0.0 <= (outcome.sensitivity or 0.0) < 0.9
        assert "baseline" in outcome.rules
        assert outcome.norm is not None
        assert 0.01 < outcome.norm < 2.0
        assert isinstance(outcome.clipped, bool)
        assert outcome.verdict == "honest"
    for note in small.notes:
        assert note.outcome.state is None
        if note.crafted:
            assert (note.outcome.reason, note.outcome.norm) == ("crafted-model", None)


def test_records_are_counted_once_for_each_hospital_that_could_lose_them(
    small: HeartsResult,
) -> None:
    patients = sum(len(cohorts.load(name)) for name in cohorts.SITES)
    for reads in (small.unguarded, small.guarded, small.worst_uninspected):
        assert reads.records + reads.held_out == patients
    assert set(small.uninspected) == set(SMALL.scales)


def test_an_example_is_a_patient_read_in_the_open_and_not_behind_the_guard(
    small: HeartsResult,
) -> None:
    assert len(small.examples) == 3
    for example in small.examples:
        assert example.unguarded_error < 0.01
        assert example.sanitized_error > 0.3
        assert example.unguarded["age"] == pytest.approx(example.truth["age"], abs=1.0)


def test_the_seed_fixes_the_federation_and_never_the_guard_s_noise(
    small: HeartsResult, tmp_path: Path
) -> None:
    again = run_hearts(SMALL, state=tmp_path)
    assert again.auc_unguarded_by_site == small.auc_unguarded_by_site
    assert again.unguarded == small.unguarded
    assert norms(again, 1) == norms(small, 1)
    assert all(one != other for one, other in zip(norms(again, 2), norms(small, 2), strict=True))


def test_another_seed_is_another_split(small: HeartsResult) -> None:
    other = run_hearts(Settings(repeats=1, rounds=4, turns_at=3, seed=5))
    assert other.auc_unguarded_by_site != small.auc_unguarded_by_site


def test_progress_counts_every_round_and_the_surroundings_are_left_alone(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    torch.manual_seed(4)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    run_hearts(
        Settings(repeats=1, rounds=1, turns_at=1, scales=(0.01,)),
        state=tmp_path,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_bare_hospital_hands_over_what_it_trained() -> None:
    model = network(13, 256, seeded())
    sent = copied(model.state_dict())
    outcome = BareDoor().take_part(site(), 1, sent, model, seeded(1))
    assert outcome.state is not None
    assert all(
        torch.equal(outcome.state[name], value) for name, value in model.state_dict().items()
    )
    assert outcome.norm == pytest.approx(update_norm(sent, outcome.state))


def test_a_guarded_hospital_hands_over_something_else_than_it_trained(tmp_path: Path) -> None:
    model = network(13, 256, seeded())
    sent = copied(model.state_dict())
    door = GuardedDoor("tabular-ehr", tmp_path, "job")
    outcome = door.take_part(site(), 1, sent, model, seeded(1))
    assert outcome.action == "released"
    assert outcome.state is not None
    assert all((outcome.state[name] != value).any() for name, value in model.state_dict().items())


def test_a_guarded_hospital_does_not_train_on_a_crafted_model_unless_told_to(
    tmp_path: Path,
) -> None:
    model = network(13, 256, seeded())
    crafted = binning(model, copied(model.state_dict()), generator=seeded(2), scale=0.01)
    before = copied(model.state_dict())
    refused = GuardedDoor("tabular-ehr", tmp_path / "a", "job").take_part(
        site(), 1, crafted, model, seeded(1)
    )
    assert (refused.action, refused.state, refused.norm) == ("refused", None, None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    blind = GuardedDoor("tabular-ehr", tmp_path / "b", "job", inspects=False)
    assert blind.take_part(site(), 1, crafted, model, seeded(1)).action == "released"


def test_an_update_with_too_few_patients_behind_it_is_withheld(tmp_path: Path) -> None:
    model = network(13, 256, seeded())
    door = GuardedDoor("tabular-ehr", tmp_path, "job")
    outcome = door.take_part(site(10), 1, copied(model.state_dict()), model, seeded(1))
    assert (outcome.action, outcome.reason) == ("withheld", "too-few-patients")


def test_auc_is_the_field_s_own_with_ties() -> None:
    scores = torch.randn(200, generator=seeded()).mul(2).round()
    labels = (torch.rand(200, generator=seeded(1)) < 0.3).float()
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))


def test_a_network_starts_as_torch_starts_one_without_its_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fresh = network(13, 256, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    bound = 13**-0.5
    weight = fresh[0].weight.detach()
    assert 0.95 * bound < weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.equal(weight, network(13, 256, seeded())[0].weight)


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"turns_at": 0}, {"turns_at": 21}, {"scales": ()}]
)
def test_a_run_with_nothing_to_show_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(MisuseError):
        Settings(**wrong)


def test_the_means_are_over_hospitals_and_the_loss_is_their_difference(small: HeartsResult) -> None:
    assert small.auc_unguarded == pytest.approx(sum(small.auc_unguarded_by_site.values()) / 4)
    loss = small.auc_unguarded - small.auc_guarded
    assert small.auc_losses == pytest.approx((loss,))
    assert 0.5 < small.auc_unguarded < 1.0
