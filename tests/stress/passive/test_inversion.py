"""The image attacker succeeds on few pictures and little noise, and fails where it should."""

import math

import pytest
import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.demo.xray_hospital import initialise, xray_net
from sentinel.errors import MisuseError
from sentinel.stress.passive.estimate import Estimation, conjugate_gradients, most_likely
from sentinel.stress.passive.images import LONE
from sentinel.stress.passive.inversion import Matching, blur, match_direction, total_variation
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.prior import ImagePrior, fit_prior
from sentinel.stress.passive.reidentify import match_within_class, ranked_first
from sentinel.stress.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (28, 28)
DATA = xray_data.load()


@pytest.fixture(scope="module")
def prior() -> ImagePrior:
    return fit_prior(DATA.public.images, DATA.public.labels, 60)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def training(
    labels: torch.Tensor, batches: tuple[torch.Tensor, ...] | None = None, rate: float = 1.0
) -> LocalTraining:
    model = xray_net()
    initialise(model, generator())
    batches = batches or (torch.arange(len(labels)),)
    return LocalTraining(model, model.state_dict(), labels, batches, rate)


def chosen(count: int) -> xray_data.Pictures:
    """Half of them of each class."""
    return DATA.hospital.split(count // 2)[0]


def noised(raw: torch.Tensor, ratio: float) -> Seen:
    """The update with noise of `ratio` times its own norm: as if the clip just touched it."""
    std = ratio * float(raw.norm()) / math.sqrt(raw.numel())
    return Seen(raw + std * torch.randn(raw.shape, generator=generator(7)), 1.0, std)


def test_one_picture_comes_back_from_its_raw_gradient_and_is_found_among_a_hundred(
    prior: ImagePrior,
) -> None:
    labels = DATA.hospital.labels[:1]
    site = training(labels)
    seen = Seen(site.update(DATA.hospital.images[:1], differentiable=False))
    found = match_direction(site, seen, LONE, SIZE, generator())
    assert float(ssim(found, DATA.hospital.images[:1])) > 0.9
    assert found.min() >= 0
    assert found.max() <= 1
    decoys = tuple(DATA.decoys.of_class(label) for label in (0, 1))
    assert ranked_first(found, DATA.hospital.images[:1], labels, decoys, prior).count.share == 1.0


def test_noise_takes_that_picture_away_from_the_attacker_without_a_prior() -> None:
    labels = DATA.hospital.labels[:1]
    site = training(labels)
    seen = noised(site.update(DATA.hospital.images[:1], differentiable=False), 5.0)
    found = match_direction(site, seen, Matching(iterations=150), SIZE, generator())
    assert float(ssim(found, DATA.hospital.images[:1])) < 0.3


def test_the_clip_alone_takes_nothing_away() -> None:
    """A cosine does not see the scale."""
    labels = DATA.hospital.labels[:1]
    site = training(labels)
    raw = site.update(DATA.hospital.images[:1], differentiable=False)
    search = Matching(iterations=20)
    whole = match_direction(site, Seen(raw), search, SIZE, generator())
    clipped = match_direction(site, Seen(0.1 * raw, scale=0.1), search, SIZE, generator())
    assert torch.allclose(whole, clipped, atol=0.05)


def test_the_attacker_with_a_prior_beats_the_class_mean_through_noise_on_one_picture(
    prior: ImagePrior,
) -> None:
    """A lone picture is not safe behind noise of its update's own size."""
    picture, labels = DATA.hospital.images[:1], DATA.hospital.labels[:1]
    site = training(labels)
    seen = noised(site.update(picture, differentiable=False), 1.0)
    found = most_likely(site, seen, prior, Estimation(), generator())
    assert float(ssim(found, picture)) > float(ssim(prior.means[labels], picture)) + 0.03


def test_the_same_attacker_does_better_with_fewer_pictures_and_with_less_noise(
    prior: ImagePrior,
) -> None:
    gains = {}
    for count, ratio in ((2, 0.0), (2, 5.0), (2, 100.0), (32, 5.0)):
        few = chosen(count)
        site = training(few.labels)
        seen = noised(site.update(few.images, differentiable=False), ratio)
        search = Estimation(rounds=6, products=60, least_noise=0.1)
        found = most_likely(site, seen, prior, search, generator())
        matched = match_within_class(found, few.images, few.labels)
        blind = ssim(prior.means[few.labels], few.images).mean()
        gains[count, ratio] = float(ssim(matched, few.images).mean() - blind)
    assert gains[2, 0.0] > 0.05
    assert gains[2, 5.0] > 0.05  # the shipped noise does not save two pictures: min_patients does
    assert gains[2, 100.0] < 0.02
    assert gains[32, 5.0] < 0.02


def test_several_local_steps_are_replayed(prior: ImagePrior) -> None:
    """FedAvg: the attacker that replays both steps beats the one that takes them for one."""
    few = chosen(2)
    rate = 2.0
    both = training(few.labels, (torch.tensor([0]), torch.tensor([1])), rate)
    seen = Seen(both.update(few.images, differentiable=False))
    search = Estimation(rounds=6, products=60, least_noise=0.1)
    scores = []
    for assumed in (both, training(few.labels, rate=2 * rate)):
        found = most_likely(assumed, seen, prior, search, generator())
        scores.append(float(ssim(found, few.images).mean()))
    assert scores[0] > scores[1] + 0.02


def test_a_replayed_update_is_what_an_ordinary_loop_leaves() -> None:
    few = chosen(6)
    batches = (torch.tensor([0, 3, 4]), torch.tensor([1, 2]), torch.tensor([5]))
    site = training(few.labels, batches, 0.3)
    model = xray_net()
    model.load_state_dict(site.global_state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for batch in batches:
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(few.images[batch]), few.labels[batch]).backward()
        optimizer.step()
    delta = {name: value - site.global_state[name] for name, value in model.state_dict().items()}
    replayed = site.update(few.images, differentiable=False)
    assert torch.allclose(replayed, site.flatten(delta), atol=1e-6)
    assert not replayed.requires_grad


def test_an_update_without_a_parameter_is_refused() -> None:
    site = training(torch.tensor([0]))
    with pytest.raises(MisuseError, match="lacks"):
        site.flatten({})


def test_a_mask_alone_does_not_save_a_lone_picture(prior: ImagePrior) -> None:
    """One coordinate in ten is enough; noise that is scaled up with them is reckoned with."""
    picture, labels = DATA.hospital.images[:1], DATA.hospital.labels[:1]
    site = training(labels)
    raw = site.update(picture, differentiable=False)
    std = 0.05 * float(raw.norm()) / math.sqrt(raw.numel())
    kept = torch.rand(raw.shape, generator=generator(5)) < 0.1
    values = (raw + std * torch.randn(raw.shape, generator=generator(6))) * kept / 0.1
    found = most_likely(site, Seen(values, 1.0, std, 0.1), prior, Estimation(), generator())
    assert float(ssim(found, picture)) > float(ssim(prior.means[labels], picture)) + 0.05


def test_the_mask_is_read_off_the_zeros() -> None:
    values = torch.tensor([0.0, 2.0, 0.0, 4.0])
    simulated = Seen(values, scale=0.5, keep=0.5).sanitize(torch.ones(4))
    assert simulated.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_attackers_leave_the_global_generator_alone(prior: ImagePrior) -> None:
    few = chosen(2)
    site = training(few.labels)
    seen = Seen(site.update(few.images, differentiable=False))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(
            match_direction(site, seen, Matching(iterations=3, restarts=2), SIZE, generator())
            + most_likely(site, seen, prior, Estimation(rounds=1), generator())
        )
        assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    assert torch.equal(found[0], found[1])


def test_restarts_keep_the_lowest_objective() -> None:
    """Two restarts from one generator are at least as good as the first of them."""
    few = chosen(2)
    site = training(few.labels)
    seen = Seen(site.update(few.images, differentiable=False))

    def objective(restarts: int) -> float:
        search = Matching(iterations=15, restarts=restarts)
        found = match_direction(site, seen, search, SIZE, generator(3))
        assert not found.requires_grad
        cosine = nn.functional.cosine_similarity(site.update(found), seen.values, dim=0)
        return float((1 - cosine + search.total_variation * total_variation(found)).detach())

    # The kept pictures took one more step after the objective was read.
    assert objective(4) <= objective(1) + 0.02


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    stairs = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])[None, None]
    assert float(total_variation(stairs)) == pytest.approx(1.0)
    assert float(total_variation(torch.full((1, 1, 4, 4), 0.3))) == 0.0


def test_blur_keeps_the_mean_level_and_lowers_the_noise() -> None:
    noise = torch.rand((1, 1, 28, 28), generator=generator())
    flat = torch.full((1, 1, 28, 28), 0.3)
    assert torch.allclose(blur(flat, 1.5), flat)
    assert blur(noise, 1.5).std() < 0.4 * noise.std()
    assert torch.equal(blur(noise, 0.0), noise)


def test_conjugate_gradients_solve_a_linear_system() -> None:
    factor = torch.randn((12, 12), generator=generator(), dtype=torch.float64)
    matrix = factor @ factor.T + torch.eye(12, dtype=torch.float64)
    right = torch.randn(12, generator=generator(1), dtype=torch.float64)
    found = conjugate_gradients(lambda x: matrix @ x, right, 60, 1e-12)
    assert torch.allclose(found, torch.linalg.solve(matrix, right))
    assert torch.equal(conjugate_gradients(lambda x: x, torch.zeros(3), 5), torch.zeros(3))
