"""The noise has the right scale, wrong scales are rejected, and no global generator is touched."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from sentinel.mechanism import Recipe, SystemEntropy, add_noise_, grid_step, treat_all
from sentinel.mechanism.entropy import uniform
from sentinel.mechanism.recipe import Workspace
from sentinel.source import Held
from sentinel.spans import BLOCK

STEP = 2.0**-20


def test_uniforms_are_never_zero_and_reach_both_ends() -> None:
    class Ends:
        def fill(self, buffer: memoryview) -> None:
            words = np.frombuffer(buffer, dtype=np.uint64)
            words[0::2] = 0
            words[1::2] = np.iinfo(np.uint64).max

    low, high = uniform(2, Ends()).tolist()
    assert low == 2.0**-53
    assert high == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_its_standard_deviation_and_lies_on_the_grid(
    dtype: torch.dtype, fixed_entropy
) -> None:
    tensor = torch.zeros(100_000, dtype=dtype)
    step = grid_step(1.0, tensor.numel(), 0.25)
    add_noise_(tensor, 0.25, step, fixed_entropy(3))
    assert tensor.std().item() == pytest.approx(0.25, rel=0.02)
    if dtype is torch.float64:
        assert torch.equal((tensor / step).round(), tensor / step)


def test_value_and_noise_are_summed_exactly_and_rounded_once(fixed_entropy) -> None:
    """Adding in float32 would round the noise first, and the support would show the value."""
    value, nothing = torch.full((5000,), 0.3), torch.zeros(5000, dtype=torch.float64)
    out = value.clone()
    add_noise_(out, 1e-3, STEP, fixed_entropy(4))
    add_noise_(nothing, 1e-3, STEP, fixed_entropy(4))  # the noise alone
    exact = (value.double() / STEP).round() * STEP + nothing
    assert torch.equal(out, exact.float())


@pytest.mark.parametrize("size", [7, 5000])
def test_a_value_between_two_steps_is_rounded_alike_whatever_the_noise(
    fixed_entropy, size: int
) -> None:
    """Halves go to even before the noise comes in; else the sum would show that there was one."""
    halves = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5], dtype=torch.float64)
    for factor in (1.0, 0.5):
        recipe = Recipe(factor=factor, std=1e-3, step=STEP)
        noise = treat_all(Held({"": torch.zeros(size)}), {"": recipe}, fixed_entropy(4))[0][""]
        for value, rounded in zip(halves, (-2, 0, 0, 2, 2), strict=True):
            flat = torch.full((size,), float(value * STEP / factor), dtype=torch.float64)
            drawn = treat_all(Held({"": flat}), {"": recipe}, fixed_entropy(4))[0][""]
            assert torch.equal(drawn, noise.double() + rounded * STEP)


def test_grids_of_two_widths_get_each_their_own_noise(fixed_entropy) -> None:
    """As many steps wide on either, so that the tables are the same and the draws might be."""
    steps = {"a": STEP, "b": 8 * STEP, "c": STEP}
    recipes = {name: Recipe(std=2000 * step, step=step) for name, step in steps.items()}
    tensors = {name: torch.zeros(20_000, dtype=torch.float64) for name in steps}
    made, _ = treat_all(Held(tensors), recipes, fixed_entropy(3))
    for name, step in steps.items():
        whole = made[name] / step
        assert torch.equal(whole, whole.round())
        assert whole.std().item() == pytest.approx(2000, rel=0.03)


def test_values_that_do_not_stay_leave_not_even_their_sign(fixed_entropy) -> None:
    for recipe in (Recipe(keep=0.5), Recipe(keep=0.5, std=1e-3, step=STEP)):
        made, _ = treat_all(Held({"": torch.full((1000,), -1.0)}), {"": recipe}, fixed_entropy(2))
        dropped = made[""] == 0.0
        assert 400 < dropped.sum().item() < 600
        assert not torch.signbit(made[""][dropped]).any()


@pytest.mark.parametrize("step", [0.0, -1.0, 0.75, 2.0**971, math.inf, math.nan])
def test_a_grid_that_is_no_power_of_two_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Recipe(std=1.0, step=step)
    assert Recipe(std=0.0, step=step).std == 0.0  # not used


def test_the_buffers_of_a_thread_take_two_mebibytes() -> None:
    """What a thread needs at all times, whatever the size of the update."""
    workspace = Workspace(torch.device("cpu"))
    drawer = workspace._drawer
    assert workspace._wide.data_ptr() == drawer.scratch.ctypes.data  # one and the same
    assert drawer.scratch.nbytes + drawer._words.nbytes == 2 << 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gets_the_same_noise_rounded_once(dtype: torch.dtype, fixed_entropy) -> None:
    """Noise drawn in a narrow dtype would vanish, or take a handful of values."""
    out, wide = torch.full((4096,), 1.0, dtype=dtype), torch.full((4096,), 1.0, dtype=torch.float64)
    add_noise_(out, 0.3, STEP, fixed_entropy(5))
    add_noise_(wide, 0.3, STEP, fixed_entropy(5))
    assert torch.equal(out, wide.to(dtype))


def test_every_value_of_many_blocks_and_tensors_gets_one_draw_of_its_own(fixed_entropy) -> None:
    sizes = (3, BLOCK + 70_000, 0, 11, BLOCK)
    tensors = {str(size): torch.zeros(size) for size in sizes}
    recipes = dict.fromkeys(tensors, Recipe(std=1.0, step=STEP))
    made, squares = treat_all(Held(tensors), recipes, fixed_entropy(6))
    everything = torch.cat([made[name].view(-1) for name in tensors]).double()
    assert everything.square().mean().item() == pytest.approx(1.0, abs=0.005)
    assert sum(squares.values()) == pytest.approx(everything.square().sum().item(), rel=1e-12)
    half = everything.numel() // 2
    for shift in (1, 11, 70_000, BLOCK, 1 << 17, half):
        both = torch.stack([everything[:-shift][:half], everything[shift:][:half]])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(both.shape[1])


def test_the_same_bits_give_the_same_noise_on_any_number_of_threads(fixed_entropy) -> None:
    before = torch.get_num_threads()
    outcomes = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        tensor = torch.zeros(2 * BLOCK + 5)
        add_noise_(tensor, 1.0, STEP, fixed_entropy(7))
        outcomes.append(tensor)
    torch.set_num_threads(before)
    assert torch.equal(*outcomes)


def test_where_values_lie_says_nothing_about_them(fixed_entropy) -> None:
    """Values that differ by less than a step leave the very same bytes behind."""
    outcomes = []
    for value in (0.1, 0.1 + STEP / 64):
        tensor = torch.full((10_000,), value, dtype=torch.float64)
        add_noise_(tensor, 1e-3, STEP, fixed_entropy(8))
        outcomes.append(tensor)
    assert torch.equal(*outcomes)
    assert torch.equal((outcomes[0] / STEP).round() * STEP, outcomes[0])


def test_tensors_and_releases_get_independent_noise() -> None:
    entropy = SystemEntropy()
    first, second = torch.zeros(50_000), torch.zeros(50_000)
    for tensor in (first, second):
        add_noise_(tensor, 1.0, STEP, entropy)
    other = torch.zeros(50_000)
    add_noise_(other, 1.0, STEP, SystemEntropy())
    for left, right in [(first, second), (first, other)]:
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1].item()) < 0.03


def test_the_global_generators_are_neither_read_nor_written() -> None:
    """Both ways: a seed does not repeat the noise, and drawing noise does not move the state."""
    outcomes = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - the global generator is what is tested
        random.seed(42)
        before = (
            torch.get_rng_state().clone(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 - as above
            random.getstate(),
        )
        tensor = torch.zeros(100)
        add_noise_(tensor, 1.0, STEP, SystemEntropy())
        treat_all(Held({"t": tensor}), {"t": Recipe(keep=0.5)}, SystemEntropy())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002 - as above
        assert random.getstate() == before[2]
        outcomes.append(tensor)
    assert not torch.equal(*outcomes)


def test_key_and_counter_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    monkeypatch.setattr("sentinel.mechanism.entropy.os.urandom", urandom)
    buffer = bytearray(64)
    SystemEntropy().fill(memoryview(buffer))
    assert asked == [32, 16]
    cipher = Cipher(algorithms.AES(bytes([1]) * 32), modes.CTR(bytes([2]) * 16))
    assert bytes(buffer) == cipher.encryptor().update(bytes(64))


def test_a_forked_child_does_not_share_the_stream() -> None:
    entropy = SystemEntropy()
    entropy.fill(memoryview(bytearray(16)))
    receive, send = os.pipe()
    child = os.fork()
    buffer = bytearray(32)
    entropy.fill(memoryview(buffer))
    if child == 0:
        os.write(send, buffer)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 32) != bytes(buffer)
    os.close(receive)
    os.close(send)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, (1 << 20) + 3])
def test_system_entropy_fills_every_byte(length: int) -> None:
    seen = bytearray(length)
    for _ in range(12):
        buffer = bytearray(length)
        SystemEntropy().fill(memoryview(buffer))
        seen = (
            bytearray(a | b for a, b in zip(seen, buffer, strict=True)) if length < 99 else buffer
        )
    assert all(seen) if length < 99 else len(set(seen)) == 256


def test_small_tensors_side_by_side_get_what_each_would_get_alone(fixed_entropy) -> None:
    """Neighbours of other recipes and dtypes, some with noise and some without."""
    recipes = {
        "half": Recipe(factor=0.5),
        "half too": Recipe(factor=0.5),
        "limited": Recipe(max_abs=0.25),
        "noised": Recipe(std=1.0, step=STEP),
        "noised too": Recipe(std=1.0, step=STEP),
        "quieter": Recipe(std=0.5, step=STEP),
        "wide": Recipe(factor=0.25),
        "narrow": Recipe(factor=0.5),
        "thinned": Recipe(keep=0.25),
        "plain": Recipe(),
    }
    tensors = {name: torch.linspace(-1, 1, 999) for name in recipes}
    tensors["wide"] = tensors["wide"].double()
    tensors["narrow"] = tensors["narrow"].bfloat16()
    made, squares = treat_all(Held(tensors), recipes, fixed_entropy(9))
    assert all(torch.equal(made[name], tensors["half"] / 2) for name in ("half", "half too"))
    assert torch.equal(made["limited"], tensors["limited"].clamp(-0.25, 0.25))
    assert torch.equal(made["wide"], tensors["wide"] / 4)
    assert torch.equal(made["plain"], tensors["plain"])
    assert torch.equal(made["narrow"], tensors["narrow"] / 2)
    kept = made["thinned"] != 0
    assert kept.double().mean().item() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(made["thinned"][kept], 4 * tensors["thinned"][kept])
    noise = {name: (made[name] - tensors[name]).double() for name in recipes}
    for name, std in (("noised", 1.0), ("noised too", 1.0), ("quieter", 0.5)):
        assert noise[name].std().item() == pytest.approx(std, rel=0.1)
    both = torch.stack([noise["noised"], noise["noised too"]])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(999)
    for name, square in squares.items():
        assert square == pytest.approx(made[name].double().square().sum().item(), rel=1e-12)
