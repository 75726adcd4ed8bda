"""A hospital's chest X-rays: what the server gets back from a raw gradient, and from the guard's.

Three times the same hospital and the same attacker, who knows labels, training and sanitizer: a raw
gradient of one picture, which gives the picture away; that update at the guard, which keeps it in,
since one patient stands behind it; and an update of 64 pictures, raw and as the guard releases it.
The model is at its start, where it gives most away. Every number is computed in the run.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.demo.xray_result import Sanitized, XrayPictures, XrayResult, XraySettings
from sentinel.errors import MisuseError, Withheld
from sentinel.guard import Guard
from sentinel.stress.images import Truth, best
from sentinel.stress.inversion import match_direction
from sentinel.stress.layers import State, copied
from sentinel.stress.local_training import LocalTraining, Seen
from sentinel.stress.prior import ImagePrior, fit_prior
from sentinel.stress.ssim import ssim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sentinel.demo.xray_data import Pictures, XrayData
    from sentinel.release import Decided
    from sentinel.stress.images import Attack, ImageAttacker

FEDERATION = "xray-demo"
NET = "three 3x3 convolutions (16, 32, 32 channels; strides 2, 2, 1), ReLU, one linear layer"
STAGE = "at initialisation"
SIDE = 28  # pixels
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
        stack.enter_context(_one_thread())
        home = state or Path(stack.enter_context(TemporaryDirectory(prefix="sentinel-xrays-")))
        guard = Guard(settings.policy, home, federation=FEDERATION, run=f"seed-{settings.seed}")
        hospital = _Hospital.draw(settings)
        reason = _reason_to_withhold(hospital, guard)
        release = _release(hospital, guard)
        step()
        lone = [_attack_lone(hospital, index, step) for index in range(settings.lone)]
        attacks = _attack_batch(hospital, release, step)
    return _result(hospital, release, reason, lone, attacks)


def xray_net() -> nn.Sequential:
    """The model, its weights not yet set: grey [N, 1, 28, 28] in, two classes out."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, device="meta"),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, device="meta"),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, device="meta"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 2, device="meta"),
    ).to_empty(device="cpu")


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Set weights as PyTorch does by default, without its global generator."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


@dataclass(frozen=True)
class _Hospital:
    """One hospital, and what its attacker has beforehand."""

    settings: XraySettings
    data: XrayData
    others: Pictures  # public pictures kept out of the prior, as many as the hospital has
    prior: ImagePrior
    model: nn.Module
    global_state: State
    generator: torch.Generator  # of the attacker

    @classmethod
    def draw(cls, settings: XraySettings) -> _Hospital:
        generator = torch.Generator().manual_seed(settings.seed)
        model = xray_net()
        initialise(model, generator)
        data = xray_data.load()
        others, known = data.public.split(int(data.hospital.labels.bincount().max()))
        prior = fit_prior(known.images, known.labels, settings.components)
        return cls(settings, data, others, prior, model, copied(model.state_dict()), generator)

    def fit(self, pictures: Pictures) -> None:
        """Train the model in place: one step on all pictures."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.settings.rate)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(self.model(pictures.images), pictures.labels).backward()
        optimizer.step()

    def replayed(self, labels: Tensor) -> LocalTraining:
        """The same training, as the attacker simulates it."""
        everything = (torch.arange(len(labels)),)
        return LocalTraining(self.model, self.global_state, labels, everything, self.settings.rate)

    def raw_update(self, pictures: Pictures) -> Tensor:
        """What would leave without the guard, [D]."""
        training = self.replayed(pictures.labels)
        return training.update(pictures.images, differentiable=False)

    def stand_ins(self) -> Pictures:
        """For each of the hospital's pictures another one of its class, so with the same labels."""
        hospital = self.data.hospital
        images = torch.empty_like(hospital.images)
        for label in range(len(self.prior.means)):
            images[hospital.labels == label] = self.others.of_class(label)
        return xray_data.Pictures(images, hospital.labels)

    def one(self, index: int) -> Pictures:
        """A single picture."""
        chosen = slice(index, index + 1)
        hospital = self.data.hospital
        return xray_data.Pictures(hospital.images[chosen], hospital.labels[chosen])


@dataclass(frozen=True)
class _Release:
    """What the guard let out, as the attacker sees it, and what was done to it."""

    seen: Seen
    treatment: Sanitized


def _reason_to_withhold(hospital: _Hospital, guard: Guard) -> str | None:
    """Try to release the update of one patient; the reason code of what came of it."""
    try:
        with guard.round(1, hospital.global_state, hospital.model, patients=1) as rnd:
            hospital.fit(hospital.one(0))
        rnd.release()
    except Withheld as error:
        return error.reason.value
    return None


def _release(hospital: _Hospital, guard: Guard) -> _Release:
    """Release the update of the whole hospital."""
    pictures = hospital.data.hospital
    patients = len(pictures.labels)  # one picture of each
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


def _attack_lone(hospital: _Hospital, index: int, step: Callable[[], None]) -> Tensor:
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


def _attack_batch(hospital: _Hospital, release: _Release, step: Callable[[], None]) -> _Attacks:
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
    hospital: _Hospital, seen: Seen, attacker: ImageAttacker, step: Callable[[], None]
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
    hospital: _Hospital,
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


def _pictures(hospital: _Hospital, lone: Tensor, means: Tensor, attacks: _Attacks) -> XrayPictures:
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold torch to one thread: the attacker's tensors are small, and threads would wait in turn.

    Beside other busy processes a second thread makes these attacks a hundred times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
