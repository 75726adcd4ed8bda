"""House: the parts that a release goes through, and the promise that its policy makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sentinel.mechanism import slack
from sentinel.privacy import GaussianEvent, Promise, UnboundedEvent

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable

    from sentinel.adaptive import Memory
    from sentinel.audit import AuditLog, Entry, Record
    from sentinel.mechanism import Entropy
    from sentinel.policy import LoadedPolicy, Policy
    from sentinel.privacy import Ledger
    from sentinel.releases import Releases, RoundKey


class Clock(Protocol):
    """The time, as an argument."""

    def __call__(self) -> dt.datetime:
        """Now, with a time zone."""


@dataclass(frozen=True, slots=True)
class House:
    """The parts that a release goes through."""

    policy: LoadedPolicy
    ledger: Ledger
    log: AuditLog
    releases: Releases
    entropy: Callable[[], Entropy]
    clock: Clock
    process: str  # random id of the guard, 32 hex digits
    memory: Callable[[RoundKey], Memory]  # of the bounds of the round's run

    @property
    def rules(self) -> Policy:
        """What the policy file says."""
        return self.policy.policy

    def now(self) -> int:
        """Seconds since 1970."""
        return int(self.clock().timestamp())

    def write(self, kind: type[Record], **fields: object) -> Entry:
        """Append one record, with the ledger's head in it."""

        def build() -> Record:
            head = self.ledger.head()
            return kind.model_validate(
                {
                    "at": self.now(),
                    "process": self.process,
                    "ledger_seq": head.seq,
                    "ledger_head": head.hash,
                    **fields,
                }
            )

        return self.log.append(build)


def promise_of(policy: Policy) -> Promise | None:
    """The budget that the policy promises; None where it promises nothing."""
    privacy = policy.privacy
    if privacy is None:
        return None
    return Promise(privacy.unit, privacy.adjacency, privacy.epsilon, privacy.delta)


def event_of(policy: Policy, coordinates: int = 0) -> GaussianEvent | UnboundedEvent:
    """What one release under the policy costs, where the promise is the site's or none.

    Args:
        policy: one that promises nothing, or for a site.
        coordinates: how many values get noise: each adds to how far it may be from ideal noise.
    """
    privacy = policy.privacy
    if privacy is None:
        return UnboundedEvent()
    far = slack(coordinates)
    return GaussianEvent(
        unit=privacy.unit,
        adjacency=privacy.adjacency,
        noise_multiplier=privacy.noise_multiplier,
        log_ratio=far.log_ratio,
        mass=far.mass,
    )
