"""The noise has the right scale, wrong scales are rejected, and no global generator is touched."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from sentinel.mechanism import SystemEntropy, add_noise_, grid_step, keep_, standard_normal
from sentinel.mechanism.entropy import uniform

CPU = torch.device("cpu")


def test_draws_are_standard_normal_and_other_scales_are_rejected(fixed_entropy) -> None:
    draws = standard_normal(200_000, fixed_entropy(1), CPU).numpy()
    assert stats.kstest(draws, "norm").pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws * wrong, "norm").pvalue < 1e-12
    assert abs(draws.mean()) < 5 / math.sqrt(draws.size)
    assert stats.kurtosis(draws) == pytest.approx(0.0, abs=0.06)


def test_tails_reach_beyond_what_a_float32_uniform_allows(fixed_entropy) -> None:
    """2 million draws: about 127 beyond 4 sigma are expected, and none is cut off."""
    draws = standard_normal(2_000_000, fixed_entropy(2), CPU)
    assert 80 <= int((draws.abs() > 4).sum()) <= 180
    smallest = torch.tensor([2.0**-53], dtype=torch.float64)  # the least uniform there is
    assert math.sqrt(-2 * math.log(smallest.item())) > 8.5


def test_uniforms_are_never_zero_and_reach_both_ends() -> None:
    class Ends:
        def fill(self, buffer: memoryview) -> None:
            words = np.frombuffer(buffer, dtype=np.int64)
            words[0::2] = np.iinfo(np.int64).min
            words[1::2] = np.iinfo(np.int64).max

    low, high = uniform(2, Ends(), CPU).tolist()
    assert low == 2.0**-53
    assert high == 1.0


@pytest.mark.parametrize("count", [0, 1, 2, 65_537])
def test_any_number_of_draws_is_finite(count: int) -> None:
    draws = standard_normal(count, SystemEntropy(), CPU)
    assert draws.shape == (count,)
    assert torch.isfinite(draws).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_its_standard_deviation_and_lies_on_the_grid(
    dtype: torch.dtype, fixed_entropy
) -> None:
    tensor = torch.zeros(100_000, dtype=dtype)
    step = grid_step(1.0, tensor.numel())
    add_noise_(tensor, 0.25, step, fixed_entropy(3))
    assert tensor.std().item() == pytest.approx(0.25, rel=0.02)
    if dtype is torch.float64:
        assert torch.equal((tensor / step).round(), tensor / step)


def test_value_and_noise_are_summed_exactly_and_rounded_once(fixed_entropy) -> None:
    """Adding in float32 would round the noise first, and the support would show the value."""
    value = torch.full((5000,), 0.3)
    step = grid_step(1.0, 5000)
    out = value.clone()
    add_noise_(out, 1e-3, step, fixed_entropy(4))
    noise = (standard_normal(5000, fixed_entropy(4), CPU) * 1e-3 / step).round()
    exact = ((value.double() / step).round() + noise) * step
    assert torch.equal(out, exact.float())


def test_tensors_and_releases_get_independent_noise() -> None:
    entropy = SystemEntropy()
    first, second = torch.zeros(50_000), torch.zeros(50_000)
    for tensor in (first, second):
        add_noise_(tensor, 1.0, 2.0**-20, entropy)
    other = torch.zeros(50_000)
    add_noise_(other, 1.0, 2.0**-20, SystemEntropy())
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
        add_noise_(tensor, 1.0, 2.0**-20, SystemEntropy())
        keep_(tensor, 0.5, SystemEntropy())
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
