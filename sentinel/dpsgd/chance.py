"""Chance: the randomness of a model's own layers while it is trained privately.

Dropout draws its masks for a batch row after row. Under a seed that is known (`manual_seed(0)` in
a script that the server wrote), one more record in front shifts the masks of all the others, and
moves the sum of a batch by many clip norms. So while a model runs in a private round, torch's
generators hold states that nobody knows, fresh for each pass; then they are put back as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.mechanism.entropy import random_words

if TYPE_CHECKING:
    from sentinel.mechanism import Entropy

_TWISTER = 624  # words of 32 bits in the Mersenne Twister
_WORDS = slice(3, 3 + _TWISTER)  # where they stand in torch's state as int64, one in each
_HEADER = 5048  # bytes that are whole int64


class Chance:
    """Puts torch's generators aside for a pass of the model, and back.

    Guarantees:
        Between `begin` and `end` the CPU's generator holds 624 fresh words of 32 bits, a GPU's a
        fresh seed of 64 bits.

    Edges:
        a pass that ended, or raised an error:     the loop's generators are as before, bit by bit
        one that was interrupted (Ctrl-C):         as before, when the round ends or goes on
        a seed that was set before the pass:       its masks do not depend on it
        a seed that the pass sets (`manual_seed`): as before; its masks are not covered
        `begin` twice, or `end` twice:             as once
    """

    def __init__(self, entropy: Entropy) -> None:
        """Nothing is put aside yet."""
        self._entropy = entropy
        self._state = torch.Generator().manual_seed(0).get_state()
        self._words = self._state[:_HEADER].view(torch.int64)[_WORDS]
        self._aside: list[tuple[torch.Generator, torch.Tensor]] = []

    def begin(self, device: torch.device) -> None:
        """A pass begins: fresh states, on the CPU and on the model's device."""
        if self._aside:
            return
        cpu = torch.default_generator
        self._aside.append((cpu, cpu.get_state()))
        cpu.set_state(self._fresh())
        if device.type == "cuda":
            place = torch.cuda.current_device() if device.index is None else device.index
            other = torch.cuda.default_generators[place]
            self._aside.append((other, other.get_state()))
            other.manual_seed(int(random_words(1, self._entropy)[0] >> 1))

    def end(self) -> None:
        """The pass ended: everything as it was before."""
        while self._aside:
            generator, state = self._aside.pop()
            generator.set_state(state)

    def _fresh(self) -> torch.Tensor:
        """A state of the CPU's generator that nobody knows."""
        words = random_words(_TWISTER // 2, self._entropy).view("uint32")
        self._words.copy_(torch.from_numpy(words.astype("int64")))
        return self._state
