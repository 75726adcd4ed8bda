"""Words and their order come out of a raw gradient, and not out of what the policy lets out."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sentinel import Guard
from sentinel.demo import cohorts
from sentinel.errors import MisuseError
from sentinel.interval import Count, difference
from sentinel.stress.passive.local_training import LocalTraining, Seen
from sentinel.stress.passive.notes import (
    ORDERS,
    NoteTransformer,
    Vocabulary,
    initialise,
    note,
)
from sentinel.stress.passive.released import let_out
from sentinel.stress.passive.text import (
    Reading,
    TextAttacker,
    common_length,
    embedding_of,
    frequencies,
    from_shares,
    in_place,
    reading,
    spanned,
    words_present,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread", "known_noise")
COHORT = cohorts.load("cleveland")


def written() -> tuple[Tensor, int]:
    """Every patient's note as tokens, and how many words there are."""
    order = torch.randint(
        len(ORDERS), (len(COHORT),), generator=torch.Generator().manual_seed(0)
    ).tolist()
    notes = [note(cohorts.record(row), at) for row, at in zip(COHORT.rows, order, strict=True)]
    vocabulary = Vocabulary.of(notes)
    return vocabulary.encode(notes), len(vocabulary.words)


class Bag(nn.Module):
    """The mean of the words' embeddings, one rectified layer, classes; the order has no part."""

    def __init__(self, words: int, width: int) -> None:
        """Make the layers; set their values with `initialise`."""
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.EmbeddingBag(words, width, mode="mean")
            self.rest = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 2))
        self.to_empty(device="cpu")

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T] to [N, 2]."""
        answer: Tensor = self.rest(self.embedding(tokens))
        return answer


TOKENS, WORDS = written()
LENGTH = TOKENS.shape[1]


class _Round:
    """Some patients' notes, and a small net that reads them; one gradient of all."""

    def __init__(self, batch: int, seed: int, *, bag: bool = False) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(TOKENS), generator=self.draw)
        self.notes, self.others = TOKENS[order[:batch]], TOKENS[order[200:]]
        self.likely = frequencies(TOKENS[order[50:200]], WORDS)
        net = Bag(WORDS, 64) if bag else NoteTransformer(WORDS, LENGTH, 64)
        initialise(net, self.draw)
        start = {name: value.clone() for name, value in net.state_dict().items()}
        labels = COHORT.labels[order[:batch]].long()
        self.training = LocalTraining(net, start, labels, (torch.arange(batch),), 1.0)

    @property
    def raw(self) -> Seen:
        return Seen(self.training.update(self.notes, differentiable=False))

    def noised(self, ratio: float, keep: float = 1.0) -> Seen:
        raw = self.raw.values
        std = ratio * float(raw.norm()) / math.sqrt(raw.numel())
        values = raw + std * torch.randn(raw.shape, generator=self.draw)
        kept = torch.rand(raw.shape, generator=self.draw) < keep
        return Seen(values * kept / keep, noise_std=std, keep=keep)

    def part(self, seen: Seen, name: str) -> Tensor:
        shapes = {own: self.training.global_state[own].shape for own in self.training.names}
        parts = seen.values.split([shape.numel() for shape in shapes.values()])
        return dict(zip(shapes, parts, strict=True))[name].view(shapes[name])

    def fed(self) -> Tensor:
        """What each word at each place feeds the attention layer, [T, words, width]."""
        state = self.training.global_state
        return state["position.weight"][:, None] + state["embedding.weight"][None]

    def read(self, seen: Seen, allowed: Tensor) -> Reading:
        guesses = TextAttacker().read(self.training, seen, allowed, self.draw)
        return reading(guesses, self.notes, self.others, self.likely)


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_the_rows_that_moved_are_the_words_of_the_batch(batch: int, bag: bool) -> None:  # noqa: FBT001 - a parameter
    one = _Round(batch, 0, bag=bag)
    found = words_present(one.part(one.raw, "embedding.weight"))
    assert torch.equal(found, torch.unique(one.notes))


def test_words_stand_out_from_little_noise_and_none_does_from_noise_alone() -> None:
    one, hits, wrong = _Round(2, 1), 0, 0
    for keep in (1.0, 0.5):
        seen = one.noised(0.1, keep)
        found = words_present(one.part(seen, "embedding.weight"), seen.noise_std / seen.keep)
        true = torch.unique(one.notes)
        hits += int(torch.isin(true, found).sum())
        wrong += int((~torch.isin(found, true)).sum())
    assert hits >= 0.7 * 2 * len(true)
    assert wrong == 0
    silent = torch.randn(2000, 64, generator=one.draw)
    assert len(words_present(silent, 1.0)) <= 1


@pytest.mark.parametrize("batch", [1, 2])
def test_every_word_lies_in_the_span_of_the_gradient_and_few_others_do(batch: int) -> None:
    """Two notes of 12 words have a rank of at most 24, in 64 dimensions."""
    one = _Round(batch, 0)
    inside = spanned(one.part(one.raw, "value.weight"), one.fed())
    assert inside is not None
    assert bool(inside[torch.arange(LENGTH), one.notes].all())
    true = sum(len(torch.unique(one.notes[:, place])) for place in range(LENGTH))
    assert true <= int(inside.sum()) <= 3 * true


def test_a_gradient_of_full_rank_or_under_noise_tells_nothing_by_its_span() -> None:
    one = _Round(1, 0)
    full = torch.randn(64, 64, generator=one.draw)
    assert spanned(full, one.fed()) is None
    seen = one.noised(2.0)
    assert spanned(one.part(seen, "value.weight"), one.fed(), seen.noise_std) is None


def test_one_note_is_read_word_by_word_from_the_words_alone() -> None:
    """Presence from the embedding, order by matching the update: no span is used."""
    one = _Round(1, 1)
    known = torch.zeros(WORDS)
    known[words_present(one.part(one.raw, "embedding.weight"))] = 1.0
    found = one.read(one.raw, one.likely * known)
    assert found.tokens.share >= 0.9
    assert found.order >= 0.9
    assert difference(found.tokens, found.by_frequency).low > 0.0


@pytest.mark.slow
def test_the_span_sets_the_words_of_two_notes_in_place() -> None:
    right = frequent = 0
    for seed in (0, 1):
        one = _Round(2, seed)
        inside = spanned(one.part(one.raw, "value.weight"), one.fed())
        assert inside is not None
        found = one.read(one.raw, one.likely * inside)
        right, frequent = right + found.tokens.hits, frequent + found.by_frequency.hits
        trials = found.tokens.trials
    assert right / (2 * trials) >= 0.7
    assert difference(Count(right, 2 * trials), Count(frequent, 2 * trials)).low > 0.0


def test_the_shipped_policy_leaves_no_more_words_than_other_patients_notes_give(
    tmp_path: Path,
) -> None:
    """Others are matched with the same guesses: the matching alone lifts what frequencies give."""
    one = _Round(16, 3)
    guard = Guard("tabular-ehr", tmp_path, unsafe_skip_inspection=True, alerts=io.StringIO())
    seen = let_out(guard, 1, one.training, one.notes, patients=16)
    assert seen.noise_std > 0.0
    std = seen.noise_std / seen.keep
    named = words_present(one.part(seen, "embedding.weight"), std)
    assert len(named) <= 2
    assert spanned(one.part(seen, "value.weight"), one.fed(), std) is None
    quick = TextAttacker(search=TextAttacker().search, swaps=3, offered=4)
    guesses = quick.read(one.training, seen, one.likely, one.draw)
    found = reading(guesses, one.notes, one.others, one.likely)
    assert found.notes.hits == 0
    assert difference(found.tokens, found.others).low <= 0.0
    assert difference(found.tokens, found.others).high <= 0.15
    assert abs(found.tokens.share - found.others.share) < 0.1


def test_shares_of_one_word_at_each_place_are_the_tokens() -> None:
    one = _Round(3, 2)
    known = torch.arange(WORDS)
    codes = nn.functional.one_hot(one.notes, WORDS).float().flatten(1)
    by_shares = from_shares(one.training, known).update(codes, differentiable=False)
    assert torch.allclose(by_shares, one.raw.values, atol=1e-5)


def test_frequencies_are_shares_of_each_word_at_each_place_and_never_nothing() -> None:
    found = frequencies(torch.tensor([[0, 2], [0, 1], [0, 2], [1, 2]]), 3)
    assert torch.allclose(found.sum(1), torch.ones(2))
    assert found[0].tolist() == pytest.approx([0.75, 0.25, 0.0], abs=2e-3)
    assert found[1].tolist() == pytest.approx([0.0, 0.25, 0.75], abs=2e-3)
    assert float(found.min()) > 0.0


def test_words_in_place_are_counted_for_each_note_under_the_best_matching() -> None:
    notes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    guesses = torch.tensor([[5, 6, 0, 0], [1, 2, 3, 0]])
    assert in_place(guesses, notes).tolist() == [0.75, 0.5]


def test_the_first_embedding_is_the_words() -> None:
    assert embedding_of(NoteTransformer(5, 4, 8)) == "embedding"
    assert embedding_of(nn.Linear(3, 2)) is None


def test_a_net_without_an_embedding_is_refused() -> None:
    net = nn.Linear(3, 2)
    training = LocalTraining(net, net.state_dict(), torch.zeros(1), (torch.arange(1),), 1.0)
    with pytest.raises(MisuseError, match="Embedding"):
        from_shares(training, torch.arange(3))


def test_notes_in_another_order_lose_places_but_keep_some_of_the_order() -> None:
    notes = torch.arange(12).view(1, 12)
    likely = torch.eye(12)
    turned = notes.roll(1, 1)
    found = reading(turned, notes, notes, likely)
    assert found.tokens.hits == 0
    assert found.order == pytest.approx(11 / 12)
    assert found.by_frequency.share == found.order_by_frequency == 1.0


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [3, 2, 1], 1), ([1, 9, 2], [1, 2], 2)],
)
def test_the_longest_common_subsequence(first: list[int], second: list[int], length: int) -> None:
    assert common_length(first, second) == length


def test_guesses_that_do_not_fit_the_notes_are_refused() -> None:
    notes = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(MisuseError, match="one guess for each note"):
        reading(notes[:1], notes, notes, torch.ones(3, 1))
