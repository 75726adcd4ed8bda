"""Under a promise the attacker replays every step exactly, and still tells next to nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, imported as its command does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("private_membership")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_influences_are_the_clipped_gradients_of_each_record(table: Any) -> None:
    rows = torch.randn(5, 3, generator=seeded())
    rows[0] *= 1e-3  # one that is not clipped
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    head = nn.Linear(3, 1)
    nn.init.uniform_(head.weight, -1.0, 1.0, generator=seeded(1))
    nn.init.constant_(head.bias, 5.0)  # the first record's gradient on the bias is not small
    state = {name: value.detach() for name, value in head.named_parameters()}
    for clip_norm in (0.3, 10.0):
        found = table.influences(state, rows, labels, clip_norm)
        for place in range(5):
            head.zero_grad()
            margin = head(rows[place : place + 1])[:, 0]
            F.binary_cross_entropy_with_logits(margin, labels[place : place + 1]).backward()
            grads = [head.weight.grad, head.bias.grad]
            alone = torch.cat([g.flatten() for g in grads if g is not None])
            alone *= min(1.0, clip_norm / float(alone.norm()))
            assert torch.allclose(found[place], alone, atol=1e-6)


def test_without_noise_to_speak_of_the_attacker_is_sure(table: Any) -> None:
    """Influences in large units of the noise: the control that it reads sums of them."""
    influences = 50.0 * torch.randn(12, 30, generator=seeded(), dtype=torch.float64)
    members = torch.arange(12) % 2 == 0
    parts = []
    for step in range(3):
        noise = torch.randn(30, generator=seeded(step), dtype=torch.float64)
        parts.append((influences, influences[members].sum(0) + noise))
    scores = table.joint(table.seen_in(parts), 0.5)
    assert float(scores[members].min()) > float(scores[~members].max())


def test_the_attacker_replays_every_private_step_down_to_its_noise(
    table: Any, tmp_path: Path
) -> None:
    """Released step less the sum of its members' influences: deviation 1, in units of the noise."""
    split = table.open_updates.cases(None, 16)["hearts"].draw(0)
    trained = table.train(split, 100.0, tmp_path, table.private.Knobs(2, 1, 0.3, 1.0))
    rest = []
    for name, site in split.sites.items():
        rest += [update - own[site.members].sum(0) for own, update in trained.rounds[name]]
    left = torch.stack(rest)
    assert left.shape == (8, 27)
    assert float(left.std()) == pytest.approx(1.0, abs=0.2)
    assert abs(float(left.mean())) < 0.3
