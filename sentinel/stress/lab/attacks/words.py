"""Words: which of them a batch of texts held, and in which order."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sentinel.stress.lab.finding import Exhibit, Finding, Tally, exhibited
from sentinel.stress.lab.replay import require_time, unreplayable
from sentinel.stress.lab.subject import Kind
from sentinel.stress.passive.text import (
    ONE_NOTE,
    TextAttacker,
    embedding_of,
    frequencies,
    from_shares,
    in_place,
    words_present,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records

ORDERED = 4  # texts behind an update whose words are put in order; of more nothing comes out
MOST_WORDS = 256  # that are put in order: those that moved most
MARGIN = 0.05  # share of a text's words that counts as nothing
READER = TextAttacker(search=replace(ONE_NOTE, iterations=200), swaps=30, offered=16)


class Words:
    """Rows of the embedding that moved name the words; the order is searched for."""

    name = "words"
    title = "words of texts, named by the embedding's update and put in order by search"
    knows = "labels, batches, learning rate, the guard's treatment, and how common each word is"
    worth = 1.0
    seconds = 4.0
    wanted = 16
    of_groups = False

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """It takes tokens, and a model with an embedding for them."""
        if subject.kind is not Kind.TEXT:
            return "the records are no texts"
        name = embedding_of(subject.model)
        if name is None or f"{name}.weight" not in subject.start:
            return "the model has no torch.nn.Embedding or EmbeddingBag for its words"
        if len(subject.held_out) < setting.records:
            return "too few held-out records to stand beside those behind the update"
        return None

    def run(
        self, case: Case, behind: Records, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Name the words, and read few texts; the yardstick are others under the same guesses."""
        texts, held_out = behind.inputs, case.subject.held_out.inputs
        rows = case.delta[f"{embedding_of(case.model)}.weight"]
        back = case.sent_back
        present = words_present(rows, back.std / back.keep)
        guesses: Tensor | None = None
        if len(texts) <= ORDERED and unreplayable(case.subject) is None:
            guesses = _read(case, present, generator, deadline)  # first: it asks for the time
        inside, outside = (torch.isin(part, present).double().mean(1) for part in (texts, held_out))
        named = Tally(
            "words of a text that are named as words of the batch",
            tuple(inside.tolist()),
            tuple(outside.tolist()),
            margin=MARGIN,
        )
        if guesses is None:
            return Finding((named,))
        right = in_place(guesses, texts)
        others = [part for part in torch.split(held_out, len(texts)) if len(part) == len(texts)]
        apart = torch.cat([in_place(guesses, part) for part in others])
        read = Tally(
            "words of a text that are read in their place",
            tuple(right.tolist()),
            tuple(apart.tolist()),
            margin=MARGIN,
        )
        return Finding((named, read), _exhibits(guesses, texts, right))


def _read(case: Case, present: Tensor, generator: torch.Generator, deadline: Deadline) -> Tensor:
    """Texts [N, T] that explain the update."""
    allowed = _likely(case.subject)
    known = _known(case, present, allowed)
    few = torch.zeros(allowed.shape[1])
    few[known] = 1.0
    training = from_shares(case.training, known)
    shares = torch.full((case.setting.records, len(allowed) * len(known)), 1.0 / len(known))
    require_time(training, shares, READER.search, deadline)
    found: Tensor = READER.read(case.training, case.seen, allowed * few, generator)
    return found


def _known(case: Case, present: Tensor, likely: Tensor) -> Tensor:
    """The words that are put in order: those that moved; under noise also the usual ones."""
    moved = case.delta[f"{embedding_of(case.model)}.weight"].double().square().sum(1)
    if case.sent_back.std == 0.0 and len(present):
        return present[moved[present].argsort(descending=True)[:MOST_WORDS]]
    usual = likely.sum(0).argsort(descending=True)[: MOST_WORDS // 2]
    most = moved.argsort(descending=True)[: MOST_WORDS // 2]
    known: Tensor = torch.unique(torch.cat([usual, most]))
    return known


@functools.lru_cache(maxsize=1)
def _likely(subject: Subject) -> Tensor:
    """How common each word is at each place, [T, words]: in public texts, else in held-out ones."""
    words = len(subject.start[f"{embedding_of(subject.model)}.weight"])
    return frequencies((subject.public or subject.held_out).inputs, words)


def _exhibits(guesses: Tensor, texts: Tensor, right: Tensor) -> tuple[Exhibit, ...]:
    """A few texts, each with the guess that suits it best."""
    suits = (guesses[:, None] == texts[None]).sum(-1)
    return tuple(
        Exhibit(texts[at], guesses[int(suits[:, at].argmax())], float(right[at]), at)
        for at in exhibited(right)
    )
