"""What the attacker is told of a release is what the guard did."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from sentinel import Guard
from sentinel.demo import cohorts
from sentinel.demo.hearts import network
from sentinel.errors import MisuseError
from sentinel.stress.inference.loop import Loop
from sentinel.stress.inference.observed import Observed, raw, sanitized
from sentinel.stress.lab.subject import binary_loss
from sentinel.stress.layers import State, copied
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("known_noise")
POLICY = """
schema = 1
name = "observed"
[[rule]]
id = "all"
{knobs}
{more}
"""


def trained() -> tuple[Loop, State, State]:
    model = network(13, 16, torch.Generator().manual_seed(0))
    loop, sent = Loop(model, binary_loss, 0.5), copied(model.state_dict())
    cohort = cohorts.load("cleveland")
    data = Records(cohort.rows[:64], cohort.labels[:64])
    return loop, sent, loop.train(sent, data, torch.Generator().manual_seed(0))


def released(home: Path, knobs: str, more: str = "") -> tuple[Observed, Observed]:
    """A release under a policy, and the same update raw."""
    path = home / "policy.toml"
    path.write_text(POLICY.format(knobs=knobs, more=more))
    path.chmod(0o600)
    loop, sent, local = trained()
    guard = Guard(path, home / "state")
    with guard.round(1, sent, patients=64) as rnd:
        pass
    delta = rnd.release(local, kind="delta")
    return sanitized(loop, sent, delta, rnd.decided), raw(loop, sent, local)


def test_a_raw_update_is_seen_as_it_is() -> None:
    loop, sent, local = trained()
    seen = raw(loop, sent, local)
    assert torch.equal(seen.values, loop.flatten(local) - loop.flatten(sent))
    assert bool(seen.kept.all())
    assert float(seen.std.max()) == 0.0
    assert float(seen.factor.min()) == 1.0


def test_the_factor_is_that_of_the_clip(tmp_path: Path) -> None:
    seen, bare = released(tmp_path, "max_norm = 0.01")
    assert float(seen.factor[0]) < 0.9
    assert torch.allclose(seen.values, seen.factor * bare.values, atol=1e-6)


def test_the_noise_has_the_deviation_that_is_told(tmp_path: Path) -> None:
    seen, bare = released(tmp_path, "max_norm = 0.1\nnoise_ratio = 10.0")
    noise = (seen.values - seen.factor * bare.values) / seen.std
    assert float(seen.std[0]) == pytest.approx(1.0 / math.sqrt(len(noise)), rel=0.01)
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=0.3)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.25)


def test_a_mask_is_read_off_the_zeros_and_its_rescaling_undone(tmp_path: Path) -> None:
    seen, bare = released(tmp_path, "keep = 0.5")
    assert 0.3 < float(seen.kept.float().mean()) < 0.7
    assert torch.allclose(seen.values[seen.kept], bare.values[seen.kept], atol=1e-6)
    assert float(seen.values[~seen.kept].abs().max()) == 0.0


def test_a_withheld_parameter_is_not_counted(tmp_path: Path) -> None:
    more = '[[rule]]\nid = "head"\nmatch = ["2.**"]\naction = "withhold"'
    seen, bare = released(tmp_path, "max_norm = 100.0", more)
    assert seen.kept.tolist() == [True] * (14 * 16) + [False] * 17
    assert torch.equal(seen.values[seen.kept], bare.values[seen.kept])


def test_a_replay_tells_nothing() -> None:
    loop, sent, _ = trained()
    with pytest.raises(MisuseError, match="released before"):
        sanitized(loop, sent, sent, None)


def test_a_bound_on_single_values_is_not_known_to_the_attacker(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="max_abs"):
        released(tmp_path, "max_abs = 0.001")
