"""What a private round keeps count of: steps, budget, units, and what an error leaves behind."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sentinel import MisuseError, Withheld
from sentinel.audit import read_log
from sentinel.dpsgd.quantile import Quantile
from sentinel.house import promise_of
from sentinel.mechanism import slack
from sentinel.privacy import Charge, Head, weigh
from sentinel.terms import GENESIS, Reason

from .conftest import Clipper
from .test_training import IDS, Site, make, mlp, withheld

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLLOWS = "adaptive_clip = { quantile = 0.5, floor = 0.001, ceiling = 100.0 }"
COORDINATES = 257 - 16  # 13 x 16 + 16 + 16 + 1


def spend_until_only(site: Site, fewer: int, than: int) -> None:
    """Others spend until a round of `fewer` steps is paid for and one of `than` is not."""
    ledger, allowance = site.guard._state.ledger, site.training._allowance
    promise = promise_of(site.guard.policy.policy)
    assert promise is not None

    def pays(steps: int) -> bool:
        try:
            ledger.require_budget("default", allowance.event(steps), promise)
        except Withheld:
            return False
        return True

    charges = 0
    for size in (256, 64, 16, 4, fewer):
        while pays(than if size == fewer else than + size):
            charges += 1
            charge = Charge(
                at=0,
                dataset="default",
                policy="0" * 64,
                round=f"{charges:064x}",
                event=allowance.event(size),
                log_head=Head(0, GENESIS),
            )
            ledger.charge(charge, promise, per_day=None)
    assert pays(fewer)


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def test_what_is_left_of_ideal_noise_is_charged_for_every_draw_of_every_step(tmp_path) -> None:
    """One draw for each coordinate and step, and one more for the count of a clip that follows."""
    for more, draws in (("", COORDINATES), (FOLLOWS, COORDINATES + 1)):
        site = Site(make(tmp_path / str(draws)), more=more)
        site.wrap()
        for steps in (1, 3, 7):
            event = site.training._allowance.event(steps)
            whole = slack(draws * steps)
            assert event.log_ratio == pytest.approx(whole.log_ratio, rel=1e-9, abs=0)
            assert event.mass == pytest.approx(whole.mass, rel=1e-9, abs=0)


def test_where_the_clip_norm_follows_the_gradients_get_more_noise_and_no_more_is_charged(
    tmp_path,
) -> None:
    """Measured on gradients that are zero: more than z, as the split of z says."""
    site = Site(tmp_path, more=FOLLOWS, batch=20)
    site.data = TensorDataset(torch.zeros(303, 13), torch.full((303, 1), 0.5))
    model = nn.Linear(13, 1, bias=False)
    nn.init.zeros_(model.weight)
    site.wrap(model)
    expected = Quantile(0.5, 0.001, 100.0, batch=20).gradient_multiplier(1.0)
    assert expected > 1.1
    values = []
    with site.round() as rnd:
        for _ in range(12):
            for x, y in site.loader:
                before, clip = site.model.weight.detach().clone(), site.training.clip_norm
                site.step(x, y)
                moved = (site.model.weight.detach() - before).flatten() / 0.1
                values.append(moved / clip * 20)
    rnd.release()
    found = float(torch.cat(values).std())  # 120 steps x 13 values: within 2 %
    assert found == pytest.approx(expected, rel=0.06)
    assert found != pytest.approx(1.0, rel=0.06)
    assert site.events[0].noise_multiplier == 1.0


def test_an_unpaid_epoch_is_refused_before_its_first_batch_whatever_was_trained(tmp_path) -> None:
    """All steps of the round so far count."""
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    done = 0
    with site.round(), pytest.raises(Withheld) as caught:  # noqa: PT012 - a loop fails in it
        while True:
            for x, y in site.loader:
                site.step(x, y)
                done += 1
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert done > len(site.loader)
    assert done % len(site.loader) == 0


def test_an_unpaid_epoch_says_its_steps_how_many_still_fit_and_who_claims_the_epsilon(
    tmp_path,
) -> None:
    """As many as the ledger allows, and not one more."""
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    with site.round(), pytest.raises(Withheld) as caught:  # noqa: PT012 - a loop fails in it
        while True:
            site.train(len(site.loader))
    said = re.match(
        r"One more epoch \(10 private steps after (\d+) in this round; (\d+) still fit\) would "
        r"spend epsilon [\d.]+ of 3\.5 \(.*unit record.*, claimed by the training process, ",
        str(caught.value),
    )
    assert said is not None, str(caught.value)
    taken, fit = int(said[1]), int(said[2])
    assert taken == site.training.steps
    promise = promise_of(site.guard.policy.policy)
    assert promise is not None
    event = site.training._allowance.event

    def spent(steps: int) -> float:
        return weigh({event(steps): 1}, promise).epsilon

    assert 0 <= fit < 10
    assert spent(taken + fit) <= 3.5 < spent(taken + fit + 1)


def test_steps_that_others_spent_meanwhile_are_not_told_as_fitting(tmp_path) -> None:
    site = Site(tmp_path, epsilon=8.0)
    site.wrap()
    with site.round():
        for _ in range(2):
            site.train(len(site.loader))
        spend_until_only(site, 1, 20)
        with pytest.raises(Withheld, match="after 20 in this round; 0 still fit"):
            site.train(1)


def test_an_epoch_of_very_many_steps_is_refused_without_counting_what_fits(tmp_path) -> None:
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    with (
        site.round(),
        pytest.raises(Withheld, match=r"\(6,000 private steps after 0 in this round\)"),
    ):
        site.training.require_epoch(6000)


def logged(folder: Path) -> list[tuple[str, Reason | None]]:
    """What the log says of each round since the guard started."""
    entries = [entry.record for entry in read_log(folder / "site" / "audit")]
    return [
        (one.type, getattr(one, "reason", None)) for one in entries if one.type != "guard.started"
    ]


def exhaust(site: Site) -> None:
    """Train until the budget does not pay for another epoch."""
    while True:
        site.train(len(site.loader))


def tamper(site: Site) -> None:
    """Change a parameter between two steps."""
    site.train(1)
    with torch.no_grad():
        site.model[2].bias.add_(1.0)
    site.train(1)


REFUSED = [(exhaust, Reason.BUDGET_EXHAUSTED), (tamper, Reason.PROMISE_NOT_KEPT)]


@pytest.mark.parametrize(("loop", "reason"), REFUSED)
def test_a_refusal_that_ends_the_block_is_one_record_one_alert_and_one_exception(
    tmp_path, capsys, loop: Callable[[Site], None], reason: Reason
) -> None:
    """All with the same reason; nothing was charged, and the round may be tried again."""
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    rnd = site.round()
    with pytest.raises(Withheld) as caught, rnd:
        loop(site)
    assert caught.value.reason is reason
    assert logged(tmp_path) == [("round.opened", None), ("update.withheld", reason)]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert f'event="update withheld" reason={reason} round=1' in told[0]
    with pytest.raises(MisuseError, match="The round is withheld"):
        rnd.release()
    assert site.events == []
    site.number -= 1
    site.release(steps=2)
    assert [event.steps for event in site.events] == [2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("loop", "reason"), REFUSED)
def test_a_refusal_is_told_where_the_log_cannot_be_written(
    tmp_path, capsys, monkeypatch, loop: Callable[[Site], None], reason: Reason
) -> None:
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(Withheld) as caught, site.round():  # noqa: PT012 - a loop fails in it
        monkeypatch.setattr("sentinel.audit.log.os.write", full)
        loop(site)
    assert caught.value.reason is reason
    assert capsys.readouterr().err.count(f"reason={reason} round=1") == 1


def test_a_budget_that_ends_is_no_refusal_where_the_loop_catches_it_and_releases(
    tmp_path, capsys
) -> None:
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    with site.round() as rnd:
        with pytest.raises(Withheld):
            exhaust(site)
        rnd.release()
    assert [name for name, _ in logged(tmp_path)] == [
        "round.opened",
        "update.decided",
        "update.released",
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("patient 4711"),
        Withheld(Reason.NOT_FINITE, "of another round, for patient 4711"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_loop_itself_is_an_abort_also_after_a_refusal_that_it_caught(
    tmp_path, capsys, error: BaseException
) -> None:
    """No text of it is kept, and nobody is alerted."""
    site = Site(tmp_path, epsilon=3.5)
    site.wrap()
    with pytest.raises(type(error)) as caught, site.round():  # noqa: PT012 - a loop fails in it
        with pytest.raises(Withheld):
            exhaust(site)
        raise error
    assert caught.value is error
    assert logged(tmp_path) == [("round.opened", None), ("round.aborted", None)]
    assert capsys.readouterr().err == ""
    kept = b"".join(path.read_bytes() for path in (tmp_path / "site" / "audit").iterdir())
    assert b"4711" not in kept


def test_what_others_spend_between_two_rounds_is_not_paid_twice(tmp_path) -> None:
    """The answer of the last round's budget does not hold for the next."""
    site = Site(tmp_path, epsilon=8.0)
    site.wrap()
    site.release(steps=2)
    spend_until_only(site, 1, len(site.loader))
    with site.round(), pytest.raises(Withheld) as caught:
        site.train(1)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED


def test_momentum_of_a_round_whose_charge_was_refused_is_not_carried_on(tmp_path) -> None:
    """It was read for its release, but others had spent the rest; an earlier round cost as much."""
    site = Site(tmp_path, epsilon=8.0)
    site.wrap(optimizer=adam)
    site.release(steps=6)
    with site.round() as rnd:
        site.train(6)
        spend_until_only(site, 1, 6)
        charged = len(site.events)
    with pytest.raises(Withheld) as caught:
        rnd.release()
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert len(site.events) == charged
    with pytest.raises(Withheld, match="begins with state"), site.round():
        pass


def test_what_is_left_of_a_batch_is_no_part_of_the_next_round(tmp_path) -> None:
    """Left between two pieces: their sum is forgotten, and the next round trains as ever."""
    site = Site(tmp_path, unit="patient", batch=50)
    site.wrap(patients=IDS, max_records=17)
    with site.round() as rnd:
        for x, y in site.loader:
            site.step(x, y)
            break
    assert site.training._sum is not None
    assert site.training.steps == 0
    start = site.state
    state = rnd.release()
    assert all(torch.equal(state[name], start[name]) for name in state)
    with site.round() as rnd:
        assert site.training._sum is None
        for x, y in site.loader:
            site.step(x, y)
    rnd.release()
    assert site.events[-1].steps == len(site.loader)


def test_an_epoch_left_in_the_middle_of_a_batch_spoils_the_round(tmp_path) -> None:
    """To leave out the rest of one would be a choice by the data."""
    site = Site(tmp_path, unit="patient", batch=50)
    site.wrap(patients=IDS, max_records=17)
    with site.round() as rnd:
        for x, y in site.loader:
            site.step(x, y)
            break
        with pytest.raises(MisuseError, match="middle of a batch"):
            next(iter(site.loader))
    withheld(site, rnd)


def known(folder: Path, entropy: Any, **options: Any) -> Site:
    """A site whose coins and noise are known, whose clip follows, and with a cap of two records."""
    site = Site(folder, unit="patient", batch=50, more=f"{FOLLOWS}\nrecords_per_patient = 2")
    house = site.guard._door.house
    site.guard._door.house = dataclasses.replace(house, entropy=lambda: entropy(21))
    site.wrap(patients=IDS, **options)
    return site


def test_a_batch_in_pieces_counts_like_a_whole_one(tmp_path, fixed_entropy) -> None:
    """The clip norm moves by all units of the batch, and what the cap left out counts once."""
    whole = known(make(tmp_path / "whole"), fixed_entropy)
    parts = known(make(tmp_path / "parts"), fixed_entropy, max_records=17)
    for site in (whole, parts):
        site.release(steps=4 if site is whole else 99)
    assert whole.training.clip_norm == parts.training.clip_norm != 1.0
    assert whole.training.left_out == parts.training.left_out > 100


def test_the_counts_in_memory_add_up_over_steps(tmp_path) -> None:
    site = Site(tmp_path, unit="patient", batch=200, more="records_per_patient = 2")
    rows = site.data.tensors[0].clone()
    rows[:3] = math.nan  # the first patient's
    site.data = TensorDataset(rows, site.data.tensors[1])
    site.wrap(patients=IDS)
    with site.round() as rnd:
        for _ in range(3):
            site.train(1)
    rnd.release()
    assert site.training.steps == 3
    assert site.training.not_finite == 3
    assert site.training.left_out == 3 * 101


def test_a_unit_that_is_not_finite_is_not_counted_as_unclipped() -> None:
    """Else NaN would draw the clip norm down."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[0.1], [math.nan], [1.0], [math.inf], [50.0]])
    found = Clipper(clip_norm=1.0).sum(model, inputs, [0, 1, 2, 3, 4])
    assert (found.unclipped, found.not_finite) == (2, 2)


def test_no_gradient_is_left_after_a_step(site: Site) -> None:
    """Neither the private one, which would add up, nor any other: no zero_grad() is needed."""
    with site.round() as rnd:
        for x, y in site.loader:
            nn.functional.binary_cross_entropy_with_logits(site.model(x), y).backward()
            site.optimizer.step()
            assert all(parameter.grad is None for parameter in site.model.parameters())
    rnd.release()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """With a private MLP, unit record."""
    made = Site(tmp_path)
    made.wrap()
    return made


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_step_that_ends_in_an_error_spoils_the_round(
    tmp_path, fixed_entropy, error: type[BaseException]
) -> None:
    """The system gives no random bits, or the user interrupts, in the midst of the noise."""

    class Failing:
        def __init__(self) -> None:
            self.armed = False
            self.inner = fixed_entropy(3)

        def fill(self, buffer: memoryview) -> None:
            self.inner.fill(buffer)

        def branch(self) -> Any:
            if self.armed:
                raise error
            return self.inner.branch()

    source = Failing()
    site = Site(tmp_path)
    site.guard._door.house = dataclasses.replace(site.guard._door.house, entropy=lambda: source)
    site.wrap()
    with site.round() as rnd:
        site.train(1)
        source.armed = True
        with pytest.raises(error):
            site.train(1)
        source.armed = False
        with pytest.raises((Withheld, MisuseError)):
            site.train(1)
    withheld(site, rnd)


def test_after_a_refusal_every_further_step_of_the_round_is_refused(site: Site) -> None:
    """Also one that would be sound by itself: nothing more is spent on the round."""
    with site.round() as rnd:
        site.train(1)
        with pytest.raises(MisuseError, match="twice on one"):
            site.optimizer.step()
        before = site.model[0].weight.detach().clone()
        with pytest.raises(Withheld):
            site.train(1)
        assert torch.equal(before, site.model[0].weight)
    withheld(site, rnd)


def test_a_state_dict_that_is_not_the_models_parameters_is_withheld(tmp_path) -> None:
    """Averaged or rounded in a hook: whatever it is, it is not what the last step left."""
    site = Site(tmp_path)
    model = mlp()

    def averaged(_: nn.Module, state: dict[str, torch.Tensor], *__: object) -> None:
        if hooked:
            state["0.bias"] = state["0.bias"] + 1.0

    hooked: list[bool] = []
    model._register_state_dict_hook(averaged)
    site.wrap(model)
    with site.round() as rnd:
        site.train(2)
        hooked.append(True)
    with pytest.raises(Withheld) as caught:
        rnd.release()
    assert caught.value.reason is Reason.PROMISE_NOT_KEPT


def test_a_model_that_does_not_take_the_global_state_is_refused_before_training(tmp_path) -> None:
    """Its loading puts something of its own in the place of a buffer."""
    model = mlp()
    model.register_buffer("shift", torch.zeros(1))
    site = Site(tmp_path)
    site.wrap(model)

    def shifted(*_: object) -> None:
        model.shift.add_(1.0)

    model.register_load_state_dict_post_hook(shifted)
    with pytest.raises(Withheld) as caught, site.round():
        pytest.fail("the round was opened")
    assert caught.value.reason is Reason.PROMISE_NOT_KEPT
