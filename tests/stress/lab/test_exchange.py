"""What the attacker is told of the treatment is what was done to the update."""

from __future__ import annotations

import pytest
import torch

from sentinel.policy.store import parse_policy
from sentinel.stress.lab.exchange import GuardedDoor, Site, Update, changed, raw
from sentinel.stress.lab.servers import SERVERS
from sentinel.stress.lab.setting import HONEST, Setting, Stage

PROMISE = """
schema = 1
name = "promise"
[privacy]
unit = "site"
epsilon = 20.0
delta = 1e-5
clip_norm = 0.02
noise_multiplier = 2.0
[[rule]]
id = "all"
"""


def one_update(subject, setting=Setting(records=32)) -> tuple[Site, Update]:  # noqa: B008 - frozen
    site = Site(subject, torch.Generator().manual_seed(0))
    return site, site.update(setting, SERVERS[HONEST])


def test_a_raw_update_is_what_training_changed(table) -> None:
    site, update = one_update(table)
    case = site.case(update, raw(update))
    assert torch.allclose(case.seen.values, case.training.update(update.behind.inputs), atol=1e-6)
    assert torch.equal(case.received["0.weight"], update.sent["0.weight"] + case.delta["0.weight"])


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_replayed_training_is_the_sites_own(table, epochs) -> None:
    site, update = one_update(table, Setting(records=70, epochs=epochs))
    assert len(update.batches) == (1 if epochs == 0 else 2 * 3)
    case = site.case(update, raw(update))
    replayed = case.training.update(update.behind.inputs, differentiable=False)
    assert torch.allclose(case.seen.values, replayed, atol=1e-6)


def test_noise_and_clip_are_told_as_they_are(table, plain, tmp_path) -> None:
    site, update = one_update(table)
    back = GuardedDoor(plain(noise=0.5, norm=0.01), tmp_path).send(update, site.model, 32)
    true = site.case(update, raw(update)).seen.values
    left = site.case(update, back).seen
    assert back.scale < 1.0
    assert float((left.values - back.scale * true).std()) == pytest.approx(back.std, rel=0.15)


def test_rules_on_the_score_hold_of_a_fooled_guard_and_rules_on_the_model_do_not(
    table, plain, tmp_path
) -> None:
    """So "had it been fooled" is more than clip, noise and mask of the rules for every round."""
    rules = '[[rule]]\nid = "score"\nwhen = { sensitivity = 0.0 }\nkeep = 0.5\n'
    rules += '[[rule]]\nid = "model"\nwhen = { suspicion = 0.1 }\naction = "refuse-round"\n'
    site = Site(table, torch.Generator().manual_seed(0))
    update = site.update(Setting("qbi", records=32), SERVERS["qbi"])
    assert GuardedDoor(plain(more=rules), tmp_path / "policy").send(update, site.model, 32).refused
    fooled = GuardedDoor(plain(more=rules), tmp_path / "alone", alone=True)
    back = fooled.send(update, site.model, 32)
    assert set(back.rules) == {"baseline", "score"}
    assert back.keep == 0.5


def test_under_a_promise_for_the_site_the_base_mechanism_is_told(table, tmp_path) -> None:
    """And its budget is a scratch one, so that it lasts for every update."""
    site, update = one_update(table)
    door = GuardedDoor(parse_policy(PROMISE.encode(), "promise.toml"), tmp_path)
    true = site.case(update, raw(update)).seen.values
    for _ in range(2):
        back = door.send(update, site.model, 32)
        left = site.case(update, back).seen
        assert back.std == pytest.approx(0.04, rel=0.05)
        assert float((left.values - back.scale * true).std()) == pytest.approx(back.std, rel=0.15)


def test_the_later_stage_is_trained_and_the_start_is_as_given(table) -> None:
    site = Site(table, torch.Generator().manual_seed(0))
    start, later = site.stage(Stage.START), site.stage(Stage.LATER)
    assert not any(value.any() for value in changed(table.start, start).values())
    with torch.no_grad():
        losses = []
        for state in (start, later):
            site.model.load_state_dict(state)
            losses.append(float(table.loss(site.model(table.train.inputs), table.train.labels)))
    assert losses[1] < 0.9 * losses[0]
