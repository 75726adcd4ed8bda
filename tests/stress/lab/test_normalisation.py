"""Normalised pictures are attacked as strongly as plain ones, and plain ones as before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from sentinel.demo.subjects import xray_model, xrays
from sentinel.errors import MisuseError
from sentinel.page.png import data_uri
from sentinel.stress.lab.attacks import ATTACKS
from sentinel.stress.lab.attacks.pictures import in_pixels
from sentinel.stress.lab.deadline import Deadline
from sentinel.stress.lab.exchange import Case, Site, Update, raw
from sentinel.stress.lab.gallery import _grey
from sentinel.stress.lab.loading import subject_of
from sentinel.stress.lab.normalisation import Normalisation
from sentinel.stress.lab.page import page
from sentinel.stress.lab.runner import Options, run_lab
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST, Setting
from sentinel.stress.passive.dlg import Descent
from sentinel.stress.passive.images import LONE
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.stress.lab.finding import Finding
    from sentinel.stress.lab.subject import Subject

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalisation((0.5,), (0.25,))


def colours(count: int = 64) -> torch.Tensor:
    """Pictures of three channels, none of which reaches from 0 to 1."""
    pictures = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return pictures * torch.tensor([0.8, 0.5, 0.9])[:, None, None]


def test_pixels_come_back_from_what_the_model_takes_channel_by_channel() -> None:
    pictures = colours()
    inputs = PLAN.to_inputs(pictures)
    means, stds = torch.tensor(PLAN.mean), torch.tensor(PLAN.std)
    assert torch.allclose(inputs[:, 2], (pictures[:, 2] - means[2]) / stds[2])
    assert torch.allclose(PLAN.to_pixels(inputs), pictures, atol=1e-6)
    assert PLAN.to_pixels(inputs.double()).dtype == torch.float64


def test_one_value_serves_every_channel() -> None:
    assert torch.equal(GREY.to_inputs(colours()), (colours() - 0.5) / 0.25)


def test_pictures_from_0_to_1_are_left_alone_down_to_the_object() -> None:
    plain = Normalisation.measured([colours(), colours(8)])
    records = Records(colours(), torch.zeros(64).long())
    assert plain.identity
    assert plain.pictures(records) is records
    assert plain.to_pixels(records.inputs) is plain.to_inputs(records.inputs) is records.inputs


def test_a_measured_range_is_that_of_all_records_in_each_channel() -> None:
    inputs = PLAN.to_inputs(colours())
    found = Normalisation.measured([inputs[:32], inputs[32:]])
    pixels = found.to_pixels(inputs)
    assert torch.allclose(pixels.amin((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(pixels.amax((0, 2, 3)), torch.ones(3), atol=1e-6)
    assert torch.allclose(found.to_inputs(pixels), inputs, atol=1e-5)


def test_a_channel_without_contrast_has_a_range_all_the_same() -> None:
    inputs = PLAN.to_inputs(colours())
    inputs[:, 1] = -3.0
    pixels = Normalisation.measured([inputs]).to_pixels(inputs)
    assert torch.equal(pixels[:, 1], torch.zeros(64, 12, 12))


def test_records_in_pixels_keep_labels_and_flags_and_lie_from_0_to_1() -> None:
    inputs = PLAN.to_inputs(torch.rand(64, 3, 12, 12).round())
    records = Records(inputs, torch.arange(64), torch.arange(64) > 3)
    found = PLAN.pictures(records)
    assert (float(found.inputs.min()), float(found.inputs.max())) == (0.0, 1.0)
    assert found.labels is records.labels
    assert found.flags is records.flags


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((float("nan"),), (1.0,)), ((), (1.0,)), ((0.5,), ())],
)
def test_what_cannot_be_undone_is_refused(mean, std) -> None:
    with pytest.raises(MisuseError, match="above 0"):
        Normalisation(mean, std)


@pytest.mark.parametrize(
    ("given", "inputs", "expected"),
    [
        (Normalisation((0.5, 0.5), (0.25,)), GREY.to_inputs(colours()), "each of the 3 channels"),
        (PLAN, colours(), "are not normalised; leave mean and std out"),
        (GREY, PLAN.to_inputs(colours()), "divided by 255"),
        (Normalisation(), PLAN.to_inputs(colours()), "divided by 255"),
    ],
    ids=["channels", "plain", "another", "none"],
)
def test_a_normalisation_that_is_not_that_of_the_pictures_is_refused(
    given, inputs, expected
) -> None:
    with pytest.raises(MisuseError, match=expected):
        given.require_fit([inputs])


def test_half_precision_is_no_other_normalisation() -> None:
    PLAN.require_fit([PLAN.to_inputs(torch.rand(64, 3, 12, 12).round()).bfloat16().float()])


def with_inputs(data: dict[str, Any], change: Normalisation, *, tell: bool) -> dict[str, Any]:
    """The same records as a plan hands them to the model, and the plan where it is told."""
    parts = ("train", "held_out", "public")
    found = {part: (change.to_inputs(data[part][0]), data[part][1]) for part in parts}
    return {**data, **found, **({"mean": change.mean, "std": change.std} if tell else {})}


def updated(subject: Subject, setting: Setting) -> tuple[Case, Update]:
    site = Site(subject, torch.Generator().manual_seed(0))
    update = site.update(setting, SERVERS[HONEST])
    return site.case(update, raw(update)), update


def attacked(subject: Subject, name: str, setting: Setting) -> Finding:
    case, update = updated(subject, setting)
    assert ATTACKS[name].misfit(subject, setting) is None
    generator = torch.Generator().manual_seed(1)
    return ATTACKS[name].run(case, update.behind, generator, Deadline.after(600.0))


def require_pixels(found: Finding) -> None:
    """What the report shows lies from 0 to 1."""
    assert found.exhibits
    for shown in found.exhibits:
        assert 0.0 <= float(shown.truth.min()) <= float(shown.truth.max()) <= 1.0
        assert 0.0 <= float(shown.guess.min()) <= float(shown.guess.max()) <= 1.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that suffice for what these tests say."""
    monkeypatch.setattr("sentinel.stress.lab.attacks.pictures.LONE", replace(LONE, iterations=300))
    sharp = Descent(iterations=60, restarts=1)
    monkeypatch.setattr("sentinel.stress.lab.attacks.pictures.SHARP", sharp)
    monkeypatch.setattr("sentinel.stress.lab.attacks.untold.SHARP", sharp)


@pytest.mark.usefixtures("quick")
def test_a_normalised_x_ray_comes_back_from_a_raw_gradient_as_well_as_a_plain_one() -> None:
    """The net of the demo with strides of 2, its own pictures, no public ones."""

    def likeness(data: dict[str, Any]) -> float:
        alone = {key: value for key, value in data.items() if key != "public"}
        subject = subject_of(xray_model(), alone, torch.Generator().manual_seed(0), "x-rays")
        found = attacked(subject, "pictures", Setting(records=1))
        require_pixels(found)
        assert found.tallies[1].mean == 1.0
        return found.main.mean

    plain = likeness(xrays())
    assert plain > 0.93
    for tell in (True, False):
        assert likeness(with_inputs(xrays(), GREY, tell=tell)) > plain - 0.03


def normalised(coloured: Callable[..., Subject], *, tell: bool) -> Subject:
    """Pictures of three channels as ImageNet's are normalised."""
    return coloured(lambda data: with_inputs(data, PLAN, tell=tell))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("name", ["pictures", "untold"])
def test_normalised_colours_come_back_with_and_without_the_label(coloured, name, tell) -> None:
    found = attacked(normalised(coloured, tell=tell), name, Setting(records=1))
    require_pixels(found)
    assert found.worst.guess.shape == (3, 12, 12)
    assert found.main.mean > 0.95
    assert found.main.gain > 0.02


def test_local_epochs_on_normalised_pictures_are_replayed_as_such(coloured) -> None:
    found = attacked(normalised(coloured, tell=True), "untold", Setting(records=8, epochs=2))
    require_pixels(found)
    assert len(found.main.values) == 8


def test_the_replay_of_pixels_is_the_training_on_what_the_model_takes(coloured) -> None:
    subject = normalised(coloured, tell=True)
    case, update = updated(subject, Setting(records=8, epochs=2))
    pixels = subject.pixels.pictures(update.behind).inputs
    replayed = in_pixels(case).update(pixels, differentiable=False)
    assert torch.allclose(replayed, case.seen.values, atol=1e-5)
    assert not torch.allclose(case.training.update(pixels, differentiable=False), replayed)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["pictures", "untold"])
def test_mean_0_and_std_1_change_nothing_in_an_attack_on_plain_pictures(images, name) -> None:
    same = replace(images, normalisation=Normalisation((0.0,), (1.0,)))
    case, _ = updated(images, Setting(records=1))
    assert in_pixels(case) is case.training
    one, other = (attacked(subject, name, Setting(records=1)) for subject in (images, same))
    assert torch.equal(one.worst.guess, other.worst.guess)
    assert one.tallies == other.tallies


@pytest.fixture
def flat(images) -> dict[str, Any]:
    """Records of the pictures, for a net whose first layer takes them as they are."""
    parts = {"train": images.train, "held_out": images.held_out, "public": images.public}
    return {name: (part.inputs, part.labels) for name, part in parts.items()}


def perceptron(data: dict[str, Any]) -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 2))
    return subject_of(net, data, torch.Generator().manual_seed(0), "flat")


def test_rows_of_normalised_pictures_are_told_from_others_as_plain_ones_are(flat) -> None:
    """A picture whose inputs are far from 0 would be near to every other one."""
    far = Normalisation((-20.0,), (2.0,))
    plain, normalised = (
        attacked(perceptron(data), "rows", Setting(records=1))
        for data in (flat, with_inputs(flat, far, tell=True))
    )
    require_pixels(normalised)
    for one, other in zip(plain.tallies, normalised.tallies, strict=True):
        assert one.mean == other.mean == 1.0
        assert abs(one.chance - other.chance) <= 1 / len(one.chances)
    assert torch.allclose(plain.worst.truth, normalised.worst.truth, atol=1e-5)
    assert torch.allclose(normalised.worst.guess, normalised.worst.truth, atol=1e-2)


def test_the_report_shows_pixels_and_not_what_the_model_takes(flat, plain, stop_after) -> None:
    subject = perceptron(with_inputs(flat, GREY, tell=True))
    result = run_lab(subject, plain(), Options(("rows",), 600.0, curves=False), stop_after(1))
    html = page([result], "here", redacted=False)
    shown = [picture for picture in flat["train"][0] if data_uri(_grey(picture.mean(0))) in html]
    assert shown
    assert data_uri(_grey(GREY.to_inputs(shown[0]).mean(0))) not in html
    redacted = page([result], "here", redacted=True)
    assert data_uri(_grey(shown[0].mean(0))) not in redacted
    assert data_uri(_grey(torch.zeros(4, 4))) in redacted  # a raw row is read: all is right


def test_a_range_is_measured_anew_of_the_records_that_are_left(images) -> None:
    """As where only public records may be looked at."""
    inputs = GREY.to_inputs(images.train.inputs)
    narrow = Records(inputs / 2.0, images.train.labels)
    data = {"train": (inputs, images.train.labels), "held_out": (inputs, images.train.labels)}
    subject = subject_of(images.model, data, torch.Generator().manual_seed(0), "two")
    left = replace(subject, train=narrow, held_out=narrow)
    assert left.pixels != subject.pixels
    assert left.pixels == Normalisation.measured([narrow.inputs])
