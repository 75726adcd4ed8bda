"""The X-ray half of the demo: its data, its run through a real guard, and what it claims."""

import dataclasses
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from sentinel.demo import xray_data, xrays
from sentinel.demo.xray_hospital import Hospital, initialise, xray_net
from sentinel.demo.xray_result import XrayResult, XraySettings
from sentinel.demo.xrays import run_xrays
from sentinel.errors import MisuseError, Withheld
from sentinel.guard import Guard
from sentinel.stress.passive.estimate import Estimation
from sentinel.stress.passive.images import ImageAttacker
from sentinel.stress.passive.inversion import Matching
from sentinel.stress.ssim import ssim

# One of each kind, and as many iterations as still take the lone picture.
QUICK = XraySettings(
    lone=1,
    shown=4,
    lone_search=Matching(iterations=400),
    attacker=ImageAttacker({"smoothed": Matching(iterations=4)}, {"prior": Estimation(rounds=2)}),
)


@pytest.fixture(scope="module")
def calls() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[int, int]]) -> XrayResult:
    state = tmp_path_factory.mktemp("xrays")
    return run_xrays(QUICK, state=state, on_step=lambda done, total: calls.append((done, total)))


def test_the_attacker_is_told_the_true_clip_and_noise(tmp_path: Path) -> None:
    """What is released less the clipped raw update has the standard deviation that it is told."""
    guard = Guard("chest-xray", tmp_path)
    hospital = Hospital.draw(QUICK)
    release = xrays._release(hospital, guard)
    raw = hospital.raw_update(hospital.data.hospital)
    seen = release.seen
    policy = guard.policy.policy
    assert seen.scale == pytest.approx(min(1.0, policy.noise_norm / float(raw.norm())))
    rest = seen.values - seen.scale * raw
    assert float(rest.std()) == pytest.approx(seen.noise_std, rel=0.02)
    ratio = policy.always[0].noise_ratio
    expected = ratio * policy.noise_norm / math.sqrt(len(raw))
    assert seen.noise_std == pytest.approx(expected)


def test_the_shipped_pictures_are_small_and_counted_as_attributed() -> None:
    data = resources.files("sentinel.demo") / "data"
    assert len((data / "xrays.npz").read_bytes()) < 400_000
    attribution = (data / "ATTRIBUTION-xrays.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in attribution
    parts = xray_data.load()
    for part, each in (("hospital", 32), ("decoys", 99), ("public", 140)):
        pictures = getattr(parts, part)
        assert pictures.labels.bincount().tolist() == [each, each]
        assert f"| `{part}_images`, `{part}_labels` | {each} of each class" in attribution


def test_no_picture_is_shipped_twice() -> None:
    data = xray_data.load()
    images = torch.cat([data.hospital.images, data.decoys.images, data.public.images])
    assert len(np.unique(images.flatten(1).numpy(), axis=0)) == 542
    assert images.shape[1:] == (1, 28, 28)
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0


def test_a_split_keeps_every_picture_once_and_the_classes_even() -> None:
    public = xray_data.load().public
    first, others = public.split(32)
    assert first.labels.bincount().tolist() == [32, 32]
    assert others.labels.bincount().tolist() == [108, 108]
    both = torch.cat([first.images, others.images]).flatten(1).numpy()
    assert len(np.unique(both, axis=0)) == len(public.labels)


def test_one_picture_is_taken_from_its_raw_gradient(result: XrayResult) -> None:
    assert result.ssim_raw >= 0.9
    assert result.lone_ssims == (pytest.approx(result.ssim_raw),)


def test_the_policy_keeps_the_update_of_one_patient_in(result: XrayResult) -> None:
    assert result.lone_image_withheld
    assert result.lone_reason == "too-few-patients"


def test_the_released_update_gives_no_more_than_the_class_mean(result: XrayResult) -> None:
    assert result.batch_size == 64
    assert result.ssim_sanitized <= result.ssim_class_mean + 0.02
    assert result.reid_top1 <= result.reid_chance_limit
    assert result.reid_by_chance > 0.003
    assert result.ssim_class_mean == pytest.approx(0.68, abs=0.02)


def test_the_released_update_was_clipped_and_noised_as_the_policy_says(result: XrayResult) -> None:
    done = result.treatment
    assert done.norm > done.max_norm > 0  # the clip binds: the case that favours the attacker
    assert done.noise_norm >= done.max_norm
    assert "baseline" in done.rules


def test_the_headline_is_the_best_of_all_attackers(result: XrayResult) -> None:
    assert set(result.sanitized) == {"smoothed", "prior"}
    assert result.ssim_sanitized == max(attack.ssim for attack in result.sanitized.values())
    assert result.ssim_raw_batch == max(attack.ssim for attack in result.raw.values())


def test_figures_say_where_they_were_measured(result: XrayResult) -> None:
    assert result.parameters == 17_186
    assert "convolutions" in result.net
    assert result.stage == "at initialisation"
    assert 0.0 < result.ssim_unrelated < 1.0


def test_pictures_are_those_behind_the_update(result: XrayResult) -> None:
    shown = result.pictures
    expected = xray_data.load().hospital.images[:4, 0].mul(255).round().to(torch.uint8).numpy()
    assert np.array_equal(shown.originals, expected)
    for field in dataclasses.fields(shown):
        pictures = getattr(shown, field.name)
        assert pictures.dtype == np.uint8
        assert pictures.shape[-2:] == (28, 28)
    again = torch.from_numpy(shown.lone_reconstructed).float()[None, None] / 255
    original = torch.from_numpy(shown.lone).float()[None, None] / 255
    assert float(ssim(again, original)) == pytest.approx(result.lone_ssims[0], abs=0.01)
    assert shown.raw.shape == shown.sanitized.shape == shown.class_means.shape == (4, 28, 28)


def test_progress_counts_up_to_its_total(result: XrayResult, calls: list[tuple[int, int]]) -> None:
    assert result.settings is QUICK
    done, total = zip(*calls, strict=True)
    assert done == tuple(range(1, len(calls) + 1))
    assert set(total) == {len(calls)}


def test_a_policy_that_lets_nothing_out_ends_the_run(tmp_path: Path) -> None:
    policy = tmp_path / "closed.toml"
    policy.write_text(
        'schema = 1\nname = "closed"\n[limits]\nmin_patients = 65\n'
        '[[rule]]\nid = "baseline"\nmax_norm = 0.25\nnoise_ratio = 5.0\n',
        encoding="utf-8",
    )
    settings = dataclasses.replace(QUICK, policy=str(policy))
    with pytest.raises(Withheld, match="too-few-patients"):
        run_xrays(settings, state=tmp_path / "state")


def test_weights_are_drawn_as_torch_does_by_default_and_from_the_given_generator() -> None:
    nets = [xray_net() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        initialise(net, torch.Generator().manual_seed(seed))
    weights = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    linear = nets[0][-1]
    bound = 1 / math.sqrt(linear.in_features)
    assert 0.99 * bound < float(linear.weight.detach().abs().max()) <= bound


def test_a_run_leaves_the_global_generator_and_the_thread_count_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    quickest = dataclasses.replace(
        QUICK,
        lone_search=Matching(iterations=2),
        attacker=ImageAttacker({}, {"prior": Estimation(rounds=1, products=2)}),
    )
    run_xrays(quickest, state=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("settings", [{"lone": 0}, {"shown": 0}])
def test_a_run_with_nothing_to_show_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(MisuseError, match="at least one"):
        XraySettings(**settings)
