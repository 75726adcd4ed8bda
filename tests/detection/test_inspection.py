"""Inspection: crafted models are found, honest ones pass, and nothing of the user's is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sentinel.detection import History, Kind, inspect_global_model
from sentinel.errors import MisuseError
from sentinel.stress import corpus, servers
from sentinel.terms import Verdict


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(name: str, seed: int = 0, init: str = "default") -> tuple[nn.Module, corpus.State]:
    net = next(net for net in corpus.NETS if net.name == name)
    module = corpus.fresh(net, seeded(seed), init)
    return module, servers.copied(module.state_dict())


CRAFTS = {
    "binning": (servers.binning, Verdict.BINNING),
    "trap_weights": (servers.trap_weights, Verdict.SPARSE_ACTIVATION),
    "qbi": (servers.qbi, Verdict.SPARSE_ACTIVATION),
    "fishing_class": (servers.fishing_class, Verdict.MAGNIFICATION),
    "fishing_feature": (servers.fishing_feature, Verdict.MAGNIFICATION),
    "suppression": (servers.suppression, Verdict.INCONSISTENCY),
}


@pytest.mark.parametrize("name", ["mlp-13-256-1", "mlp-13-64-2", "lenet-256", "norm-cnn-128"])
@pytest.mark.parametrize("craft", CRAFTS)
def test_a_textbook_attack_is_found_and_named(name: str, craft: str) -> None:
    module, honest = built(name, 3)
    attack, verdict = CRAFTS[craft]
    crafted = attack(module, honest, generator=seeded(4))
    alone = inspect_global_model(crafted)
    assert alone.suspicion > 0.8
    assert alone.verdict is verdict
    assert inspect_global_model(honest).suspicion < 0.3


@pytest.mark.parametrize(
    "choices",
    [
        {"scale": 0.01},
        {"direction": servers.Direction.MEAN},
        {"stealth": servers.Stealth(permute=True, scale=1.0, flip=0.5, jitter=0.1)},
        {"scale": 0.01, "stealth": servers.Stealth(permute=True, flip=0.5)},
    ],
)
def test_binning_is_found_behind_scale_sign_order_and_jitter(choices: dict[str, object]) -> None:
    module, honest = built("mlp-13-256-1")
    crafted = servers.binning(module, honest, generator=seeded(1), **choices)
    found = inspect_global_model(crafted)
    assert found.verdict is Verdict.BINNING
    assert found.suspicion > 0.8


def test_a_finding_names_the_crafted_layer_by_its_place_among_the_sorted_names() -> None:
    module, honest = built("lenet-256")
    crafted = servers.qbi(module, honest, generator=seeded(1))
    found = inspect_global_model(crafted)
    assert sorted(crafted)[found.findings[0].layer] == "7.weight"
    assert found.findings[0].kind is Kind.QUANTILE_BIASES


@pytest.mark.parametrize("net", corpus.NETS, ids=lambda net: net.name)
@pytest.mark.parametrize("init", corpus.INITS)
def test_fresh_models_of_every_kind_of_first_values_pass(net: corpus.Net, init: str) -> None:
    module = corpus.fresh(net, seeded(5), init)
    found = inspect_global_model(module.state_dict(), None, module)
    assert found.suspicion < 0.3
    assert found.verdict is Verdict.HONEST
    assert not found.unhealthy
    assert found.probed


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pruned_and_half_precision_models_pass(share: float, dtype: torch.dtype) -> None:
    module, state = built("lenet-256", 6)
    small = {name: value.to(dtype) for name, value in corpus.pruned(state, share).items()}
    assert inspect_global_model(small, None, module).suspicion < 0.3


def test_an_honest_run_raises_no_alarm_with_history_and_probes() -> None:
    for run in corpus.honest_runs(4, 4, seed=77):
        history = None
        for state in run.states:
            found = inspect_global_model(state, history, run.module)
            history = found.history
            assert found.suspicion < 0.3
        assert len(history.scales) == 4


def test_values_that_are_not_finite_are_unhealthy_and_no_attack() -> None:
    _, state = built("mlp-13-64-2")
    for value in (float("nan"), float("inf")):
        state["0.weight"][0, 0] = value
        found = inspect_global_model(state)
        assert found.verdict is Verdict.UNHEALTHY
        assert found.unhealthy
        assert found.suspicion == 0.0


def test_a_diverged_model_is_unhealthy() -> None:
    _, state = built("mlp-30-128-64-5")
    found = inspect_global_model({name: value * 1e4 for name, value in state.items()})
    assert found.unhealthy


@pytest.mark.parametrize("change", ["add", "remove", "shape", "dtype"])
def test_a_changed_structure_is_found_against_state_and_history(change: str) -> None:
    _, state = built("mlp-13-64-2")
    other = dict(state)
    if change == "add":
        other["extra"] = torch.zeros(3)
    elif change == "remove":
        del other["2.bias"]
    elif change == "shape":
        other["0.weight"] = torch.randn(64, 14, generator=seeded(0))
    else:
        other["2.bias"] = other["2.bias"].half()
    for previous in (state, History.of(state)):
        found = inspect_global_model(other, previous)
        assert found.verdict is Verdict.STRUCTURE_CHANGED
        assert found.suspicion > 0.9


def test_a_model_that_collapses_between_rounds_is_found() -> None:
    _, state = built("mlp-30-128-64-5")
    small = {name: value * 0.01 for name, value in state.items()}
    assert inspect_global_model(small).suspicion < 0.5
    found = inspect_global_model(small, state)
    assert found.suspicion >= 0.8
    assert found.findings[0].kind is Kind.SCALE_JUMP


def test_layers_that_grow_from_zero_are_no_jump() -> None:
    module, state = built("mlp-13-64-2", init="zero-last")
    _, later = built("mlp-13-64-2", 1)
    later = {name: later[name] if name.startswith("2") else state[name] for name in state}
    assert inspect_global_model(later, state, module).suspicion < 0.3


STARTS = {
    "zero linear": (lambda: nn.Linear(20, 1), 0.0),
    "tiny": (lambda: corpus.mlp(20, 64, 2), 1e-3),
    "small": (lambda: corpus.mlp(20, 64, 2), 1e-2),
    "zero deep": (lambda: corpus.mlp(20, 32, 32, 2), None),
}


@pytest.mark.parametrize("rates", [[0.1] * 10, [0.5] * 10, [0.01, 0.05, 0.1, *[0.5] * 7]])
@pytest.mark.parametrize("start", STARTS)
def test_layers_that_start_at_or_near_zero_grow_for_ten_rounds_without_alarm(
    start: str, rates: list[float]
) -> None:
    build, size = STARTS[start]
    module = build()
    for value in module.parameters():
        nn.init.normal_(value, 0.0, 0.2 if size is None else size, generator=seeded(value.numel()))
    if size is None:
        nn.init.zeros_(list(module.children())[-1].weight)
    net = corpus.Net(start, build, (20,), 1 if start == "zero linear" else 2)
    task, history = corpus.Task(net, seeded(3)), None
    for rate in rates:
        found = inspect_global_model(module.state_dict(), history)
        assert Kind.SCALE_JUMP not in {finding.kind for finding in found.findings}
        history = found.history
        corpus.train(module, task, steps=20, rate=rate)


@pytest.mark.parametrize("factor", [0.01, 30.0])
@pytest.mark.parametrize("name", ["mlp-13-256-1", "mlp-30-128-64-5", "lenet-256"])
def test_a_whole_model_that_shrinks_or_grows_at_once_is_found(name: str, factor: float) -> None:
    _, state = built(name)
    changed = {key: value * factor for key, value in state.items()}
    found = inspect_global_model(changed, state)
    assert found.suspicion >= 0.8
    assert Kind.SCALE_JUMP in {finding.kind for finding in found.findings}


def test_history_survives_json_and_stays_bounded() -> None:
    _, state = built("mlp-13-64-2")
    history = History.of(state)
    for _ in range(100):
        history = history.after(state)
    assert len(history.scales) == 64
    assert History.from_json(history.to_json()) == history


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version":2,"structure":[],"scales":[]}', '{"version":1}']
)
def test_a_damaged_history_is_refused(text: str) -> None:
    with pytest.raises(MisuseError, match="history"):
        History.from_json(text)


def test_history_holds_no_value_of_a_layer() -> None:
    _, state = built("mlp-13-64-2")
    written = History.of(state).to_json()
    assert len(written) < 600  # 960 values and their names could not be in it


class Watchful(nn.Module):
    """Remembers every call, draws from the global generator and has dropout."""

    def __init__(self) -> None:
        """Build."""
        super().__init__()
        self.first = nn.Linear(13, 32)
        self.last = nn.Linear(32, 2)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count the call."""
        self.calls += 1
        noise = torch.rand(1)
        return self.last(nn.functional.dropout(self.first(x), training=True)) + 0 * noise


def test_probing_leaves_model_gradients_mode_hooks_and_generators_untouched() -> None:
    model = Watchful()
    model.last.weight.grad = torch.ones_like(model.last.weight)
    fired = []
    model.first.register_forward_hook(lambda *_: fired.append(1))
    state = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    found = inspect_global_model(state, None, model)
    assert found.probed
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert model.calls == 0
    assert not fired
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))


def test_buffers_outside_the_state_mean_no_probes() -> None:
    module, state = built("mlp-13-64-2")
    module.register_buffer("kept", torch.zeros(3), persistent=False)
    assert not inspect_global_model(state, None, module).probed


def test_a_model_that_takes_no_known_input_is_inspected_by_its_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + y

    model = Odd()
    found = inspect_global_model(model.state_dict(), None, model)
    assert not found.probed
    assert found.verdict is Verdict.HONEST


def test_the_same_model_gets_the_same_inspection() -> None:
    module, state = built("lenet-256")
    assert inspect_global_model(state, None, module) == inspect_global_model(state, None, module)


@pytest.mark.parametrize("state", [{}, None, [1], {"a": 1}, {1: torch.zeros(2)}])
def test_what_is_no_state_dict_is_misuse(state: object) -> None:
    with pytest.raises(MisuseError, match="state"):
        inspect_global_model(state)


def test_states_of_odd_tensors_are_inspected() -> None:
    state = {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor(3),
        "zero.weight": torch.zeros(4, 4),
        "one.weight": torch.ones(1, 1),
    }
    assert inspect_global_model(state).verdict is Verdict.HONEST


def test_rows_of_one_sign_mirror_nothing() -> None:
    """Nets trained fast on images draw whole rows below zero."""
    module, state = built("mlp-100-512-10")
    state["0.weight"][::2] = -state["0.weight"][::2].abs()
    found = inspect_global_model(state)
    assert Kind.TRAP_ROWS not in {finding.kind for finding in found.findings}
    crafted = servers.trap_weights(module, state, generator=seeded(1))
    assert Kind.TRAP_ROWS in {found.kind for found in inspect_global_model(crafted).findings}


def test_few_small_kernels_are_no_traps_by_chance() -> None:
    for seed in range(60):
        generator = seeded(seed)
        state = {
            "0.weight": 0.2 * torch.randn(8, 1, 3, 3, generator=generator) - 0.02,
            "0.bias": 0.1 * torch.randn(8, generator=generator),
            "1.weight": 0.1 * torch.randn(16, 8, 3, 3, generator=generator) - 0.01,
            "1.bias": 0.1 * torch.randn(16, generator=generator),
            "2.weight": 0.1 * torch.randn(4, 16, generator=generator),
        }
        assert inspect_global_model(state).suspicion < 0.3


def test_rows_that_pruning_left_one_entry_are_no_bins() -> None:
    _, state = built("mlp-13-64-2", 2)
    state["0.bias"] = torch.randn(64, generator=seeded(3))
    assert inspect_global_model(corpus.pruned(state, 0.9)).suspicion < 0.3


def test_drawn_rows_among_trained_ones_are_found_by_their_length_and_trained_ones_pass() -> None:
    _, state = built("mlp-100-512-10")
    drawn = {name: value.clone() for name, value in state.items()}
    drawn["0.weight"][:128] = torch.randn(128, 100, generator=seeded(1))
    found = inspect_global_model(drawn)
    assert found.verdict is Verdict.SPARSE_ACTIVATION
    assert found.findings[0].kind is Kind.LOUD_ROWS
    grown = {name: value.clone() for name, value in state.items()}
    grown["0.weight"][:128] *= torch.linspace(5.0, 20.0, 128)[:, None]
    assert inspect_global_model(grown).suspicion < 0.3


def test_identity_kernels_and_rare_classes_pass() -> None:
    kernels = torch.zeros(16, 8, 3, 3)
    nn.init.dirac_(kernels)
    kernels += 0.003 * torch.randn(kernels.shape, generator=seeded(1))
    state = {
        "0.weight": 0.1 * torch.randn(6, 1, 5, 5, generator=seeded(2)),
        "1.weight": 0.1 * torch.randn(8, 6, 3, 3, generator=seeded(3)),
        "2.weight": kernels,
        "3.weight": 0.02 * torch.randn(6, 64, generator=seeded(4)),
        "3.bias": torch.tensor([-0.7, -1.5, -2.5, -3.5, -5.0, -6.9]),
    }
    assert inspect_global_model(state).suspicion < 0.3


def dense(units: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A hidden layer as PyTorch draws it."""
    generator = seeded(seed)
    bound = 1.0 / inputs**0.5
    weight = (torch.rand(units, inputs, generator=generator) * 2 - 1) * bound
    return weight, (torch.rand(units, generator=generator) * 2 - 1) * bound


def model_of(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """That layer between a fresh one before it and a fresh head."""
    before, after = dense(weight.shape[1], 60, 1), dense(4, len(weight), 2)
    pairs = {"0": before, "1": (weight, bias), "2": after}
    return {
        f"{name}.{part}": value
        for name, pair in pairs.items()
        for part, value in zip(("weight", "bias"), pair, strict=True)
    }


@pytest.mark.parametrize("apart", [0.004, 0.001, 1e-4])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_copies_of_one_row_at_different_thresholds_are_bins_however_narrow(
    apart: float, share: float
) -> None:
    weight, bias = dense(100, 200, 0)
    rows = round(share * 100)
    turned = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    norm = float(weight[0].norm())
    weight[:rows] = weight[0] * turned[:, None]
    bias[:rows] = (0.1 + torch.linspace(0, 2 * apart, rows)) * norm * turned
    found = inspect_global_model(model_of(weight, bias))
    assert found.verdict is Verdict.BINNING
    assert found.findings[0].kind is Kind.PARALLEL_ROWS
    bias[:rows] = 0.1 * norm * turned  # a widened net: copies with the threshold of their original
    assert inspect_global_model(model_of(weight, bias)).suspicion < 0.3


def test_biases_to_both_sides_beyond_large_drawn_weights_are_quantiles() -> None:
    generator = seeded(3)
    weight = torch.randn(100, 300, generator=generator)
    bias = torch.randn(100, generator=generator)
    assert inspect_global_model(model_of(weight, bias)).suspicion < 0.3  # a standard normal start
    found = inspect_global_model(model_of(weight, 3.0 * bias))
    assert found.verdict is Verdict.SPARSE_ACTIVATION
    small, usual = dense(100, 300, 4)  # trained biases spread so beside weights of usual size
    assert inspect_global_model(model_of(small, 3.0 * usual)).suspicion < 0.3


@pytest.mark.parametrize("jitter", [0.1, 0.25])
def test_blurred_halves_in_rows_that_are_half_negative_are_traps(jitter: float) -> None:
    generator = seeded(5)
    rows, half = 100, 120
    negative = torch.rand(rows, half, generator=generator)
    weight = torch.cat([-negative, 0.95 * negative], dim=1)
    order = torch.rand(rows, 2 * half, generator=generator).argsort(1)
    bias = torch.zeros(rows)
    weight = weight.gather(1, order)
    weight += jitter * float(weight.std()) * torch.randn(weight.shape, generator=generator)
    found = inspect_global_model(model_of(weight, bias))
    assert found.verdict is Verdict.SPARSE_ACTIVATION
    honest = torch.rand(rows, 2 * half, generator=generator) - 0.5
    assert inspect_global_model(model_of(honest, bias)).suspicion < 0.3


def mobile_net(seed: int) -> dict[str, Tensor]:
    """Depthwise and pointwise kernels with a normalisation folded into them, and three heads."""
    generator = seeded(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    alike = torch.zeros(32, 1, 3, 3)
    alike[:, :, 1, 1] = 1.0
    alike += 0.05 * drawn(32, 1, 3, 3)
    lengths = torch.exp(0.8 * drawn(32, 1, 1, 1))
    return {
        "0.weight": 0.3 * drawn(32, 1, 3, 3),
        "0.bias": 3.0 * drawn(32),
        "1.weight": alike * lengths,  # rows that all look one way, each at a channel of its own
        "1.bias": 3.0 * drawn(32),
        "2.weight": 0.2 * drawn(64, 32, 1, 1),
        "2.bias": -0.9 + 1.5 * drawn(64),
        "objects.weight": 0.1 * drawn(1, 64, 1, 1),
        "objects.bias": torch.tensor([-4.6]),  # few places hold one: the usual first value
        "classes.weight": drawn(5, 1).expand(5, 64) * drawn(64) + 0.02 * drawn(5, 64),
        "classes.bias": drawn(5),
        "places": torch.arange(1000.0)[:, None] * 3.0,
    }


@pytest.mark.parametrize("seed", range(8))
def test_folded_kernels_objectness_and_columns_of_constants_pass(seed: int) -> None:
    assert inspect_global_model(mobile_net(seed)).suspicion < 0.3


def test_kernels_that_are_a_dense_layer_are_judged_as_one() -> None:
    generator = seeded(1)
    line = torch.randn(1, 16, 5, 5, generator=generator)
    bins = line + 0.001 * torch.randn(120, 16, 5, 5, generator=generator)
    state = {
        "0.weight": 0.1 * torch.randn(16, 6, 5, 5, generator=generator),
        "0.bias": torch.zeros(16),
        "1.weight": bins,
        "1.bias": torch.linspace(-20.0, 20.0, 120),
        "2.weight": 0.1 * torch.randn(10, 120, generator=generator),
        "2.bias": torch.zeros(10),
    }
    found = inspect_global_model(state)
    assert found.verdict is Verdict.BINNING
    assert found.suspicion > 0.9


def test_a_layer_whose_biases_let_few_records_past_is_found_also_where_it_is_made_of_kernels() -> (
    None
):
    generator = seeded(1)
    weight = torch.randn(64, 16, 5, 5, generator=generator)
    state = {
        "1.weight": weight,
        "1.bias": -1.9 * weight.flatten(1).norm(dim=1),
        "2.weight": 0.1 * torch.randn(10, 64, generator=generator),
    }
    assert inspect_global_model(state).verdict is Verdict.SPARSE_ACTIVATION
