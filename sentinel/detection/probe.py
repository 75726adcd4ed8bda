"""Probe: how many of a site's own records its update gives away now, read as a server would.

It needs the patients' records, so it is no post-processing of anything: only where nothing is
promised may a release depend on it. The score of the update alone is an estimate; this is a
measurement, of one attack, and can only raise it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sentinel.detection.layers import bias_name, entry_name
from sentinel.detection.readout import NEAR, candidates, read_share, thresholds_of
from sentinel.detection.rounds import dense_input
from sentinel.detection.synthetic import ModelError, twin
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

MOST = 256  # records that are looked for


@dataclass(frozen=True, slots=True)
class Probe:
    """What some of the records give the first dense layer of the global model.

    Attributes:
        weight: name of its weight in the global state.
        bias: name of its bias.
        inputs: [rows, columns], one row for each record (for each of its places, in a sequence).
        thresholds: [units], bias over row norm, in whose order a server subtracts neighbours.
    """

    weight: str
    bias: str
    inputs: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, model: nn.Module, state: Mapping[str, Tensor], records: Tensor) -> Self:
        """Run records through a copy of the global model.

        Args:
            model: the architecture; it is not run.
            state: the global state.
            records: [n, ...], inputs as the model takes them; the first `MOST` are looked for.

        Raises:
            MisuseError: the model cannot be copied or run on these records, or it has no dense
                layer with a bias that training changes.

        Guarantees:
            The model, its gradients and the global random generators are untouched. No error
            holds a value, or a text of the model's own code.
        """
        copied = twin(model, state)
        if copied is None:
            raise MisuseError(
                "The model cannot be copied for a probe: it has tensors outside its state dict, or "
                "none of its own yet. Leave the probe out; the update is scored without."
            )
        try:
            some = records[:MOST].detach().cpu()
            reached = dense_input(copied.module, some.float() if some.is_floating_point() else some)
        except ModelError:
            raise MisuseError(
                "The model does not take these records; give a tensor of inputs (records, ...), as "
                "the training loop gives them to the model."
            ) from None
        weight = "" if reached is None else entry_name(reached[0], "weight")
        if reached is None or not {weight, bias_name(weight)} <= copied.names.keys():
            raise MisuseError(
                "The model has no dense layer with a bias, which is what a probe reads; leave it "
                "out, and the update is scored without."
            )
        weight, bias = copied.names[weight], copied.names[bias_name(weight)]
        thresholds = thresholds_of(state[weight].cpu(), state[bias].cpu())
        return cls(weight, bias, reached[1], thresholds)

    def read(self, deltas: Mapping[str, Tensor]) -> float | None:
        """The share of the records that linear read-out of the layer comes near to.

        Args:
            deltas: name -> local - global.

        Returns:
            0 to 1; None where weight or bias are not among the deltas, and so do not leave.

        Edges:
            one record:           near is relative to its own norm
            several:              near is relative to the distance from their mean
            met by chance:        counts as read
            a layer that is still: 0
        """
        if not {self.weight, self.bias} <= deltas.keys():
            return None
        weight, bias = (deltas[name].detach().cpu() for name in (self.weight, self.bias))
        guesses = candidates(weight, bias, self.thresholds)
        alone = len(self.inputs) == 1
        average = torch.zeros_like(self.inputs[0]) if alone else self.inputs.double().mean(0)
        return read_share(guesses, self.inputs, average, NEAR)
