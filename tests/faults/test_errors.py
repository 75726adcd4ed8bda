"""A disk that is full, failing or cuts writes short, at every file operation.

A life that meets an error withholds and goes on; nothing is given out that is not kept and charged.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Site

ROUNDS = [0, 1]
KINDS = ["noisy", "promise", "pruning"]
FOR_EVER = 1 << 30


def operations(site: Site, *, reads: bool = False) -> int:
    """How many operations a whole life on a fresh site has."""
    return len(site.live(ROUNDS, {"reads": reads})["operations"])


def fail(site: Site, error: int, first: int, last: int, *, reads: bool = False) -> bool:
    """One life with failing operations, each round tried three times; whether it met the fault."""
    fault = {"error": error, "first": first, "last": last, "reads": reads}
    hit = site.live(ROUNDS, fault, tries=3)["hit"]
    site.must_be_sound([*ROUNDS, 2])
    return bool(hit)


def fail_at_each(kind: str, new_site: Callable[[str], Site], error: int, **options: bool) -> None:
    """Every operation of a life in turn fails once, or from there on for ever."""
    for_ever, reads = options.get("for_ever", False), options.get("reads", False)
    total = operations(new_site(kind), reads=reads)
    met = [
        fail(new_site(kind), error, place, FOR_EVER if for_ever else place, reads=reads)
        for place in range(total)
    ]
    assert total > 150
    assert sum(met) > 0.95 * total  # lives differ by an operation or two


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_some_file_operations_fail(error: int, new_site: Callable[[str], Site]) -> None:
    chance = random.Random()  # noqa: S311 - another choice in every run
    for kind in KINDS:
        for place in chance.sample(range(operations(new_site(kind))), 3):
            fail(new_site(kind), error, place, place)
            fail(new_site(kind), error, place, FOR_EVER)


@pytest.mark.soak
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_every_file_operation_fails_once(error: int, kind: str, new_site) -> None:
    fail_at_each(kind, new_site, error)


@pytest.mark.soak
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
def test_everything_fails_from_some_operation_on(kind: str, new_site) -> None:
    fail_at_each(kind, new_site, errno.ENOSPC, for_ever=True)


@pytest.mark.soak
@pytest.mark.usefixtures("traced")
def test_every_read_fails_once(new_site: Callable[[str], Site]) -> None:
    fail_at_each("noisy", new_site, errno.EIO, reads=True)


@pytest.mark.usefixtures("traced")
def test_a_write_cut_short_loses_nothing(new_site: Callable[[str], Site]) -> None:
    """Every third write of a life in turn writes half of its bytes."""
    whole = new_site("noisy").live(ROUNDS, {})["operations"]
    writes = [place for place, name in enumerate(whole) if "write" in name]
    assert len(writes) > 15
    met = 0
    for place in writes[::3]:
        site = new_site("noisy")
        met += bool(site.live(ROUNDS, {"short": place}, tries=2)["hit"])
        site.must_be_sound([*ROUNDS, 2])
    assert met > len(writes[::3]) / 2  # lives differ by an operation or two, and places shift
