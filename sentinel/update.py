"""Update: the difference between a trained model and the global model it started from.

Rules, in the order in which they are enforced:

- Both states are mappings of names to dense tensors with the same names and shapes; anything
  unknown, missing or reshaped is refused by name (never by value).
- Integer and boolean entries (step counters, indices) and normalisation statistics never leave:
  the global model's own value goes back. Statistics may be treated as parameters on request.
- Every other floating entry is a parameter. A 0-d entry is a parameter of one value; a zero-size
  entry is a parameter of none.
- Entries that share their storage are one parameter, counted and noised once.
- All arithmetic is on the difference, in float32, or in float64 where the model is float64.
- A difference that is not finite is refused.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.parameter import is_lazy

from sentinel.errors import MisuseError, Withheld
from sentinel.memory import room
from sentinel.source import Differences, Held
from sentinel.spans import apart, joined, parted
from sentinel.terms import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from sentinel.memory import Rooms
    from sentinel.source import Source
    from sentinel.spans import Span

State = dict[str, torch.Tensor]
Kind = Literal["weights", "delta"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_KNOWN = frozenset((*_FLOATS, *_WHOLE))
_VARIANCE = "running_var"
_STATISTICS = ("running_mean", _VARIANCE)


class Role(enum.Enum):
    """What an entry of a state is to the update."""

    PARAMETER = "parameter"
    STATISTIC = "statistic"  # floating, but computed from data: BatchNorm's running mean
    COUNTER = "counter"  # integers and booleans


@dataclass(frozen=True, slots=True)
class Update:
    """What one round of training changed, and all that is needed to give it back.

    Attributes:
        deltas: local - global for every parameter that may leave, float32 or wider, on the device
            of the local state; computed when it is read, or held where it carries noise.
        squares: sum of squares of each delta.
        aliases: name -> the name under which its tied tensor stands in `deltas`.
        base: the global state, borrowed and never written.
        roles: role of every entry, in the order of the global state.

    Guarantees:
        Only parameters that may leave are in `deltas`, each storage once, so that `squares` are
        those of all that can leave. Neither state is written to.

    Edges:
        `assembly` of fewer names than in `deltas`: the others go back as the global model has them
        `assembly` of deltas that are held:         they are used up
    """

    deltas: Source
    squares: dict[str, float]
    aliases: dict[str, str]
    base: Mapping[str, torch.Tensor]
    roles: dict[str, Role]

    @classmethod
    def from_states(
        cls,
        global_state: Mapping[str, torch.Tensor],
        local_state: Mapping[str, torch.Tensor],
        *,
        buffers: Collection[str] = (),
        statistics_as_parameters: bool = False,
        let_out: Callable[[Collection[str]], Collection[str]] | None = None,
    ) -> Update:
        """Read an update.

        Args:
            global_state: the model as it was received.
            local_state: the model after training: the same names and shapes.
            buffers: names known to be buffers of the model; a floating buffer is a statistic.
            statistics_as_parameters: treat normalisation statistics like parameters.
            let_out: given the names of all parameters, those that may leave; the others are
                dropped before any norm. All of them where left out.

        Returns:
            The update. It borrows both states, which must not change until it was given back.

        Raises:
            Withheld: STRUCTURE_MISMATCH or NOT_FINITE, naming the entry.

        Guarantees:
            The rules of this module, in their order. No error holds a value.

        Edges:
            a 0-d parameter:                       one value, inside the norm
            an empty one, or no difference:        a sum of squares of 0
            integers, booleans, statistics:        in no norm; they stay
            statistics as parameters:              leave; a running variance stays above 0
            float16 and bfloat16:                  the difference is float32
            float64:                               the difference is float64
            a tensor that is not contiguous:       read by its values
            tied tensors:                          one parameter, under its first name
            tied tensors, one name withheld:       neither leaves
            tensors that overlap in part:          two parameters
            NaN, Inf, or squares beyond float64:   NOT_FINITE
            finite one by one, but not together:   NOT_FINITE
            an unknown, missing or reshaped entry: STRUCTURE_MISMATCH
            no dense tensor, or without a shape:   STRUCTURE_MISMATCH
            a name that cannot be printed:         STRUCTURE_MISMATCH
        """
        check_structure(global_state, local_state)
        roles = _roles(global_state, buffers, as_parameters=statistics_as_parameters)
        names = [name for name, role in roles.items() if role is Role.PARAMETER]
        aliases = _tied(names, global_state, local_state)
        leaving = set(names if let_out is None else let_out(names))
        leaving -= _touched_by(set(names) - leaving, aliases)
        chosen = [name for name in names if name in leaving and name not in aliases]
        deltas = Differences(chosen, local_state, global_state)
        _require_measurable(deltas.squares)
        kept = {alias: name for alias, name in aliases.items() if alias in leaving}
        return cls(deltas, deltas.squares, kept, global_state, roles)

    @property
    def coordinates(self) -> dict[str, int]:
        """Values behind each name that may leave; a tied name counts 0, its tensor is counted."""
        return {**self.deltas.sizes, **dict.fromkeys(self.aliases, 0)}

    def assembly(
        self,
        released: Collection[str],
        *,
        noised: Collection[str] = (),
        kind: Kind = "weights",
        rooms: Rooms = room,
    ) -> Assembly:
        """Begin to give the update back as a state dict; uses up deltas that are held.

        Args:
            released: names in `deltas` that leave; all others go back as the global model has them.
            noised: those of them that carry noise.
            kind: "weights" (global + delta) or "delta".
            rooms: where the memory of the state comes from.
        """
        return Assembly(self, frozenset(released), frozenset(noised), kind, rooms)


class Assembly:
    """The state dict of a released update, put together piece by piece.

    Guarantees:
        Without noise, each value is rounded toward the global model's own, so that the difference
        which a receiver computes is no larger than the delta in any coordinate. With noise the
        nearest value is taken (post-processing), and values beyond the dtype's range are set to its
        largest.

    Edges:
        `put` beyond the range of the dtype:     the largest value of the dtype
        `put` under a name that is not released: KeyError
        `state` where nothing was released:      the global model's values; zeros as a delta
        `state` of a tied tensor:                the same values, in memory of each name's own
        `state` of another layout than by rows:  contiguous, the same values
        `state` of a variance that is above 0:   stays above 0
        `state` of a variance that is not:       moves by no more than the delta
    """

    def __init__(
        self,
        update: Update,
        released: frozenset[str],
        noised: frozenset[str],
        kind: Kind,
        rooms: Rooms,
    ) -> None:
        """Made by `Update.assembly`."""
        self._update, self._kind, self._rooms = update, kind, rooms
        self._released, self._noised = released, noised
        self._out = {name: self._room(name) for name in released}
        self._places = {name: out.view(-1) for name, out in self._out.items()}
        self._origins = {
            name: update.base[name].detach().to(out.device).contiguous().view(-1)
            for name, out in self._out.items()
            if kind == "weights"
        }

    def put(self, run: Sequence[Span], values: torch.Tensor) -> None:
        """Take values of the sanitized delta; threads may put different values at once.

        Args:
            run: where they belong: spans of tensors that are released, on one device.
            values: float64 (values,), one span after the other; used up.
        """
        kinds = {(self._out[span.name].dtype, span.name in self._noised) for span in run}
        if len(kinds) == 1 and not apart(run):
            self._put_alike(run, values)
        else:
            for span, part in zip(run, parted(values, run), strict=True):
                self._put_alike([span], part)

    def _put_alike(self, run: Sequence[Span], values: torch.Tensor) -> None:
        """Settle all values of a run in one call, whatever many tensors they belong to."""
        places = [span.of(self._places[span.name]) for span in run]
        alone = len(places) == 1
        target = places[0] if alone else values.new_empty(values.shape, dtype=places[0].dtype)
        origin = joined(self._origins, run) if self._kind == "weights" else None
        _settle(target, origin, values, nearest=run[0].name in self._noised)
        if not alone:
            for place, part in zip(places, parted(target, run), strict=True):
                place.copy_(part)

    def state(self) -> State:
        """The finished state dict.

        Returns:
            The same names, shapes, dtypes and devices as the global state, contiguous, in memory of
            its own.
        """
        state: State = {}
        for name, base in self._update.base.items():
            original = self._update.aliases.get(name)
            if name in self._released:
                state[name] = self._finished(name, base)
            elif original in self._released:
                state[name] = self._copy(state[original])
            else:
                state[name] = self._unchanged(base)
        return state

    def _room(self, name: str) -> torch.Tensor:
        """Memory for what leaves: the delta's own where it is held in the same dtype."""
        deltas, base = self._update.deltas, self._update.base[name]
        if isinstance(deltas, Held) and deltas[name].dtype == base.dtype:
            return deltas[name]
        return self._rooms(base.shape, base.dtype, deltas.device(name))

    def _copy(self, value: torch.Tensor) -> torch.Tensor:
        return self._rooms(value.shape, value.dtype, value.device).copy_(value.detach())

    def _unchanged(self, base: torch.Tensor) -> torch.Tensor:
        """The global model's own value, or no change."""
        if self._kind == "delta":
            return self._rooms(base.shape, base.dtype, base.device).zero_()
        return self._copy(base)

    def _finished(self, name: str, base: torch.Tensor) -> torch.Tensor:
        out = self._out[name].to(base.device)
        if name.rpartition(".")[2] == _VARIANCE and self._kind == "weights":
            positive = out.clamp(min=torch.finfo(out.dtype).tiny)
            out.copy_(torch.where(base > 0, positive, out))  # toward the global value, not past it
        return out


def check_structure(
    global_state: Mapping[str, torch.Tensor], local_state: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a local state whose names, shapes or kinds of dtype are not the global model's."""
    for name in local_state:
        if name not in global_state:
            raise _mismatch(name, "is not in the global model")
    for name, base in global_state.items():
        if name not in local_state:
            raise _mismatch(name, "of the global model is missing from the local one")
        _check_entry(name, base)
        local = local_state[name]
        _check_entry(name, local)
        if local.shape != base.shape:
            raise _mismatch(name, "has another shape than in the global model")
        if local.is_floating_point() != base.is_floating_point():
            raise _mismatch(name, "has another kind of dtype than in the global model")


def _check_entry(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise _mismatch(name, "is no tensor; a state dict of tensors was expected")
    if not name.isprintable():
        raise _mismatch(name, "has a name that cannot be printed")
    if is_lazy(value):
        raise _mismatch(name, "has no shape yet; run the model once before the round")
    odd = value.is_quantized or value.is_meta or value.is_nested
    if odd or value.layout is not torch.strided:
        raise _mismatch(
            name, "is sparse, nested, quantized or has no data; a dense tensor was expected"
        )
    if value.dtype not in _KNOWN:
        raise _mismatch(
            name, "has a dtype that is not supported; use float64/32/16, bfloat16, int or bool"
        )


def _mismatch(name: str, problem: str) -> Withheld:
    return Withheld(Reason.STRUCTURE_MISMATCH, f"Entry {name!r} {problem}; nothing was released.")


def _roles(
    state: Mapping[str, torch.Tensor], buffers: Collection[str], *, as_parameters: bool
) -> dict[str, Role]:
    def role(name: str, value: torch.Tensor) -> Role:
        if not value.is_floating_point():
            return Role.COUNTER
        if name in buffers or name.rpartition(".")[2] in _STATISTICS:
            return Role.PARAMETER if as_parameters else Role.STATISTIC
        return Role.PARAMETER

    return {name: role(name, value) for name, value in state.items()}


def _storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _tied(
    names: list[str],
    global_state: Mapping[str, torch.Tensor],
    local_state: Mapping[str, torch.Tensor],
) -> dict[str, str]:
    """Each later name of a tied tensor -> its first name.

    Tied is what shares storage in the local state and is equal in the global one. Entries that
    overlap in part, or whose global values differ, stay separate parameters: the joint norm then
    counts both, which is larger and so still a bound.
    """
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name in names:
        if not local_state[name].numel():
            continue
        original = first.setdefault(_storage_key(local_state[name]), name)
        if original != name and _same(global_state[name], global_state[original]):
            aliases[name] = original
    return aliases


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _touched_by(names: set[str], aliases: Mapping[str, str]) -> set[str]:
    """`names` and every name tied to one of them: what one name withholds, its twins do too."""
    originals = {aliases.get(name, name) for name in names}
    return originals | {alias for alias, original in aliases.items() if original in originals}


def _require_measurable(squares: Mapping[str, float]) -> None:
    """Refuse an update whose tensors are finite one by one, and not together."""
    try:
        math.fsum(squares.values())
    except OverflowError:
        raise Withheld(
            Reason.NOT_FINITE,
            "The update is too large to measure; nothing was released. Check the training step for "
            "divergence.",
        ) from None


def _settle(
    target: torch.Tensor, origin: torch.Tensor | None, values: torch.Tensor, *, nearest: bool
) -> None:
    """Write `origin + values` (or `values` alone) in the dtype of `target`; uses up `values`."""
    largest = torch.finfo(target.dtype).max
    delta = None if nearest else values.abs()
    if origin is not None:
        values.add_(origin)
    target.copy_(values.clamp_(-largest, largest))
    if delta is not None:
        start = torch.zeros_like(target) if origin is None else origin
        beyond = (target.double() - start).abs_() > delta
        target.copy_(torch.where(beyond, torch.nextafter(target, start), target))


def shares_storage(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether any tensor of one state lives in memory of the other."""

    def storages(state: Mapping[str, torch.Tensor]) -> set[int]:
        return {value.untyped_storage().data_ptr() for value in state.values()} - {0}

    return not storages(left).isdisjoint(storages(right))


def model_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over sorted (name, dtype, shape, little-endian bytes); 64 hex digits.

    Args:
        state: names to dense tensors. Only for public states: a global model, or what was released.

    Guarantees:
        Two states have the same digest only where names, dtypes, shapes and bytes are equal: each
        header is framed by its length. The order of the mapping does not matter.

    Edges:
        no entry:                        the SHA-256 of nothing
        an empty tensor:                 its header alone
        a 0-d tensor:                    its header and one value
        0 and -0:                        differ
        NaN:                             equal where its bytes are
        a tensor that is not contiguous: its values, row by row
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(_header(name, tensor.dtype, tensor.shape))
        if tensor.numel():
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


@functools.lru_cache(maxsize=1 << 12)  # the same model comes back, several times a round
def _header(name: str, dtype: torch.dtype, shape: torch.Size) -> bytes:
    header = json.dumps([name, str(dtype), list(shape)]).encode()
    return len(header).to_bytes(8, "little") + header


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    rows = tensor.cpu().contiguous()
    return (rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows).numpy().data


def require_state(state: object, what: str) -> None:
    """Refuse, as misuse, anything that is not a non-empty mapping of names to tensors."""
    if not isinstance(state, Mapping) or not state:
        raise MisuseError(f"{what} must be a non-empty state dict (names to tensors).")
    for name, value in state.items():
        if not isinstance(name, str):
            raise MisuseError(f"{what} has an entry whose name is no text; state dicts have names.")
        if not isinstance(value, torch.Tensor):
            raise MisuseError(
                f"{what} must map names to tensors, and entry {name!r} is none. Of a checkpoint "
                "pass the model's own state dict; turn numpy arrays into tensors with "
                "torch.from_numpy."
            )
        _check_entry(name, value)
