"""Malicious and honest servers read what the project's reference says that they read."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.stress import nets, servers
from sentinel.stress.corpus import Net, Task, train
from sentinel.stress.layers import loaded, recorded_inputs
from sentinel.stress.servers import Public, measure
from sentinel.stress.servers.raw import count_read, gradient_of, rows_read, viewed

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.layers import State

    Batches = list[tuple[Tensor, Tensor]]

pytestmark = pytest.mark.usefixtures("one_thread")

LENET = Net("lenet-256", lambda: nets.lenet(256, 10), (1, 28, 28), 10)
# Least share of a batch of 32 that the reference gives for a family on this net.
REFERENCE = {
    "binning-gaussian": 0.81,
    "binning-mean": 0.81,
    "binning-cosine": 0.81,
    "binning-scaled": 0.81,
    "trap-weights": 0.31,
    "qbi": 0.78,
}
MORE = {"trap-weights": 0.7}  # where every row is tuned on its own: .82 to .9 measured


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def setting(seed: int, steps: int) -> tuple[nn.Module, State, Public, Batches, Batches]:
    """A net, its state, public records, and two batches of 32 and of 8."""
    model = nets.drawn(LENET.build, seeded(seed))
    task = Task(LENET, seeded(10 + seed))
    train(model, task, steps=steps, rate=0.05)
    public = Public(*task.draw(2000), 32)
    batches = [[task.draw(size) for _ in range(2)] for size in (32, 8)]
    return model, servers.copied(model.state_dict()), public, batches[0], batches[1]


def reads(model: nn.Module, state: State, batches: Batches) -> float:
    """Share of the rows that reach the first dense layer which one raw gradient each gives away."""
    return read_with(model, state, batches, None)


def read_with(model: nn.Module, state: State, batches: Batches, secret: Tensor | None) -> float:
    """The same, for a server that reads by a secret."""
    read = rows = 0
    for records, labels in batches:
        twin = loaded(model, state)
        output, inputs = recorded_inputs(twin, records, "7")
        loss = nn.functional.cross_entropy(output, labels)
        names = dict(twin.named_parameters())
        values = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        read += count_read(viewed(model, state, values, "7"), inputs.detach(), secret)
        rows += len(inputs)
    return read / rows


def pooled(craft: str, steps: int = 0) -> float:
    """Share of batches of 32 that the craft reads, over two drawings of net and records."""
    shares = []
    for seed in (1, 2):
        model, state, public, batches, _ = setting(seed, steps)
        made = servers.recipe(craft).craft(public)
        shares.append(reads(model, made(model, state, generator=seeded(20 + seed)), batches))
    return sum(shares) / 2


def pooled_honest(steps: int, batch: int) -> float:
    shares = []
    for seed in (1, 2):
        model, state, _, large, small = setting(seed, steps)
        shares.append(reads(model, state, large if batch == 32 else small))
    return sum(shares) / 2


@pytest.mark.parametrize(("batch", "expected"), [(32, 0.25), (8, 0.8)])
def test_an_honest_lenet_at_init_gives_away_the_reference_share(
    batch: int, expected: float
) -> None:
    """For eight records the reference has .77 to .84."""
    assert pooled_honest(0, batch) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("craft", REFERENCE)
def test_each_family_reads_the_reference_share_of_a_batch_of_32(craft: str) -> None:
    assert pooled(craft) >= MORE.get(craft, REFERENCE[craft])


@pytest.mark.parametrize(
    "craft",
    [
        "binning-sparse",
        "loki",
        "class-separation",
        pytest.param("learned-neurons", marks=pytest.mark.slow),
    ],
)
def test_families_without_a_reference_figure_read_at_least_half_of_the_batch(craft: str) -> None:
    assert pooled(craft) >= 0.5


def test_fishing_for_a_class_reduces_a_batch_of_32_to_the_one_record_of_it() -> None:
    model = nets.drawn(LENET.build, seeded(1))
    task = Task(LENET, seeded(11))
    state = servers.copied(model.state_dict())
    sent = servers.fishing_class(model, state, generator=seeded(3), target=4)
    images, labels = task.draw(200)
    others = torch.nonzero(labels != 4)[:31, 0]
    chosen = torch.cat([torch.nonzero(labels == 4)[:1, 0], others])
    leak = measure(model, state, sent, [(images[chosen], labels[chosen])])
    assert leak.effective == pytest.approx(1.0)
    assert leak.largest == pytest.approx(1.0)
    assert leak.alike == pytest.approx(1.0, abs=1e-4)
    assert leak.honest_effective > 25
    assert leak.read == 1  # the .03 of the reference


@pytest.mark.parametrize("steps", [0, pytest.param(200, marks=pytest.mark.slow)])
def test_a_secret_decoder_reads_batches_in_which_the_honest_model_hides_most(steps: int) -> None:
    """Measured: .63, .40 and .20 of 32, 64 and 128 records; the honest model gives .28, .09, .05.

    Trained, .71, .43 and .27 beside .32, .21 and .08. Who lacks the secret reads less of the
    crafted model than of the honest one, and the model answers as before.
    """
    model, state, public, _, _ = setting(1, steps)
    task = Task(LENET, seeded(11))  # the same patterns
    task.draw(2000)  # and none of the public records
    secret = servers.seer_secret(256, seeded(3))
    sent = servers.seer(
        model, state, generator=seeded(4), sample=public.sample, batch=64, secret=secret
    )
    batches = [task.draw(64) for _ in range(2)]
    assert read_with(model, sent, batches, secret) >= 0.3
    assert reads(model, sent, batches) < 0.6 * reads(model, state, batches)
    images, _ = task.draw(500)
    answers = [loaded(model, one).eval()(images).argmax(1) for one in (sent, state)]
    assert (answers[0] == answers[1]).float().mean() > 0.95


@pytest.mark.parametrize(("hidden", "expected"), [(64, 0.37), (256, 0.73)])
def test_an_honest_heart_disease_model_gives_away_the_reference_share_of_eight(
    hidden: int, expected: float
) -> None:
    cohort = cohorts.load("cleveland")
    read = rows = 0
    for seed in range(50):
        model: nn.Module = network(13, hidden, seeded(seed))
        part = cohort.take(torch.randperm(len(cohort), generator=seeded(seed))[:8])
        found = gradient_of(model, model.state_dict(), (part.rows, part.labels.long()), "0")
        read += rows_read(model, model.state_dict(), found, "0")
        rows += len(found.inputs)
    assert read / rows == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("craft", REFERENCE)
def test_the_families_read_as_much_of_a_trained_model(craft: str) -> None:
    assert pooled(craft, steps=200) >= REFERENCE[craft]
