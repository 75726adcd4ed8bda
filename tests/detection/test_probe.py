"""A probe reads as many of a site's records as a server would, and raises the score by it alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.detection import Probe, SensitivityScore
from sentinel.errors import MisuseError


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))


def gradient(model: nn.Module, records: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = (records.sum(1) > 0).long()
    loss = nn.functional.cross_entropy(model(records), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {name: -0.1 * grad for name, grad in zip(names, grads, strict=True)}


def drawn(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("count", "least", "most"), [(1, 1.0, 1.0), (8, 0.3, 1.0), (256, 0.0, 0.1)]
)
def test_it_reads_all_of_one_record_and_hardly_any_of_many(
    count: int, least: float, most: float
) -> None:
    model, records = net(), drawn(count)
    found = Probe.of(model, model.state_dict(), records).read(gradient(model, records))
    assert least <= found <= most


def test_records_that_are_not_behind_the_update_are_not_read() -> None:
    model = net()
    probe = Probe.of(model, model.state_dict(), drawn(64, seed=2))
    assert probe.read(gradient(model, drawn(1))) < 0.05


def test_noise_that_hides_the_record_is_seen_to() -> None:
    model, records = net(), drawn(1)
    deltas = gradient(model, records)
    noise = torch.Generator().manual_seed(3)
    hidden = {
        name: delta + delta.norm() * torch.randn(delta.shape, generator=noise)
        for name, delta in deltas.items()
    }
    probe = Probe.of(model, model.state_dict(), records)
    assert probe.read(deltas) == 1.0
    assert probe.read(hidden) == 0.0


def test_a_layer_that_does_not_leave_or_did_not_move_tells_nothing() -> None:
    model, records = net(), drawn(4)
    probe = Probe.of(model, model.state_dict(), records)
    deltas = gradient(model, records)
    assert probe.read({name: torch.zeros_like(delta) for name, delta in deltas.items()}) == 0.0
    del deltas["0.bias"]
    assert probe.read(deltas) is None


def test_a_score_is_raised_and_never_lowered() -> None:
    score = SensitivityScore(0.4, {"0.weight": 0.4, "0.bias": 0.1, "2.weight": 0.2}, "generic")
    higher = score.raised(0.9, ("0.weight", "0.bias"))
    assert higher == SensitivityScore(
        0.9, {"0.weight": 0.9, "0.bias": 0.9, "2.weight": 0.2}, "probed"
    )
    same = score.raised(0.0, ("0.weight", "0.bias"))
    assert (same.overall, same.per_tensor) == (score.overall, score.per_tensor)


def test_neither_the_model_nor_the_generator_is_touched() -> None:
    model = nn.Sequential(nn.Dropout(0.5), *net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    Probe.of(model, before, drawn(4))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


class Secretive(nn.Linear):
    """Raises what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise it."""
        raise ValueError(str(x.tolist()))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU()), "no dense layer|not take these"),
        (nn.Sequential(nn.Linear(12, 2, bias=False)), "no dense layer"),
        (nn.Sequential(nn.Linear(5, 2)), "does not take these records"),
        (Secretive(12, 2), "does not take these records"),
        (nn.Sequential(nn.LazyLinear(3)), "cannot be copied"),
    ],
)
def test_what_cannot_be_probed_is_said_without_a_value(model: nn.Module, what: str) -> None:
    records = drawn(3)
    with pytest.raises(MisuseError, match=what) as error:
        Probe.of(model, model.state_dict(), records)
    assert str(float(records[0, 0]))[:5] not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__cause__ is None
