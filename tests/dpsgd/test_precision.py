"""Coarse arithmetic is refused: autocast, half precision, TF32 and bfloat16 products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from sentinel import MisuseError
from sentinel.dpsgd.precision import require_full_products

from .test_training import Site, layered, withheld

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def site(tmp_path) -> Site:
    made = Site(tmp_path)
    made.wrap()
    return made


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Put torch's settings back."""
    cudnn = torch.backends.cudnn.conv.fp32_precision
    products = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = cudnn
    torch.backends.cuda.matmul.fp32_precision = products


def test_a_forward_pass_under_autocast_is_withheld(site: Site) -> None:
    with site.round() as rnd, pytest.raises(MisuseError, match="autocast"):  # noqa: PT012 - a loop fails in it
        for x, _ in site.loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                site.model(x)
    assert rnd


def test_a_backward_pass_under_autocast_is_refused(site: Site) -> None:
    with site.round(), pytest.raises(MisuseError, match="autocast"):  # noqa: PT012 - a loop fails in it
        for x, y in site.loader:
            loss = nn.functional.binary_cross_entropy_with_logits(site.model(x), y)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss.backward()


def test_an_autocast_pass_that_the_loop_swallows_cannot_be_stepped_on(site: Site) -> None:
    with site.round() as rnd:
        for x, _ in site.loader:
            with (
                torch.autocast("cpu", dtype=torch.bfloat16),
                pytest.raises(MisuseError, match="autocast"),
            ):
                site.model(x)
            with pytest.raises(MisuseError, match="no backward pass"):
                site.optimizer.step()
            break
    withheld(site, rnd)


class Halved(nn.Module):
    """A layer whose output is coarse."""

    def __init__(self) -> None:
        """Make its parameter."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return (x * self.scale).bfloat16()


class Back(nn.Module):
    """To float32 again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return x.float()


def test_a_layer_with_a_coarse_output_is_refused(tmp_path) -> None:
    site = Site(tmp_path)
    site.wrap(layered(Halved(), Back()))
    with site.round(), pytest.raises(MisuseError, match="half precision"):
        site.train(1)


def test_a_frozen_layer_in_half_precision_is_refused(tmp_path) -> None:
    """Gradients go back through it."""
    frozen = nn.Linear(4, 4).bfloat16().requires_grad_(requires_grad=False)
    with pytest.raises(MisuseError, match="trained or frozen"):
        Site(tmp_path).wrap(layered(frozen))


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("wanted", ["high", "medium"])
def test_coarse_matrix_products_are_refused(site: Site, wanted) -> None:
    torch.set_float32_matmul_precision(wanted)
    with site.round(), pytest.raises(MisuseError, match="highest"):
        site.train(1)
    with pytest.raises(MisuseError, match=r"cuda\.matmul"):
        require_full_products(CUDA)


@pytest.mark.usefixtures("_as_before")
def test_tf32_convolutions_are_refused_on_cuda_where_they_are_torchs_default() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with pytest.raises(MisuseError, match=r"cudnn\.allow_tf32 = False"):
        require_full_products(CUDA)
    require_full_products(CPU)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    require_full_products(CUDA)
