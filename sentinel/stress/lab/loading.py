"""Load the site's own model and records from the code that the operator names.

`package.module:name` is imported and called without arguments. That runs the site's code, so the
name is taken from the operator's command line alone, never from a file or from data.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sentinel.errors import MisuseError
from sentinel.stress.lab.normalisation import Normalisation
from sentinel.stress.lab.subject import FEWEST, Kind, Subject, default_loss, kind_of
from sentinel.stress.records import Records

if TYPE_CHECKING:
    from collections.abc import Callable

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_HELD_OUT = 0.3  # share that is kept out of training where the loader names none
_PARTS = ("train", "held_out", "public")
_CHOICES = ("kind", "categorical", "property", "mean", "std", "loss", "rate", "batch")
_TWO = 2  # inputs and labels


def load_subject(model: str, data: str, generator: torch.Generator) -> Subject:
    """Call the site's factory and loader.

    Args:
        model: `package.module:factory`; gives a torch.nn.Module.
        data: `package.module:loader`; gives (inputs, labels), a torch Dataset of such pairs, or a
            mapping or dataclass with `train` and, where there are any, `held_out`, `public`,
            `kind`, `categorical`, `property`, `mean`, `std`, `loss`, `rate`, `batch`.
        generator: draws the held-out records where the loader names none.

    Raises:
        MisuseError: a name of another form, code that cannot be imported or fails, or something
            that does not fit; the sentence says what was expected.
    """
    module = _called(model, "--model", "a function that gives a torch.nn.Module")
    if not isinstance(module, nn.Module):
        raise MisuseError(
            f"--model {model} gave {type(module).__name__}; expected a torch.nn.Module."
        )
    return subject_of(
        module, _called(data, "--data", "a function that gives the records"), generator, name=model
    )


def subject_of(module: nn.Module, given: object, generator: torch.Generator, name: str) -> Subject:
    """Put a model and what a loader gave together; see `load_subject`."""
    parts = _parts(given)
    flags = _flags(parts.get("property"))
    train = _flagged(_records(parts["train"], "train"), flags, "train")
    chosen = parts.get("kind")
    kinds = [kind.value for kind in Kind]
    if chosen is not None and chosen not in kinds:
        raise MisuseError(f"kind must be one of {', '.join(kinds)}.")
    held_out = parts.get("held_out")
    if held_out is None:
        train, rest = _split(train, generator)
    else:
        rest = _flagged(_records(held_out, "held_out"), flags, "held_out")
    public = parts.get("public")
    return Subject(
        name=name,
        kind=kind_of(train.inputs) if chosen is None else Kind(chosen),
        model=module,
        train=train,
        held_out=rest,
        public=None if public is None else _flagged(_records(public, "public"), flags, "public"),
        loss=_loss(parts.get("loss"), train),
        rate=_number(parts.get("rate", 0.05), "rate"),
        batch=_whole(parts.get("batch", 32)),
        categorical=_columns(parts.get("categorical", ()), train),
        normalisation=_normalisation(parts.get("mean"), parts.get("std")),
    )


def _called(name: str, option: str, what: str) -> Any:  # noqa: ANN401 - whatever the site's code gives
    found = _found(name, option, what)
    try:
        return found()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the site's own code; its text may hold values
        raise MisuseError(
            f"{option} {name}: the call failed with {type(error).__name__}. It is called without "
            "arguments; try it in Python first."
        ) from None


def _found(name: str, option: str, what: str) -> Callable[[], object]:
    if not _FORM.fullmatch(name):
        raise MisuseError(f"{option} must be of the form package.module:name, naming {what}.")
    where, attribute = name.split(":")
    folder = os.getcwd()  # noqa: PTH109 - a plain string for sys.path
    here = folder not in sys.path
    if here:  # as `python -m` does: the site's code lies where the command is given
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(where), attribute, None)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the site's own code; its text may hold values
        raise MisuseError(
            f"{option}: {where} cannot be imported ({type(error).__name__}). It is looked for in "
            "this folder and in the installed packages."
        ) from None
    finally:
        if here and folder in sys.path:
            sys.path.remove(folder)
    if not callable(found):
        raise MisuseError(f"{option}: {where} has no function {attribute}; expected {what}.")
    return found  # type: ignore[no-any-return]  # a callable of unknown result is what is wanted


def _parts(given: object) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = {item.name: getattr(given, item.name) for item in dataclasses.fields(given)}
    if not isinstance(given, Mapping):
        return {"train": given}
    known = {*_PARTS, *_CHOICES}
    unknown = [str(key) for key in given if key not in known]
    if unknown or "train" not in given:
        raise MisuseError(
            f"The loader's mapping must hold train, and may hold {', '.join(sorted(known))}; "
            f"{len(unknown)} of its keys are none of these."
        )
    return {key: value for key, value in given.items() if value is not None}


def _records(given: object, part: str) -> Records:
    if isinstance(given, Records):
        return given
    if isinstance(given, DataLoader):
        raise MisuseError(
            f"{part} is a DataLoader; return its dataset (loader.dataset), or a pair (inputs, "
            "labels) of tensors."
        )
    if isinstance(given, Dataset):
        given = _stacked(given, part)
    if isinstance(given, Sequence) and len(given) == _TWO:
        try:
            inputs, labels = (torch.as_tensor(item).detach().cpu() for item in given)
        except (TypeError, ValueError, RuntimeError):
            raise MisuseError(f"{part}: inputs and labels must be tensors or arrays.") from None
        if len(inputs) != len(labels):
            raise MisuseError(f"{part}: inputs and labels must be of one length.")
        if inputs.is_floating_point():
            inputs = inputs.float()
        if labels.ndim == _TWO and labels.shape[1] == 1:
            labels = labels[:, 0]
        return Records(inputs, labels.float() if labels.is_floating_point() else labels.long())
    raise MisuseError(
        f"{part} must be a pair (inputs, labels) of tensors, or a torch Dataset of such pairs."
    )


def _flags(given: object) -> Mapping[str, Any]:
    """Part -> who has the property; a list alone is that of train."""
    if given is None:
        return {}
    found = given if isinstance(given, Mapping) else {"train": given}
    if "train" not in found or not set(found) <= set(_PARTS):
        raise MisuseError(
            "property must hold 0 or 1 for each record of train, or be a mapping of parts "
            f"({', '.join(_PARTS)}) to such values; train is needed."
        )
    return found


def _flagged(records: Records, flags: Mapping[str, Any], part: str) -> Records:
    if part not in flags:
        return records
    try:
        values = torch.as_tensor(flags[part]).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.shape != records.labels.shape or not bool(((values == 0) | (values == 1)).all()):
        raise MisuseError(f"property: {part} needs one value, 0 or 1, for each of its records.")
    return dataclasses.replace(records, flags=values.bool())


def _stacked(dataset: Dataset[Any], part: str) -> tuple[Tensor, Tensor]:
    try:
        pairs = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]  # checked by the call
        _require_no_dicts(pairs, part)
        inputs = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
        return inputs, torch.stack([torch.as_tensor(pair[1]).reshape(()) for pair in pairs])
    except MisuseError:
        raise
    except Exception as error:  # noqa: BLE001 - the site's own code; its text may hold values
        raise MisuseError(
            f"{part}: the Dataset does not give pairs of an input and a label, all of one shape "
            f"({type(error).__name__})."
        ) from None


def _require_no_dicts(pairs: Sequence[object], part: str) -> None:
    if any(isinstance(pair, Mapping) for pair in pairs):
        raise MisuseError(
            f"{part}: the Dataset gives dicts; return a pair (inputs, labels) of tensors, such as "
            "the stacked values of two of their keys."
        )


def _split(records: Records, generator: torch.Generator) -> tuple[Records, Records]:
    if len(records) < FEWEST / _HELD_OUT:
        raise MisuseError(
            f"{len(records)} records are too few to keep {_HELD_OUT:.0%} of them out of training; "
            "give more, or name held_out records in the loader's mapping."
        )
    order = torch.randperm(len(records), generator=generator)
    cut = round(len(order) * _HELD_OUT)
    return records.take(order[cut:]), records.take(order[:cut])


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MisuseError(f"{name} must be a finite number.")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MisuseError("batch must be a whole number.")
    return value


def _loss(given: object, train: Records) -> Callable[[Tensor, Tensor], Tensor]:
    if given is None:
        return default_loss(train.labels)
    if not callable(given):
        raise MisuseError("loss must be a function of the model's answers and the labels.")
    return given


def _normalisation(mean: object, std: object) -> Normalisation | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise MisuseError("mean and std go together; give both, or neither.")
    return Normalisation(_numbers(mean, "mean"), _numbers(std, "std"))


def _numbers(given: object, name: str) -> tuple[float, ...]:
    try:
        return tuple(torch.as_tensor(given, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError, RuntimeError):
        raise MisuseError(f"{name} must be a number, or one for each channel.") from None


def _columns(given: object, train: Records) -> tuple[int, ...]:
    """Numbers of the columns that hold categories."""
    width = train.inputs[0].numel() if len(train) else 0
    if not isinstance(given, Sequence) or not all(
        isinstance(column, int) and 0 <= column < width for column in given
    ):
        raise MisuseError(
            f"categorical must list numbers of columns, from 0 to {max(0, width - 1)}."
        )
    return tuple(given)
