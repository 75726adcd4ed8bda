"""Published and obvious rules that the detector is held against, on the same models.

Each gives one number, larger for a model that looks more like a trap. To be kind to D-SNR it is
also taken on true records of the task, which no guard may look at before the round.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.rounds import loss_of
from sentinel.stress.layers import loaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sentinel.stress.bench.nets import Net

BASELINES = (
    "D-SNR, true records",
    "D-SNR, probes",
    "T-SNR",
    "duplicate rows",
    "effective rank",
    "exclusive neurons",
    "loss on probes",
)
RECORDS = 8  # behind each D-SNR: the batch at which it is sharpest
PROBES = 32
PARALLEL = 0.99  # cosine from which two rows are duplicates
MOST_ROWS = 256  # of a matrix that are compared
CEILING = 1e12  # of a ratio whose divisor is nothing


def baselines(
    module: nn.Module,
    net: Net,
    state: Mapping[str, Tensor],
    batch: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    """Score one global model by every rule of `BASELINES`.

    Args:
        module: the architecture; it is not touched.
        net: what its records look like.
        state: the global model.
        batch: true records and labels, `RECORDS` at least.
        generator: draws the probes.

    Returns:
        Score by name; what is not finite counts as the ceiling.
    """
    wide = {
        name: value.float() if value.is_floating_point() else value for name, value in state.items()
    }
    twin = loaded(module, wide).eval()
    probes, labels = probe_batch(net, generator)
    weights = [value.flatten(1) for name, value in wide.items() if _is_matrix(name, value)]
    loss, exclusive = _forward(twin, probes, labels)
    found = {
        "D-SNR, true records": d_snr(twin, batch[0][:RECORDS], batch[1][:RECORDS]),
        "D-SNR, probes": d_snr(twin, probes[:RECORDS], labels[:RECORDS]),
        "T-SNR": t_snr(twin),
        "duplicate rows": max(map(duplicate_rows, weights), default=0.0),
        "effective rank": 1.0 - min(map(effective_rank, weights), default=1.0),
        "exclusive neurons": exclusive,
        "loss on probes": loss,
    }
    return {name: _bounded(value) for name, value in found.items()}


def probe_batch(net: Net, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return probes that know nothing of the task, [PROBES, *shape], and labels drawn alike."""
    labels = torch.randint(max(net.classes, 2), (PROBES,), generator=generator)
    if net.words is not None:
        return torch.randint(net.words, (PROBES, *net.shape), generator=generator), labels
    if len(net.shape) == 1:
        return torch.randn(PROBES, *net.shape, generator=generator), labels
    return torch.rand(PROBES, *net.shape, generator=generator), labels


def d_snr(model: nn.Module, records: Tensor, labels: Tensor) -> float:
    """Return max over layers of max_i ||g_i|| / sum_{j != i} ||g_j||, g the records' gradients.

    Reference: Garov et al., "SEER", ICLR 2024, arXiv 2306.03013, section 4.
    """
    parameters = [value for value in model.parameters() if value.ndim > 1]
    norms = []
    for index in range(len(records)):
        one = records[index : index + 1]
        loss = loss_of(model(one), labels[index : index + 1], one)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append([0.0 if grad is None else float(grad.norm()) for grad in grads])
    table = torch.tensor(norms, dtype=torch.float64)  # [records, layers]
    most = table.amax(0)
    ratios = most / (table.sum(0) - most).clamp_min(1e-300)
    return float(ratios[most > 0].max()) if bool((most > 0).any()) else 0.0


def t_snr(model: nn.Module) -> float:
    """Return max over the first convolution's kernels of max|w| / (sum|w| - max|w|).

    Where there is no convolution, over the rows of the first dense layer.

    Reference: Garov et al., "SEER", ICLR 2024, arXiv 2306.03013, on transformed weights.
    """
    first = next(_first_weights(model), None)
    if first is None:
        return 0.0
    sizes = first.detach().flatten(1).abs().double()
    most = sizes.amax(1)
    ratios = most / (sizes.sum(1) - most).clamp_min(1e-300)
    return float(ratios[most > 0].max()) if bool((most > 0).any()) else 0.0


def _first_weights(model: nn.Module) -> Iterator[Tensor]:
    for part in model.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d):
            # One kernel has the weights of one input and one output.
            yield part.weight.reshape(-1, math.prod(part.kernel_size))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            yield part.weight


def duplicate_rows(weight: Tensor) -> float:
    """Return the share of rows that are parallel to another, [rows, columns]."""
    rows = weight[:MOST_ROWS]
    rows = rows[rows.norm(dim=1) > 0]
    if len(rows) < 2 or rows.shape[1] < 3:  # noqa: PLR2004 - in a plane any rows look alike
        return 0.0
    unit = nn.functional.normalize(rows, dim=1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0.0)
    return float((cosines.amax(1) > PARALLEL).double().mean())


def effective_rank(weight: Tensor) -> float:
    """Return exp(entropy of the squared singular values) as a share of the smaller side."""
    rows = weight[:MOST_ROWS, :].double()
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    total = values.sum()
    if len(values) < 2 or not total > 0:  # noqa: PLR2004 - one direction has rank one
        return 1.0
    shares = values / total
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return float(entropy.exp()) / len(values)


def _forward(model: nn.Module, probes: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the loss on probes, and the largest share of a layer's units with one probe each.

    Reference: Pan et al., USENIX Security 2022, for exclusive neurons.
    """
    shares: list[float] = []

    def watch(_part: nn.Module, _inputs: object, output: Tensor) -> None:
        fired = output > 0
        if output.ndim > 2:  # noqa: PLR2004 - tokens in the middle
            fired = fired.flatten(1, -2).any(1)
        if fired.shape[1] >= MOST_ROWS // 16:
            shares.append(float((fired.sum(0) == 1).double().mean()))

    handles = [
        part.register_forward_hook(watch) for part in model.modules() if isinstance(part, nn.Linear)
    ]
    try:
        with torch.no_grad():
            loss = float(loss_of(model(probes), labels, probes))
    finally:
        for handle in handles:
            handle.remove()
    return loss, max(shares, default=0.0)


def _is_matrix(name: str, value: Tensor) -> bool:
    return name.endswith("weight") and value.ndim > 1 and value.is_floating_point()


def _bounded(value: float) -> float:
    return min(value, CEILING) if math.isfinite(value) else CEILING
