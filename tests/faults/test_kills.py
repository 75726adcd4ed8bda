"""kill -9 at random instants and at every file operation of opening a state and releasing rounds.

After each: whatever had been given out is given again byte for byte to whoever asks with another
local state, was charged before, and ledger, log and folder go on working.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Site

ROUNDS = [0, 1, 2]
KINDS = ["noisy", "promise", "pruning"]
PRIVATE = ["patient", "record"]


def killed_at(place: int, site: Site) -> bool:
    """One life on a fresh site, killed before one operation; whether it got that far."""
    life = site.live(ROUNDS, {"kill": place})
    site.must_be_sound([*ROUNDS, 3])
    return os.WIFSIGNALED(life["status"])


def operations(site: Site) -> int:
    """How many operations a whole life on a fresh site has."""
    return len(site.live(ROUNDS, {})["operations"])


def killed_at_some(new_site: Callable[[], Site], kills: int) -> int:
    """Lives killed before operations chosen by chance; how many got that far."""
    chance = random.Random()  # noqa: S311 - another choice in every run
    places = chance.sample(range(operations(new_site())), kills)
    return sum(killed_at(place, new_site()) for place in places)


def kill_at_each(new_site: Callable[[], Site]) -> None:
    """A life for every operation, killed before it."""
    total = operations(new_site())
    killed = sum(killed_at(place, new_site()) for place in range(total))
    assert total > 150
    assert killed > 0.95 * total  # lives differ by an operation or two


@pytest.mark.usefixtures("traced")
def test_a_life_writes_through_every_store(new_site) -> None:
    """The faults below land where they should: in ledger, log, releases and history."""
    seen = " ".join(new_site("noisy").live(ROUNDS, {})["operations"])
    for part in ("pwrite64 /ledger.sqlite-wal", "fdatasync /ledger.sqlite-wal", "write /audit/"):
        assert part in seen
    for part in ("fsync /releases", "rename /releases", "rename /history", "mkdir /releases"):
        assert part in seen


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_some_file_operations(kind: str, new_site: Callable[[str], Site]) -> None:
    assert killed_at_some(lambda: new_site(kind), 6) >= 4  # lives differ by an operation or two


@pytest.mark.soak
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_every_file_operation(kind: str, new_site: Callable[[str], Site]) -> None:
    kill_at_each(lambda: new_site(kind))


@pytest.mark.soak
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_while_it_recovers(kind: str, new_site: Callable[[str], Site]) -> None:
    """Three kills on one site: the second and third fall into the work of recovering."""
    total = operations(new_site(kind))
    chance = random.Random()  # noqa: S311 - another choice in every run
    for _ in range(60):
        site = new_site(kind)
        for _ in range(3):
            site.live(ROUNDS, {"kill": chance.randrange(total)})
        site.must_be_sound([*ROUNDS, 3])


def killed_at_random(
    site: Site, kills: int, together: int, *, within: float = 0.12, each: int = 4
) -> None:
    """Lives on one site until there were so many kills, `together` at a time on the same rounds.

    Each has `each` rounds before it, and is killed at some instant `within` so many seconds.
    """
    chance = random.Random()  # noqa: S311 - another choice in every run
    done = first = 0
    while done < kills:
        rounds = list(range(first, first + each))
        lives = [{"kill_after": chance.uniform(0.0, within)} for _ in range(together)]
        ends = site.live_together(rounds, *lives)
        done += sum(os.WIFSIGNALED(end["status"]) for end in ends)
        site.must_be_sound(rounds)
        first += 2  # the rounds after these two come again


def one_of(kinds: list[str]) -> str:
    """Another kind in every run."""
    return random.Random().choice(kinds)  # noqa: S311 - as it says


def test_killed_at_fifteen_random_instants(new_site: Callable[[str], Site]) -> None:
    killed_at_random(new_site(one_of(["noisy", "promise"])), 15, together=1)


def test_two_processes_on_one_folder_killed_at_random_instants(new_site) -> None:
    killed_at_random(new_site(one_of(["noisy", "promise"])), 8, together=2)


@pytest.mark.soak
@pytest.mark.parametrize("together", [1, 2, 3])
def test_killed_at_two_hundred_random_instants(together: int, new_site) -> None:
    killed_at_random(new_site(one_of(["noisy", "promise"])), 200, together)


def test_a_process_goes_on_where_another_on_the_same_rounds_is_killed(new_site) -> None:
    site = new_site("promise")
    for first in range(0, 12, 3):
        rounds = list(range(first, first + 3))
        _, whole = site.live_together(rounds, {"kill_after": 0.03}, {})
        assert whole["status"] == 0
        assert [word for word, *_ in whole["told"]] == ["sent"] * 3
        site.must_be_sound(rounds)


@pytest.mark.usefixtures("traced", "warm_for_private")
@pytest.mark.parametrize("kind", PRIVATE)
def test_private_training_killed_before_some_file_operations(kind: str, new_site) -> None:
    """Asked again, the life trains anew, for other steps: the release is given without a look."""
    assert killed_at_some(lambda: new_site(kind), 3) >= 2  # lives differ by an operation or two


@pytest.mark.usefixtures("warm_for_private")
@pytest.mark.parametrize("together", [1, 2])
def test_private_training_killed_at_random_instants(together: int, new_site) -> None:
    killed_at_random(new_site(one_of(PRIVATE)), 5 * together, together, within=0.2, each=3)


@pytest.mark.soak
@pytest.mark.usefixtures("traced", "warm_for_private")
@pytest.mark.parametrize("kind", PRIVATE)
def test_private_training_killed_before_every_file_operation(kind: str, new_site) -> None:
    kill_at_each(lambda: new_site(kind))


@pytest.mark.soak
@pytest.mark.usefixtures("warm_for_private")
@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize("together", [1, 2])
def test_private_training_killed_at_two_hundred_random_instants(
    kind: str, together: int, new_site
) -> None:
    killed_at_random(new_site(kind), 200, together, within=0.2, each=3)
