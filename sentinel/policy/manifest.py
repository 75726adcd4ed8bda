"""Which parameters a model has: names and sizes out of a safetensors file, no value is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The entries of a model's state.

    Attributes:
        parameters: floating entries that may leave: name -> number of values.
        statistics: running statistics of normalisation layers: name -> number of values.
        others: names of the rest, such as integer counters, which never leave.
    """

    parameters: Mapping[str, int]
    statistics: Mapping[str, int]
    others: tuple[str, ...]

    def candidates(self, statistics: str) -> dict[str, int]:
        """Return what could leave under `limits.statistics`: name -> number of values."""
        if statistics == "as-parameters":
            return {**self.parameters, **self.statistics}
        return dict(self.parameters)


def read_manifest(path: Path) -> Manifest:
    """Read names, types and shapes from a safetensors file.

    Raises:
        MisuseError: no such file, or not a safetensors file.
    """
    parameters: dict[str, int] = {}
    statistics: dict[str, int] = {}
    others: list[str] = []
    try:
        with safe_open(path, framework="np") as file:
            for name in sorted(file.keys()):
                entry = file.get_slice(name)
                if entry.get_dtype() not in _FLOATING:
                    others.append(name)
                elif name.rpartition(".")[2] in _STATISTICS:
                    statistics[name] = prod(entry.get_shape())
                else:
                    parameters[name] = prod(entry.get_shape())
    except (OSError, SafetensorError):
        raise MisuseError(
            f"{path}: cannot be read as a model; expected a safetensors file, as written by "
            "safetensors.torch.save_file(model.state_dict(), PATH)"
        ) from None
    return Manifest(parameters, statistics, tuple(others))
