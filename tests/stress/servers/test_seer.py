"""A seer's records lie in mixtures of neurons: nobody else finds them, and no weight shows them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentinel.errors import MisuseError
from sentinel.stress import nets, servers
from sentinel.stress.servers import measure
from sentinel.stress.servers.seer import seer_secret


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Module:
    return nets.drawn(lambda: nets.mlp(40, 96, 4), seeded(1))


def rows(count: int, seed: int) -> torch.Tensor:
    """Rows of forty columns that vary along ten directions only, and a little beside them."""
    mix = torch.randn(10, 40, generator=seeded(9))
    generator = seeded(seed)
    wide = torch.randn(count, 10, generator=generator) @ mix
    return wide + 0.01 * torch.randn(count, 40, generator=generator)


def test_the_secret_mixes_each_neuron_once_at_most_and_none_by_little() -> None:
    secret = seer_secret(50, seeded(), group=4)
    assert secret.shape == (12, 50)
    assert ((secret != 0).sum(1) == 4).all()
    assert ((secret != 0).sum(0) <= 1).all()
    assert secret[secret != 0].abs().min() >= 0.5


def test_the_secret_is_what_the_same_generator_draws_first() -> None:
    model, sample = mlp(), rows(200, 2)
    drawn = servers.seer(model, model.state_dict(), generator=seeded(5), sample=sample)
    generator = seeded(5)
    secret = seer_secret(96, generator)
    given = servers.seer(
        model, model.state_dict(), generator=generator, sample=sample, secret=secret
    )
    assert all(torch.equal(drawn[name], given[name]) for name in drawn)


def test_the_mixture_of_what_fires_a_whole_group_is_zero() -> None:
    model = mlp()
    secret = seer_secret(96, seeded(3))
    sent = servers.seer(
        model, model.state_dict(), generator=seeded(4), sample=rows(400, 2), secret=secret
    )
    behind = sent["2.weight"] @ secret.T
    assert behind.abs().max() < 1e-4 * sent["2.weight"].abs().max()


def test_who_has_the_secret_reads_a_batch_that_others_do_not() -> None:
    """A slice holds one record of a batch in 1/e of all draws, so a third of the rows come out."""
    model = mlp()
    state, sample = servers.copied(model.state_dict()), rows(1000, 2)
    batches = [(rows(32, seed), torch.arange(32) % 4) for seed in range(20, 24)]
    shares = {"told": 0.0, "untold": 0.0, "wrong": 0.0, "honest": 0.0}
    draws = 6  # shares differ by .03 between draws, and by as much between processors
    for draw in range(draws):
        secret = seer_secret(96, seeded(10 + draw))
        sent = servers.seer(
            model, state, generator=seeded(draw), sample=sample, batch=32, secret=secret
        )
        told = measure(model, state, sent, batches, secret=secret)
        assert told.reads
        shares["told"] += told.share / draws
        shares["honest"] += told.honest_share / draws
        shares["untold"] += measure(model, state, sent, batches).share / draws
        other = seer_secret(96, seeded(20 + draw))
        shares["wrong"] += measure(model, state, sent, batches, secret=other).share / draws
    assert shares["told"] >= 0.28
    assert max(shares["untold"], shares["wrong"]) < shares["told"] / 4
    assert shares["honest"] < 0.15


def test_few_neurons_fire_for_few_and_no_two_rows_are_alike() -> None:
    """What gives binning and sparse activation away is not there; most pairs are as far as ever."""
    model = mlp()
    sent = servers.seer(model, model.state_dict(), generator=seeded(4), sample=rows(1000, 2))
    fired = (rows(1000, 5) @ sent["0.weight"].T + sent["0.bias"] > 0).float().mean(0)
    assert ((fired > 0.05) & (fired < 0.95)).float().mean() > 0.8
    unit = nn.functional.normalize(sent["0.weight"], dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(0).amax(1)
    assert nearest.median() < 0.95
    assert torch.linalg.matrix_rank(sent["0.weight"]) == 40


def test_the_model_answers_as_the_honest_one_does() -> None:
    """Measured: the same class for .86 to .91 of fresh rows, over twelve draws of the secret."""
    model = mlp()
    state = servers.copied(model.state_dict())
    fresh = rows(500, 6)
    before = model(fresh).detach()
    model.load_state_dict(servers.seer(model, state, generator=seeded(4), sample=rows(1000, 2)))
    after = model(fresh).detach()
    assert (before.argmax(1) == after.argmax(1)).float().mean() > 0.8
    assert (after - before).square().mean() < 0.3 * before.var(0).mean()


def test_a_layer_too_narrow_or_a_sample_too_small_is_refused() -> None:
    model = mlp()
    with pytest.raises(MisuseError, match="2 to 3 of the layer's neurons, got 4"):
        seer_secret(3, seeded(), group=4)
    with pytest.raises(MisuseError, match="the sample must hold a batch of 32"):
        servers.seer(model, model.state_dict(), generator=seeded(), sample=rows(31, 1))
