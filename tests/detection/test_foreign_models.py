"""Models of other people: a reference and probes, or none, but never their exception."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sentinel.detection import build_reference, inspect_global_model, score_update
from sentinel.detection.rounds import Spec, local_round, loss_of
from sentinel.detection.synthetic import matched
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable


class Output:
    """As libraries return it."""

    def __init__(self, logits: torch.Tensor) -> None:
        """Hold the logits."""
        self.logits = logits


class Wrapped(nn.Module):
    """A dense net whose output is packed by `pack`."""

    def __init__(self, pack: Callable[[torch.Tensor], Any]) -> None:
        """Build."""
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        self.pack = pack

    def forward(self, rows: torch.Tensor) -> Any:
        """Run the net, and pack."""
        return self.pack(self.net(rows))


class Picky(nn.Module):
    """Fails on what `refuses` says, with an exception of its own."""

    def __init__(self, most: int) -> None:
        """Build."""
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.most = most

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Fail on large batches."""
        if len(rows) > self.most:
            raise ZeroDivisionError
        return self.layer(rows)


class Backward(torch.autograd.Function):
    """Fails in its backward pass."""

    @staticmethod
    def forward(_context: Any, values: torch.Tensor) -> torch.Tensor:
        """Pass on."""
        return values.clone()

    @staticmethod
    def backward(_context: Any, *_grads: Any) -> Any:
        """Fail."""
        raise KeyError


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


FINE = {
    "bare": lambda: nn.Linear(10, 2),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 16)), nn.ReLU()),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 16))),
    "parallel": lambda: nn.DataParallel(mlp()),
    "compiled": lambda: torch.compile(mlp(), backend="eager"),
    "tuple": lambda: Wrapped(lambda out: (out, 1)),
    "dict": lambda: Wrapped(lambda out: {"logits": out}),
    "object": lambda: Wrapped(Output),
}
HOPELESS = {
    "lazy": lambda: nn.Sequential(nn.LazyLinear(2)),
    "hooked": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 2))),
    "other dict": lambda: Wrapped(lambda out: {"scores": out}),
    "text": lambda: Wrapped(lambda _: "yes"),
    "integers": lambda: Wrapped(lambda out: out.argmax(1)),
    "two arguments": lambda: nn.Bilinear(3, 3, 2),
    "large batches": lambda: Picky(2),
    "many records": lambda: Picky(40),
    "backward": lambda: Wrapped(Backward.apply),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning")
@pytest.mark.parametrize("name", FINE)
def test_an_ordinary_model_in_any_wrapping_has_a_reference_and_is_probed(name: str) -> None:
    model = FINE[name]()
    state = model.state_dict()
    reference = build_reference(model, state)
    assert set(reference.tensors) <= state.keys()
    assert reference.tensors
    assert inspect_global_model(state, None, model).probed


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_matches_states_with_and_without_its_prefix(prefix: str) -> None:
    inner = mlp()
    state = {prefix + name: value for name, value in inner.state_dict().items()}
    for model in (inner, nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        reference = build_reference(model, state)
        assert set(reference.tensors) == {f"{prefix}0.weight", f"{prefix}2.weight"}
    rows, labels = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)), torch.ones(1)
    deltas = local_round(inner, rows, labels.long(), Spec(1, 1))
    named = {prefix + name: value for name, value in deltas.items()}
    score = score_update(named, reference)
    assert score.sharpness == "reference"
    plain = score_update(deltas, build_reference(inner, inner.state_dict()))
    assert score.overall == pytest.approx(plain.overall, abs=1e-6)


def test_names_that_no_prefix_explains_are_not_matched() -> None:
    assert matched(["a", "b"], ["module.a", "b"]) is None
    assert matched(["a"], ["other.a"]) is None
    assert matched(["module.a"], ["a"]) == {"module.a": "a"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning")
@pytest.mark.parametrize("name", HOPELESS)
def test_a_model_that_cannot_be_run_has_no_reference_and_says_so(name: str) -> None:
    model = HOPELESS[name]()
    with pytest.raises(MisuseError, match="no reference can be built"):
        build_reference(model, model.state_dict())


@pytest.mark.parametrize("name", ["other dict", "text", "two arguments", "large batches"])
def test_a_model_that_cannot_be_run_is_not_probed(name: str) -> None:
    model = HOPELESS[name]()
    assert not inspect_global_model(model.state_dict(), None, model).probed


def test_our_own_mistakes_are_not_taken_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError

    monkeypatch.setattr("sentinel.detection.rehearsal.update_features", broken)
    monkeypatch.setattr("sentinel.detection.behaviour._dominant", broken)
    model = nn.Linear(6, 2)
    with pytest.raises(KeyError):
        build_reference(model, model.state_dict())
    with pytest.raises(KeyError):
        inspect_global_model(model.state_dict(), None, model)


def test_an_uninitialised_state_is_misuse() -> None:
    lazy = nn.LazyLinear(2)
    with pytest.raises(MisuseError, match="without a shape"):
        inspect_global_model(lazy.state_dict(), None, lazy)


def test_an_output_of_the_inputs_shape_is_a_reconstruction() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    loss = loss_of(rows + 2.0, torch.zeros(2, dtype=torch.int64), rows)
    assert float(loss) == pytest.approx(4.0)


def test_a_sparse_embedding_takes_part_in_synthetic_rounds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)).eval()
    words, labels = torch.randint(20, (6, 3)), torch.tensor([0, 1, 0, 1, 0, 1])
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    for spec in (Spec(6, 3), Spec(6, 3, adam=True)):
        found, expected = (local_round(one, words, labels, spec) for one in (model, dense))
        assert found["0.weight"].any()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
