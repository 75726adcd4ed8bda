"""Globs on dotted names."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentinel.policy.globs import MAX_LENGTH, compiled, matches, problem


@pytest.mark.parametrize(
    ("glob", "inside", "outside"),
    [
        ("**", ["a", "a.b", "a.b.c"], []),
        ("*", ["a"], ["a.b"]),
        ("head.**", ["head", "head.weight", "head.0.bias"], ["header.weight", "a.head.weight"]),
        ("**.bias", ["bias", "a.bias", "a.b.bias"], ["a.bias.x", "a.nobias"]),
        ("a.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["a.xb", "a.b.c"]),
        ("conv*.weight", ["conv.weight", "conv1.weight"], ["conv1.0.weight", "Conv1.weight"]),
        ("layer*_*.w", ["layer1_2.w", "layer_.w"], ["layer1.w"]),
        ("a+b(c)|d", ["a+b(c)|d"], ["aab(c)|d", "aabc", "d"]),
        ("a.b", ["a.b"], ["axb", "a.b.c", "z.a.b", "a.b\n"]),
    ],
)
def test_glob_is_anchored_and_case_sensitive(
    glob: str, inside: list[str], outside: list[str]
) -> None:
    """A glob has to match the whole name; everything but * and ** is literal."""
    assert [name for name in inside if not matches((glob,), name)] == []
    assert [name for name in outside if matches((glob,), name)] == []


@pytest.mark.parametrize(
    "glob",
    [
        "",
        ".a",
        "a.",
        "a..b",
        "a**",
        "**a.b",
        "a.***",
        "a?",
        "[ab]",
        "{a,b}",
        "!a",
        "a b",
        "a\\b",
        "a" * (MAX_LENGTH + 1),
        "ä",
        "a\n",
    ],
)
def test_malformed_globs_are_refused(glob: str) -> None:
    """What a reader might take for another wildcard, and what can match nothing, is refused."""
    assert problem(glob)
    with pytest.raises(ValueError, match=r"glob|\*|character"):
        compiled(glob)


@cache
def _naive(glob: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Match by the definition, segment by segment, trying every split."""
    if not glob:
        return not name
    if glob[0] == "**":
        return any(_naive(glob[1:], name[at:]) for at in range(len(name) + 1))
    first = bool(name) and (glob[0] == "*" or _wild(glob[0], name[0]))
    return first and _naive(glob[1:], name[1:])


@cache
def _wild(glob: str, text: str) -> bool:
    if not glob:
        return not text
    if glob[0] == "*":
        return any(_wild(glob[1:], text[at:]) for at in range(len(text) + 1))
    return text[:1] == glob[0] and _wild(glob[1:], text[1:])


_segments = st.one_of(
    st.just("**"),
    st.text("ab*", min_size=1, max_size=5).filter(lambda text: "**" not in text),
)
_names = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(_segments, min_size=1, max_size=5), _names)
def test_patterns_agree_with_the_definition(glob: list[str], name: list[str]) -> None:
    """The compiled pattern says the same as a matcher that tries every split."""
    assert matches((".".join(glob),), ".".join(name)) is _naive(tuple(glob), tuple(name))


@pytest.mark.parametrize(
    ("glob", "name"),
    [
        ("*a" * 100 + "*b", "a" * 50_000),
        (".".join(["**.a"] * 50) + ".b", ".".join(["a"] * 25_000)),
        (".".join(["**.*a*a"] * 30) + ".b", ".".join(["aaaa"] * 10_000)),
        ("**." + ".".join(["*"] * 100) + ".b", ".".join(["a"] * 25_000)),
        ("a" * 200 + "*b", "a" * 50_000),
    ],
)
def test_hostile_globs_take_no_exponential_time(glob: str, name: str) -> None:
    """A pattern made to backtrack, on a name a hundred times longer than any real one, is fast."""
    start = time.process_time()
    assert not matches((glob,), name)
    assert time.process_time() - start < 5
