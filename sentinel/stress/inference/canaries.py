"""Canaries: a lower bound on what a policy's private training really gives away, from one run.

Invented patients go through the whole guarded step: guard, round, private loader, clipping, noise,
chain, charge, release. Whether each of them is there is a coin. The attacker sees the global models
and the released states, and nothing else; from them it guesses the coins. If the epsilon that its
success proves is larger than what the ledger charged, the noise is smaller than it says, a unit
counts for more than it may, or the account is wrong.

A bound that stays below the ledger's epsilon is no proof of anything: it says that this attack did
not find more. The noise is the system's and differs from run to run.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sentinel.arguments import require_policy
from sentinel.crew import one_thread
from sentinel.errors import MisuseError
from sentinel.guard import Guard
from sentinel.house import promise_of
from sentinel.mechanism import SystemEntropy
from sentinel.mechanism.entropy import uniform
from sentinel.state import StateFolder
from sentinel.stress.inference.one_run import Guesses, count, guess, lower_bound
from sentinel.stress.layers import copied
from sentinel.terms import Adjacency, Unit

if TYPE_CHECKING:
    from sentinel.mechanism import Entropy
    from sentinel.policy import LoadedPolicy
    from sentinel.policy.schema import Privacy
    from sentinel.privacy import Spent
    from sentinel.stress.layers import State

_STRENGTH = 4.0  # of a canary's gradient, in clip norms: clipping is certain
_MOST = 8192  # canaries; one column of the data set each
_MOST_OVER = 2  # times the public cohort, as private training takes at most
_LEAST = 50  # canaries; fewer prove nothing
_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class CanaryAttack:
    """How the audit is run; all of it is fixed before anything is seen.

    Attributes:
        canaries: m, how many coins.
        records: of each canary; more than one only under unit "patient".
        rounds: one after the other, each from what the last one released.
        epochs: in each round.
        shares: of the canaries that are guessed; each share is an attack of its own, and the
            confidence is split among them. Few guesses are surer, many refute a gross error.
        confidence: of the bound.

    The rows take 4 x records x canaries^2 bytes, half of that under add-or-remove.
    """

    canaries: int = 2000
    records: int = 1
    rounds: int = 1
    epochs: int = 1
    shares: tuple[float, ...] = (0.08, 0.6)
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not _LEAST <= self.canaries <= _MOST:
            raise MisuseError(f"canaries must be a number from {_LEAST} to {_MOST}.")
        if min(self.records, self.rounds, self.epochs) < 1:
            raise MisuseError("records, rounds and epochs must be 1 or more.")
        if not self.shares or not all(0.0 < share <= 1.0 for share in self.shares):
            raise MisuseError("shares must name at least one share, each above 0 and up to 1.")
        if not 0.0 < self.confidence < 1.0:
            raise MisuseError("confidence must lie between 0 and 1.")

    @property
    def guesses(self) -> tuple[int, ...]:
        """How many coins each attack guesses: even numbers."""
        return tuple(2 * max(1, int(share * self.canaries / 2)) for share in self.shares)


DEFAULTS = CanaryAttack()


@dataclass(frozen=True, slots=True)
class CanaryAudit:
    """What an audit found.

    Attributes:
        guesses: how each attack did.
        lower_bound: on epsilon, at the ledger's unit, adjacency and delta.
        confidence: with which the bound is right.
        ledger: what the ledger says was spent, with unit, adjacency, delta and accountant.
    """

    guesses: tuple[Guesses, ...]
    lower_bound: float
    confidence: float
    ledger: Spent

    @property
    def holds(self) -> bool:
        """Whether the bound stays under the ledger's epsilon.

        Where the promise is kept it does, but for chance: in at most 1 - `confidence` of all runs.
        """
        return self.lower_bound <= self.ledger.epsilon

    def __str__(self) -> str:
        """One line, with everything that an epsilon needs beside it."""
        spent = self.ledger
        right = ", ".join(f"{g.right} of {g.made} guesses right" for g in self.guesses)
        return (
            f"epsilon at least {self.lower_bound:.2f} ({100 * self.confidence:g} % confidence; "
            f"{self.guesses[0].canaries} canaries, {right}); the ledger says at most "
            f"{spent.epsilon:.2f} ({spent.accountant}); per {spent.unit}, {spent.adjacency}, delta "
            f"{spent.delta:g}"
        )


def audit(
    policy: str | Path | LoadedPolicy,
    attack: CanaryAttack = DEFAULTS,
    *,
    entropy: Entropy | None = None,
) -> CanaryAudit:
    """Train on canaries under a policy, guess who was there, and compare with the ledger.

    Args:
        policy: one that promises privacy per patient or per record. Its budget must pay for the
            training; state is kept in a folder that is thrown away, so nobody's budget is touched.
        attack: how.
        entropy: of the coins; the system's where left out. The noise is always the guard's own.

    Returns:
        The bound, and the ledger's epsilon beside it.

    Guarantees:
        If what the guard releases is as private as its ledger says, `lower_bound` exceeds the
        ledger's epsilon with probability at most 1 - `attack.confidence`.

        - Coins are fair: one 53-bit draw for each. The attacker does not see them before it has
          guessed.
        - One coin, one unit: a canary's records have one patient id, and no other's. Under
          add-or-remove a coin says whether the canary is there; under replace, whether it or its
          mirror image is.
        - The numbers of guesses are fixed by `attack`; several share the confidence.
        - A canary is as strong as can be: a gradient of 4 clip norms in every step, along an axis
          of its own, so that nothing but the noise hides it.

    Edges:
        a policy that promises nothing per person:   MisuseError
        more records than a batch takes of one unit: MisuseError
        more than twice the public cohort:           MisuseError
        a budget that does not pay for it:           Withheld
        the same entropy again:                      the same coins; the noise is another

    Raises:
        MisuseError: the policy promises nothing per patient or record, or does not fit the attack.
        Withheld: the policy lets nothing out, or its budget does not pay for the training.
    """
    loaded = require_policy(policy)
    privacy = _require_fit(loaded, attack)
    coins = uniform(attack.canaries, entropy or SystemEntropy()) <= 0.5  # noqa: PLR2004 - a fair coin
    with one_thread(), TemporaryDirectory(prefix="sentinel-canaries-", dir=_memory()) as home:
        released = _train(loaded, attack, _canaries(coins, privacy, attack), Path(home))
        ledger = _spent(loaded, Path(home))
    scores = released[_WEIGHT].flatten().double()  # the first global model is zero everywhere
    found = tuple(count(guess(scores, made), coins) for made in attack.guesses)
    bound = lower_bound(found, ledger.delta, confidence=attack.confidence)
    return CanaryAudit(found, bound, attack.confidence, ledger)


@dataclass(frozen=True, slots=True)
class _Canaries:
    """Records of those who are there: `rows` (records, m), `targets` (records,), `patients`."""

    rows: Tensor
    targets: Tensor
    patients: list[int]


def _canaries(coins: Tensor, privacy: Privacy, attack: CanaryAttack) -> _Canaries:
    """A column for each canary; its gradient is -target x row, whatever the weights are."""
    clip = privacy.clip_norm if privacy.adaptive_clip is None else privacy.adaptive_clip.ceiling
    there = torch.arange(len(coins))
    targets = torch.where(coins, 1.0, -1.0)
    if privacy.adjacency is Adjacency.ADD_OR_REMOVE:
        there = there[coins]
    owners = there.repeat_interleave(attack.records)
    rows = torch.zeros(len(owners), len(coins))
    rows[torch.arange(len(owners)), owners] = _STRENGTH * clip
    return _Canaries(rows, targets[owners], owners.tolist())


def _train(loaded: LoadedPolicy, attack: CanaryAttack, canaries: _Canaries, home: Path) -> State:
    """All rounds; the last released state."""
    guard = Guard(loaded, home, federation="canaries", run="audit", alerts=io.StringIO())
    privacy = loaded.policy.privacy
    assert privacy is not None and privacy.batch is not None  # noqa: PT018, S101 - `_require_fit` saw to it
    model = nn.Linear(attack.canaries, 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.zeros_(model.weight)
    # In this unit of the learning rate, a canary moves its own weight by 1 in each step it is in.
    optimizer = torch.optim.SGD(model.parameters(), lr=privacy.batch / privacy.clip_norm)
    private, optimizer_, loader = guard.private(
        model,
        optimizer,
        DataLoader(TensorDataset(canaries.rows, canaries.targets)),
        patients=canaries.patients if privacy.unit is Unit.PATIENT else None,
    )
    state = copied(model.state_dict())
    for number in range(attack.rounds):
        with guard.round(number, state, model, patients=privacy.patients) as rnd:
            for _ in range(attack.epochs):
                for rows, targets in loader:
                    optimizer_.zero_grad()
                    (-(private(rows)[:, 0] * targets).mean()).backward()
                    optimizer_.step()
        state = rnd.release()
    return state


def _memory() -> str | None:
    """A folder that is kept in memory, where the system has one: nothing in it is of use later."""
    memory = Path("/dev/shm")  # noqa: S108 - a private folder with a random name is made in it
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None


def _spent(loaded: LoadedPolicy, home: Path) -> Spent:
    promise = promise_of(loaded.policy)
    assert promise is not None  # noqa: S101 - `_require_fit` saw to it
    return StateFolder(home).ledger.spent(loaded.policy.dataset, promise, tight=True)


def _require_fit(loaded: LoadedPolicy, attack: CanaryAttack) -> Privacy:
    """The promise, where this attack can test it."""
    privacy = loaded.policy.privacy
    if privacy is None or privacy.unit is Unit.SITE or privacy.batch is None:
        raise MisuseError(
            "The canary audit is for a policy that promises privacy per patient or per record and "
            "names privacy.batch."
        )
    most = privacy.records_per_patient if privacy.unit is Unit.PATIENT else 1
    if attack.records > most:
        raise MisuseError(
            f"A canary may have at most {most} records under this policy: more would be left out "
            "of the batch."
        )
    cohort = privacy.cohort
    if cohort is not None and attack.canaries > _MOST_OVER * cohort:
        raise MisuseError(
            f"At most {_MOST_OVER * cohort} canaries fit the policy's public cohort; ask for fewer "
            "with CanaryAttack(canaries=...)."
        )
    return privacy
