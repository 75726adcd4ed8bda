"""Whatever a site hands over is taken in its simplest form, and refused in a sentence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sentinel.errors import MisuseError
from sentinel.stress.lab.loading import load_subject, subject_of
from sentinel.stress.lab.normalisation import Normalisation
from sentinel.stress.lab.subject import Kind, Subject

ROWS, LABELS = (
    torch.randn(200, 5, generator=torch.Generator().manual_seed(1)),
    torch.arange(200) % 2,
)


BYTES = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)


class Dicts(Dataset):
    """Gives its records as other libraries do."""

    def __len__(self) -> int:
        """As many as there are rows."""
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, object]:
        """One record by its keys."""
        return {"Smith": ROWS[index], "label": LABELS[index]}


@dataclasses.dataclass
class Given:
    """What a loader may give."""

    train: object
    kind: str = "table"
    rate: float = 0.5


def subject(given: object) -> Subject:
    return subject_of(nn.Linear(5, 2), given, torch.Generator().manual_seed(0), "site")


@pytest.mark.parametrize(
    "given",
    [
        (ROWS, LABELS),
        [ROWS.numpy(), LABELS.numpy()],
        TensorDataset(ROWS, LABELS),
        {"train": (ROWS, LABELS)},
        Given((ROWS, LABELS)),
    ],
    ids=["pair", "arrays", "dataset", "mapping", "dataclass"],
)
def test_every_form_gives_the_same_records_and_keeps_three_tenths_back(given) -> None:
    found = subject(given)
    assert found.kind is Kind.TABLE
    assert (len(found.train), len(found.held_out)) == (140, 60)
    together = torch.cat([found.train.inputs, found.held_out.inputs])
    assert torch.equal(together.sort(0).values, ROWS.sort(0).values)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rows", "must be a pair"),
        ((ROWS, LABELS[:5]), "of one length"),
        ((ROWS[:40], LABELS[:40]), "too few"),
        ((ROWS * torch.nan, LABELS), "NaN"),
        ((ROWS, LABELS - 1), "numbered from 0"),
        ((ROWS, LABELS + 0.5), "must be 0 or 1"),
        ((ROWS[:, :4], LABELS), "cannot be trained"),
        ({"train": (ROWS, LABELS), "kind": "sound"}, "kind must be one of"),
        ({"train": (ROWS, LABELS), "kind": "image"}, "takes inputs of 4 axes"),
        ({"train": (ROWS, LABELS), "Mrs Smith": 1}, "1 of its keys"),
        ({"train": (ROWS, LABELS), "rate": "fast"}, "rate must be a finite number"),
        ({"train": (ROWS, LABELS), "rate": math.nan}, "rate must be a finite number"),
        ({"train": (ROWS, LABELS), "batch": math.nan}, "batch must be a whole number"),
        ({"train": (ROWS, LABELS), "categorical": "Smith"}, "from 0 to 4"),
        ({"train": (ROWS, LABELS), "categorical": [5]}, "from 0 to 4"),
        ({"train": (ROWS, LABELS), "mean": 0.5}, "mean and std go together"),
        ({"train": (ROWS, LABELS), "std": 0.5}, "mean and std go together"),
        ({"train": (ROWS, LABELS), "mean": 0.5, "std": 0.5}, "mean and std are of pictures"),
        ({"train": (ROWS, LABELS), "mean": "Smith", "std": 0.5}, "mean must be a number"),
        ({"train": (ROWS, LABELS), "mean": 0.5, "std": ["Smith"]}, "std must be a number"),
        ({"train": (ROWS, LABELS), "mean": 0.5, "std": 0}, "those of std be above 0"),
        ({"train": (ROWS, LABELS), "loss": "mean"}, "loss must be a function"),
        ({"train": (ROWS, LABELS), "property": LABELS[:5]}, "one value, 0 or 1"),
        ({"train": (ROWS, LABELS), "property": ["Smith"] * 200}, "one value, 0 or 1"),
        ({"train": (ROWS, LABELS), "property": {"public": LABELS}}, "train is needed"),
        ({"train": (ROWS, LABELS), "kind": "genotypes"}, "0, 1 or 2 minor alleles"),
        ({"train": (ROWS, LABELS), "public": (ROWS[:, :2], LABELS)}, "shape and type"),
        ({"train": (ROWS, LABELS), "held_out": (ROWS, LABELS.float())}, "shape and type"),
        ({"train": (ROWS, LABELS), "rate": 0.0}, "above 0"),
        ((BYTES, LABELS), r"images\.float\(\) / 255"),
        ((BYTES[:, 0], LABELS), r"images\.float\(\) / 255"),
        ({"train": (BYTES, LABELS), "kind": "image"}, r"images\.float\(\) / 255"),
        (DataLoader(TensorDataset(ROWS, LABELS)), r"return its dataset \(loader\.dataset\)"),
        ({"train": DataLoader(TensorDataset(ROWS, LABELS))}, "train is a DataLoader"),
        (Dicts(), "the Dataset gives dicts; return a pair"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(given, expected) -> None:
    with pytest.raises(MisuseError, match=expected) as refused:
        subject(given)
    assert "Smith" not in str(refused.value)


def test_a_property_stays_with_its_records_through_the_split() -> None:
    found = subject({"train": (ROWS, LABELS), "property": ROWS[:, 0] > 0})
    for part in (found.train, found.held_out):
        assert torch.equal(part.flags, part.inputs[:, 0] > 0)


def test_parts_may_have_properties_of_their_own() -> None:
    parts = dict.fromkeys(("train", "held_out", "public"), (ROWS, LABELS))
    flags = {"train": LABELS, "public": (1 - LABELS).tolist()}
    found = subject({**parts, "property": flags})
    assert torch.equal(found.public.flags, LABELS == 0)
    assert found.held_out.flags is None


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.25, 0.5, 0.75], (0.5, 0.25, 0.5)),
        (torch.tensor([0.25, 0.5, 0.75])[:, None, None], torch.tensor([0.5, 0.25, 0.5])),
        (np.array([0.25, 0.5, 0.75]), np.array([0.5, 0.25, 0.5], dtype=np.float32)),
    ],
    ids=["sequences", "tensors", "arrays"],
)
def test_a_normalisation_is_taken_in_the_forms_that_transforms_take(mean, std) -> None:
    plan = Normalisation((0.25, 0.5, 0.75), (0.5, 0.25, 0.5))
    pictures = torch.rand(200, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    data = {"train": (plan.to_inputs(pictures), LABELS), "mean": mean, "std": std}
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 2))
    assert subject_of(net, data, torch.Generator().manual_seed(0), "site").pixels == plan


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("os.system", "a:b", "package.module:name"),
        ("no_such_package_here:net", "a:b", "cannot be imported"),
        ("math:nothing", "a:b", "no function nothing"),
        ("math:sqrt", "a:b", "call failed with TypeError"),
        ("time:time", "a:b", "expected a torch.nn.Module"),
    ],
)
def test_a_bad_name_is_refused_with_what_was_expected(model, data, expected) -> None:
    with pytest.raises(MisuseError, match=expected):
        load_subject(model, data, torch.Generator())


def test_code_in_the_folder_of_the_command_is_found(tmp_path, monkeypatch) -> None:
    code = "import torch\ndef net(): return torch.nn.Linear(5, 2)\n"
    code += "def data(): return torch.ones(200, 5), torch.zeros(200).long()\n"
    (tmp_path / "own_site_code.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    found = load_subject("own_site_code:net", "own_site_code:data", torch.Generator())
    assert found.train.inputs.shape == (140, 5)


@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
def test_the_text_of_a_foreign_error_is_not_repeated(tmp_path, monkeypatch, error) -> None:
    name = f"failing_site_code_{error.lower()}"
    (tmp_path / f"{name}.py").write_text(f"def net(): raise {error}('Mrs Smith')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisuseError, match=error) as refused:
        load_subject(f"{name}:net", "a:b", torch.Generator())
    assert "Smith" not in str(refused.value)


def test_the_trial_step_leaves_the_model_as_it_was() -> None:
    """Also where a forward pass moves running statistics."""
    net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    subject_of(net, (ROWS, LABELS), torch.Generator().manual_seed(0), "site")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
