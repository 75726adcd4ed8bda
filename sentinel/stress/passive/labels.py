"""Label recovery: which classes, and how many records of each, are behind an update.

The loss falls where the last layer raises a record's own class and lowers all others, so that the
update of its bias is (label - probabilities) summed over the records, and that of its weight the
same times the record's embedding. One record shows its class by a sign (iDLG). For several, the
update is linear in the counts per class, once the probabilities and embeddings are about known:
from records of the attacker's own (as LLG and its successors do), or from the update itself where
it has none (as iLRG does). Local steps move the probabilities; the attacker sees both ends of the
way and takes the mean along it.

Adaptive: what noise, mask and the spread of embeddings leave uncertain weighs less (generalised
least squares over the whole last layer).

References: Zhao, Mopuri, Bilen (iDLG, arXiv:2001.02610); Wainakh et al. (LLG, arXiv:2105.09369);
Ma et al. (iLRG, ICLR 2023); Geng et al. (arXiv:2110.09074).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.passive.local_training import LocalTraining, Seen

WAYPOINTS = (0.0, 0.5, 1.0)  # shares of the way from the first step's model to the last step's
SIMPSON = (1 / 6, 4 / 6, 1 / 6)  # what each weighs in the mean along it
MODEL_ERROR = 0.03  # of the head's root mean square: the attacker's records are not the site's


@dataclass(frozen=True, slots=True)
class Probes:
    """Records of the attacker's own.

    Attributes:
        inputs: [M, ...], as the model takes them.
        labels: [M], or None where the attacker has records without labels; noise will do.
    """

    inputs: Tensor
    labels: Tensor | None = None

    def classes(self, count: int) -> Tensor:
        """[M], the class that each stands for: without labels one after the other.

        Raises:
            MisuseError: a class that none stands for.
        """
        labels = torch.arange(len(self.inputs)) % count if self.labels is None else self.labels
        if set(labels.tolist()) != set(range(count)):
            msg = "the attacker's records must stand for each class of the model, and no other"
            raise MisuseError(msg)
        return labels


def lone_label(training: LocalTraining, seen: Seen, *, probes: Probes | None = None) -> int:
    """The class of the one record behind an update.

    Args:
        training: how the site trained; its labels are not read.
        seen: the update.
        probes: give the usual embedding, against which the weight's rows are read where noise
            or a mask lies over the bias; without them the bias and the rows' sums are read.

    Guarantees:
        A raw update of steps on one record gives its class, whatever the net: only the entry of
        the bias of that class rises.

    Raises:
        MisuseError: the model has no last layer to read.
    """
    head = _Head.of(training)
    weight, bias = head.split(seen.values)
    whole = seen.noise_std == 0.0 and seen.keep == 1.0
    if whole and bias is not None:
        return int(bias.argmax())
    usual = torch.ones(weight.shape[1])
    if probes is not None:
        usual = head.embedded(training, probes.inputs, seen.values, 0.0)[0].mean(dim=0)
    score = weight @ usual
    if bias is not None:
        score = score + bias
    return int(score.argmax())


def count_labels(training: LocalTraining, seen: Seen, *, probes: Probes | None = None) -> Tensor:
    """How many records of each class are behind an update, [classes], int64.

    Args:
        training: how the site trained: how many records, in what batches, at what rate. Its labels
            are not read but for their number.
        seen: the update.
        probes: the attacker's own records; None reads embeddings off the update, which takes a
            raw one, more than two classes, and records that do not share all their neurons.

    Returns:
        Counts of 0 or more that add up to the number of records.

    Raises:
        MisuseError: the model has no last layer to read; without probes, none with a bias.
    """
    head = _Head.of(training)
    records = len(training.labels)
    rate = training.learning_rate * len(training.batches) / records  # of one record, all in all
    if probes is None:
        design, whitened = _from_update(head, training, seen, rate * seen.scale)
    else:
        design, whitened = _from_probes(head, training, seen, probes, rate * seen.scale)
    return _integers(design, whitened, records)


@dataclass(frozen=True, slots=True)
class _Head:
    """The last fully connected layer, and where it lies in an update.

    Attributes:
        name: of the layer.
        weight: its place in [D].
        bias: likewise; None where it has none.
        shape: classes, width.
    """

    name: str
    weight: slice
    bias: slice | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, training: LocalTraining) -> _Head:
        linear = [
            name for name, part in training.model.named_modules() if isinstance(part, nn.Linear)
        ]
        if not linear:
            msg = "labels are read off a torch.nn.Linear as last layer; this model has none"
            raise MisuseError(msg)
        places, start = {}, 0
        for name in training.names:
            end = start + training.global_state[name].numel()
            places[name] = slice(start, end)
            start = end
        classes, width = training.global_state[f"{linear[-1]}.weight"].shape
        weight, bias = places[f"{linear[-1]}.weight"], places.get(f"{linear[-1]}.bias")
        return cls(linear[-1], weight, bias, (classes, width))

    def split(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """[classes, width] and [classes] of an update [D]."""
        bias = None if self.bias is None else values[self.bias]
        return values[self.weight].view(self.shape), bias

    def flat(self, values: Tensor) -> Tensor:
        """The layer's part of [D]: weight, then bias."""
        weight, bias = self.split(values)
        return weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])

    def embedded(
        self, training: LocalTraining, inputs: Tensor, change: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [M, width] and probabilities [M, classes], a share of the way on."""
        state, start = dict(training.global_state), 0
        for name in training.names:
            end = start + state[name].numel()
            state[name] = state[name].detach() + share * change[start:end].view(state[name].shape)
            start = end
        state |= {name: value.clone() for name, value in training.model.named_buffers()} | {
            name: value.clone()
            for name, value in training.global_state.items()
            if name not in training.names
        }
        caught: list[Tensor] = []
        part = training.model.get_submodule(self.name)
        hook = part.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            with torch.no_grad():
                answers = functional_call(training.model, state, (inputs,))
        finally:
            hook.remove()
        return caught[0].flatten(0, -2), answers.softmax(dim=1)


def _from_probes(
    head: _Head, training: LocalTraining, seen: Seen, probes: Probes, rate: float
) -> tuple[Tensor, Tensor]:
    """What one record of each class adds to the head [E, classes], and the head [E]; whitened."""
    stand_for = probes.classes(head.shape[0])
    added = _mean_additions(head, training, seen, probes.inputs, stand_for)
    means = torch.stack([added[stand_for == label].mean(dim=0) for label in range(head.shape[0])])
    spread = added - means[stand_for]
    gain = rate if seen.hidden_mask else rate / seen.keep
    kept, values = head.flat(seen.kept), head.flat(seen.values).double()
    values, means = values[kept], gain * means[:, kept]
    spread = spread[:, kept] * gain * math.sqrt(len(training.labels) / len(spread))
    error = math.hypot(seen.error_std, MODEL_ERROR * float(values.square().mean().sqrt()))
    together = _whitened(torch.cat([means, values[None]]).T, spread, max(error, 1e-30))
    return together[:, :-1], together[:, -1]


def _mean_additions(
    head: _Head, training: LocalTraining, seen: Seen, inputs: Tensor, labels: Tensor
) -> Tensor:
    """[M, E]: what each probe would add to the head, in the mean along the way; float64.

    A crafted model's training may diverge: the part of the way that gives no numbers is left out.
    """
    # What of the update is signal: the attacker walks no further than that.
    signal = seen.signal_norm / max(seen.values.norm().item(), 1e-30)
    change = seen.values * (signal / seen.scale)
    change = change * (1 - 1 / len(training.batches))  # the last step starts before its own change
    weight, bias = head.split(change)
    size = weight.numel() + (0 if bias is None else bias.numel())
    added, counted = torch.zeros((len(labels), size), dtype=torch.float64), 0.0
    for share, part in zip(WAYPOINTS, SIMPSON, strict=True):
        hidden, chances = head.embedded(training, inputs, change, share)
        raised = F.one_hot(labels, head.shape[0]).double() - chances.double()
        rows = torch.einsum("mc,md->mcd", raised, hidden.double()).flatten(1)
        one = rows if head.bias is None else torch.cat([rows, raised], dim=1)
        if bool(torch.isfinite(one).all()):
            added, counted = added + part * one, counted + part
    return added / max(counted, SIMPSON[0])


def _whitened(columns: Tensor, spread: Tensor, error: float) -> Tensor:
    """Columns [E, n] times (error^2 + spread^T spread)^(-1/2), up to a rotation."""
    sizes, axes = torch.linalg.eigh(spread @ spread.T)  # [M'], [M', M']
    usable = sizes > float(sizes.max()) * 1e-10
    sizes = sizes[usable]
    basis = spread.T @ axes[:, usable] / sizes.sqrt()  # [E, r], orthonormal
    along = basis.T @ columns
    shrunk = basis @ (along * (error / (error**2 + sizes).sqrt() - 1)[:, None])
    whitened: Tensor = (columns + shrunk) / error
    return whitened


def _from_update(
    head: _Head, training: LocalTraining, seen: Seen, rate: float
) -> tuple[Tensor, Tensor]:
    """The same for the bias alone, with embeddings as the rows of the update show them."""
    weight, bias = head.split(seen.values)
    if bias is None:
        msg = "without probes, counts are read off a last layer with a bias"
        raise MisuseError(msg)
    safe = torch.where(bias.abs() > 1e-12, bias, torch.full_like(bias, 1e-12))  # noqa: PLR2004 - no division by 0
    hidden = weight / safe[:, None]
    logits = hidden @ training.global_state[f"{head.name}.weight"].T
    logits = logits + training.global_state[f"{head.name}.bias"]
    chances = logits.double().nan_to_num().softmax(dim=1)  # [class, classes]
    raised = torch.eye(len(bias), dtype=torch.float64) - chances
    return raised.T, bias.double() / rate


def _integers(design: Tensor, seen: Tensor, records: int) -> Tensor:
    """Whole numbers n >= 0 that add up to `records` and leave |design n - seen| least.

    From the best real numbers on the simplex, rounded; then one record is moved from class to
    class as long as that helps, which ends at the least of a convex function in all but ties.
    """
    classes = design.shape[1]
    gram, pull = design.T @ design, design.T @ seen
    ones = torch.ones((classes, 1), dtype=torch.float64)
    corner = torch.zeros((1, 1), dtype=torch.float64)
    system = torch.cat([torch.cat([gram, ones], 1), torch.cat([ones.T, corner], 1)])
    right = torch.cat([pull, torch.tensor([float(records)], dtype=torch.float64)])
    real = (torch.linalg.pinv(system, hermitian=True) @ right)[:classes].clamp_min(0.0)
    counts = _rounded(real, records)
    while True:
        slope = gram @ counts - pull
        # Change of the objective / 2 when one record moves from a to b.
        curve = gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram
        change = slope[None, :] - slope[:, None] + curve / 2
        change[counts <= 0] = math.inf
        change.fill_diagonal_(math.inf)
        least = float(change.min())
        if not least < -1e-9 * float(gram.diagonal().mean()):
            return counts.long()
        source, target = divmod(int(change.argmin()), classes)
        counts[source] -= 1
        counts[target] += 1


def _rounded(real: Tensor, total: int) -> Tensor:
    """Largest remainders: whole numbers near `real` that add up to `total`."""
    size = float(real.sum())
    shares = real * (total / size) if size > 0 else torch.full_like(real, total / len(real))
    counts = shares.floor()
    missing = round(total - float(counts.sum()))
    counts[(shares - counts).argsort(descending=True)[:missing]] += 1
    return counts
