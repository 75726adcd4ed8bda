"""Under the shipped policy for pictures, the smallest update that leaves gives no picture away.

The best of every image attacker against updates that went through the guard, and the control: the
same attackers get pictures out of the same updates as they were.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel import Guard
from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.errors import Withheld
from sentinel.interval import wilson
from sentinel.stress.layers import copied
from sentinel.stress.passive.estimate import Estimation
from sentinel.stress.passive.images import FLOOR, Attack, Gain, ImageAttacker, Truth, dealt
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import ImagePrior, fit_prior
from sentinel.stress.passive.reidentify import Found, Recognition
from sentinel.stress.passive.released import let_out

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread", "known_noise")
DATA = xray_data.load()
PUBLIC = tuple(DATA.public.of_class(label) for label in (0, 1))
SITE = tuple(
    torch.cat([DATA.hospital.of_class(label), DATA.decoys.of_class(label)]) for label in (0, 1)
)
RATE = 5.0  # one step is longer than the policy lets it be: the noise is at its weakest
MARGIN = 0.02  # mean SSIM over the class mean that counts as nothing
CHANCE = 0.01  # first among 100
# One of each kind, for the short form; the whole of FLOOR is in the long one.
SHORT = ImageAttacker(
    searches={"smoothing": FLOOR.searches["smoothing"]},
    estimates={"public prior, damped": FLOOR.estimates["public prior, damped"]},
    steps=FLOOR.steps,
)
RAW = ImageAttacker({}, {"longer": Estimation(rounds=8, products=40, least_noise=2.0)})


@pytest.fixture(scope="module")
def prior() -> ImagePrior:
    return fit_prior(DATA.public.images, DATA.public.labels, 60)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def guarded(home: Path) -> Guard:
    return Guard("chest-xray", home, federation="f", run="r", alerts=io.StringIO())


def smallest(guard: Guard) -> int:
    """Patients behind the smallest update that the policy lets out; one picture of each."""
    least = guard.policy.policy.limits.min_patients
    assert least is not None
    return least


def stepping(truth: Truth, epochs: int = 0) -> LocalTraining:
    """A site that takes one step on its pictures; a net at its start, or trained on public ones."""
    model = xray_net()
    initialise(model, generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(epochs):
        order = torch.randperm(len(DATA.public.labels), generator=generator())
        for batch in order.roll(epoch).split(8):
            optimizer.zero_grad()
            answers = model(DATA.public.images[batch])
            torch.nn.functional.cross_entropy(answers, DATA.public.labels[batch]).backward()
            optimizer.step()
    everything = (torch.arange(len(truth.labels)),)
    return LocalTraining(model, copied(model.state_dict()), truth.labels, everything, RATE)


def pooled(
    exposed: list[tuple[LocalTraining, Seen, Truth]], attacker: ImageAttacker, prior: ImagePrior
) -> dict[str, Gain]:
    """What each attacker gets of all these updates."""
    results: dict[str, list[tuple[Truth, Attack]]] = {}
    for site, seen, truth in exposed:
        for name, guesses in attacker.reconstruct(site, seen, prior, generator()):
            results.setdefault(name, []).append((truth, truth.score(guesses, prior)))
    return {name: Gain.over(updates, prior) for name, updates in results.items()}


def released(
    guard: Guard, truths: list[Truth], epochs: int
) -> list[tuple[LocalTraining, Seen, Truth]]:
    """Every update as the guard lets it out."""
    exposed = []
    for number, truth in enumerate(truths):
        site = stepping(truth, epochs)
        seen = let_out(guard, number, site, truth.pictures, len(truth.labels))
        assert seen.scale < 1.0
        exposed.append((site, seen, truth))
    return exposed


def naked(
    exposed: list[tuple[LocalTraining, Seen, Truth]],
) -> list[tuple[LocalTraining, Seen, Truth]]:
    """The same updates without a guard."""
    return [
        (site, Seen(site.update(truth.pictures, differentiable=False)), truth)
        for site, _, truth in exposed
    ]


def assert_floor(gains: dict[str, Gain]) -> None:
    """Nobody gains more than the margin, at 95 %, nor finds more than chance does, at 95 %."""
    best = max(gains.values(), key=lambda gain: gain.mean)
    assert len(best.gains) >= 100
    assert best.upper <= MARGIN
    assert wilson(best.found.count).low <= CHANCE
    luckiest = min(gain.found.by_chance for gain in gains.values())
    assert luckiest > 0.05 / len(gains)


@pytest.mark.slow
def test_the_smallest_update_let_out_gives_no_picture_and_the_same_update_raw_does(
    tmp_path: Path, prior: ImagePrior
) -> None:
    """128 pictures: at most .02 of mean SSIM over the class mean, and found as often as by chance.

    The control: raw, a prior gains more than that, and who holds the candidates finds them.
    """
    guard = guarded(tmp_path)
    truths = dealt(SITE, smallest(guard) // 2, 99, generator())[:4]
    exposed = released(guard, truths, 0)
    assert_floor(pooled(exposed, SHORT, prior))
    raw = naked(exposed)
    (gain,) = pooled(raw, RAW, prior).values()
    assert gain.mean - gain.half > MARGIN
    found = Found.pooled(
        [Recognition(site, seen, PUBLIC).first(t.pictures, t.decoys) for site, seen, t in raw]
    )
    assert wilson(found.count).low > 0.1


@pytest.mark.soak
@pytest.mark.parametrize("epochs", [0, 1], ids=["start", "one epoch"])
@pytest.mark.parametrize("times", [1, 2], ids=["smallest", "twice that"])
def test_no_attacker_of_all_gains_from_what_is_let_out(
    times: int, epochs: int, tmp_path: Path, prior: ImagePrior
) -> None:
    """256 pictures: total variation, smoothing, restarts, small steps, and three priors."""
    guard = guarded(tmp_path)
    truths = dealt(SITE, times * smallest(guard) // 2, 99, generator())
    assert_floor(pooled(released(guard, truths, epochs), FLOOR, prior))


def test_an_update_of_one_picture_fewer_is_kept_in(tmp_path: Path) -> None:
    guard = guarded(tmp_path)
    (truth, *_) = dealt(SITE, smallest(guard) // 2, 99, generator())
    with pytest.raises(Withheld, match="too-few-patients"):
        let_out(guard, 0, stepping(truth), truth.pictures, smallest(guard) - 1)
