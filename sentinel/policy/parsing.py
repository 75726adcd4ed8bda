"""From the bytes of a TOML file to a strict model, with errors that a person can act on.

Every problem of a file is told at once, one line each: file, line, key path, what was expected,
what came, what to do.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from sentinel.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

    Location = tuple[int | str, ...]

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 2**20  # 1 MiB; a policy of 256 rules takes a tenth of it
_QUOTED = 40  # characters or bits: what still fits a line

_EXPECTED = {
    "missing": "is missing; add it",
    "float_type": "expected a number, as in 0.5",
    "finite_number": "expected a finite number; nan and inf are refused",
    "int_type": "expected a whole number",
    "bool_type": "expected true",
    "string_type": 'expected a text in quotes, as in "name"',
    "tuple_type": 'expected a list, as in ["**"]; a table is written [[rule]], in double brackets',
    "model_type": "expected a table",
    "date_type": "expected a date without quotes and without time, as in 2027-06-30",
}
_FORMATTED = {
    "enum": "expected {expected}",
    "literal_error": "expected {expected}",
    "greater_than": "expected a number greater than {gt}",
    "greater_than_equal": "expected a number of {ge} or more",
    "less_than": "expected a number less than {lt}",
    "less_than_equal": "expected a number of {le} or less",
    "too_long": "expected at most {max_length} entries",
    "too_short": "expected at least {min_length} entry",
}
_PATTERN = (
    "expected 1 to 64 characters: letters, digits and hyphens, small letters only where it is a "
    "name or an id, beginning with a letter or digit"
)


def parse_toml(raw: bytes, source: str, model: type[Model]) -> Model:
    """Parse and check a TOML file.

    Args:
        raw: the file's bytes.
        source: what errors call the file.
        model: a strict pydantic model.

    Raises:
        PolicyError: too large, not UTF-8, not TOML, or not what the model asks for.
    """
    if len(raw) > MAX_BYTES:
        raise PolicyError(f"{source}: larger than {MAX_BYTES} bytes; split it or shorten it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{source}: not UTF-8; save it as UTF-8 text") from None
    try:
        content = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and Python's own limit on digits
        raise PolicyError(f"{source}: not valid TOML: {error}; correct that line") from None
    except RecursionError:
        raise PolicyError(f"{source}: not valid TOML: nested too deeply") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = _sentences(error.errors(include_url=False), content, text, model)
        lines = [f"{source}:{line}" if line else source for line, _ in problems]
        told = (f"{at}: {what}" for at, (_, what) in zip(lines, problems, strict=True))
        raise PolicyError("\n".join(told)) from None


def _sentences(
    errors: Sequence[ErrorDetails],
    content: Mapping[str, Any],
    text: str,
    model: type[BaseModel],
) -> list[tuple[int | None, str]]:
    """Return line and sentence of every problem, without those that only follow from another."""
    found: list[tuple[int | None, str]] = []
    places = [_place(error["loc"], content) for error in errors]
    for error, location in zip(errors, places, strict=True):
        deeper = any(len(p) > len(location) and p[: len(location)] == location for p in places)
        if error["type"] == "default_factory_not_called" or deeper:
            continue
        for what in _explained(error, model).split("\n"):
            label = _label(location, content)
            found.append((_line(location, text), f"{label}: {what}" if label else what))
    return found


def _place(location: Location, content: Mapping[str, Any]) -> Location:
    """Cut off what pydantic adds below a single value: the form of it that was tried."""
    node: Any = content
    for depth, part in enumerate(location):
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict):
            node = node.get(part)
        else:
            return location[:depth]
    return location


def _explained(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(error["loc"], model)
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return _EXPECTED[kind]
    if kind == "string_pattern_mismatch":
        expected = _PATTERN
    elif kind in _FORMATTED:
        expected = _FORMATTED[kind].format(**context)
    else:
        expected = _EXPECTED.get(kind, error["msg"])
    return expected + _came(error["input"])


def _came(value: object) -> str:
    """Quote a short scalar of the policy file; it is the author's own text, not data."""
    match value:
        case bool():
            return f"; got {str(value).lower()}"
        case str() if len(value) <= _QUOTED:
            return f'; got "{value}"'
        case float():
            return f"; got {value}"
        case int() if value.bit_length() <= _QUOTED:  # Python refuses to print a huge one
            return f"; got {value}"
        case _:
            return ""


def _unknown(location: Location, model: type[BaseModel]) -> str:
    """Name the keys that are known there, and the nearest one."""
    known = _known_keys(model, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key; expected one of {', '.join(sorted(known))}{hint}"


def _known_keys(model: type[BaseModel], path: Location) -> list[str]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if not path:
        return list(fields)
    rest = path[2:] if len(path) > 1 and isinstance(path[1], int) else path[1:]
    for inner in _models_in(fields[str(path[0])].annotation):
        return _known_keys(inner, rest)
    return []


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401  any type expression
    """Find the models inside `X`, `X | None` and `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def _label(location: Location, content: Mapping[str, Any]) -> str:
    """Write `rule[2].when.sensitivity (rule "leaky")`; counting begins at 0."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    match location:
        case (str(table), int(index), *_):
            entries = content.get(table)
            entry = entries[index] if isinstance(entries, list) else None
            name = (entry.get("id") or entry.get("name")) if isinstance(entry, dict) else None
            return f'{path} ({table} "{name}")' if isinstance(name, str) else path
        case _:
            return path


def _line(location: Location, text: str) -> int | None:
    """Find the line of a key, as well as a plain search can; None where it is not certain."""
    lines = text.splitlines()
    match location:
        case ():
            return None
        case (str(table), int(index), *rest):
            heads = _heads(lines, rf"\[\[\s*{re.escape(table)}\s*\]\]")
            start = heads[index] if index < len(heads) else None
        case (str(table), *rest) if rest:
            heads = _heads(lines, rf"\[\s*{re.escape(table)}\s*\]")
            start = heads[0] if len(heads) == 1 else None
        case (key, *_):
            start, rest = -1, [key]
    if start is None:
        return None
    key_lines = _keys_below(lines, start, [str(part) for part in rest])
    return key_lines if key_lines is not None else (start + 1 or None)


def _heads(lines: list[str], pattern: str) -> list[int]:
    return [at for at, line in enumerate(lines) if re.match(rf"\s*{pattern}\s*(#|$)", line)]


def _keys_below(lines: list[str], start: int, keys: list[str]) -> int | None:
    """Return the line (from 1) that sets one of `keys` before the next table begins."""
    for at in range(start + 1, len(lines)):
        line = lines[at].strip()
        if line.startswith("["):
            return None
        if any(re.match(rf"{re.escape(key)}\s*[.=]", line) for key in keys):
            return at + 1
    return None
