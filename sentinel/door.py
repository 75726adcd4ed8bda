"""Door: where a global model is received; gate, inspection, and what is remembered of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sentinel import audit, detection
from sentinel.audit import AlertEvent
from sentinel.bounds import auto_norms
from sentinel.detection.bundle import GLOBAL_MODEL, UPDATE_SENSITIVITY
from sentinel.errors import MisuseError, PolicyError, RoundRefused, Withheld
from sentinel.gate import gate, require_open, require_sound
from sentinel.policy import refuses, unmatched
from sentinel.terms import Reason, Verdict, Weakness
from sentinel.update import model_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from sentinel.audit import Alerts
    from sentinel.detection import Inspection, SensitivityScore
    from sentinel.house import House
    from sentinel.policy import Policy
    from sentinel.privacy import DpSgdEvent
    from sentinel.release import Measure
    from sentinel.releases import RoundKey
    from sentinel.state import StateFolder


class Door:
    """Receives global models for one guard.

    Attributes:
        house: what a release goes through.
        alerts: where refusals are told.
    """

    def __init__(self, house: House, state: StateFolder, alerts: Alerts, *, inspects: bool) -> None:
        """Keep the parts; `start` checks them."""
        self.house = house
        self.alerts = alerts
        self._state = state
        self._references = detection.References(state.references)
        self._inspects = inspects

    def start(self) -> None:
        """Check that ledger and log fit together, and record which code and policy are at work.

        Raises:
            Withheld: they do not fit, or a detector is missing.
        """
        require_sound(self.house)
        weaknesses = [Weakness.IN_PROCESS, Weakness.UNSIGNED_POLICY]
        if not self._inspects:
            weaknesses.append(Weakness.INSPECTION_OFF)
            self.alerts.send(AlertEvent.CONTROL_WEAKENED, weakness=Weakness.INSPECTION_OFF)
        self.house.write(
            audit.GuardStarted,
            build=build_digest(),
            policy=self.house.policy.digest,
            detectors=tuple(
                detection.load_detector(name).digest for name in (UPDATE_SENSITIVITY, GLOBAL_MODEL)
            ),
            weaknesses=tuple(weaknesses),
        )

    def gate(
        self,
        key: RoundKey,
        base: Mapping[str, torch.Tensor],
        patients: int | None,
        least: DpSgdEvent | None = None,
    ) -> str:
        """Check everything that can be known before the global model is looked at; its digest.

        `least` is what one step of the round's private training costs; None where it has none.

        Raises:
            Withheld: nothing trained on it could be released.
            PolicyError: a rule names parameters that this model does not have.
        """
        require_sound(self.house)
        _require_matches(self.house.rules, base)
        digest = model_digest(base)
        ending = self.house.releases.ending(key)
        if ending is not None:
            require_open(ending, digest)
        else:
            gate(self.house, patients, least)
            auto_norms(self.house, key)  # unreadable: nothing could be released
        return digest

    def inspect(
        self, key: RoundKey, base: Mapping[str, torch.Tensor], model: nn.Module | None
    ) -> Inspection | None:
        """Inspect against what is remembered of this run, and remember a model that passes."""
        if not self._inspects:
            return None
        file = self._state.history(key.federation, key.run)
        with file.locked():
            text = file.read()
            previous = None if text is None else _remembered(text)
            found = detection.inspect_global_model(base, previous, model)
            opening = refuses(self.house.rules, found.suspicion, unhealthy=found.unhealthy)
            if not opening.refused:
                file.write(found.history.to_json())
        return found

    def admit(
        self, key: RoundKey, digest: str, inspection: Inspection | None
    ) -> tuple[float, bool]:
        """Let the policy judge the inspection, and record it; suspicion and ill health.

        Raises:
            RoundRefused: the policy refuses to train on this global model.
        """
        suspicion = 0.0 if inspection is None else inspection.suspicion
        unhealthy = inspection is not None and inspection.unhealthy
        verdict = Verdict.HONEST if inspection is None else inspection.verdict
        opening = refuses(self.house.rules, suspicion, unhealthy=unhealthy)
        if opening.refused:
            reason = Reason.UNHEALTHY_MODEL if unhealthy else Reason.CRAFTED_MODEL
            raise _refusal(reason, verdict, opening.decided_by)
        self.house.write(
            audit.RoundOpened,
            round=key.digest,
            number=key.number,
            global_model=digest,
            verdict=verdict,
            suspicion=audit.score_step(suspicion),
            inspected=inspection is not None,
        )
        return suspicion, unhealthy

    def refuse(
        self, key: RoundKey, digest: str | None, inspection: Inspection | None, reason: Reason
    ) -> None:
        """Record and tell that a round was refused before training, as far as that is possible.

        A log that cannot be written must not hide why the round was refused.
        """
        verdict = None if inspection is None else inspection.verdict
        with contextlib.suppress(Withheld):
            self.house.write(
                audit.RoundRefused,
                round=key.digest,
                number=key.number,
                global_model=digest,
                verdict=verdict,
                suspicion=None if inspection is None else audit.score_step(inspection.suspicion),
                reason=reason,
            )
        self.tell(AlertEvent.ROUND_REFUSED, key, reason, verdict)

    def tell(
        self, event: AlertEvent, key: RoundKey, reason: Reason, verdict: Verdict | None
    ) -> None:
        """Alert operations."""
        fields: dict[str, Reason | Verdict | int] = {"reason": reason, "round": key.number}
        if verdict is not None:
            fields["verdict"] = verdict
        self.alerts.send(event, **fields)

    def measure(self, model: nn.Module | None, base: Mapping[str, torch.Tensor]) -> Measure:
        """Scores what would leave, against a reference through this very model where there is one.

        The log says of every score whether it had one.
        """
        reference = None if model is None else self._references.of(model, base)

        def measure(deltas: Mapping[str, torch.Tensor]) -> SensitivityScore:
            return detection.score_update(deltas, reference)

        return measure

    def probed(
        self,
        measure: Measure,
        model: nn.Module,
        base: Mapping[str, torch.Tensor],
        records: torch.Tensor,
    ) -> Measure:
        """Scores what would leave as `measure` does, and looks for these records in it.

        Raises:
            MisuseError: the policy promises something, or the model cannot be probed with these.
        """
        if self.house.rules.privacy is not None:
            raise MisuseError(
                "The policy makes a promise, so nothing that leaves may depend on single records; "
                "leave the probe out."
            )
        probe = detection.Probe.of(model, base, records)

        def measured(deltas: Mapping[str, torch.Tensor]) -> SensitivityScore:
            score, share = measure(deltas), probe.read(deltas)
            return score if share is None else score.raised(share, (probe.weight, probe.bias))

        return measured


def _require_matches(policy: Policy, base: Mapping[str, torch.Tensor]) -> None:
    """Refuse a policy with a glob that matches no entry of this model: most likely a typo."""
    missing = unmatched(policy, list(base))
    if missing:
        rule, glob = missing[0]
        raise PolicyError(
            f"Rule {rule!r} of policy {policy.name!r} matches nothing in this model with {glob!r}. "
            "Correct the glob, or take it out; `sentinel policy check --model` finds all of them."
        )


def _remembered(text: str) -> detection.History:
    try:
        return detection.History.from_json(text)
    except MisuseError:
        raise Withheld(
            Reason.STATE_UNSAFE,
            "What is remembered of earlier global models cannot be read; put the state folder back "
            "as it was.",
        ) from None


@functools.cache
def build_digest() -> str:
    """SHA-256 over the package's own source files, so that the log says which code ran."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        name = path.relative_to(package).as_posix().encode()
        digest.update(len(name).to_bytes(8, "little") + name)
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _refusal(reason: Reason, verdict: Verdict, rules: tuple[str, ...]) -> RoundRefused:
    named = ", ".join(rules)
    return RoundRefused(
        reason,
        f"The global model of this round was refused before training (verdict {verdict}, rule "
        f"{named}). See docs/runbook.md.",
    )
