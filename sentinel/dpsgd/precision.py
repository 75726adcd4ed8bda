"""Precision: refuses arithmetic so coarse that one record's company changes another's gradient.

Gradients in bfloat16 or TF32 round what went before: a last bit that another record in the batch
moved can become 2^-8 or 2^-11 of a value, far above what `clipping.Bound` leaves free for it.
Everything here only reads torch's settings.
"""

from __future__ import annotations

import torch

from sentinel.errors import MisuseError

EXACT = (torch.float32, torch.float64)
_COARSE = ("tf32", "bf16")


def require_no_autocast(tensor: torch.Tensor) -> None:
    """Refuse what came out of a layer, or back to it, under autocast or in a coarse type.

    Raises:
        MisuseError: autocast is on for the tensor's device, or it is not float32 or float64.
    """
    if torch.is_autocast_enabled(tensor.device.type) or tensor.dtype not in EXACT:
        raise MisuseError(
            "A layer ran under autocast or in half precision; private training runs in float32 or "
            "float64, since coarser gradients cannot be clipped exactly. Leave torch.autocast out, "
            "around the model and around backward()."
        )


def require_full_products(device: torch.device) -> None:
    """Refuse matrix products and convolutions that torch was told to run in TF32 or bfloat16.

    Raises:
        MisuseError: one of torch's settings for the device's kind asks for it.
    """
    for name in _coarse_settings(device.type):
        raise MisuseError(
            f"{name} allows TF32 or bfloat16; private training needs full float32 products. Set "
            'torch.set_float32_matmul_precision("highest") and, on CUDA, '
            "torch.backends.cudnn.allow_tf32 = False, before the round."
        )


def _coarse_settings(kind: str) -> list[str]:
    backends = torch.backends
    if kind == "cuda":
        settings = {
            "torch.backends.cuda.matmul": backends.cuda.matmul.fp32_precision,
            "torch.backends.cudnn.conv": backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # not in torch's stubs
        }
    else:
        settings = {
            "torch.backends.mkldnn.matmul": backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]  # as above
            "torch.backends.mkldnn.conv": backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]  # as above
        }
    return [name for name, value in settings.items() if value in _COARSE]
