"""A hospital's chest X-rays: what the server gets back from a raw gradient, and from the guard's.

Three times the same hospital and the same attacker, who knows labels, training and sanitizer: a raw
gradient of one picture, which gives the picture away; that update at the guard, which keeps it in,
since one patient stands behind it; and an update of 64 pictures, raw and as the guard releases it.
The model is at its start, where it gives most away. Every number is computed in the run.
"""

from __future__ import annotations

import io
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from sentinel.crew import one_thread
from sentinel.demo.xray_hospital import NET, SIDE, Hospital
from sentinel.demo.xray_result import Sanitized, XrayPictures, XrayResult, XraySettings
from sentinel.errors import MisuseError, Withheld
from sentinel.guard import Guard
from sentinel.stress.passive.images import Truth, best
from sentinel.stress.passive.inversion import match_direction
from sentinel.stress.passive.local_training import Seen
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sentinel.release import Decided
    from sentinel.stress.passive.images import Attack, ImageAttacker

FEDERATION = "xray-demo"
STAGE = "at initialisation"
DEFAULTS = XraySettings()


def run_xrays(
    settings: XraySettings = DEFAULTS,
    *,
    state: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> XrayResult:
    """Run the attacker on one hospital, with and without the guard.

    Args:
        settings: what to run.
        state: folder for the guard's ledger, log and releases; temporary where left out.
        on_step: called with the steps done and the steps in all.

    Returns:
        What was measured.

    Raises:
        Withheld: the policy lets out no update of the whole hospital either.
        MisuseError: a policy that treats parameters differently, which this attacker cannot use.
    """
    step = _counter(settings, on_step)
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        home = state or Path(stack.enter_context(TemporaryDirectory(prefix="sentinel-xrays-")))
        guard = Guard(
            settings.policy,
            home,
            federation=FEDERATION,
            run=f"seed-{settings.seed}",
            alerts=io.StringIO(),  # the refusal is in the result
        )
        hospital = Hospital.draw(settings)
        reason = _reason_to_withhold(hospital, guard)
        release = _release(hospital, guard)
        step()
        lone = [_attack_lone(hospital, index, step) for index in range(settings.lone)]
        attacks = _attack_batch(hospital, release, step)
    return _result(hospital, release, reason, lone, attacks)


@dataclass(frozen=True)
class _Release:
    """What the guard let out, as the attacker sees it, and what was done to it."""

    seen: Seen
    treatment: Sanitized


def _reason_to_withhold(hospital: Hospital, guard: Guard) -> str | None:
    """Try to release the update of one patient; the reason code of what came of it."""
    try:
        with guard.round(1, hospital.global_state, hospital.model, patients=1) as rnd:
            hospital.fit(hospital.one(0))
        rnd.release()
    except Withheld as error:
        return error.reason.value
    return None


def _release(hospital: Hospital, guard: Guard) -> _Release:
    """Release the update of the whole hospital."""
    pictures = hospital.data.hospital
    patients = len(pictures.labels)  # counted as one for each picture; the data name none
    with guard.round(2, hospital.global_state, hospital.model, patients=patients) as rnd:
        hospital.fit(pictures)
    delta = rnd.release(kind="delta")
    if rnd.decided is None:
        msg = "this state folder has released the demo's round before; name another, or none"
        raise MisuseError(msg)
    values = hospital.replayed(pictures.labels).flatten(delta)
    return _known(rnd.decided, values, float(hospital.raw_update(pictures).norm()))


def _known(decided: Decided, values: Tensor, norm: float) -> _Release:
    """Tell the attacker everything about the treatment, the clip's factor included."""
    treatments = set(decided.plan.treatments.values())
    if len(treatments) > 1 or not math.isinf(next(iter(treatments)).max_abs):
        msg = "the demo's attacker takes a policy with one treatment for all parameters, no max_abs"
        raise MisuseError(msg)
    (treatment,) = treatments
    max_norm = min((bound.max_norm for bound in decided.plan.bounds), default=math.inf)
    scale = min(1.0, max_norm / norm)
    noise_norm = treatment.noise_std * math.sqrt(len(values))
    done = Sanitized(norm, max_norm, noise_norm, treatment.keep, decided.plan.decided_by)
    return _Release(Seen(values, scale, treatment.noise_std, treatment.keep), done)


def _attack_lone(hospital: Hospital, index: int, step: Callable[[], None]) -> Tensor:
    """Reconstruct one picture from its raw gradient, [1, 1, H, W]."""
    picture = hospital.one(index)
    seen = Seen(hospital.raw_update(picture))
    training = hospital.replayed(picture.labels)
    found = match_direction(
        training, seen, hospital.settings.lone_search, (SIDE, SIDE), hospital.generator
    )
    step()
    return found


@dataclass(frozen=True)
class _Attacks:
    """Every attack on the whole hospital's update."""

    raw: dict[str, Attack]
    sanitized: dict[str, Attack]
    unrelated: float


def _attack_batch(hospital: Hospital, release: _Release, step: Callable[[], None]) -> _Attacks:
    """Attack the update of the whole hospital, raw and released, and one of other pictures."""
    attacker = hospital.settings.attacker
    raw = Seen(hospital.raw_update(hospital.data.hospital))
    unrelated = Seen(hospital.raw_update(hospital.stand_ins()))
    controls = _attack(hospital, unrelated, attacker.with_prior_only(), step)
    return _Attacks(
        raw=_attack(hospital, raw, attacker, step),
        sanitized=_attack(hospital, release.seen, attacker, step),
        unrelated=controls[best(controls)].ssim,
    )


def _attack(
    hospital: Hospital, seen: Seen, attacker: ImageAttacker, step: Callable[[], None]
) -> dict[str, Attack]:
    """Try everything on one update, and score it against the hospital's pictures."""
    pictures, prior = hospital.data.hospital, hospital.prior
    decoys = tuple(hospital.data.decoys.of_class(label) for label in range(len(prior.means)))
    truth = Truth(pictures.images, pictures.labels, decoys)
    training = hospital.replayed(pictures.labels)
    scored = {}
    for name, guesses in attacker.reconstruct(training, seen, prior, hospital.generator):
        scored[name] = truth.score(guesses, prior)
        step()
    return scored


def _result(
    hospital: Hospital,
    release: _Release,
    reason: str | None,
    lone: list[Tensor],
    attacks: _Attacks,
) -> XrayResult:
    pictures = hospital.data.hospital
    means = hospital.prior.means[pictures.labels]
    originals = pictures.images[: len(lone)]
    return XrayResult(
        settings=hospital.settings,
        net=NET,
        parameters=sum(p.numel() for p in hospital.model.parameters()),
        stage=STAGE,
        batch_size=len(pictures.labels),
        lone_ssims=tuple(ssim(torch.cat(lone), originals).tolist()),
        lone_reason=reason,
        treatment=release.treatment,
        ssim_class_mean=float(ssim(means, pictures.images).mean()),
        ssim_unrelated=attacks.unrelated,
        raw=attacks.raw,
        sanitized=attacks.sanitized,
        pictures=_pictures(hospital, lone[0], means, attacks),
    )


def _pictures(hospital: Hospital, lone: Tensor, means: Tensor, attacks: _Attacks) -> XrayPictures:
    shown = slice(0, hospital.settings.shown)
    images = hospital.data.hospital.images
    return XrayPictures(
        lone=_grey(images[:1])[0],
        lone_reconstructed=_grey(lone)[0],
        originals=_grey(images[shown]),
        class_means=_grey(means[shown]),
        raw=_grey(attacks.raw[best(attacks.raw)].guesses[shown]),
        sanitized=_grey(attacks.sanitized[best(attacks.sanitized)].guesses[shown]),
    )


def _grey(pictures: Tensor) -> NDArray[np.uint8]:
    """[N, 1, H, W] from 0 to 1, as [N, H, W] from 0 to 255."""
    return pictures[:, 0].mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


def _counter(
    settings: XraySettings, on_step: Callable[[int, int], None] | None
) -> Callable[[], None]:
    """A callback that counts up to the number of steps."""
    attacker = settings.attacker
    total = 1 + settings.lone + 2 * len(attacker) + len(attacker.with_prior_only())
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    return step
