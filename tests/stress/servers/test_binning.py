"""Binning isolates most records of a batch, along any line, however its rows hide."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.demo.hospitals import Loop, Site
from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.passive.tabular import EXACT, nearest, view
from sentinel.stress.servers import Direction, Stealth, measure
from sentinel.stress.servers.raw import gradient_of, guesses

SAMPLE = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Module:
    return nets.drawn(lambda: nets.mlp(*widths), seeded(sum(widths)))


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("widths", [(13, 256, 1), (13, 256, 16, 3)])
def test_binning_reads_most_of_a_batch_where_the_honest_model_gives_away_few(
    direction: Direction, widths: tuple[int, ...]
) -> None:
    model = mlp(*widths)
    state = servers.copied(model.state_dict())
    batch = torch.randn(32, 13, generator=seeded(1)), torch.arange(32) % 2
    crafted = servers.binning(model, state, generator=seeded(), direction=direction, scale=0.1)
    leak = measure(model, state, crafted, [batch])
    assert leak.honest_share < 0.3
    assert leak.share >= 0.6


def test_binning_puts_its_cuts_at_quantiles_of_the_sample_it_is_given() -> None:
    """On inputs far from standard normal, only the sample's own quantiles split them evenly."""
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    rows = 5 + 0.1 * torch.randn(2000, 13, generator=seeded(1))
    fired = []
    for sample in (None, rows[:1000]):
        crafted = servers.binning(model, state, generator=seeded(), sample=sample)
        active = rows[1000:] @ crafted["0.weight"].T + crafted["0.bias"] > 0
        fired.append(active.float().mean(0))
    assert int(((fired[0] > 0.05) & (fired[0] < 0.95)).sum()) < 16
    assert torch.allclose(fired[1], 1 - (torch.arange(64) + 0.5) / 64, atol=0.1)


def test_a_narrow_layer_reads_more_of_a_cohort_by_scanning_a_part_of_it() -> None:
    """212 patients, two epochs, 64 neurons: 4 to 6 rows in the reference; 16.0 measured so."""
    public = cohorts.load("hungarian").rows
    exact = {0: 0, 212: 0}
    for seed in range(5):
        parts = cohorts.split(cohorts.load("cleveland"), 0.7, seeded(seed))
        site = Site("cleveland", *parts, Loop(epochs=2, batch=32, rate=0.02))
        model = network(13, 64, seeded(seed))
        state = servers.copied(model.state_dict())
        for records in exact:
            sent = servers.binning(
                model,
                state,
                generator=seeded(seed),
                scale=0.01,
                sample=public,
                records=records,
            )
            model.load_state_dict(sent)
            site.fit(model, seeded(seed))
            wide, local = (
                {name: value.double() for name, value in one.items()}
                for one in (sent, model.state_dict())
            )
            seen = guesses(view(wide, local, "0", "2"))
            exact[records] += int((nearest(seen, site.train.rows) < EXACT).sum())
    assert len(site.train.rows) == 212
    assert exact[212] / 5 >= 10
    assert exact[212] > 3 * exact[0]


def test_binning_reaches_a_named_layer_behind_convolutions() -> None:
    model = nets.drawn(lambda: nets.lenet(64, 3), seeded(1))
    state = servers.copied(model.state_dict())
    crafted = servers.binning(model, state, generator=seeded(), layer="7")
    changed = {name for name in state if not torch.equal(state[name], crafted[name])}
    assert changed == {"7.weight", "7.bias", "9.weight", "9.bias"}
    assert torch.linalg.matrix_rank(crafted["7.weight"]) == 1


def test_binning_refuses_a_last_layer_and_a_name_that_is_not_there() -> None:
    model = mlp(13, 32, 1)
    state = servers.copied(model.state_dict())
    with pytest.raises(MisuseError, match="two fully connected layers in a row"):
        servers.binning(model, state, generator=seeded(), layer="2")
    with pytest.raises(MisuseError, match="there are 0, 2"):
        servers.binning(model, state, generator=seeded(), layer="head")


def test_hidden_bins_compute_the_same_function_in_another_order_and_scale() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    outputs = []
    for stealth in (Stealth(), Stealth(permute=True, scale=1.0)):
        crafted = servers.binning(model, state, generator=seeded(), stealth=stealth)
        model.load_state_dict(crafted)
        outputs.append(model(SAMPLE).detach())
    assert torch.allclose(*outputs, rtol=1e-4)
    assert crafted["0.weight"].norm(dim=1).std() > 0.2


def test_flipped_and_jittered_rows_are_flipped_and_jittered_in_the_share_asked_for() -> None:
    model = mlp(13, 400, 1)
    state = servers.copied(model.state_dict())
    hidden = Stealth(flip=0.5, jitter=0.1, rows=0.25)
    crafted = servers.binning(model, state, generator=seeded(), stealth=hidden)
    bent = (crafted["0.weight"] != state["0.weight"]).any(1)
    assert int(bent.sum()) == 100
    rows = F.normalize(crafted["0.weight"][bent], dim=1)
    cosines = rows @ rows[0]
    assert 0.35 < (cosines > 0).float().mean() < 0.65
    assert 0.9 < cosines[1:].abs().mean() < 0.999


@pytest.mark.parametrize("hidden", [64, 65])
def test_sparse_bins_stay_between_zero_and_one_wherever_the_record_lies(hidden: int) -> None:
    """Two neighbours make a step of height one, which the published bins get from a Hardtanh."""
    model = mlp(13, hidden, 1)
    crafted = servers.sparse_binning(
        model, servers.copied(model.state_dict()), generator=seeded(), sample=SAMPLE
    )
    model.load_state_dict(crafted)
    assert isinstance(model, nn.Sequential)
    fired = model[1](model[0](20 * SAMPLE)).detach()
    steps = fired[:, 0:64:2] - fired[:, 1:64:2]
    assert steps.min() > -1e-3
    assert steps.max() < 1 + 1e-3
    assert (steps > 0.999).any()


def test_isolation_makes_the_layer_s_update_one_record() -> None:
    model = mlp(13, 64, 1)
    state = servers.copied(model.state_dict())
    crafted = servers.isolation(model, state, generator=seeded(), sample=SAMPLE)
    fired = SAMPLE @ crafted["0.weight"].T + crafted["0.bias"] > 0
    assert fired.any(1).sum() == 1
    assert fired.any(1).equal(fired.all(1))
    gradient = gradient_of(model, crafted, (SAMPLE, torch.zeros(40).long()), "0").values
    row = (gradient["0.weight"][0] / gradient["0.bias"][0]).double()
    assert torch.allclose(row, SAMPLE[fired.any(1)][0].double(), rtol=1e-4)


def test_isolation_for_a_batch_lets_one_in_so_many_past() -> None:
    model = mlp(13, 64, 1)
    rows = torch.randn(1000, 13, generator=seeded(5))
    crafted = servers.isolation(
        model, model.state_dict(), generator=seeded(), sample=rows, batch=20
    )
    fired = rows @ crafted["0.weight"][0] + crafted["0.bias"][0] > 0
    assert int(fired.sum()) == 50
