"""Family H, stealth: wrappers that make a craft harder to see, composable with all of them.

Permuting and scaling keep the function that the model computes (with a ReLU behind the layer); the
others cost the attacker something, and whether an attack is left is measured, not assumed. One
round in many and one client only are the server's choice: see `federation.MaliciousServer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sentinel.stress.layers import State, attacked_pair, copied
from sentinel.stress.servers.craft import require_forgetful
from sentinel.stress.servers.fit import fitted
from sentinel.stress.servers.rows import jittered_rows, row_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from sentinel.stress.servers.craft import Craft

    Bend = Callable[[nn.Module, Mapping[str, Tensor], State, torch.Generator], State]


def permuted(craft: Craft) -> Craft:
    """Put the crafted layer's rows in random order, and the columns behind them with them."""

    def bend(
        model: nn.Module, _: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        first, following = attacked_pair(model, bent)
        order = torch.randperm(len(bent[f"{first}.bias"]), generator=generator)
        bent[f"{first}.weight"] = bent[f"{first}.weight"][order]
        bent[f"{first}.bias"] = bent[f"{first}.bias"][order]
        bent[f"{following}.weight"] = bent[f"{following}.weight"][:, order]
        return bent

    return _wrapped(craft, bend)


def scaled(craft: Craft, spread: float = 1.0) -> Craft:
    """Multiply each row by exp(u), u uniform in -spread to spread, and divide its column by it."""

    def bend(
        model: nn.Module, _: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        first, following = attacked_pair(model, bent)
        factors = row_scales(len(bent[f"{first}.bias"]), spread, generator)
        factors = factors.to(bent[f"{first}.bias"])
        bent[f"{first}.weight"] *= factors[:, None]
        bent[f"{first}.bias"] *= factors
        bent[f"{following}.weight"] /= factors
        return bent

    return _wrapped(craft, bend)


def turned(craft: Craft, share: float = 0.5) -> Craft:
    """Turn the sign of a share of the rows: they cut the same line from the other side."""

    def bend(
        model: nn.Module, _: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        first, _following = attacked_pair(model, bent)
        chosen = torch.rand(len(bent[f"{first}.bias"]), generator=generator) < share
        bent[f"{first}.weight"][chosen] *= -1
        bent[f"{first}.bias"][chosen] *= -1
        return bent

    return _wrapped(craft, bend)


def jittered(craft: Craft, size: float = 0.1) -> Craft:
    """Add normal noise to every matrix that the craft changed, relative to each row's size."""

    def bend(
        _: nn.Module, state: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        for name, value in bent.items():
            if value.ndim > 1 and value.is_floating_point() and not value.equal(state[name]):
                rows = jittered_rows(value.float().flatten(1), size, generator)
                value.copy_(rows.view_as(value))
        return bent

    return _wrapped(craft, bend)


def mixed(craft: Craft, share: float = 0.5) -> Craft:
    """Mix `share` of the crafted model with the rest of the honest one."""

    def bend(
        _: nn.Module, state: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        del generator
        return blended(bent, state, share)

    return _wrapped(craft, bend)


def among_honest(craft: Craft, share: float = 0.25) -> Craft:
    """Craft a share of the layer's rows only; the others and what takes them up stay honest."""

    def bend(
        model: nn.Module, state: Mapping[str, Tensor], bent: State, generator: torch.Generator
    ) -> State:
        first, following = attacked_pair(model, bent)
        count = len(bent[f"{first}.bias"])
        kept = torch.randperm(count, generator=generator)[max(2, round(share * count)) :]
        bent[f"{first}.weight"][kept] = state[f"{first}.weight"][kept]
        bent[f"{first}.bias"][kept] = state[f"{first}.bias"][kept]
        bent[f"{following}.weight"][:, kept] = state[f"{following}.weight"][:, kept]
        return bent

    return _wrapped(craft, bend)


def blended(crafted: Mapping[str, Tensor], honest: Mapping[str, Tensor], share: float) -> State:
    """Mix `share` of a crafted state with the rest of an honest one, floating entries only."""
    return {
        name: torch.lerp(honest[name], value, share) if value.is_floating_point() else value.clone()
        for name, value in crafted.items()
    }


WRAPPERS: dict[str, Callable[[Craft], Craft]] = {
    "permuted": permuted,
    "scaled": scaled,
    "turned": turned,
    "jittered": jittered,
    "mixed": mixed,
    "among-honest": among_honest,
}


def _wrapped(craft: Craft, bend: Bend) -> Craft:
    """Return a craft that bends what `craft` returns once more.

    Raises:
        MisuseError: the craft learns from what comes back, which would come back of another model.
    """
    require_forgetful(craft)

    @fitted
    def hidden(
        model: nn.Module, state: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> State:
        bent = copied(craft(model, state, generator=generator))
        return bend(model, state, bent, generator)

    return hidden
