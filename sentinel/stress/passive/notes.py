"""Short clinical notes written from table rows by templates, and small nets that read them.

The notes are synthetic text about real rows: one clause for each finding, clauses in one of a few
orders, always of the same length. Real notes are longer, freer and rarer in wording.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

PAIN = {1: "typical", 2: "atypical", 3: "other", 4: "no"}
ORDERS = (  # of the clauses; the first word of a note says whom it is about
    ("pain", "pressure", "cholesterol", "pulse", "exercise"),
    ("pressure", "pain", "exercise", "cholesterol", "pulse"),
    ("exercise", "pulse", "pain", "pressure", "cholesterol"),
)


def note(record: Mapping[str, float], order: int) -> tuple[str, ...]:
    """Write a heart-disease record, in the columns' units, as words; ages and values in tens.

    Args:
        record: holds age, sex, cp, trestbps, chol, thalach and exang.
        order: which of ORDERS.
    """
    clauses = {
        "pain": (PAIN[min(max(round(record["cp"]), 1), 4)], "angina"),
        "pressure": ("pressure", _tens(record["trestbps"])),
        "cholesterol": ("cholesterol", _tens(record["chol"])),
        "pulse": ("pulse", _tens(record["thalach"])),
        "exercise": ("pain" if record["exang"] > 0.5 else "rest", "exercise"),  # noqa: PLR2004 - of 0 and 1
    }
    who = "man" if record["sex"] > 0.5 else "woman"  # noqa: PLR2004 - of 0 and 1
    words = (_tens(record["age"]), who)
    return words + tuple(word for name in ORDERS[order] for word in clauses[name])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that a net knows, which are public."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, notes: Iterable[tuple[str, ...]]) -> Vocabulary:
        """Every word that occurs, in alphabetical order."""
        return cls(tuple(sorted({word for words in notes for word in words})))

    def encode(self, notes: Iterable[tuple[str, ...]]) -> Tensor:
        """Notes of one length as [N, T] int64.

        Raises:
            MisuseError: a word is not in the vocabulary.
        """
        places = {word: place for place, word in enumerate(self.words)}
        try:
            return torch.tensor([[places[word] for word in words] for words in notes])
        except KeyError:
            raise MisuseError("a note holds a word that is not in the vocabulary") from None


class NoteTransformer(nn.Module):
    """One attention layer and one rectified layer, each with a skip connection; mean; classes."""

    def __init__(self, words: int, length: int, width: int, classes: int = 2) -> None:
        """Make the layers; set their values with `initialise`."""
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(words, width)
            self.position = nn.Embedding(length, width)
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.value = nn.Linear(width, width)
            self.wide = nn.Linear(width, 2 * width)
            self.narrow = nn.Linear(2 * width, width)
            self.head = nn.Linear(width, classes)
            self.rectifier = nn.ReLU()
        self.to_empty(device="cpu")

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T] to [N, classes]."""
        x = self.embedding(tokens) + self.position.weight
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / math.sqrt(x.shape[-1])
        x = x + scores.softmax(-1) @ self.value(x)
        x = x + self.narrow(self.rectifier(self.wide(x)))
        answer: Tensor = self.head(x.mean(-2))
        return answer


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Set all values: embeddings normal with deviation 0.5, the rest as PyTorch does by default."""
    for layer in net.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            nn.init.normal_(layer.weight, 0.0, 0.5, generator=generator)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _tens(value: float) -> str:
    return str(10 * round(value / 10))
