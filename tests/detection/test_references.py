"""References of one guard: kept where they can be had, and not tried every round where not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sentinel.detection import References, references

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Counted(nn.Module):
    """A model that takes no input, and counts how often it is asked."""

    asked = 0

    def __init__(self) -> None:
        """Hold one dense layer."""
        super().__init__()
        self.dense = nn.Linear(3, 2)

    def forward(self, _: object) -> object:
        """Refuse."""
        type(self).asked += 1
        raise TypeError


def test_an_architecture_without_a_reference_is_tried_again_only_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "asked", 0)
    kept, model = References(tmp_path), Counted()
    state = model.state_dict()
    assert kept.of(model, state) is None
    first = Counted.asked
    assert first > 0
    for _ in range(references.PAUSE - 1):
        assert kept.of(model, state) is None
    assert Counted.asked == first
    assert kept.of(model, state) is None
    assert Counted.asked == 2 * first


def test_a_pause_is_of_one_architecture(tmp_path: Path) -> None:
    kept, bad, good = (
        References(tmp_path),
        Counted(),
        nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)),
    )
    assert kept.of(bad, bad.state_dict()) is None
    assert kept.of(good, good.state_dict()) is not None
    assert [path.name[:10] for path in tmp_path.iterdir()] == ["reference-"]


def test_a_model_without_shapes_has_no_reference(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    assert References(tmp_path).of(model, model.state_dict()) is None
