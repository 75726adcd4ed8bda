"""What a guard lets out of one replayed training, and what its attacker is told of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.stress.passive.local_training import Seen

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.guard import Guard
    from sentinel.stress.passive.local_training import LocalTraining


def let_out(
    guard: Guard, number: int, training: LocalTraining, inputs: Tensor, patients: int
) -> Seen:
    """Train, release through the guard, and give the attacker the update with all its figures.

    Args:
        guard: at the site's door.
        number: of the round; each may be used once.
        training: how the site trains.
        inputs: [N, ...], what it trains on.
        patients: how many stand behind them.

    Returns:
        The released update. The clip's factor is exact where no `max_abs` binds; where one does,
        the attacker is told the factor that the norm was scaled by after it.

    Raises:
        Withheld: nothing leaves.
        MisuseError: a number that was released before, or a policy that treats parameters
            differently, which one set of figures cannot say.
    """
    raw = training.update(inputs, differentiable=False)
    start = {name: training.global_state[name] for name in training.names}
    local, at = {}, 0
    for name, value in start.items():
        local[name] = value + raw[at : at + value.numel()].view_as(value)
        at += value.numel()
    with guard.round(number, start, patients=patients) as rnd:
        pass
    delta = rnd.release(local, kind="delta")
    if rnd.decided is None or len(set(rnd.decided.plan.treatments.values())) != 1:
        raise MisuseError("use a fresh round number, and a policy with one treatment for all")
    (treatment,) = set(rnd.decided.plan.treatments.values())
    limit = min((bound.max_norm for bound in rnd.decided.plan.bounds), default=math.inf)
    norm = float(raw.clamp(-treatment.max_abs, treatment.max_abs).norm())
    scale = min(1.0, limit / norm) if norm > 0.0 else 1.0
    return Seen(training.flatten(delta), scale, treatment.noise_std, treatment.keep)
