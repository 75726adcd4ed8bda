"""Notes say what a record says, in words of a public vocabulary; the nets read them."""

from __future__ import annotations

import pytest
import torch

from sentinel.errors import MisuseError
from sentinel.stress.passive.notes import (
    ORDERS,
    NoteTransformer,
    Vocabulary,
    initialise,
    note,
)


def test_an_unknown_word_is_refused_without_being_named() -> None:
    with pytest.raises(MisuseError, match="not in the vocabulary") as refused:
        Vocabulary(("man",)).encode([("woman",)])
    assert "woman" not in str(refused.value)


def test_a_note_says_what_the_record_says() -> None:
    row = {"age": 63.0, "sex": 1.0, "cp": 1.0, "trestbps": 145.0, "chol": 233.0}
    row |= {"thalach": 150.0, "exang": 0.0}
    assert note(row, 0)[:4] == ("60", "man", "typical", "angina")
    assert sorted(note(row, 1)) == sorted(note(row, 2))


def test_all_orders_give_notes_of_one_length_with_the_same_words() -> None:
    row = {"age": 41.0, "sex": 0.0, "cp": 4.0, "trestbps": 120.0, "chol": 200.0}
    row |= {"thalach": 170.0, "exang": 1.0}
    notes = [note(row, order) for order in range(len(ORDERS))]
    assert len(set(notes)) == len(ORDERS)
    assert len({tuple(sorted(words)) for words in notes}) == 1


def test_the_order_of_words_matters_to_the_transformer() -> None:
    net, tokens = NoteTransformer(5, 4, 8), torch.tensor([[0, 1, 2, 3]])
    initialise(net, torch.Generator().manual_seed(0))
    assert not torch.allclose(net(tokens), net(tokens.flip(1)), atol=1e-6)


def test_the_seed_alone_sets_a_net() -> None:
    one, other = NoteTransformer(5, 4, 8), NoteTransformer(5, 4, 8)
    for net in (one, other):
        initialise(net, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
