"""Which rounds of a log count, once each, and which a promise leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sentinel.audit import (
    Entry,
    GuardStarted,
    Record,
    RoundOpened,
    RoundRefused,
    UpdateDecided,
    UpdateWithheld,
)
from sentinel.calibration import (
    Gathered,
    Which,
    from_globals,
    from_log,
    from_updates,
    is_promised,
    require_no_promise,
)
from sentinel.detection import inspect_global_model, score_update
from sentinel.errors import MisuseError
from sentinel.policy.store import parse_policy
from sentinel.privacy import Charge, GaussianEvent, Head, Ledger, UnboundedEvent
from sentinel.stress import corpus, servers
from sentinel.terms import GENESIS, Adjacency, Reason, Sharpness, Unit, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentinel.policy import Policy

OLD, NEW = "a" * 64, "b" * 64  # digests of bundles
SENSITIVITY, MODEL = "c" * 64, "d" * 64
COMMON = {"at": 1, "process": "1" * 32, "ledger_seq": 0, "ledger_head": GENESIS}
PLAIN = b'schema = 1\nname = "plain"\n[[rule]]\nid = "r"\nmax_norm = 1.0\n'
SITE = b"""schema = 1
name = "site"
[privacy]
unit = "site"
epsilon = 8.0
delta = 1e-5
clip_norm = 1.0
noise_multiplier = 2.0
[[rule]]
id = "r"
"""


def policy(text: bytes = PLAIN) -> Policy:
    return parse_policy(text, "test").policy


def key(number: int) -> str:
    return f"{number:064x}"


def started(process: str = "1" * 32, model: str = NEW, sensitivity: str = SENSITIVITY) -> Record:
    fields = COMMON | {"process": process}
    digests = (sensitivity, model)
    return GuardStarted(build=OLD, policy=OLD, detectors=digests, weaknesses=(), **fields)


def opened(number: int, suspicion: int, **others: object) -> Record:
    fields = COMMON | {"inspected": True, "verdict": Verdict.HONEST} | others
    return RoundOpened(
        round=key(number), number=number, global_model=MODEL, suspicion=suspicion, **fields
    )


def refused(number: int, suspicion: int | None, reason: Reason = Reason.CRAFTED_MODEL) -> Record:
    verdict = Verdict.UNHEALTHY if reason is Reason.UNHEALTHY_MODEL else Verdict.BINNING
    return RoundRefused(
        round=key(number),
        number=number,
        global_model=MODEL,
        verdict=None if suspicion is None else verdict,
        suspicion=suspicion,
        reason=reason,
        **COMMON,
    )


def decided(number: int, sensitivity: int, **others: object) -> Record:
    fields: dict[str, object] = {"sharpness": Sharpness.REFERENCE, "promised": False}
    return UpdateDecided(
        round=key(number),
        sensitivity=sensitivity,
        suspicion=0,
        budget_spent=0,
        rules=(),
        released=1,
        withheld=0,
        coordinates=3,
        **(COMMON | fields | others),
    )


def withheld(number: int, reason: Reason = Reason.TOO_SENSITIVE) -> Record:
    return UpdateWithheld(round=key(number), reason=reason, **COMMON)


def entries(*records: Record) -> list[Entry]:
    return [Entry(seq, "", "", record) for seq, record in enumerate(records, 1)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture
def charge(ledger: Ledger) -> Callable[..., None]:
    def charge(number: int, dataset: str = "default", *, promised: bool = False) -> None:
        event = UnboundedEvent()
        if promised:
            event = GaussianEvent(unit=Unit.SITE, adjacency=Adjacency.REPLACE, noise_multiplier=2.0)
        ledger.charge(Charge(1, dataset, OLD, key(number), event, Head(0, GENESIS)), None)

    return charge


def suspicion(ledger: Ledger, *records: Record, after: int = 0) -> Gathered:
    return from_log(entries(*records), ledger, policy(), Which.SUSPICION, NEW, after=after)


def sensitivity(ledger: Ledger, *records: Record, text: bytes = PLAIN) -> Gathered:
    return from_log(entries(*records), ledger, policy(text), Which.SENSITIVITY, SENSITIVITY)


def test_suspicion_is_that_of_every_inspected_round_in_order(ledger: Ledger) -> None:
    found = suspicion(
        ledger, started(), opened(1, 2), refused(2, 12), opened(3, 1, inspected=False)
    )
    assert found.scores == [0.1, 0.6]
    assert found.stopped == 1


def test_a_round_that_was_refused_before_it_was_inspected_has_no_score(ledger: Ledger) -> None:
    found = suspicion(ledger, started(), refused(1, None, Reason.RATE_LIMITED), opened(1, 3))
    assert found.scores == [0.15]


def test_a_round_counts_once_with_its_first_score(ledger: Ledger, charge) -> None:
    charge(1)
    records = (started(), opened(1, 2), opened(1, 9), decided(1, 4), decided(1, 8), withheld(1))
    assert suspicion(ledger, *records).scores == [0.1]
    assert sensitivity(ledger, *records).scores == [0.2]


def test_rounds_before_the_record_are_no_new_rounds_though_they_come_again(ledger: Ledger) -> None:
    found = suspicion(ledger, started(), opened(1, 2), opened(1, 2), opened(2, 3), after=2)
    assert found.scores == [0.15]


def test_another_bundle_is_another_scale(ledger: Ledger) -> None:
    other = "2" * 32
    found = suspicion(
        ledger,
        started(other, model=OLD),
        opened(1, 9, process=other),
        started(),
        opened(2, 1),
        opened(3, 9, process="3" * 32),
    )
    assert found.scores == [0.05]
    assert found.other_bundle == 2


def test_a_broken_model_is_no_ordinary_round(ledger: Ledger) -> None:
    found = suspicion(
        ledger,
        started(),
        refused(1, 0, Reason.UNHEALTHY_MODEL),
        opened(2, 0, verdict=Verdict.UNHEALTHY),
    )
    assert (found.scores, found.unhealthy) == ([], 2)


def test_an_update_withheld_for_its_score_counts_as_one(ledger: Ledger, charge) -> None:
    for number in range(4):
        charge(number)
    found = sensitivity(
        ledger,
        started(),
        decided(0, 3),
        withheld(1),
        withheld(2, Reason.NOT_FINITE),
        decided(3, 9, sharpness=Sharpness.BLIND),
    )
    assert found.scores == [0.15, 1.0, 0.45]
    assert (found.stopped, found.blind) == (1, 1)


def test_sensitivity_is_of_the_policys_dataset_alone(ledger: Ledger, charge) -> None:
    charge(1)
    charge(2, "other")
    assert sensitivity(ledger, started(), decided(1, 1), decided(2, 2), decided(3, 3)).scores == [
        0.05
    ]


@pytest.mark.parametrize("text", [SITE, PLAIN])
def test_under_a_promise_no_score_of_a_raw_update_is_read(
    ledger: Ledger, charge, text: bytes
) -> None:
    """Whether the policy makes the promise, or only the ledger remembers one."""
    charge(1)
    charge(2)
    charge(3, promised=True)
    records = (started(), decided(1, 7), withheld(2), decided(3, 2, promised=True, unit=Unit.SITE))
    found = sensitivity(ledger, *records, text=text)
    assert found.scores == [0.1]
    assert found.raw == 2
    assert is_promised(policy(text), ledger)
    with pytest.raises(MisuseError, match="post-processing"):
        require_no_promise(policy(text), ledger)


def test_a_promise_on_another_dataset_forbids_nothing_here(ledger: Ledger, charge) -> None:
    charge(1, "other", promised=True)
    assert not is_promised(policy(), ledger)
    require_no_promise(policy(), ledger)


def test_the_newest_rounds_are_the_last_ones(ledger: Ledger) -> None:
    found = suspicion(ledger, started(), *(opened(number, number) for number in range(5)))
    assert found.newest(2).scores == [0.15, 0.2]
    assert found.newest(9).scores == found.scores


def test_global_models_are_inspected_with_their_history_and_a_crafted_one_does_not_enter_it() -> (
    None
):
    generator = torch.Generator().manual_seed(1)
    module = corpus.fresh(corpus.NETS[0], generator)
    honest = servers.copied(module.state_dict())
    crafted = servers.binning(module, honest, generator=generator, scale=0.01)
    broken = {name: value * float("nan") for name, value in honest.items()}
    rules = policy(
        PLAIN + b'[[rule]]\nid = "c"\nwhen = { suspicion = 0.5 }\naction = "refuse-round"\n'
    )
    found = from_globals([honest, crafted, broken, honest], rules)
    first = inspect_global_model(honest)
    crafted_after = inspect_global_model(crafted, first.history)
    last = inspect_global_model(honest, first.history)
    assert found.scores == [first.suspicion, crafted_after.suspicion, last.suspicion]
    assert (found.stopped, found.unhealthy) == (1, 1)


def test_updates_are_scored_as_they_are() -> None:
    generator = torch.Generator().manual_seed(2)
    updates = [{"weight": torch.randn(32, 16, generator=generator)} for _ in range(3)]
    assert from_updates(updates).scores == [score_update(update).overall for update in updates]
