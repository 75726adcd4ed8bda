# ruff: noqa: PLC0415 - Opacus is not installed everywhere the tests run
"""Private steps: one record of NaN among 64, through Opacus and through guard.private."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path

import torch
from judging import Finding
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sentinel

TITLE = "one record of NaN among 64, one private step on all of them"
HAS_TO_BE = "the record counts for nothing, the others are learned from"
DELTA = 1e-5
POLICY = f"""
schema = 1
name = "records"
[privacy]
unit = "record"
patients = 64
batch = 64
epsilon = 50.0
delta = {DELTA}
clip_norm = 1.0
noise_multiplier = 1.0
[[rule]]
id = "baseline"
"""


def opacus() -> Finding:
    """PrivacyEngine, flat clipping, clip norm 1, noise multiplier 1."""
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")
    model, optimizer, loader = _loop()
    engine = PrivacyEngine()
    private = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    _train(*private)
    return _judged(model, {}, f"epsilon {engine.get_epsilon(DELTA):.3g} reported")


def sentinel_private() -> Finding:
    """guard.private within a round, and its release."""
    model, optimizer, loader = _loop()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.toml"
        path.write_text(POLICY)
        path.chmod(0o600)
        guard = sentinel.Guard(path, Path(folder) / "site", alerts=io.StringIO())
        private = guard.private(model, optimizer, loader)
        with guard.round(0, start, model) as rnd:
            _train(*private)
        return _judged(model, rnd.release(), "")


CONTESTANTS = {"Opacus PrivacyEngine": opacus, "Sentinel guard.private": sentinel_private}


def _loop() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    generator = torch.Generator().manual_seed(5)
    records = torch.randn(64, 6, generator=generator)
    labels = (records.sum(1, keepdim=True) > 0).float()
    records[7] = torch.nan
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    loader = DataLoader(TensorDataset(records, labels), batch_size=64)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    for records, labels in loader:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(records), labels).backward()
        optimizer.step()


def _judged(model: nn.Module, out: dict[str, torch.Tensor], more: str) -> Finding:
    """Whether the parameters, and what was released of them, are finite."""
    values = [*model.parameters(), *out.values()]
    bad = sum(int((~value.isfinite()).sum()) for value in values)
    if bad:
        return Finding(
            "wrong", f"values not finite: {bad} of {sum(v.numel() for v in values)}; {more}"
        )
    return Finding("right")
