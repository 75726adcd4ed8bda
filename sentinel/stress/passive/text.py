"""Text out of an update: which words a batch held, and in which order.

Only words of the batch move their row of the embedding, so the rows that stand out from the noise
name them. The words' order is searched as a softmax over the known words at every place, with the
update matched as for tables, and improved by swaps of two places. Where the inputs of the first
attention layer have a smaller rank than its width, they span the rows of its gradient, so a word
at a place can be checked on its own, exactly.

Reference: Balunovic et al., NeurIPS 2022 (arXiv:2202.08827); Petrov et al., NeurIPS 2024
(arXiv:2405.15586).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2
from torch import Tensor, nn

from sentinel.errors import MisuseError
from sentinel.interval import Count
from sentinel.stress.passive.columns import Column, Table
from sentinel.stress.passive.relaxation import Relaxation, relax
from sentinel.stress.passive.restarts import Restarts, misfits

if TYPE_CHECKING:
    from sentinel.stress.passive.local_training import LocalTraining, Seen

FALSE_ALARMS = 0.01  # words wrongly seen in an update of noise alone, in expectation
SINGLE_PRECISION = 1e-7  # rounding of a gradient, as a share of its largest singular value
LEAST_DIRECTION = 1e-6  # singular values under this share of the largest are rounding
TELLS_APART = 0.25  # share of an input outside the span from which words can be told apart
ROUNDING = 1e-4  # of the longest row or the input: below it is arithmetic, not signal
UNLIKELY = 1e-3  # share of a word at a place where no reference note has it


def words_present(rows: Tensor, noise_std: float = 0.0) -> Tensor:
    """Which words the batch held, read from the embedding's update.

    Args:
        rows: [words, width]; entries that a mask dropped are exactly zero.
        noise_std: standard deviation of the noise on each entry that is not zero.

    Returns:
        Indices of the words, ascending. Without noise every row that moved; with noise those whose
        squared norm is too large for noise.
    """
    squares = rows.double().square().sum(1)
    if noise_std == 0.0:
        return torch.nonzero(squares > (ROUNDING**2 * squares.max()))[:, 0]
    kept = (rows != 0).sum(1).numpy()
    limits = chi2.isf(FALSE_ALARMS / len(rows), kept.clip(min=1))
    return torch.nonzero(squares / noise_std**2 > torch.from_numpy(limits))[:, 0]


def spanned(gradient: Tensor, inputs: Tensor, noise_std: float = 0.0) -> Tensor | None:
    """Which inputs lie in the span of a linear layer's gradient.

    Args:
        gradient: [outputs, width]; of attention, that of the values has the fullest rank.
        inputs: [..., width], what each word at each place would feed the layer.
        noise_std: standard deviation of the noise, or of rounding, on each entry.

    Returns:
        [...] bool; None where the gradient tells nothing: of full rank, or blurred by noise.
    """
    wide = gradient.double()
    _, sizes, directions = torch.linalg.svd(wide, full_matrices=False)
    noise = noise_std * (math.sqrt(wide.shape[0]) + math.sqrt(wide.shape[1]))
    rank = int((sizes > max(noise, LEAST_DIRECTION * float(sizes[0]))).sum())
    if rank in {0, wide.shape[1]}:
        return None
    # The least direction is off by about the noise by its size.
    blur = max(noise, SINGLE_PRECISION * float(sizes[0])) / float(sizes[rank - 1])
    slack = max(ROUNDING, 3 * blur)
    if slack > TELLS_APART:
        return None
    basis = directions[:rank]
    offered = inputs.double()
    left = offered - offered @ basis.T @ basis
    inside: Tensor = left.norm(dim=-1) < slack * offered.norm(dim=-1)
    return inside


ONE_NOTE = Relaxation(restarts=2, iterations=120, hardness=(20.0,))


@dataclass(frozen=True, slots=True)
class TextAttacker:
    """How the words of a batch are put in order.

    Attributes:
        search: of the relaxation.
        swaps: rounds of swapping two places; none where 0.
        offered: swaps that each round tries.
    """

    search: Relaxation = ONE_NOTE
    swaps: int = 30
    offered: int = 32

    def read(
        self, training: LocalTraining, seen: Seen, allowed: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Reconstruct notes.

        Args:
            training: how the site trained, on a net with an `nn.Embedding` or `nn.EmbeddingBag`.
            seen: the update, with the figures of its sanitizer.
            allowed: [T, words], how likely each word is at each place before the update is seen;
                0 where it is ruled out.
            generator: of starts and swaps.

        Returns:
            [N, T] tokens.

        Raises:
            MisuseError: the net has no embedding.
        """
        known = torch.nonzero(allowed.sum(0) > 0)[:, 0]
        replay = from_shares(training, known)
        table = places(allowed[:, known])
        found = relax(replay, seen, table, self.search, generator).best
        shares = found.view(len(training.labels), len(allowed), len(known))
        ordered = self._swapped(replay, seen, shares.argmax(-1), len(known), generator)
        return known[ordered]

    def _swapped(
        self,
        replay: LocalTraining,
        seen: Seen,
        tokens: Tensor,
        words: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Swap two places, of one note or of two, wherever that explains the update better."""
        lowest = _misfit(replay, seen, tokens[None], words)[0]
        for _ in range(self.swaps):
            cells = torch.randint(tokens.numel(), (self.offered, 2), generator=generator)
            tried = tokens.flatten().repeat(self.offered, 1)
            swapped = tried.scatter(1, cells, tried.gather(1, cells.flip(1)))
            candidates = swapped.view(self.offered, *tokens.shape)
            values = _misfit(replay, seen, candidates, words)
            if values.min() < lowest:
                lowest, tokens = values.min(), candidates[values.argmin()]
        return tokens


def from_shares(training: LocalTraining, known: Tensor) -> LocalTraining:
    """The same training of a net that takes shares [N, T * K] of K known words in place of tokens.

    Raises:
        MisuseError: the net has no embedding.
    """
    twin = copy.deepcopy(training.model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            # The first one is taken for the words'; one of the places comes after it.
            if isinstance(child, nn.Embedding | nn.EmbeddingBag):
                setattr(parent, name, _Shares(child, known))
                return replace(training, model=twin)
    raise MisuseError("this attack needs a net with a torch.nn.Embedding or EmbeddingBag")


def places(allowed: Tensor) -> Table:
    """One category for each place: [T, K] likelihoods of the known words, 0 for ruled out."""
    codes = torch.eye(allowed.shape[1])
    columns = []
    for likely in allowed:
        levels = codes[likely > 0]
        shares = likely[likely > 0] / likely.sum()
        top = levels[shares.argmax()]
        columns.append(Column(levels, shares, shares @ levels, 1.0, top))
    return Table(tuple(columns))


def frequencies(tokens: Tensor, words: int) -> Tensor:
    """How often each word stands at each place of reference notes [M, T]: [T, words]; never 0."""
    counts = torch.zeros(tokens.shape[1], words)
    shares = counts.scatter_add_(1, tokens.T, torch.ones(tokens.T.shape)) / len(tokens)
    return (shares + UNLIKELY) / (1 + UNLIKELY * words)


class _Shares(nn.Module):
    """An embedding that takes shares of known words, with the same parameter."""

    def __init__(self, was: nn.Embedding | nn.EmbeddingBag, known: Tensor) -> None:
        super().__init__()
        self.weight = was.weight
        self.known = known
        self.bag = isinstance(was, nn.EmbeddingBag)

    def forward(self, shares: Tensor) -> Tensor:
        """[n, T * K] to [n, T, width], or their mean over places."""
        split = shares.reshape(*shares.shape[:-1], -1, len(self.known))
        embedded: Tensor = split @ self.weight[self.known]
        return embedded.mean(-2) if self.bag else embedded


def _misfit(replay: LocalTraining, seen: Seen, tokens: Tensor, words: int) -> Tensor:
    """[candidates, N, T] known tokens to how badly each explains the update, [candidates]."""
    codes = nn.functional.one_hot(tokens, words).float().flatten(2)
    return misfits(Restarts(replay, len(tokens)).updates(codes), seen).detach()


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of the notes, of others by the same guesses, and by frequencies alone.

    Attributes:
        tokens: places with the right word, out of all.
        by_frequency: the same where the most frequent word is said at each place.
        others: the same of notes that were not behind the update.
        order: mean longest common subsequence, as a share of the notes' length (ROUGE-L).
        order_by_frequency: the same by frequencies.
        notes: whole notes.
    """

    tokens: Count
    by_frequency: Count
    others: Count
    order: float
    order_by_frequency: float
    notes: Count


def reading(guesses: Tensor, notes: Tensor, others: Tensor, likely: Tensor) -> Reading:
    """Compare guesses with notes, matched one to one with the truth at hand.

    Args:
        guesses: [N, T].
        notes: [N, T], behind the update.
        others: at least N others.
        likely: [T, words], frequencies at each place.

    Raises:
        MisuseError: numbers that do not fit.
    """
    if guesses.shape != notes.shape or len(others) < len(notes):
        raise MisuseError("a reading takes one guess for each note, and at least as many others")
    matched = _matched(guesses, notes)
    apart = others[: len(notes)]
    common = likely.argmax(-1).expand(len(notes), -1)
    return Reading(
        tokens=_right(matched, notes),
        by_frequency=_right(common, notes),
        others=_right(_matched(guesses, apart), apart),
        order=_order(matched, notes),
        order_by_frequency=_order(common, notes),
        notes=Count(int((matched == notes).all(1).sum()), len(notes)),
    )


def common_length(first: list[int], second: list[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = row[:]
        for place, other in enumerate(second, 1):
            row[place] = (
                before[place - 1] + 1 if token == other else max(before[place], row[place - 1])
            )
    return row[-1]


def _matched(guesses: Tensor, notes: Tensor) -> Tensor:
    right = (guesses[:, None] == notes[None]).sum(-1)
    chosen, at = linear_sum_assignment(right.numpy(), maximize=True)
    return guesses[torch.as_tensor(chosen)[torch.as_tensor(at).argsort()]]


def in_place(guesses: Tensor, notes: Tensor) -> Tensor:
    """Share of each note's places with the right word, [N] float64, guesses matched one to one.

    Args:
        guesses: [N, T].
        notes: [N, T], in any order.
    """
    return (_matched(guesses, notes) == notes).double().mean(1)


def embedding_of(model: nn.Module) -> str | None:
    """Name of the words' embedding, the first in the model; None where there is none."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = (name for name, part in model.named_modules() if isinstance(part, kinds))
    return next(found, None)


def _right(guesses: Tensor, notes: Tensor) -> Count:
    return Count(int((guesses == notes).sum()), notes.numel())


def _order(guesses: Tensor, notes: Tensor) -> float:
    pairs = zip(guesses.tolist(), notes.tolist(), strict=True)
    return sum(common_length(one, other) for one, other in pairs) / notes.numel()
