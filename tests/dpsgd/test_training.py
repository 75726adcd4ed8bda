"""Private rounds of a real guard: what they charge, what they refuse, and what breaks the chain."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import sentinel
from sentinel import MisuseError, PolicyError, Withheld
from sentinel.audit import read_log
from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import auc
from sentinel.house import promise_of
from sentinel.privacy import Promise, total
from sentinel.privacy.events import DpSgdEvent
from sentinel.terms import Adjacency, Reason, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

POLICY = """
schema = 1
name = "private"
[privacy]
unit = "{unit}"
patients = 200
batch = {batch}
epsilon = {epsilon}
delta = 1e-4
clip_norm = 1.0
noise_multiplier = {noise}
{more}
[[rule]]
id = "all"
"""
FOLDERS: list[Path] = []
IDS = [row // 3 for row in range(303)]  # synthetic: no patient of the data has several records


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 1))


class Site:
    """A guard with a policy, a model that it made private, and a training loop."""

    def __init__(self, folder: Path, **figures: Any) -> None:
        """Make them; `figures` fill the policy in."""
        text = POLICY.format(
            **{"unit": "record", "batch": 20, "epsilon": 50.0, "noise": 1.0, "more": "", **figures}
        )
        path = folder / "policy.toml"
        path.write_text(text)
        path.chmod(0o600)
        self.guard = sentinel.Guard(path, folder / "site")
        for earlier in FOLDERS:  # the score's references take a second each to make
            for known in (earlier / "site" / "references").iterdir():
                shutil.copy2(known, folder / "site" / "references")
        FOLDERS.append(folder)
        cohort = cohorts.load("cleveland")
        self.data = TensorDataset(cohort.rows, cohort.labels[:, None])
        self.number = 0

    def wrap(
        self,
        model: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        """Make a model private."""
        model = model or mlp()
        loader = DataLoader(self.data, batch_size=20, shuffle=True)
        made = optimizer(model.parameters(), lr=0.1)
        self.model, self.optimizer, self.loader = self.guard.private(model, made, loader, **options)
        self.state = {name: value.clone() for name, value in model.state_dict().items()}

    @property
    def training(self) -> Any:
        """The guard's own record of the training."""
        return self.guard._private[self.model]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One step of an ordinary loop."""
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(self.model(x), y).backward()
        self.optimizer.step()

    def train(self, steps: int = 3) -> None:
        """A few steps."""
        for place, (x, y) in enumerate(self.loader, start=1):
            self.step(x, y)
            if place == steps:
                return

    def round(self) -> Any:
        """The next round."""
        self.number += 1
        return self.guard.round(self.number, self.state, self.model)

    def release(self, steps: int = 3) -> dict[str, torch.Tensor]:
        """A whole round."""
        with self.round() as rnd:
            self.train(steps)
        self.state = rnd.release()
        return self.state

    @property
    def events(self) -> list[Any]:
        """What the ledger holds."""
        return [row.event for row in self.guard._state.ledger.rows()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """With a private MLP, unit record."""
    made = Site(tmp_path)
    made.wrap()
    return made


def withheld(site: Site, rnd: Any) -> None:
    """Assert that the round cannot be released, whatever is tried, and was not charged."""
    before = len(site.events)
    for _ in range(2):
        with pytest.raises((Withheld, MisuseError)) as caught:
            rnd.release()
    first = caught.value
    assert isinstance(first, MisuseError) or first.reason is Reason.PROMISE_NOT_KEPT
    assert len(site.events) == before


def test_a_round_is_charged_for_every_step_it_took(site: Site) -> None:
    site.release(steps=3)
    (event,) = site.events
    assert (event.kind, event.unit, event.adjacency) == (
        "dp-sgd",
        Unit.RECORD,
        Adjacency.ADD_OR_REMOVE,
    )
    assert (event.sampling, event.sampling_rate, event.steps) == ("poisson", 0.1, 3)
    assert event.noise_multiplier == 1.0
    assert event.log_ratio > 0.0


def test_rounds_add_up_to_the_epsilon_of_all_their_steps(site: Site) -> None:
    site.release(steps=3)
    site.release(steps=4)
    promise = promise_of(site.guard.policy.policy)
    spent = site.guard._state.ledger.spent("default", promise)
    whole = site.events[0].model_copy(
        update={
            "steps": 7,
            "log_ratio": site.events[0].log_ratio * 7 / 3,
            "mass": site.events[0].mass * 7 / 3,
        }
    )
    at_once = total({whole: 1}, Promise(Unit.RECORD, Adjacency.ADD_OR_REMOVE, 50.0, 1e-4))
    assert spent.epsilon == pytest.approx(at_once.epsilon, rel=1e-3)
    assert site.events[1].steps == 4


def test_a_round_without_a_step_is_charged_for_one(site: Site) -> None:
    """The ledger may count too much, never too little."""
    start = site.state
    with site.round() as rnd:
        pass
    state = rnd.release()
    assert site.events[0].steps == 1
    assert all(torch.equal(state[name], start[name]) for name in state)


def test_the_promise_may_be_for_a_patient_replaced(tmp_path) -> None:
    """Twice the distance between neighbours: the same steps cost more."""
    told = []
    for adjacency in ("add-or-remove", "replace"):
        site = Site(make(tmp_path / adjacency), noise=2.0, more=f'adjacency = "{adjacency}"')
        site.wrap()
        site.release(steps=2)
        promise = promise_of(site.guard.policy.policy)
        told.append(site.guard._state.ledger.spent("default", promise, tight=True).epsilon)
        assert site.events[0].adjacency == adjacency
    assert 0.0 < told[0] < told[1]


def test_the_update_changes_by_private_steps_alone(site: Site) -> None:
    start = site.state
    state = site.release(steps=3)
    assert any(not torch.equal(state[name], start[name]) for name in state)
    for name in state:
        assert torch.allclose(state[name], site.model.state_dict()[name], atol=1e-6)


def test_the_noise_of_a_step_is_clip_norm_times_multiplier_over_the_batch(tmp_path) -> None:
    """Accepted at the right scale, refused at two thirds and three halves of it."""
    site = Site(tmp_path, noise=2.0)
    site.data = TensorDataset(torch.zeros(303, 13), torch.full((303, 1), 0.5))  # no gradient
    model = nn.Linear(13, 1, bias=False)
    nn.init.zeros_(model.weight)
    site.wrap(model)
    values = []
    with site.round():
        for _ in range(12):
            for x, y in site.loader:
                before = site.model.weight.detach().clone()
                site.step(x, y)
                values.append((site.model.weight.detach() - before).flatten() / 0.1)
                site.training._charged_memory = {}
    spread = float(torch.cat(values).std())
    # the weights' own drift is a gradient of zero inputs: none
    assert spread == pytest.approx(2.0 / 20, rel=0.1)
    for wrong in (2 / 3, 3 / 2):
        assert spread != pytest.approx(wrong * 2.0 / 20, rel=0.15)


def test_an_empty_batch_is_a_blank_record_and_a_noisy_charged_step(tmp_path) -> None:
    site = Site(tmp_path, batch=1)
    site.wrap()
    units = site.loader._batches._units
    object.__setattr__(units, "starts", units.starts[:1])  # nobody is in the data set
    with site.round() as rnd:
        for x, y in site.loader:
            assert x.shape == (1, 13)
            assert not x.any()
            assert not y.any()
            before = site.model[0].weight.detach().clone()
            site.step(x, y)
            assert not torch.equal(before, site.model[0].weight)
            break
    rnd.release()
    assert site.events[0].steps == 1


def test_a_nan_record_poisons_neither_model_nor_release(tmp_path) -> None:
    site = Site(tmp_path, batch=200)
    rows = site.data.tensors[0].clone()
    rows[5] = math.nan
    site.data = TensorDataset(rows, site.data.tensors[1])
    site.wrap()
    state = site.release(steps=1)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert site.training.not_finite == 1
    assert "not_finite" not in site.events[0].model_dump()


def test_a_full_batch_is_charged_without_amplification(tmp_path) -> None:
    site = Site(tmp_path, batch=200)
    site.wrap()
    site.release(steps=1)
    assert (site.events[0].sampling, site.events[0].sampling_rate) == ("none", 1.0)


def test_patients_are_the_unit_where_the_policy_says_so(tmp_path) -> None:
    site = Site(tmp_path, unit="patient", more="records_per_patient = 2")
    site.wrap(patients=IDS)
    site.release(steps=3)
    assert site.events[0].unit is Unit.PATIENT
    assert site.training.left_out > 0  # a third record of each is left out


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_state_of_charged_steps_is_carried_into_the_next_round(tmp_path, kind) -> None:
    site = Site(tmp_path)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    site.wrap(optimizer=lambda params, lr: kind(params, lr=lr, weight_decay=0.01, **options))
    site.release()
    assert site.optimizer.state
    site.release()
    assert len(site.events) == 2


def test_a_learning_rate_scheduler_may_run_along(site: Site) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(site.optimizer, step_size=1)
    with site.round() as rnd:
        for x, y in site.loader:
            site.step(x, y)
            scheduler.step()
    rnd.release()
    assert site.optimizer.param_groups[0]["lr"] < 0.1


def test_zeroed_gradients_in_any_pattern_change_nothing(site: Site) -> None:
    with site.round() as rnd:
        for x, y in site.loader:
            site.model.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(site.model(x), y).backward()
            site.optimizer.step()
            site.optimizer.zero_grad(set_to_none=False)
    rnd.release()


def test_a_batch_in_pieces_is_one_step(tmp_path) -> None:
    site = Site(tmp_path, unit="patient", batch=50)
    site.wrap(patients=IDS, max_records=17)
    sizes = []
    with site.round() as rnd:
        for x, y in site.loader:
            sizes.append(len(x))
            site.step(x, y)
    rnd.release()
    assert max(sizes) <= 17
    assert len(sizes) > 2 * len(site.loader)
    assert site.events[0].steps == len(site.loader) == 4


def test_gradient_accumulation_within_a_batch_is_one_step(site: Site) -> None:
    with site.round() as rnd:
        for x, y in site.loader:
            for rows in (slice(0, 4), slice(4, None)):
                if len(x[rows]):
                    out = site.model(x[rows])
                    nn.functional.binary_cross_entropy_with_logits(out, y[rows]).backward()
            site.optimizer.step()
    rnd.release()
    assert site.events[0].steps == len(site.loader)


def test_evaluation_inside_the_round_is_no_step(site: Site) -> None:
    with site.round() as rnd:
        for x, y in site.loader:
            site.step(x, y)
            with torch.no_grad():
                site.model(site.data.tensors[0])
    rnd.release()


def test_global_generators_are_neither_read_nor_written(site: Site) -> None:
    before = torch.get_rng_state()
    site.release()
    assert torch.equal(before, torch.get_rng_state())


# The chain: what was not private training alone is withheld, and not charged.


def test_a_parameter_edited_between_steps_is_withheld(site: Site) -> None:
    with site.round() as rnd:
        site.train(2)
        site.model[0].weight.data[0, 0] += 1.0
        with pytest.raises(Withheld, match="outside the private steps"):
            site.train(1)
    withheld(site, rnd)


def test_a_parameter_edited_after_the_last_step_is_withheld(site: Site) -> None:
    with site.round() as rnd:
        site.train(2)
        site.model[2].bias.data.add_(1e-6)
    withheld(site, rnd)


def test_a_foreign_start_is_withheld(site: Site) -> None:
    with site.round() as rnd:
        site.model.load_state_dict(mlp_of(7).state_dict())
        with pytest.raises(Withheld, match="outside the private steps"):
            site.train(1)
    withheld(site, rnd)


def mlp_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 1))


def test_raw_training_with_another_optimizer_is_withheld(site: Site) -> None:
    other = torch.optim.SGD(site.model.parameters(), lr=1.0)
    with site.round() as rnd:
        site.train(1)
        for parameter in site.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        other.step()
    withheld(site, rnd)


def test_raw_momentum_put_in_during_the_round_is_withheld(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))
    with site.round() as rnd:
        site.train(1)
        site.optimizer.state[site.model[0].weight]["momentum_buffer"].data.add_(1.0)
        with pytest.raises(Withheld, match="optimizer's state"):
            site.train(1)
    withheld(site, rnd)


def test_momentum_that_is_there_when_the_round_begins_is_withheld(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))
    weight = site.model[0].weight
    site.optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    with pytest.raises(Withheld, match="begins with state") as caught, site.round():
        pass
    assert caught.value.reason is Reason.PROMISE_NOT_KEPT


def test_momentum_of_an_aborted_round_is_not_carried_on(tmp_path) -> None:
    """Its steps were not charged."""
    site = Site(tmp_path)
    site.wrap(optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))
    with pytest.raises(RuntimeError, match="stop"), site.round():  # noqa: PT012 - a loop fails in it
        site.train(2)
        raise RuntimeError("stop")
    with pytest.raises(Withheld, match=r"optimizer\.state\.clear"), site.round():
        pass
    site.optimizer.state.clear()
    site.release()


def test_momentum_of_a_round_that_was_never_released_is_not_carried_on(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(optimizer=torch.optim.Adam)
    with site.round():
        site.train(2)
    with pytest.raises(Withheld, match="begins with state"), site.round():
        pass


def test_steps_after_the_release_are_refused(site: Site) -> None:
    with site.round() as rnd:
        site.train(2)
        rnd.release()
        with pytest.raises(MisuseError, match="while a round is open"):
            site.train(1)


def test_a_changed_buffer_is_withheld(tmp_path) -> None:
    site = Site(tmp_path)
    model = mlp()
    model.register_buffer("scale", torch.ones(3))
    site.wrap(model)
    with site.round() as rnd:
        site.train(1)
        site.model.scale.data[1] = 2.0
        with pytest.raises(Withheld, match="buffers"):
            site.train(1)
    withheld(site, rnd)


def test_a_buffer_that_is_not_saved_counts_too(tmp_path) -> None:
    site = Site(tmp_path)
    model = mlp()
    model.register_buffer("scale", torch.ones(3), persistent=False)
    site.wrap(model)
    with site.round() as rnd:
        site.train(1)
        site.model.scale.data[1] = 2.0
    withheld(site, rnd)


def test_a_frozen_parameter_that_moved_is_withheld(tmp_path) -> None:
    site = Site(tmp_path)
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    cohort = site.data
    made = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(cohort, batch_size=20)
    site.model, site.optimizer, site.loader = site.guard.private(model, made, loader)
    site.state = {name: value.clone() for name, value in model.state_dict().items()}
    site.release()
    assert torch.equal(site.state["0.weight"], mlp().state_dict()["0.weight"])
    with site.round() as rnd:
        site.train(1)
        site.model[0].weight.data.mul_(1.5)
    withheld(site, rnd)


def test_a_parameter_that_is_thawed_or_replaced_is_withheld(site: Site) -> None:
    with site.round() as rnd:
        site.train(1)
        site.model[0].weight = nn.Parameter(site.model[0].weight.detach().clone())
        with pytest.raises((Withheld, MisuseError)):
            site.train(1)
    withheld(site, rnd)


def test_a_model_that_another_round_took_over_is_withheld(site: Site) -> None:
    with site.round() as first:
        site.train(1)
    with site.round() as second:
        site.train(1)
    withheld(site, first)
    second.release()


def test_a_diverged_model_is_refused_as_not_finite_and_charged(site: Site) -> None:
    with site.round() as rnd:
        site.optimizer.param_groups[0]["weight_decay"] = 3e38
        site.train(3)
    with pytest.raises(Withheld) as caught:
        rnd.release()
    assert caught.value.reason is Reason.NOT_FINITE
    assert len(site.events) == 1


# What the loop must not do.


def test_a_batch_of_ones_own_is_refused(site: Site) -> None:
    x, y = (tensor[:20] for tensor in site.data.tensors)
    with site.round() as rnd:
        with pytest.raises(MisuseError, match="private loader"):
            site.step(x, y)
        with pytest.raises(MisuseError, match="without a batch"):
            site.optimizer.step()
    withheld(site, rnd)


def test_other_records_in_place_of_the_batch_are_refused(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="other records"):  # noqa: PT012 - a loop fails in it
        for _ in site.loader:
            site.model(site.data.tensors[0])


def test_a_second_step_on_one_batch_is_refused(site: Site) -> None:
    with site.round() as rnd:
        for x, y in site.loader:
            site.step(x, y)
            with pytest.raises(MisuseError, match="twice on one"):
                site.optimizer.step()
            break
    withheld(site, rnd)


def test_a_batch_that_is_skipped_is_refused(site: Site) -> None:
    """To skip one by its loss would be a choice by the data."""
    with site.round() as rnd, pytest.raises(MisuseError, match="without an optimizer"):
        for _ in site.loader:
            pass
    withheld(site, rnd)


def test_two_batches_cannot_be_accumulated_into_one_step(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="without an optimizer"):  # noqa: PT012 - a loop fails in it
        for x, y in site.loader:
            nn.functional.binary_cross_entropy_with_logits(site.model(x), y).backward()


def test_a_backward_pass_after_the_step_is_refused(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="after its step"):  # noqa: PT012 - a loop fails in it
        for x, y in site.loader:
            loss = nn.functional.binary_cross_entropy_with_logits(site.model(x), y)
            loss.backward(retain_graph=True)
            site.optimizer.step()
            loss.backward()


def test_a_closure_is_refused(site: Site) -> None:
    with site.round():
        for x, y in site.loader:
            out = site.model(x)
            nn.functional.binary_cross_entropy_with_logits(out, y).backward()
            with pytest.raises(MisuseError, match="no closure"):
                site.optimizer.step(lambda: 0.0)
            break


def test_a_grad_scaler_is_refused(site: Site) -> None:
    scaler = torch.amp.GradScaler("cpu")
    with site.round():
        for x, y in site.loader:
            loss = nn.functional.binary_cross_entropy_with_logits(site.model(x), y)
            scaler.scale(loss).backward()
            with pytest.raises(MisuseError, match="GradScaler"):
                scaler.step(site.optimizer)
            break


def test_a_step_outside_a_round_is_refused(site: Site) -> None:
    with pytest.raises(MisuseError, match="while a round is open"):
        site.train(1)


def test_a_penalty_in_the_loss_is_refused_with_what_to_use(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="weight_decay"):  # noqa: PT012 - a loop fails in it
        for x, y in site.loader:
            loss = nn.functional.binary_cross_entropy_with_logits(site.model(x), y)
            (loss + site.model[0].weight.square().sum()).backward()
            site.optimizer.step()


def test_a_part_of_the_model_cannot_be_trained_by_itself(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="run by itself"):  # noqa: PT012 - a loop fails in it
        for x, _ in site.loader:
            site.model[0](x)


def test_a_round_without_private_training_is_still_refused(site: Site) -> None:
    with pytest.raises(Withheld) as caught, site.guard.round(9, site.state, mlp()):
        pass
    assert caught.value.reason is Reason.PROMISE_NOT_KEPT


def test_dropout_and_layers_in_eval_mode_are_fine(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(layered(nn.Dropout(0.5), nn.Tanh()))
    site.release()
    assert site.events[0].steps == 3


def test_no_id_of_a_patient_is_written_anywhere(tmp_path) -> None:
    site = Site(tmp_path, unit="patient")
    site.wrap(patients=[f"zebra-{row}" for row in range(303)])
    site.release()
    written = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not any(b"zebra" in path.read_bytes() for path in written)


def test_the_counts_that_stay_in_memory_are_in_no_record(tmp_path) -> None:
    """Two data sets that differ by a patient with NaN leave the same kinds of records."""
    told = []
    for spoiled in (False, True):
        folder = make(tmp_path / str(spoiled))
        site = Site(folder, batch=200)
        if spoiled:
            rows = site.data.tensors[0].clone()
            rows[0] = math.nan
            site.data = TensorDataset(rows, site.data.tensors[1])
        site.wrap()
        site.release(steps=1)
        log = read_log(folder / "site" / "audit")
        told.append([sorted(entry.record.model_dump()) for entry in log])
    assert told[0] == told[1]


# What private training does not take.


def layered(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(13, 4), *layers, nn.Linear(4, 1))


class Mixed(nn.Module):
    """Holds a parameter and a layer."""

    def __init__(self) -> None:
        """Make both."""
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.layer = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.BatchNorm1d(4), "GroupNorm"),
        (nn.SyncBatchNorm(4), "GroupNorm"),
        (nn.BatchNorm1d(4, affine=False), "GroupNorm"),
        (nn.InstanceNorm1d(4, track_running_stats=True), "running statistics"),
        (nn.LSTM(4, 4), "LSTM"),
        (nn.GRUCell(4, 4), "GRUCell"),
        (Mixed(), "Mixed"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.Linear(4, 4).half(), "float32"),
        (nn.EmbeddingBag(4, 4), "EmbeddingBag"),
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding"),
        (nn.Embedding(4, 4, sparse=True), "sparse=False"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "Linear"),
        (nn.DataParallel(nn.Linear(4, 4)), "DataParallel"),
        (nn.Softmax(dim=0), "dimension 0"),
        (nn.LogSoftmax(dim=0), "dimension 0"),
        (nn.Flatten(start_dim=0), "dimension 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_that_mixes_records_or_is_not_known_is_refused_by_name(
    tmp_path, layer, word
) -> None:
    site = Site(tmp_path)
    with pytest.raises(MisuseError, match=word):
        site.wrap(layered(layer))


def test_the_optimizer_must_hold_exactly_the_trainable_parameters(tmp_path) -> None:
    site = Site(tmp_path)
    with pytest.raises(MisuseError, match="exactly the model's trainable"):
        site.wrap(optimizer=lambda params, lr: torch.optim.SGD([next(iter(params))], lr=lr))
    with pytest.raises(MisuseError, match=r"optimizer of torch\.optim"):
        site.wrap(optimizer=torch.optim.LBFGS)
    used = torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(MisuseError, match="exactly"):
        site.wrap(optimizer=lambda params, lr: used)  # noqa: ARG005 - an optimizer of another model


def test_a_loader_that_cannot_be_drawn_from_is_refused(tmp_path) -> None:
    site = Site(tmp_path)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield torch.zeros(13)

    weighted = WeightedRandomSampler([1.0] * 303, 303)
    for loader, word in [
        ([(torch.zeros(2, 13), torch.zeros(2, 1))], "DataLoader"),
        (DataLoader(Stream(), batch_size=2), "stream"),
        (DataLoader(site.data, sampler=weighted), "sampler of its own"),
        (DataLoader(TensorDataset(torch.zeros(0, 13))), "empty"),
        (DataLoader(site.data, batch_size=None), "batch_size=None"),
    ]:
        with pytest.raises(MisuseError, match=word):
            site.guard.private(model, optimizer, loader)


def test_what_the_policy_does_not_promise_or_say_is_refused(tmp_path) -> None:
    patient = Site(tmp_path, unit="patient")
    with pytest.raises(MisuseError, match="patients=ids"):
        patient.wrap()
    with pytest.raises(MisuseError, match="one id for each"):
        patient.wrap(patients=[1, 2, 3])
    with pytest.raises(MisuseError, match="max_records"):
        patient.wrap(patients=IDS, max_records=15)
    with pytest.raises(MisuseError, match="loss_reduction"):
        patient.wrap(patients=IDS, loss_reduction="median")
    with pytest.raises(MisuseError, match="protected less"):
        Site(make(tmp_path / "records")).wrap(patients=IDS)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_policy_without_a_batch_is_refused_by_name(tmp_path) -> None:
    site = Site(tmp_path)
    text = (tmp_path / "policy.toml").read_text().replace("batch = 20\n", "")
    path = make(tmp_path / "other") / "policy.toml"
    path.write_text(text)
    path.chmod(0o600)
    site.guard = sentinel.Guard(path, tmp_path / "other-site")
    with pytest.raises(PolicyError, match=r"privacy\.batch"):
        site.wrap()


def test_site_promises_and_none_have_no_private_training(tmp_path) -> None:
    site = Site(tmp_path)
    text = (tmp_path / "policy.toml").read_text()
    without = text[: text.index("[privacy]")] + text[text.index("[[rule]]") :]
    at_site = text.replace('"record"', '"site"').replace("batch = 20\n", "")
    for name, other in [("none", without), ("site", at_site)]:
        path = make(tmp_path / f"{name}-policy") / "policy.toml"
        path.write_text(other)
        path.chmod(0o600)
        site.guard = sentinel.Guard(path, tmp_path / f"{name}-site")
        with pytest.raises(MisuseError, match=r"guard\.private is for"):
            site.wrap()


def test_a_data_set_much_larger_than_the_public_figure_is_refused(tmp_path) -> None:
    site = Site(tmp_path)
    rows = torch.zeros(401, 13)
    site.data = TensorDataset(rows, rows[:, :1])
    with pytest.raises(MisuseError, match="more than twice"):
        site.wrap()


# The budget.


def test_an_epoch_that_the_budget_does_not_pay_for_does_not_begin(tmp_path) -> None:
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    done = 0
    with site.round() as rnd:
        with pytest.raises(Withheld) as caught:  # noqa: PT012 - a loop fails in it
            while True:
                for x, y in site.loader:
                    site.step(x, y)
                    done += 1
        assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    rnd.release()  # what was paid for may leave
    assert done > 0
    assert site.events[0].steps == done
    promise = promise_of(site.guard.policy.policy)
    assert site.guard._state.ledger.spent("default", promise, tight=True).epsilon <= 3.5


def test_a_round_is_not_opened_where_no_step_is_paid_for(tmp_path) -> None:
    site = Site(tmp_path, epsilon=0.01)
    site.wrap()
    with pytest.raises(Withheld) as caught, site.round():
        pass
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED


def test_a_released_round_is_given_again_without_a_charge(site: Site) -> None:
    state = site.release()
    with site.guard.round(site.number, dict(mlp().state_dict()), site.model) as rnd:
        pass
    again = rnd.release()
    assert rnd.replayed
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert len(site.events) == 1


def test_a_probe_on_a_copy_of_the_model_meets_no_tap(site: Site) -> None:
    import copy  # noqa: PLC0415 - only this test needs it

    twin = copy.deepcopy(site.model)
    with site.round() as rnd:
        site.train(1)
        twin(torch.zeros(2, 13)).sum().backward()
        assert twin[0].weight.grad is not None
    rnd.release()
    assert isinstance(site.events[0], DpSgdEvent)


def test_making_a_model_private_again_takes_the_old_taps_off(site: Site) -> None:
    old = site.training
    site.wrap(site.model)
    assert site.training is not old
    site.release()
    assert site.events[0].steps == 3


def test_a_model_that_is_let_go_trains_as_before(site: Site) -> None:
    site.training.remove()
    x, y = site.data.tensors
    nn.functional.binary_cross_entropy_with_logits(site.model(x), y).backward()
    assert site.model[0].weight.grad is not None


def with_known_entropy(folder: Path, entropy: Any, **options: Any) -> Site:
    """A site whose coins and noise are known; only for testing."""
    site = Site(folder, unit="patient", batch=50)
    site.guard._door.house = dataclasses.replace(
        site.guard._door.house, entropy=lambda: entropy(21)
    )
    site.wrap(patients=IDS, **options)
    return site


def test_a_batch_in_pieces_gives_the_same_model_as_a_whole_one(tmp_path, fixed_entropy) -> None:
    """Same coins, same noise: the same up to a rounding of the grid."""
    whole = with_known_entropy(make(tmp_path / "whole"), fixed_entropy)
    parts = with_known_entropy(make(tmp_path / "parts"), fixed_entropy, max_records=17)
    one, other = whole.release(steps=4), parts.release(steps=99)
    assert (whole.events[0].steps, parts.events[0].steps) == (4, 4)
    grid = 2.0**-11 / math.sqrt(257)
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) <= 4 * 0.1 * grid / 50


def synthetic_patients(pictures: int) -> list[str]:
    """Groups of 1 to 8 pictures. Synthetic: the data name no patient with several pictures."""
    sizes = itertools.cycle(range(1, 9))
    groups = itertools.chain.from_iterable([group] * next(sizes) for group in itertools.count())
    return [f"synthetic {group}" for group in itertools.islice(groups, pictures)]


def test_patients_with_one_to_eight_chest_x_rays_train_a_cnn(tmp_path) -> None:
    """Synthetic groups of real pictures: it learns, and the ledger shows what it cost."""
    data = xray_data.load()
    images = torch.cat([data.hospital.images, data.public.images])
    labels = torch.cat([data.hospital.labels, data.public.labels])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    ids = synthetic_patients(len(labels))
    site = Site(tmp_path, unit="patient", batch=20, noise=1.0)
    site.data = TensorDataset(images[order], labels[order])
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 49, 2),
    )
    site.wrap(
        model, lambda params, **_: torch.optim.SGD(params, lr=0.4, momentum=0.5), patients=ids
    )
    with site.round() as rnd:
        for _ in range(6):
            for x, y in site.loader:
                site.optimizer.zero_grad()
                nn.functional.cross_entropy(site.model(x), y).backward()
                site.optimizer.step()
    site.model.load_state_dict(rnd.release())
    with torch.no_grad():
        scores = site.model(data.decoys.images).softmax(1)[:, 1]
    assert auc(scores, data.decoys.labels) > 0.8
    assert (site.events[0].unit, site.events[0].steps) == (Unit.PATIENT, 60)
