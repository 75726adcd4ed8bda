"""Labels come back from the last layer: one record's always, several records' counts nearly so."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.errors import MisuseError
from sentinel.stress.passive.labels import Probes, count_labels, lone_label
from sentinel.stress.passive.local_training import LocalTraining, Seen

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = xray_data.load()
CLASSES = 10
MADE_UP = torch.randint(0, CLASSES, (280,), generator=torch.Generator().manual_seed(5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cnn(classes: int) -> nn.Sequential:
    return nn.Sequential(*list(xray_net())[:-1], nn.Linear(1568, classes))


def perceptron(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, classes))


def tangent(classes: int) -> nn.Sequential:
    """Embeddings of either sign."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, classes))


def sigmoid_lenet(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(588, classes),
    )


def normed(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


NETS = (cnn, perceptron, tangent, sigmoid_lenet, normed)
Net = Callable[[int], nn.Sequential]


def sent(net: Net, classes: int, *, trained: bool = False, seed: int = 0) -> nn.Sequential:
    """A global model: at its start, or after steps on public pictures."""
    model = net(classes)
    initialise(model, generator(seed))
    if trained:
        labels = DATA.public.labels if classes == 2 else MADE_UP
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch in torch.randperm(280, generator=generator(1)).split(20):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(DATA.public.images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def site(
    model: nn.Module, labels: torch.Tensor, batches: tuple[torch.Tensor, ...], rate: float = 0.05
) -> LocalTraining:
    return LocalTraining(model, model.state_dict(), labels, batches, rate)


def noised(raw: torch.Tensor, ratio: float, seed: int = 7) -> Seen:
    std = ratio * float(raw.norm()) / math.sqrt(raw.numel())
    return Seen(raw + std * torch.randn(raw.shape, generator=generator(seed)), 1.0, std)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("net", NETS)
def test_the_label_of_one_record_is_always_read_off_a_raw_update(
    *, net: Net, classes: int, trained: bool
) -> None:
    """iDLG, 100 % at batch 1: after one step, and after three on the same record."""
    model = sent(net, classes, trained=trained)
    for number in range(10):
        label = DATA.hospital.labels[6 * number] if classes == 2 else MADE_UP[number]
        picture = DATA.hospital.images[6 * number][None]
        for steps in (1, 3):
            local = site(model, label[None], (torch.tensor([0]),) * steps)
            seen = Seen(local.update(picture, differentiable=False))
            assert lone_label(local, seen) == int(label)


def recovered(  # noqa: PLR0913 - a table of cases
    model: nn.Module,
    probes: Probes | None,
    *,
    records: int,
    batch: int,
    epochs: int,
    ratio: float = 0.0,
    keep: float = 1.0,
    hidden: bool = False,
    draws: int = 3,
) -> float:
    """Share of the labels that the counts get right, in the mean over draws of skewed classes."""
    shuffle = generator(records + batch + epochs)
    classes = int(list(model.parameters())[-1].numel())
    right = 0.0
    for draw in range(draws):
        labels = (torch.rand(records, generator=shuffle) ** (1 + draw) * classes).long()
        if classes == 2:
            own = [(DATA.hospital.labels == label).nonzero().flatten() for label in (0, 1)]
            at = torch.stack([own[int(y)][i % 32] for i, y in enumerate(labels)])
        else:
            at = torch.randperm(64, generator=shuffle)[:records]
        order = tuple(
            step
            for _ in range(epochs)
            for step in torch.randperm(records, generator=shuffle).split(batch)
        )
        local = site(model, labels, order)
        seen = noised(local.update(DATA.hospital.images[at], differentiable=False), ratio, draw)
        if keep < 1.0:
            mask = torch.rand(seen.values.shape, generator=shuffle) < keep
            seen = Seen(seen.values * mask / keep, 1.0, seen.noise_std, keep, hidden)
        counts = count_labels(local, seen, probes=probes)
        assert int(counts.sum()) == records
        assert int(counts.min()) >= 0
        right += float(torch.minimum(counts, labels.bincount(minlength=classes)).sum()) / records
    return right / draws


def own(classes: int) -> Probes:
    every_third = slice(0, None, 3)
    labels = DATA.public.labels if classes == 2 else MADE_UP
    return Probes(DATA.public.images[every_third], labels[every_third])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("net", [cnn, sigmoid_lenet])
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_counts_per_class_come_back_from_one_gradient_of_many_records(
    *, net: Net, classes: int, trained: bool
) -> None:
    model = sent(net, classes, trained=trained)
    assert recovered(model, own(classes), records=8, batch=8, epochs=1) >= 0.95
    assert recovered(model, own(classes), records=32, batch=32, epochs=1) >= 0.9


def test_counts_come_back_from_local_steps_over_two_epochs() -> None:
    for classes in (2, CLASSES):
        model = sent(cnn, classes)
        assert recovered(model, own(classes), records=32, batch=8, epochs=2) >= 0.9


def test_an_attacker_without_records_reads_embeddings_off_the_update() -> None:
    model = sent(cnn, CLASSES, trained=True)
    assert recovered(model, None, records=8, batch=8, epochs=1) >= 0.95
    noise = Probes(torch.rand((60, 1, 28, 28), generator=generator(3)))
    assert recovered(model, noise, records=8, batch=8, epochs=1) >= 0.95


def test_noise_of_twice_the_updates_norm_hides_no_counts_and_a_hundred_times_does() -> None:
    """All rows of the last layer together: the bias alone is drowned long before."""
    model = sent(cnn, CLASSES)
    clear = recovered(model, own(CLASSES), records=8, batch=8, epochs=1, ratio=2.0)
    drowned = recovered(model, own(CLASSES), records=8, batch=8, epochs=1, ratio=300.0, draws=4)
    assert clear >= 0.9
    assert drowned <= 0.8


@pytest.mark.parametrize("hidden", [False, True])
def test_a_mask_hides_no_counts(*, hidden: bool) -> None:
    model = sent(cnn, CLASSES)
    kept = recovered(
        model, own(CLASSES), records=8, batch=8, epochs=1, ratio=0.5, keep=0.1, hidden=hidden
    )
    assert kept >= 0.85


def test_the_label_of_one_record_is_read_through_noise_that_drowns_the_bias() -> None:
    model = sent(sigmoid_lenet, CLASSES)
    hits, by_bias = 0, 0
    for number in range(12):
        label = MADE_UP[number][None]
        local = site(model, label, (torch.tensor([0]),))
        raw = local.update(DATA.hospital.images[5 * number][None], differentiable=False)
        seen = noised(raw, 10.0, number)
        hits += lone_label(local, seen, probes=own(CLASSES)) == int(label)
        by_bias += int(seen.values[-CLASSES:].argmax()) == int(label)
    assert hits >= by_bias + 3


def test_a_model_without_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 28), nn.Flatten())
    local = site(model, torch.tensor([0]), (torch.tensor([0]),))
    seen = Seen(torch.ones(2 * 784 + 2))
    with pytest.raises(MisuseError, match="Linear"):
        count_labels(local, seen)


def test_probes_that_leave_a_class_out_are_refused() -> None:
    model = sent(perceptron, 2)
    local = site(model, torch.tensor([0]), (torch.tensor([0]),))
    seen = Seen(local.update(DATA.hospital.images[:1], differentiable=False))
    with pytest.raises(MisuseError, match="each class"):
        count_labels(local, seen, probes=Probes(DATA.public.images[:3], torch.tensor([0, 0, 0])))


def test_counting_changes_neither_model_nor_state() -> None:
    model = sent(normed, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    local = site(model, torch.tensor([0, 1]), (torch.arange(2),))
    seen = Seen(local.update(DATA.hospital.images[:2], differentiable=False))
    count_labels(local, seen, probes=own(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
