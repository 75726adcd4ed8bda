"""Edges of private training that its docstrings name, and that no other test is about."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import sentinel
from sentinel import MisuseError, Withheld
from sentinel.dpsgd import Bound, Units
from sentinel.dpsgd.chain import Chain
from sentinel.dpsgd.chance import Chance
from sentinel.dpsgd.clipping import Rows, Whole, clip_and_add_, empty_sum
from sentinel.dpsgd.losses import LossWatch
from sentinel.house import promise_of
from sentinel.terms import Adjacency, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

POLICY = """
schema = 1
name = "private"
[privacy]
unit = "patient"
patients = 20
batch = 4
records_per_patient = 4
epsilon = 50.0
delta = 1e-4
clip_norm = 1.0
noise_multiplier = 1.0
[[rule]]
id = "all"
"""
ROWS = TensorDataset(torch.ones(20, 3), torch.ones(20, 1))
IDS = list(range(20))
SEVERAL = [0] * 10 + [1] * 2 + list(range(2, 20))


class Plain(Dataset):
    """Of record i, a row that says i; not a TensorDataset."""

    def __len__(self) -> int:
        """Ten records of patient 0, two of patient 1, one of every other."""
        return len(SEVERAL)

    def __getitem__(self, row: int) -> Any:
        """Its number, thrice, and a target."""
        return torch.full((3,), float(row)), torch.ones(1)


class Odd(Dataset):
    """Records of which no blank can be made."""

    def __len__(self) -> int:
        """As many as `ROWS`."""
        return 20

    def __getitem__(self, _: int) -> Any:
        """A tensor, and something else."""
        return torch.ones(3), object()


def guard_of(folder: Path, text: str = POLICY) -> sentinel.Guard:
    folder.mkdir(exist_ok=True)
    path = folder / "policy.toml"
    path.write_text(text)
    path.chmod(0o600)
    return sentinel.Guard(path, folder / "site")


@pytest.fixture
def guard(tmp_path: Path) -> sentinel.Guard:
    return guard_of(tmp_path)


def traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """What `guard.private` changes: hooks, and a word to torch's GradScaler."""
    hooks = [
        hook
        for layer in model.modules()
        for hook in (*layer._forward_hooks, *layer._forward_pre_hooks, *layer._backward_hooks)
    ]
    steps = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return [hooks, steps, getattr(optimizer, "_step_supports_amp_scaling", False)]


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [
        (nn.Linear, Odd(), {"patients": IDS}),
        (lambda *_: with_batch_norm(), ROWS, {"patients": IDS}),
        (nn.Linear, ROWS, {"patients": None}),
        (nn.Linear, ROWS, {"patients": IDS[1:]}),
        (nn.Linear, ROWS, {"patients": IDS, "max_records": 3}),
        (nn.Linear, ROWS, {"patients": IDS, "loss_reduction": "none"}),
    ],
    ids=["record", "layer", "no ids", "too few ids", "max_records", "loss_reduction"],
)
def test_what_is_refused_leaves_model_and_optimizer_as_they_were(
    guard: sentinel.Guard, make: Callable[..., nn.Module], data: Any, options: dict[str, Any]
) -> None:
    """So that the loop may go on without, or ask again with what the error says."""
    model = make(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MisuseError):
        guard.private(model, optimizer, DataLoader(data), **options)
    assert traces(model, optimizer) == [[], [], False]
    if make is nn.Linear:
        guard.private(model, optimizer, DataLoader(ROWS), patients=IDS)
        assert traces(model, optimizer) != [[], [], False]


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_let_go_is_as_it_was(guard: sentinel.Guard, *, fused: bool) -> None:
    """Torch's GradScaler scales the gradients of a fused optimizer alone by that word."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    before = traces(model, optimizer)
    guard.private(model, optimizer, DataLoader(ROWS), patients=IDS)
    assert traces(model, optimizer) != before
    guard._private[model].remove()
    assert traces(model, optimizer) == before


def test_an_optimizer_that_was_used_is_refused(guard: sentinel.Guard) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(MisuseError, match="used already"):
        guard.private(model, optimizer, DataLoader(ROWS), patients=IDS)


@pytest.mark.parametrize("batch", [1, 64, 8192])
@pytest.mark.parametrize("coordinates", [1, 10**6, 10**10])
@pytest.mark.parametrize("noise_multiplier", [0.05, 1.0, 1e6])
def test_little_of_the_clip_norm_is_lost_to_rounding(
    batch: int, coordinates: int, noise_multiplier: float
) -> None:
    bound = Bound(3.0, coordinates, noise_multiplier, batch)
    assert 0.87 < bound.target < 1.0
    assert bound.sensitivity(Adjacency.ADD_OR_REMOVE) == 3.0
    assert bound.sensitivity(Adjacency.REPLACE) == 6.0


def test_the_sum_of_nobody_is_zero_and_bounded_like_any_other() -> None:
    total = empty_sum(Bound(3.0, 5, 1.0, 8))
    clip_and_add_(total, [], 4)  # no parameter has gradients
    assert total.values.tolist() == [0.0] * 5
    assert total.sensitivity(Adjacency.REPLACE) == 6.0
    assert (total.unclipped, total.not_finite) == (4, 0)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (math.nan, torch.float32),
        (math.inf, torch.float32),
        (1e200, torch.float64),
        (-3e38, torch.float32),
    ],
)
def test_a_unit_that_cannot_be_measured_is_left_out_and_the_others_are_not(
    bad: float, dtype: torch.dtype
) -> None:
    """NaN, Inf, or squares beyond the dtype."""
    bound = Bound(2.0, 3, 1.0, 8)
    rows = torch.tensor([[0.5, 0.0, 0.0], [bad, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    total = empty_sum(bound)
    clip_and_add_(total, [(Whole(0, rows, Rows(torch.arange(3), 3)), 1.0)], 3)
    alone = empty_sum(bound)
    clip_and_add_(alone, [(Whole(0, rows[::2], Rows(torch.arange(2), 2)), 1.0)], 2)
    assert torch.equal(total.values, alone.values)
    assert (total.not_finite, alone.not_finite) == (1, 0)
    assert alone.values.tolist() == [0.25, 0.0, 0.0]  # in clip norms, and zero stays zero


def test_single_records_are_units_and_no_records_are_none() -> None:
    assert [int(unit) for unit in Units.single(3).starts] == [0, 1, 2, 3]
    assert Units.single(3).cap == 1
    assert len(Units.single(0)) == len(Units.grouped([], 0, 4)) == 0


def test_a_chain_knows_nan_again_and_sees_it_come_and_go() -> None:
    """A diverged model is the same model; NaN is compared bit by bit."""
    model = nn.Linear(3, 1)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    chain = Chain(model, torch.optim.SGD(model.parameters(), lr=0.1), base)
    chain.require()
    model.weight.data[0, 1] = math.nan
    with pytest.raises(Withheld):
        chain.require()
    chain.note()
    chain.require()
    chain.require_local(model.state_dict())
    model.weight.data[0, 1] = 0.0
    with pytest.raises(Withheld):
        chain.require()


def test_a_seed_that_the_pass_sets_is_gone_when_it_ends(fixed_entropy) -> None:
    before = torch.get_rng_state()
    chance = Chance(fixed_entropy(3))
    chance.begin(torch.device("cpu"))
    torch.manual_seed(0)
    torch.rand(10)
    chance.end()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]), reduction="sum"),
            torch.tensor([0, 1]),
        ),
        (nn.CrossEntropyLoss(ignore_index=1, reduction="none"), torch.tensor([0, 1])),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])), torch.eye(2)),
        (nn.MSELoss(), torch.eye(2)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 9.0])), torch.eye(2)),
    ],
    ids=["sum", "none", "shares", "another", "positive weights"],
)
def test_losses_without_a_mean_over_weights_pass(loss: nn.Module, target: torch.Tensor) -> None:
    """And whatever it is in evaluation, where a loss moves nothing."""
    watch = LossWatch()
    watch.begin()
    loss(torch.zeros(2, 2, requires_grad=True), target)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
    weighted(torch.zeros(2, 2), torch.tensor([0, 1]))
    watch.require_plain()
    weighted(torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 1]))
    with pytest.raises(MisuseError, match="reduction"):
        watch.require_plain()
    watch.end()


def list_collate(records: list[Any]) -> Any:
    """A function of the loop's own."""
    return default_collate(records)


def table() -> TensorDataset:
    plain = Plain()
    rows, targets = zip(*(plain[row] for row in range(len(plain))), strict=True)
    return TensorDataset(torch.stack(rows), torch.stack(targets))


@pytest.mark.parametrize("collate", [None, list_collate])
@pytest.mark.parametrize("make", [table, Plain])
def test_a_loader_gives_as_many_records_of_a_patient_as_the_cap_allows(
    tmp_path: Path, make: Callable[[], Dataset], collate: Callable[..., Any] | None
) -> None:
    """Everybody is in a full batch: four of the ten, and all of those who have no more."""
    guard = guard_of(tmp_path, POLICY.replace("batch = 4", "batch = 20"))
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = DataLoader(make(), collate_fn=collate)
    model, optimizer, loader = guard.private(model, optimizer, given, patients=SEVERAL)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches = []
    with guard.round(1, start, model):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            batches.append(inputs[:, 0].int().tolist())
    (rows,) = batches
    assert len(set(rows)) == len(rows)
    assert Counter(SEVERAL[row] for row in rows) == {**dict.fromkeys(range(20), 1), 0: 4, 1: 2}
    assert guard._private[model].left_out == 6


def round_by_round(guard: sentinel.Guard, *, anew: bool) -> Iterator[float]:
    """What is spent after each round; made private `anew` for each, or once."""
    house = guard._door.house
    promise = promise_of(house.rules)
    model, made = nn.Linear(3, 1), None
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(100):
        if made is None or anew:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            made = guard.private(model, optimizer, DataLoader(ROWS), patients=IDS)
        with guard.round(number, state, model) as rnd:
            for inputs, targets in made[2]:
                made[1].zero_grad()
                nn.functional.mse_loss(model(inputs), targets).backward()
                made[1].step()
        state = rnd.release()
        yield house.ledger.spent(house.rules.dataset, promise, tight=True).epsilon


def test_a_model_that_is_made_private_again_spends_the_same_budget_on(tmp_path: Path) -> None:
    """As much and as often as one that was made private once."""
    text = POLICY.replace("epsilon = 50.0", "epsilon = 5.0")
    spent: dict[bool, list[float]] = {True: [], False: []}
    for anew, figures in spent.items():
        guard = guard_of(tmp_path / str(anew), text)
        with pytest.raises(Withheld) as caught:
            figures.extend(round_by_round(guard, anew=anew))
        assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert spent[True] == spent[False]
    first, *_, last = spent[True]
    assert first < last <= 5.0
