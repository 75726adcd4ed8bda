"""Release: the numbered steps from a trained model to what may leave.

0. Gate.       Policy unexpired, budget left, rate limit, patients behind the update.
1. Read.       Build the update; refuse what is malformed.
2. Base.       Under a site-level promise: clip, round to grid, add noise, as the policy fixed it.
3. Charge.     The ledger, durably, before anything can leave.
4. Measure.    The sensitivity score of what would leave.
5. Decide.     A pure function of policy and evidence.
6. Transform.  As the plan says.
7. Record.     Durably.
8. Release.    Once; asked again, the stored bytes.

Under a promise, steps 4 to 8 are given the output of step 2 alone (`Outgoing`); the raw update is
not reachable from them. Without one, they read the raw update, and nothing formal is promised. A
raw update is never held whole: it is computed from the two states, piece by piece, whenever it is
read. Every error withholds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

from sentinel.audit import (
    UpdateDecided,
    UpdateReleased,
    UpdateReplayed,
    UpdateWithheld,
    log2_bucket,
    score_step,
)
from sentinel.audit.records import SCORE_STEPS
from sentinel.bounds import auto_norms, learn
from sentinel.crew import one_thread
from sentinel.durable import storage
from sentinel.errors import MisuseError, SentinelError, Withheld, unforeseen
from sentinel.gate import gate, require_open, require_sound
from sentinel.house import event_of, promise_of
from sentinel.mechanism import GaussianMechanism, Prepared, prepare, transform
from sentinel.policy import decide, let_out
from sentinel.privacy import Charge, DpSgdEvent, Head, UnboundedEvent
from sentinel.releases import Ending, Fate
from sentinel.source import Differences
from sentinel.terms import GENESIS, Action, Evidence, Plan, Reason, Sharpness, Unit
from sentinel.update import Kind, State, Update, model_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch

    from sentinel.detection import SensitivityScore
    from sentinel.house import House
    from sentinel.memory import Rooms
    from sentinel.privacy import Event
    from sentinel.releases import RoundKey

# Decided on the update: a retry would be a second answer about the same patients.
_FINAL = frozenset(
    {
        Reason.NOT_FINITE,
        Reason.TOO_SENSITIVE,
        Reason.WITHHELD_BY_RULE,
        Reason.NOTHING_LET_OUT,
        Reason.INTERNAL_ERROR,
    }
)


class Measure(Protocol):
    """Scores what would leave."""

    def __call__(self, deltas: Mapping[str, torch.Tensor]) -> SensitivityScore:
        """The sensitivity score of the update, and of each tensor."""


class PrivateTraining(Protocol):
    """Training that keeps a promise per patient or record (DP-SGD)."""

    def first_step(self) -> DpSgdEvent:
        """What one step costs."""

    def conclude(self, local: Mapping[str, torch.Tensor]) -> tuple[DpSgdEvent, State]:
        """What all steps from the global state to `local` cost, and a state equal to `local`.

        Nothing but private steps writes to that state.

        Raises:
            Withheld: PROMISE_NOT_KEPT where anything else had a part in `local`.
        """


@dataclass(frozen=True, slots=True)
class PublicRound:
    """What is public about a round: all that steps 4 to 8 know besides what would leave.

    Attributes:
        base: the global state; not written.
        buffers: names known to be buffers.
        patients: how many stand behind the update, as the caller says; None where it does not.
        measure: scores what would leave.
    """

    key: RoundKey
    base: Mapping[str, torch.Tensor]
    global_model: str
    buffers: Collection[str]
    patients: int | None
    suspicion: float
    unhealthy: bool
    measure: Measure


@dataclass(frozen=True, slots=True)
class OpenRound(PublicRound):
    """A round that was inspected and may be released.

    Attributes:
        private: the training that keeps a promise per patient or record; None where there is none.
    """

    private: PrivateTraining | None = None

    def public(self) -> PublicRound:
        """The round without its training."""
        known = {field.name: getattr(self, field.name) for field in fields(PublicRound)}
        return PublicRound(**known)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What would leave: all that steps 4 to 8 are given.

    Attributes:
        update: its deltas, and their sums of squares, are noised already where `base_std` is not 0.
        base_std: standard deviation of the noise that step 2 added.
        event: what it costs.
        rooms: where a state of the model's size finds room.
    """

    update: Update
    base_std: float
    event: Event
    rooms: Rooms


@dataclass(frozen=True, slots=True)
class Decided:
    """What steps 4 to 6 came to, and the event that step 3 charged."""

    event: Event
    evidence: Evidence
    score: SensitivityScore
    plan: Plan
    done: Prepared

    @property
    def clipped(self) -> bool:
        """Whether a norm bound was reached."""
        return self.done.clipped


@dataclass(frozen=True, slots=True)
class Released:
    """What leaves; `decided` is None where it had left before and was given again."""

    state: State
    decided: Decided | None

    @property
    def replayed(self) -> bool:
        """Whether the stored bytes of an earlier release were given."""
        return self.decided is None


def release(
    house: House, opened: OpenRound, local: Callable[[], Mapping[str, torch.Tensor]], kind: Kind
) -> Released:
    """Take one update through the steps.

    Args:
        house: policy, ledger, log, store and entropy.
        opened: the round.
        local: gives the local state; not called where the round has been released already.
        kind: what to release, "weights" or "delta".

    Returns:
        What leaves: the same names, shapes and dtypes as the global state.

    Raises:
        Withheld: nothing leaves; the reason is recorded.
        MisuseError: a released round is asked for in another form.

    Guarantees:
        What is returned for the first time was charged, decided by the policy, and is stored and
        recorded, durably. Under a promise for the site, all that follows the base mechanism reads
        its output alone. Of one round leave one state's bytes, however often it is asked for. An
        answer that depends on the values of the update is charged and final.

    Edges:
        released before:                            the stored bytes; `local` is not called
        released before, in another `kind`:         MisuseError
        released before, of another global model:   Withheld (OTHER_GLOBAL_MODEL)
        released before, and its bytes are gone:    Withheld (ROUND_CLOSED)
        a global state changed in training:         Withheld (GLOBAL_MODEL_CHANGED), not charged
        a state changed during the release:         Withheld (GLOBAL_MODEL_CHANGED or
                                                    LOCAL_MODEL_CHANGED), charged
        a difference that is NaN, Inf, too large:   Withheld (NOT_FINITE), charged and final
        a score at which a rule withholds:          Withheld (TOO_SENSITIVE), charged and final
        a policy that lets nothing of it out:       Withheld (NOTHING_LET_OUT), charged and final
        several guards for the last round there is: one is released, the others withheld
        a full disk:                                Withheld (STORAGE_FAILED); the round may go on
        an answer that cannot be kept:              Withheld (STORAGE_FAILED), and it is not told
        an error that nobody foresaw:               Withheld (INTERNAL_ERROR), final; charged once
                                                    the update was read
        killed at any instant:                      released once, or not at all
    """
    with storage(), house.releases.locked(opened.key), one_thread():
        try:
            require_sound(house)
            ending = house.releases.ending(opened.key)
            if ending is not None:
                return _again(house, opened, ending, kind)
            return _first(house, opened, local, kind)
        except Withheld as error:
            _record_withheld(house, opened, error.reason)
            raise
        except SentinelError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it withholds
            withheld = unforeseen(error)
            _record_withheld(house, opened, withheld.reason)
            raise withheld from None


def _first(
    house: House, opened: OpenRound, local: Callable[[], Mapping[str, torch.Tensor]], kind: Kind
) -> Released:
    least = None if opened.private is None else opened.private.first_step()
    gate(house, opened.patients, least)  # 0
    _require_unreleased(house, opened)
    outgoing = _prepared(house, opened, local)  # 1 and 2
    return _settled(house, opened.public(), outgoing, kind)


def _settled(house: House, opened: PublicRound, outgoing: Outgoing, kind: Kind) -> Released:
    """Steps 3 to 8: nothing here leads back to the raw update or to the training."""
    norms = auto_norms(house, opened.key)
    spent = _charge(house, opened, outgoing.event)  # 3
    score = opened.measure(outgoing.update.deltas)  # 4
    evidence = Evidence(
        outgoing.update.coordinates,
        score.overall,
        opened.suspicion,
        spent,
        opened.unhealthy,
        norms,
    )
    plan = decide(house.rules, evidence)  # 5
    _require_release(house, evidence, plan)
    state, done = _transform(house, outgoing, plan, kind)  # 6
    decided = Decided(outgoing.event, evidence, score, plan, done)
    _record(house, opened, decided, state, kind)  # 7
    aliases = outgoing.update.aliases
    learn(house, opened.key, evidence, opened.base, state, deltas=kind == "delta", aliases=aliases)
    return Released(state, decided)  # 8


def _require_unreleased(house: House, opened: OpenRound) -> None:
    """Refuse a round that the log calls released, though the store of releases forgot it."""
    key = opened.key.digest
    if house.ledger.was_charged(key) and house.log.was_released(key):
        raise Withheld(
            Reason.ROUND_CLOSED,
            "This round was released, and what was kept of it is gone; it is not made again.",
        )


def _prepared(
    house: House, opened: OpenRound, local: Callable[[], Mapping[str, torch.Tensor]]
) -> Outgoing:
    """Steps 1 and 2. A refusal that may depend on the update is charged like an answer about it."""
    event, state = _cost(house, opened, local())
    rooms = house.releases.rooms(sum(value.nbytes for value in opened.base.values()))
    try:
        return _base_mechanism(house, _read(house, opened, state), event, rooms)
    except Withheld as error:
        if error.reason is Reason.NOT_FINITE:
            _charge(house, opened, event)
        raise
    except Exception:
        _charge(house, opened, event)
        raise


def _cost(
    house: House, opened: OpenRound, local: Mapping[str, torch.Tensor]
) -> tuple[Event, Mapping[str, torch.Tensor]]:
    """What the release costs, and the state that this pays for.

    Of private training: once it has shown that it was nothing else, and its own copy of the state.
    """
    if opened.private is not None:
        return opened.private.conclude(local)
    values = sum(value.numel() for value in opened.base.values() if value.is_floating_point())
    return event_of(house.rules, values), local


def _read(house: House, opened: OpenRound, local: Mapping[str, torch.Tensor]) -> Update:
    policy = house.rules
    _require_received(opened, model_digest(opened.base))
    return Update.from_states(
        opened.base,
        local,
        buffers=opened.buffers,
        statistics_as_parameters=policy.limits.statistics == "as-parameters",
        let_out=lambda names: let_out(policy, names),
    )


def _require_received(opened: PublicRound, digest: str) -> None:
    if digest != opened.global_model:
        raise Withheld(
            Reason.GLOBAL_MODEL_CHANGED,
            "The received global state was changed during training, so that the update cannot be "
            "told; train on a copy, and load it without `assign=True`.",
        )


def _base_mechanism(house: House, update: Update, event: Event, rooms: Rooms) -> Outgoing:
    privacy = house.rules.privacy
    if privacy is None or privacy.unit is not Unit.SITE:
        return Outgoing(update, 0.0, event, rooms)
    mechanism = GaussianMechanism(privacy.clip_norm, privacy.noise_multiplier)
    assert isinstance(update.deltas, Differences)  # noqa: S101 - raw ones, as they were read
    noised, squares = mechanism.apply(update.deltas, house.entropy(), rooms)
    # The raw differences and their sums go no further.
    return Outgoing(replace(update, deltas=noised, squares=squares), mechanism.std, event, rooms)


def _charge(house: House, opened: PublicRound, event: Event) -> float:
    """Write the event; the share of the budget that is spent now."""
    policy, promise = house.rules, promise_of(house.rules)
    last = house.log.last()
    charge = Charge(
        at=house.now(),
        dataset=policy.dataset,
        policy=house.policy.digest,
        round=opened.key.digest,
        event=event,
        log_head=Head(0, GENESIS) if last is None else Head(last.seq, last.hash),
    )
    house.ledger.charge(charge, promise, per_day=policy.limits.rounds_per_day)
    if promise is None:
        return 0.0
    return min(1.0, house.ledger.spent(policy.dataset, promise).epsilon / promise.epsilon)


def _require_release(house: House, evidence: Evidence, plan: Plan) -> None:
    if plan.action is Action.RELEASE:
        return
    if plan.action is Action.WITHHOLD:
        raise Withheld(
            Reason.NOTHING_LET_OUT, "No rule of the policy lets any parameter of this model leave."
        )
    calm = replace(evidence, sensitivity=0.0)
    by_score = decide(house.rules, calm).action < plan.action
    reason = Reason.TOO_SENSITIVE if by_score else Reason.WITHHELD_BY_RULE
    deciding = ", ".join(
        rule.id
        for rule in house.rules.rules
        if rule.id in plan.decided_by and rule.action >= Action.WITHHOLD_UPDATE
    )
    score = score_step(evidence.sensitivity) / SCORE_STEPS
    raise Withheld(
        reason,
        f"The policy withholds this update (rule {deciding}; sensitivity score {score:.2f}).",
    )


def _transform(house: House, outgoing: Outgoing, plan: Plan, kind: Kind) -> tuple[State, Prepared]:
    update = outgoing.update
    prepared = prepare(update, plan, base_std=outgoing.base_std)
    if not prepared.released:
        raise Withheld(Reason.NOTHING_LET_OUT, "Every parameter that could leave is withheld.")
    state = transform(update, prepared, kind=kind, entropy=house.entropy(), rooms=outgoing.rooms)
    return state, prepared


def _record(house: House, opened: PublicRound, decided: Decided, state: State, kind: Kind) -> None:
    evidence, done = decided.evidence, decided.done
    promised = house.rules.privacy is not None
    house.write(
        UpdateDecided,
        round=opened.key.digest,
        promised=promised,
        sensitivity=score_step(evidence.sensitivity),
        sharpness=Sharpness(decided.score.sharpness),
        suspicion=score_step(evidence.suspicion),
        budget_spent=score_step(evidence.budget_spent),
        rules=tuple(
            place
            for place, rule in enumerate(house.rules.rules)
            if rule.id in decided.plan.decided_by
        ),
        released=len(done.released),
        withheld=len(opened.base) - len(done.released),
        coordinates=log2_bucket(sum(evidence.coordinates[name] for name in done.released)),
        clipped=None if promised else done.clipped,
        **_promised_to(decided.event),
    )
    digest = _kept(house, opened, state)
    house.releases.end(
        opened.key, Ending(Fate.RELEASED, opened.global_model, released=digest, kind=kind)
    )
    house.write(UpdateReleased, round=opened.key.digest, released=digest)
    if house.rules.limits.keep_releases is not None:
        house.releases.keep_newest(house.rules.limits.keep_releases)


def _kept(house: House, opened: PublicRound, state: State) -> str:
    """Write what leaves, durably; its digest.

    It was made of the global state, which is looked at once more: what changed it since step 1 may
    be a patient's, and would leave as it is.
    """

    def check() -> str:
        _require_received(opened, model_digest(opened.base))
        return model_digest(state)

    return house.releases.store(opened.key, state, check)


def _promised_to(event: Event) -> dict[str, object]:
    """Whom the release is promised to, and how many private steps are behind it: public."""
    if isinstance(event, UnboundedEvent):
        return {}
    return {"unit": event.unit, "steps": event.steps if isinstance(event, DpSgdEvent) else None}


def _again(house: House, opened: OpenRound, ending: Ending, kind: Kind) -> Released:
    """A round that has ended: the same answer, whatever the local state is now."""
    require_open(ending, opened.global_model)
    if ending.kind != kind:
        raise MisuseError(
            f"This round was released as {ending.kind!r}; ask for the same again, since a round is "
            "released once."
        )
    state = house.releases.load(opened.key, ending)
    house.write(UpdateReplayed, round=opened.key.digest, released=ending.released)
    return Released(state, decided=None)


def _record_withheld(house: House, opened: OpenRound, reason: Reason) -> None:
    """Write the refusal down.

    Raises:
        Withheld: STORAGE_FAILED where an answer about the update could not be kept: it is not told
            either, since a retry would be a second one.
    """
    try:
        if reason in _FINAL and house.releases.ending(opened.key) is None:
            ending = Ending(Fate.WITHHELD, opened.global_model, reason=reason)
            house.releases.end(opened.key, ending)
    except (OSError, Withheld):
        raise Withheld(
            Reason.STORAGE_FAILED,
            "The round could not be closed; check space and permissions of the state folder.",
        ) from None
    with contextlib.suppress(OSError, Withheld):  # a log that cannot be written withholds as well
        house.write(UpdateWithheld, round=opened.key.digest, reason=reason)
