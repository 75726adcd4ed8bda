"""Globs on dotted parameter names: anchored, case-sensitive, safe to run on hostile input.

- `*` stands for characters within one segment, a dot excepted; alone it is one whole segment.
- `**` stands for whole segments, any number of them, none included: `head.**` matches `head`,
  `head.weight` and `head.0.bias`.
- Everything else is literal. A glob has to match the whole name.

Guarantees: matching takes time at most proportional to len(glob) x len(name). Each stretch between
two wildcards is placed at its leftmost fit inside an atomic group, which is never undone; leftmost
is enough, since it leaves the most to the rest.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

MAX_LENGTH = 256  # characters of one glob; the longest names in public models have about 120
EVERYTHING = "**"

_LITERAL = re.compile(r"[A-Za-z0-9_\-+:/@=<>#$%&,;~^|()*]+")


def problem(glob: str) -> str | None:
    """Say in one sentence what is wrong with a glob; None where nothing is."""
    if not glob:
        return "a glob may not be empty; write ** for every parameter"
    if len(glob) > MAX_LENGTH:
        return f"a glob may have at most {MAX_LENGTH} characters"
    for segment in glob.split("."):
        if not segment:
            return "a glob may not begin or end with a dot, nor have two dots in a row"
        if not _LITERAL.fullmatch(segment):
            return "only * and ** are wildcards; blanks, quotes and ? [ ] { } ! \\ are not offered"
        if EVERYTHING in segment and segment != EVERYTHING:
            return "** has to stand alone between dots, as in encoder.**.bias"
    return None


def matches(globs: Collection[str], name: str) -> bool:
    """Say whether at least one of `globs` matches the whole of `name`."""
    return EVERYTHING in globs or any(compiled(glob).match(name + ".") for glob in globs)


@lru_cache(maxsize=4096)
def compiled(glob: str) -> re.Pattern[str]:
    """Return the pattern of a glob; it is matched against the name with one dot added behind.

    Raises:
        ValueError: the glob is not well formed.
    """
    wrong = problem(glob)
    if wrong is not None:
        raise ValueError(wrong)
    first, *others = _chunks(glob.split("."))
    if not others:
        return re.compile(first + r"\Z", re.DOTALL)
    middle = "".join(rf"(?>(?:[^.]*\.)*?{chunk})" for chunk in others[:-1])
    last = rf"(?:[^.]*\.)*?{others[-1]}\Z" if others[-1] else r".*\Z"
    return re.compile(first + middle + last, re.DOTALL)


def _chunks(segments: list[str]) -> list[str]:
    """Join the patterns of the segments between two `**`."""
    chunks = [""]
    for segment in segments:
        if segment == EVERYTHING:
            chunks.append("")
        else:
            chunks[-1] += _segment(segment)
    return chunks


def _segment(segment: str) -> str:
    """Return the pattern of one segment and the dot behind it."""
    if segment == "*":
        return r"[^.]+\."
    first, *others = (re.escape(part) for part in segment.split("*"))
    if not others:
        return first + r"\."
    middle = "".join(rf"(?>[^.]*?{part})" for part in others[:-1])
    return first + middle + rf"(?>[^.]*?{others[-1]}\.)"
