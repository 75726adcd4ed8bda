"""Judging: what came out, sorted by machine into right, raw leak, unclipped, wrong, crash or hang.

A contestant is held to what it declares itself: its bound, its noise. Measured, in this order:

1. Nothing came out where something had to, or the other way round.
2. Names and shapes are the global model's; tied names come out equal.
3. Counters (integers, booleans) are the global model's, and so is every dtype.
4. Running variances are above 0, and every value is finite.
5. No entry is further from the global model than the bound and yet equal to the local state.
6. The norm of what came out is within bound and noise.
7. What is left of the update, along its own direction, is what clipping leaves.
8. Two runs differ in every value, by as much as the declared noise makes them differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from odd_inputs import Case, Settings, State, Wants

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGMAS = 5.0  # a right one is called wrong once in millions of runs


FEW = 100  # values from which no spread can be told


class Refused(Exception):
    """Nothing left, and the contestant said so itself."""


class NotApplicable(Exception):
    """The contestant has no such setting."""


@dataclass(frozen=True)
class Claims:
    """What a contestant declares.

    Attributes:
        bound: L2 bound on the update before noise; None where it claims none.
        noise_std: standard deviation per value; 0: no noise, NaN: noise that is not Gaussian.
        keeps_direction: what leaves is the update scaled down, plus noise.
    """

    bound: float | None
    noise_std: float
    keeps_direction: bool = True


@dataclass(frozen=True)
class Finding:
    """One cell: a word and what was measured."""

    word: str
    measured: str = ""

    def __str__(self) -> str:
        """As it stands in the table, whatever is not right in bold."""
        word = self.word if self.word in {"right", "n/a"} else f"**{self.word}**"
        return f"{word}: {self.measured}" if self.measured else word


def judge(case: Case, claims: Claims, outs: list[State]) -> Finding:
    """Judge two independent releases of the same pair of states."""
    base, local = case.make()
    if case.wants is Wants.REFUSED:
        return _not_refused(claims, base, outs[0])
    for found in _broken(case, base, outs):
        return found
    twins = case.tied[1:]  # one tensor: counted once from here on
    base, local, *outs = (
        {name: value for name, value in state.items() if name not in twins}
        for state in (base, local, *outs)
    )
    for out in outs:
        for found in _problems(claims, base, local, out):
            return found
    for found in _signal(case, claims, base, local, outs):
        return found
    few = sum(value.numel() for value in base.values()) < FEW
    measured = "" if few else f"norm {_norm(base, outs[0]):.3g}"
    return _noise(claims, base, outs) or Finding("right", measured)


def _not_refused(claims: Claims, base: State, out: State) -> Finding:
    """What came out though nothing should."""
    values = [_wide(out[name]).flatten() for name in out if name in base]
    bad = sum(int((~value.isfinite()).sum()) for value in values)
    norm = _norm(base, out)
    spoiled = f"values not finite: {bad}" if bad else ""
    if norm and (claims.bound is None or norm > _limit(claims, base)):
        return Finding("unclipped", f"norm {norm:.3g}" + f"; {spoiled}" * bool(bad))
    return Finding("wrong", spoiled or f"leaves, norm {norm:.3g}")


def _broken(case: Case, base: State, outs: list[State]) -> Iterator[Finding]:
    """Not the global model's structure, or what is one tensor came out as two."""
    for out in outs:
        yield from _structure(base, out)
        if any(not torch.equal(out[case.tied[0]], out[twin]) for twin in case.tied[1:]):
            yield Finding("wrong", "one tensor, two draws of noise")


def _problems(claims: Claims, base: State, local: State, out: State) -> Iterator[Finding]:
    yield from _kept_back(base, local, out)
    bad = sum(int((~_wide(value).isfinite()).sum()) for value in out.values())
    if bad:
        yield Finding("wrong", f"values not finite: {bad}")
    yield from _raw(claims, base, local, out)
    norm = _norm(base, out)
    if norm and (claims.bound is None or norm > _limit(claims, base)):
        yield Finding("unclipped", f"norm {norm:.3g}")


def _structure(base: State, out: State) -> Iterator[Finding]:
    if sorted(out) != sorted(base):
        yield Finding("wrong", f"{len(set(out) ^ set(base))} names differ")
        return
    if any(out[name].shape != value.shape for name, value in base.items()):
        yield Finding("wrong", "a shape changed")


def _kept_back(base: State, local: State, out: State) -> Iterator[Finding]:
    """Counters must be the global model's own, every dtype too, and a variance must stay one."""
    for name, value in base.items():
        same = out[name].dtype == value.dtype and torch.equal(out[name], value)
        if not _is_parameter(value) and not same:
            largest = int(out[name].long().abs().max())
            raw = torch.equal(out[name].long(), _wide(local[name]).long())
            raw_change = _vector(base, local)
            share = float(_vector(base, out) @ raw_change / raw_change.square().sum())
            text = f"counter of {largest} leaves; {share:.2g} of the weights' update left"
            yield Finding("raw leak" if raw else "wrong", text)
        if out[name].dtype != value.dtype:
            kinds = (str(value.dtype), str(out[name].dtype))
            yield Finding("wrong", " became ".join(kind.removeprefix("torch.") for kind in kinds))
        if name.endswith("running_var") and float(out[name].min()) <= 0:
            yield Finding("wrong", f"variance {float(out[name].min()):.2g}")


def _raw(claims: Claims, base: State, local: State, out: State) -> Iterator[Finding]:
    for name in _floating(base):
        change = _wide(local[name]) - _wide(base[name])
        change = change[change.isfinite()]
        size = float(change.norm())
        if size <= 1.5 * _largest(claims, change.numel()):
            continue
        left = (_wide(out[name]) - _wide(base[name]))[_wide(local[name]).isfinite()]
        if float((left - change).norm()) <= 1e-3 * size:
            yield Finding("raw leak", f"{size:.5g} in, {float(left.norm()):.5g} out")


def _largest(claims: Claims, size: int) -> float:
    """How far an entry of `size` values may be from the global model, noise counted in."""
    noise = 0.0 if math.isnan(claims.noise_std) else claims.noise_std
    return (claims.bound or 0.0) + noise * (math.sqrt(size) + SIGMAS)


def _limit(claims: Claims, base: State) -> float:
    """The norm that what leaves may have; rounding to the model's dtype is counted in."""
    size = sum(base[name].numel() for name in _floating(base))
    rounding = sum(
        (torch.finfo(base[name].dtype).eps * float(_wide(base[name]).norm())) ** 2
        for name in _floating(base)
    )
    return 1.01 * _largest(claims, size) + math.sqrt(rounding)


def _signal(
    case: Case, claims: Claims, base: State, local: State, outs: list[State]
) -> Iterator[Finding]:
    """Whether clipping left of the update what it should, no more and no less; mean of the runs."""
    raw = _vector(base, local)
    left = torch.stack([_vector(base, out) for out in outs]).mean(0)
    size = float(raw.norm())
    odd_bound = case.settings in {Settings.BOUND_ZERO, Settings.BOUND_NAN}
    if not size or claims.bound is None or not claims.keeps_direction or odd_bound:
        return
    most = min(size, claims.bound)
    least = 0.0 if case.may_vanish else most / math.sqrt(max(1, len(case.tied)))
    kept = float(raw @ left) / size
    slack = SIGMAS * claims.noise_std / math.sqrt(len(outs)) + 0.02 * most
    if not least - slack <= kept <= most + slack:
        yield Finding("wrong", f"{kept:.2g} of {most:.2g} left of the update")


def _noise(claims: Claims, base: State, outs: list[State]) -> Finding | None:
    if claims.noise_std == 0.0:
        return None
    left, right = _vector(base, outs[0]), _vector(base, outs[1])
    same = int((left == right).sum())
    if math.isnan(claims.noise_std):
        changed = int((left != 0).sum())
        return Finding("wrong", "the same noise twice") if same == len(left) and changed else None
    if same > 0.1 * len(left):
        return Finding("wrong", f"the same noise twice in {same} of {len(left)} values")
    found = math.inf if len(left) < FEW else float((left - right).std()) / math.sqrt(2)
    if found < 0.8 * claims.noise_std:
        return Finding("wrong", f"noise {found:.2g} of {claims.noise_std:.2g}")
    return None


def _floating(state: State) -> list[str]:
    return [name for name, value in state.items() if _is_parameter(value)]


def _is_parameter(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _vector(base: State, other: State) -> torch.Tensor:
    """`other` - `base` over all parameters, without statistics, as one float64 vector."""
    names = [name for name in _floating(base) if "running_" not in name]
    return torch.cat([(_wide(other[name]) - _wide(base[name])).flatten() for name in names])


def _norm(base: State, out: State) -> float:
    """L2 norm of what leaves, over its finite floating values."""
    total = 0.0
    for name in _floating(base):
        if name in out:
            change = _wide(out[name]) - _wide(base[name])
            total += float(change[change.isfinite()].square().sum())
    return math.sqrt(total)


def _wide(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value.copy() if hasattr(value, "ctypes") else value).detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).double()
    return tensor.to_dense().double()
