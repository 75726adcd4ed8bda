"""Measured leakage: how many records a server reads out of one dense layer's update.

Used to label synthetic rounds; the true records are needed, so it never sees a real one.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT, NEAR = 0.01, 0.30  # distance of a read record, relative to its distance from the average
MOST_CANDIDATES = 1024
_FAINT = 1e-4
_STILL = (1e-4, 0.1, 0.3)  # row norms beside the largest below which a word did not occur


def thresholds_of(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the global bias over the norm of its row, [K]: the order of bins along a line."""
    norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=1)
    return bias.float() / norms.clamp_min(1e-12)


def candidates(weight: Tensor, bias: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Return a server's guesses at the inputs of a dense layer.

    Args:
        weight: [K, d], update of the weight.
        bias: [K], update of the bias.
        thresholds: [K], the global bias over the row norm, in whose order neighbours are
            subtracted (binning); left out, they are not.

    Returns:
        [n, d]: every row over its bias, differences of neighbouring rows over theirs, and the
        largest singular direction of weight and bias together.
    """
    stacked = torch.cat([weight, bias[:, None]], dim=1).double()
    parts = [stacked, _largest(stacked)]
    if thresholds is not None:
        ordered = stacked[thresholds.argsort()]
        parts.append(ordered[1:] - ordered[:-1])
    guesses = torch.cat(parts)
    sizes = guesses[:, -1].abs()
    told = sizes > _FAINT * float(sizes.max()) if len(sizes) else sizes > 0
    chosen = guesses[told]
    if len(chosen) > MOST_CANDIDATES:
        chosen = chosen[chosen[:, -1].abs().topk(MOST_CANDIDATES).indices]
    return chosen[:, :-1] / chosen[:, -1:]


def _largest(stacked: Tensor) -> Tensor:
    """Leading right singular vector, by a few power iterations on the smaller side."""
    vector = stacked[stacked.norm(dim=1).argmax()]
    for _ in range(8):
        vector = stacked.T @ (stacked @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return vector[None]


def read_share(guesses: Tensor, truth: Tensor, average: Tensor, within: float) -> float:
    """Return the share of records that some guess meets.

    Args:
        guesses: [m, d] from `candidates`.
        truth: [n, d], the records.
        average: [d], what anybody would guess.
        within: largest distance that counts, as a share of the record's distance from `average`;
            on standardised rows this is the relative error.
    """
    if not len(guesses) or not len(truth):
        return 0.0
    truth, average = truth.double(), average.double()
    distances = torch.cdist(truth, guesses.double()).amin(1)
    return float((distances < within * (truth - average).norm(dim=1)).double().mean())


def leakage(guesses: Tensor, inside: Tensor, outside: Tensor, within: float = NEAR) -> float:
    """Return the share read among the batch's records beyond what is met by chance.

    Args:
        guesses: [m, d] from `candidates`.
        inside: [n, d] what the records of the update gave the layer as input.
        outside: [k, d] the same for records that were not used: met only by chance, and their mean
            is what anybody would guess.
        within: largest distance that counts as read, relative to the distance from that mean.

    Returns:
        0 to 1; 0 where no more is read than chance may give (two standard errors).
    """
    average = outside.double().mean(0)
    read = read_share(guesses, inside, average, within)
    met = read_share(guesses, outside, average, within)
    return beyond_chance(read, met, len(inside), len(outside))


def beyond_chance(read: float, met: float, records: int, outsiders: int) -> float:
    """Return the share read beyond the share met by chance; 0 where that may be chance too.

    Args:
        read: share of the records behind the update.
        met: share of records that were not used.
        records: how many stand behind the first.
        outsiders: how many behind the second.
    """
    likely = (met * outsiders + 1.0) / (outsiders + 2.0)
    chance = (likely * (1.0 - likely) / max(records, 1)) ** 0.5
    return read - met if read - met > 2.0 * chance else 0.0


def token_leakage(weight: Tensor, inside: Tensor, outside: Tensor, within: float = NEAR) -> float:
    """Return the share of the records whose words the rows of an embedding that moved give away.

    A server sees which rows moved. That names the words of one record, and of several only all of
    them together: a record counts as read where the words seen and its own differ in at most a
    share of `within` (Jaccard's distance).

    Args:
        weight: [vocabulary, d], update of an embedding.
        inside: [n, places], words of the records behind the update.
        outside: [k, places], of others: what is met by chance.
        within: largest distance that counts as read.
    """
    norms = weight.float().norm(dim=1)
    largest = norms.amax()
    if not largest > 0.0:
        return 0.0
    found = 0.0
    for faint in _STILL:
        seen = norms > faint * largest
        read, met = (_met(seen, records, within) for records in (inside, outside))
        found = max(found, beyond_chance(read, met, len(inside), len(outside)))
    return found


def _met(seen: Tensor, records: Tensor, within: float) -> float:
    own = torch.zeros(len(records), len(seen), dtype=torch.bool)
    own.scatter_(1, records.long(), value=True)
    common = (own & seen).sum(1).double()
    either = (own | seen).sum(1).clamp_min(1).double()
    return float((1.0 - common / either <= within).double().mean())
