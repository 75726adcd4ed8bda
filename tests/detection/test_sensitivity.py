"""Sensitivity score and reference: few records score high, many low, on models of several kinds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from sentinel.detection import Reference, build_reference, score_update
from sentinel.detection.clues import CLUES, alone, clues
from sentinel.detection.features import FEATURES, update_features
from sentinel.detection.readout import beyond_chance, token_leakage
from sentinel.detection.rounds import Spec, drawn_labels, local_round, measured_leakage
from sentinel.detection.sensitivity import BLIND
from sentinel.errors import MisuseError, Withheld
from sentinel.stress import corpus, servers
from sentinel.terms import Reason
from sentinel.update import Update

if TYPE_CHECKING:
    from pathlib import Path

MLPS = ["mlp-13-256-1", "mlp-13-64-2", "mlp-30-128-64-5"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bench:
    """One model with its task and its reference."""

    def __init__(self, name: str, steps: int = 20) -> None:
        """Train a little and build the reference."""
        net = next(net for net in corpus.NETS if net.name == name)
        self.module = corpus.fresh(net, seeded(1))
        self.task = corpus.Task(net, seeded(2))
        corpus.train(self.module, self.task, steps=steps, rate=0.05)
        self.state = self.module.state_dict()
        self.reference = build_reference(self.module, self.state, sample=net.shape)

    def deltas(self, spec: Spec) -> dict[str, torch.Tensor]:
        """Train for one round."""
        return local_round(self.module, *self.task.draw(spec.records), spec)

    def score(self, spec: Spec) -> float:
        """Score one round."""
        return score_update(self.deltas(spec), self.reference).overall


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {name: Bench(name) for name in (*MLPS, "lenet-256")}


@pytest.mark.parametrize("name", [*MLPS, "lenet-256"])
def test_the_gradient_of_one_record_scores_above_what_the_shipped_policies_withhold(
    benches: dict[str, Bench], name: str
) -> None:
    scores = [benches[name].score(Spec(1, 1, 1, 0.1)) for _ in range(5)]
    assert min(scores) > 0.9


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("spec", [Spec(100, 16, 2, 0.05), Spec(200, 16, 2, 0.1)])
def test_ordinary_federated_averaging_scores_below_what_the_shipped_policies_tighten(
    benches: dict[str, Bench], name: str, spec: Spec
) -> None:
    assert max(benches[name].score(spec) for _ in range(5)) < 0.5


def test_fewer_records_score_higher_on_the_whole(benches: dict[str, Bench]) -> None:
    for bench in benches.values():
        means = [
            sum(bench.score(Spec(count, count)) for _ in range(6)) / 6 for count in (1, 8, 128)
        ]
        assert means[0] > means[1] > means[2]


def test_a_plain_mapping_and_an_update_score_alike_whatever_the_size(
    benches: dict[str, Bench],
) -> None:
    bench = benches["mlp-13-256-1"]
    deltas = bench.deltas(Spec(4, 4))
    local = {name: bench.state[name] + deltas[name] for name in deltas}
    update = Update.from_states(bench.state, local)
    whole = score_update(update, bench.reference)
    assert whole.sharpness == "reference"
    assert whole.overall == pytest.approx(score_update(deltas, bench.reference).overall, abs=0.1)
    tripled = {name: 3 * value for name, value in deltas.items()}
    assert score_update(tripled, bench.reference).overall == pytest.approx(
        score_update(deltas, bench.reference).overall, abs=1e-3
    )


def test_every_tensor_has_a_score_and_a_still_one_scores_zero(benches: dict[str, Bench]) -> None:
    bench = benches["lenet-256"]
    deltas = bench.deltas(Spec(1, 1))
    deltas["0.weight"].zero_()
    deltas["0.bias"].zero_()
    score = score_update(deltas, bench.reference)
    assert set(score.per_tensor) == set(deltas)
    assert score.per_tensor["0.weight"] == 0.0
    assert score.per_tensor["7.weight"] > 0.9
    assert score.per_tensor["7.bias"] == score.per_tensor["7.weight"]
    assert all(0.0 <= value <= 1.0 for value in score.per_tensor.values())


def test_an_update_of_zeros_or_of_nothing_scores_zero() -> None:
    assert score_update({"a": torch.zeros(3, 4)}).overall == 0.0
    assert score_update({}).overall == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_withheld(value: float) -> None:
    deltas = {"a.weight": torch.ones(3, 4), "b": torch.ones(3)}
    deltas["a.weight"][1, 1] = value
    with pytest.raises(Withheld) as raised:
        score_update(deltas)
    assert raised.value.reason is Reason.NOT_FINITE


def test_without_a_reference_the_score_says_generic(benches: dict[str, Bench]) -> None:
    bench = benches["mlp-100-512-10"] if "mlp-100-512-10" in benches else Bench("mlp-100-512-10")
    single = score_update(bench.deltas(Spec(1, 1)))
    many = score_update(bench.deltas(Spec(200, 16, 2)))
    assert single.sharpness == many.sharpness == "generic"
    assert single.overall > many.overall


def test_a_reference_is_kept_by_architecture_and_rebuilt_when_damaged(tmp_path: Path) -> None:
    net = corpus.NETS[1]
    module = corpus.fresh(net, seeded(1))
    state = module.state_dict()
    first = build_reference(module, state, folder=tmp_path / "references")
    (kept,) = (tmp_path / "references").iterdir()
    assert kept.stat().st_size < 50_000
    other = corpus.fresh(net, seeded(2))
    again = build_reference(other, other.state_dict(), folder=tmp_path / "references")
    assert _same(first, again)
    whole = kept.read_bytes()
    for damaged in (b"", b"{", whole[:100], whole[:-8], whole.replace(b"floor", b"roofs")):
        kept.write_bytes(damaged)
        assert _same(first, build_reference(module, state, folder=tmp_path / "references"))
        assert kept.read_bytes() == whole


def _same(left: Reference, right: Reference) -> bool:
    return (
        (left.tensors, left.read, left.floor) == (right.tensors, right.read, right.floor)
        and np.array_equal(left.rounds, right.rounds, equal_nan=True)
        and np.array_equal(left.leakage, right.leakage)
    )


def empty(floor: float) -> Reference:
    """A reference in which nothing tells."""
    nothing = np.zeros(0)
    return Reference((), (), np.zeros((0, 0, len(FEATURES))), nothing, nothing, nothing, floor)


def test_building_a_reference_leaves_the_model_and_the_generators_untouched() -> None:
    net = corpus.NETS[6]  # batch normalisation
    module = corpus.fresh(net, seeded(1)).train()
    state = servers.copied(module.state_dict())
    generator = torch.get_rng_state()
    build_reference(module, state)
    assert torch.equal(generator, torch.get_rng_state())
    assert module.training
    assert all(value.grad is None for value in module.parameters())
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_a_model_without_a_fitting_input_is_misuse_that_says_sample() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 5)), nn.Linear(5, 2))
    with pytest.raises(MisuseError, match="sample="):
        build_reference(module, module.state_dict())
    assert build_reference(module, module.state_dict(), sample=(15,)).tensors


def test_a_model_of_tokens_has_a_reference() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 16)
            self.hidden = nn.Linear(16, 32)
            self.last = nn.Linear(32, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.hidden(self.words(tokens).mean(1))))

    module = Text()
    reference = build_reference(module, module.state_dict())
    tokens = torch.randint(50, (1, 16), generator=seeded(1))
    deltas = local_round(module, tokens, torch.tensor([1]), Spec(1, 1))
    assert score_update(deltas, reference).overall > 0.9


def test_a_model_crafted_to_leak_has_a_floor_under_every_score() -> None:
    net = corpus.NETS[0]
    module = corpus.fresh(net, seeded(1))
    honest = build_reference(module, module.state_dict())
    crafted = servers.binning(module, module.state_dict(), generator=seeded(2), scale=0.01)
    trapped = build_reference(module, crafted)
    assert trapped.floor > 0.2
    assert honest.floor < 0.1
    module.load_state_dict(crafted)
    records, labels = corpus.Task(net, seeded(3)).draw(100)
    deltas = local_round(module, records, labels, Spec(100, 100))
    assert score_update(deltas, trapped).overall >= trapped.floor


def test_leakage_counts_all_of_one_record_and_none_of_a_large_average() -> None:
    net = corpus.NETS[1]
    module = corpus.fresh(net, seeded(1))
    task = corpus.Task(net, seeded(2))
    outside, _ = task.draw(64)
    for count, expected in ((1, 1.0), (256, 0.0)):
        records, labels = task.draw(count)
        deltas = local_round(module, records, labels, Spec(count, count))
        leak = measured_leakage(module, module.state_dict(), deltas, records, outside)
        assert leak == pytest.approx(expected, abs=0.05)


def test_likely_labels_follow_the_model_and_others_do_not() -> None:
    module = nn.Linear(4, 2)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.copy_(torch.tensor([0.0, 4.0]))
    records = torch.zeros(2000, 4)
    likely = drawn_labels(module, records, seeded(1), likely=True).double().mean()
    even = drawn_labels(module, records, seeded(1), likely=False).double().mean()
    assert float(likely) == pytest.approx(0.982, abs=0.02)
    assert float(even) == pytest.approx(0.5, abs=0.05)


def test_where_nothing_tells_the_score_is_blind_and_below_the_shipped_threshold() -> None:
    deltas = {"a": torch.randn(5, generator=seeded(1)), "still": torch.zeros(3)}
    for reference in (None, empty(0.0), empty(0.2)):
        score = score_update(deltas, reference)
        assert score.sharpness == "blind"
        assert score.overall == score.per_tensor["a"] == BLIND < 0.5
        assert score.per_tensor["still"] == 0.0
    measured = score_update(deltas, empty(0.7))
    assert measured.overall == 0.7
    assert measured.sharpness == "reference"


@pytest.mark.parametrize("kind", ["plain", "rare"])
def test_many_records_trained_with_adam_score_below_what_the_shipped_policies_tighten(
    benches: dict[str, Bench], kind: str
) -> None:
    bench = benches["mlp-13-256-1"]
    task = corpus.Task(corpus.NETS[0], seeded(4), kind)
    for records in (64, 100, 200):
        spec = Spec(records, 32, 3, 1e-3, adam=True)
        deltas = local_round(bench.module, *task.draw(records), spec)
        assert score_update(deltas, bench.reference).overall < 0.5


def test_many_unscaled_records_trained_with_adam_are_let_be_and_one_is_tightened(
    benches: dict[str, Bench],
) -> None:
    bench = benches["mlp-13-256-1"]
    task = corpus.Task(corpus.NETS[0], seeded(4), "raw")
    for records in (64, 100, 200):
        spec = Spec(records, 32, 3, 1e-3, adam=True)
        deltas = local_round(bench.module, *task.draw(records), spec)
        assert score_update(deltas, bench.reference).overall < 0.5
    one = local_round(bench.module, *task.draw(1), Spec(1, 1, 1, 1e-3, adam=True))
    assert score_update(one, bench.reference).overall > 0.5


def test_the_own_adam_steps_as_pytorchs_does() -> None:
    module = corpus.fresh(corpus.NETS[1], seeded(1))
    rows, labels = corpus.Task(corpus.NETS[1], seeded(2)).draw(64)
    deltas = local_round(module, rows, labels, Spec(64, 16, 2, 1e-3, adam=True))
    start = servers.copied(module.state_dict())
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(2):
        for first in range(0, 64, 16):
            optimizer.zero_grad()
            output = module(rows[first : first + 16])
            nn.functional.cross_entropy(output, labels[first : first + 16]).backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(deltas[name], value - start[name], atol=1e-5, rtol=1e-3)


def test_rare_labels_are_rare_and_raw_columns_have_units_of_their_own() -> None:
    _, labels = corpus.Task(corpus.NETS[0], seeded(1), "rare").draw(4000)
    assert float(labels.double().mean()) == pytest.approx(0.03, abs=0.01)
    rows, _ = corpus.Task(corpus.NETS[0], seeded(1), "raw").draw(400)
    assert float(rows.std(0).max() / rows.std(0).min()) > 10.0


def test_clues_are_named_once() -> None:
    assert len(set(CLUES)) == len(CLUES)


@pytest.mark.parametrize(
    ("read", "records", "expected"),
    [(1.0, 1, 1.0), (1 / 16, 16, 1 / 16), (1 / 64, 64, 0.0), (0.0, 8, 0.0), (0.02, 200, 0.02)],
)
def test_only_what_is_read_beyond_chance_counts(read: float, records: int, expected: float) -> None:
    assert beyond_chance(read, 0.0, records, 64) == pytest.approx(expected)


def test_the_words_of_one_text_are_read_and_those_of_many_only_together() -> None:
    generator = seeded(1)
    texts = torch.stack([torch.randperm(200, generator=generator)[:12] for _ in range(40)])
    for count, expected in ((1, 1.0), (8, 0.0)):
        weight = torch.zeros(200, 4)
        weight[texts[:count].flatten()] = torch.randn(12 * count, 4, generator=generator)
        assert token_leakage(weight, texts[:count], texts[8:]) == expected


def test_momentum_steps_as_pytorchs_does() -> None:
    module = corpus.fresh(corpus.NETS[1], seeded(1))
    rows, labels = corpus.Task(corpus.NETS[1], seeded(2)).draw(16)
    deltas = local_round(module, rows, labels, Spec(16, 8, 2, 0.05, momentum=0.9))
    start = servers.copied(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        for first in (0, 8):
            optimizer.zero_grad()
            output = module(rows[first : first + 8])
            nn.functional.cross_entropy(output, labels[first : first + 8]).backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(deltas[name], value - start[name], atol=1e-6, rtol=1e-4)


def test_a_model_whose_rounds_would_take_too_long_is_refused_before_they_begin() -> None:
    class Slow(nn.Module):
        """A dense layer that takes its time."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1)
            return self.layer(rows)

    model = Slow()
    start = time.perf_counter()
    with pytest.raises(MisuseError, match="more than the 5 allowed"):
        build_reference(model, model.state_dict(), patience=5.0)
    assert time.perf_counter() - start < 5.0


def test_clues_of_single_tensors_are_those_of_an_update_of_each() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
    deltas = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    measured = update_features(deltas, torch.Generator().manual_seed(0))
    assert len(measured) == 2
    each = [clues([entry], None).tolist() for entry in measured]
    assert alone(measured).tolist() == [pytest.approx(row) for row in each]
