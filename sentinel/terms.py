"""The few frozen words that every floor shares: actions, reasons, evidence, plan.

The four domains (policy, detection, privacy, audit) do not import one another. What has to pass
between them is declared here, holds no tensor, and never changes once made.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


# Standard deviation / clip norm below which accountants ask for terabytes and an epsilon means
# nothing.
SMALLEST_NOISE_MULTIPLIER = 0.05
# What the first link of a chain of hashes names as the one before it.
GENESIS = "0" * 64


class Action(enum.IntEnum):
    """What may happen to a parameter or an update; a larger value is stricter."""

    RELEASE = 0
    WITHHOLD = 1  # this parameter stays; the global model's value goes back
    WITHHOLD_UPDATE = 2
    REFUSE_ROUND = 3

    @property
    def word(self) -> str:
        """The word for it in policy files and on the screen."""
        return self.name.lower().replace("_", "-")


class Unit(enum.StrEnum):
    """Whose presence a promise hides."""

    PATIENT = "patient"
    RECORD = "record"
    SITE = "site"


class Adjacency(enum.StrEnum):
    """Which two data sets a promise makes hard to tell apart."""

    REPLACE = "replace"
    ADD_OR_REMOVE = "add-or-remove"


class Verdict(enum.StrEnum):
    """What the inspection takes an incoming global model for."""

    HONEST = "honest"
    BINNING = "binning"
    SPARSE_ACTIVATION = "sparse_activation"
    MAGNIFICATION = "magnification"
    TRANSFORMER_TRAP = "transformer_trap"
    INCONSISTENCY = "inconsistency"
    LEARNED = "learned"
    MULTI_ROUND = "multi_round"
    STRUCTURE_CHANGED = "structure_changed"
    UNHEALTHY = "unhealthy"


class Sharpness(enum.StrEnum):
    """What a sensitivity score is relative to."""

    PROBED = "probed"  # records of the site, shown to the guard: a measurement
    REFERENCE = "reference"  # synthetic rounds through this very model
    GENERIC = "generic"  # other models
    BLIND = "blind"  # nothing: this model's updates do not tell few records from many


class Weakness(enum.StrEnum):
    """A control that does not do its part, named in the start-up record."""

    UNSIGNED_POLICY = "unsigned-policy"
    INSPECTION_OFF = "inspection-off"
    IN_PROCESS = "in-process"  # level L0: training code could reach around the guard


class Reason(enum.StrEnum):
    """Why something was withheld or refused; each has its line in docs/runbook.md."""

    # Gate (step 0): known before the update is looked at.
    POLICY_EXPIRED = "policy-expired"
    BUDGET_EXHAUSTED = "budget-exhausted"
    RATE_LIMITED = "rate-limited"
    PATIENTS_UNKNOWN = "patients-unknown"
    TOO_FEW_PATIENTS = "too-few-patients"
    PROMISE_NOT_KEPT = "promise-not-kept"
    DETECTOR_UNAVAILABLE = "detector-unavailable"
    # State on disk that cannot be trusted or written.
    LEDGER_BEHIND_LOG = "ledger-behind-log"
    LEDGER_DAMAGED = "ledger-damaged"
    LOG_DAMAGED = "log-damaged"
    STATE_UNSAFE = "state-unsafe"
    STORAGE_FAILED = "storage-failed"
    # The round.
    CRAFTED_MODEL = "crafted-model"
    UNHEALTHY_MODEL = "unhealthy-model"
    OTHER_GLOBAL_MODEL = "other-global-model"
    GLOBAL_MODEL_CHANGED = "global-model-changed"
    ROUND_CLOSED = "round-closed"
    # The update (steps 1 and 5).
    STRUCTURE_MISMATCH = "structure-mismatch"
    NOT_FINITE = "not-finite"
    TOO_SENSITIVE = "too-sensitive"
    WITHHELD_BY_RULE = "withheld-by-rule"
    NOTHING_LET_OUT = "nothing-let-out"
    LOCAL_MODEL_CHANGED = "local-model-changed"
    INTERNAL_ERROR = "internal-error"
    # Several processes.
    RANK_LOST = "rank-lost"
    RANKS_DISAGREE = "ranks-disagree"


@dataclass(frozen=True, slots=True)
class AutoNorm:
    """The limits between which a `max_norm = "auto"` follows public history; L2 norms."""

    floor: float
    ceiling: float

    @property
    def start(self) -> float:
        """The bound of a round without history: the geometric middle."""
        return self.clamp(math.sqrt(self.floor) * math.sqrt(self.ceiling))

    def clamp(self, norm: float) -> float:
        """The nearest bound that is allowed; NaN gives the floor."""
        return min(self.ceiling, norm) if norm > self.floor else self.floor


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a decision may look at.

    Attributes:
        coordinates: name of each parameter that could leave, and how many values it has.
        sensitivity: sensitivity score of what would leave, 0 to 1.
        suspicion: suspicion about the global model, 0 to 1.
        budget_spent: share of the privacy budget that is spent, 0 to 1; 0 without a promise.
        unhealthy: whether the global model is broken rather than crafted.
        auto_norms: id of each rule with `max_norm = "auto"` -> its bound in this round, which
            follows from public history alone; where one is left out, the start.
    """

    coordinates: Mapping[str, int]
    sensitivity: float = 1.0
    suspicion: float = 1.0
    budget_spent: float = 1.0
    unhealthy: bool = True
    auto_norms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a score outside 0 to 1: NaN would slip under every threshold."""
        for score in ("sensitivity", "suspicion", "budget_spent"):
            value = getattr(self, score)
            if not 0.0 <= value <= 1.0:
                msg = f"{score} must be a number from 0 to 1; it is outside"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class NormBound:
    """The L2 norm of `names` together may be at most `max_norm`, before noise."""

    names: frozenset[str]
    max_norm: float


@dataclass(frozen=True, slots=True)
class Treatment:
    """What one parameter gets, in this order: max_abs, clip (by the plan's bounds), noise, mask."""

    action: Action = Action.RELEASE
    max_abs: float = math.inf
    noise_std: float = 0.0  # standard deviation per coordinate, in units of the update
    keep: float = 1.0  # share of coordinates kept


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to one update, decided before it is done.

    Attributes:
        action: of the update as a whole; WITHHOLD here means that no parameter is let out.
        treatments: one for each parameter of the evidence.
        bounds: every norm bound that a released parameter is under.
        decided_by: ids of the rules that applied, in file order.
    """

    action: Action
    treatments: Mapping[str, Treatment]
    bounds: tuple[NormBound, ...]
    decided_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slack:
    """How far the noise that was drawn may be from ideal noise, over one release.

    Attributes:
        log_ratio: bound on |ln(probability drawn / ideal probability)| of the noise of the whole
            release, wherever the drawn one is not cut off.
        mass: ideal probability of everything that is cut off.
    """

    log_ratio: float = 0.0
    mass: float = 0.0
