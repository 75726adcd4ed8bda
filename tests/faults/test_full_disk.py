"""A disk that is really full, and a limit on the size of files: withheld, and sound afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Site, SmallDisk

ROUNDS = [0, 1, 2]
KIB = 1024


@pytest.mark.parametrize("kind", ["noisy", "promise"])
def test_a_full_disk_withholds_and_leaves_everything_sound(
    kind: str, small_disk: SmallDisk
) -> None:
    """Free space grows from nothing to enough, a site each; then the disk is cleared."""
    sent = []
    for left in range(0, 200, 16):
        site = small_disk.new_site(kind, f"{kind}-{left}")
        small_disk.leave(left * KIB)
        site.live_together(ROUNDS, {})
        sent.append(len(site.sent))
        small_disk.leave(None)
        site.must_be_sound(ROUNDS)
        small_disk.empty()
    assert sent[0] == 0
    assert sent[-1] == len(ROUNDS)


def test_a_limit_on_the_size_of_files_withholds(new_site: Callable[[str], Site]) -> None:
    """The kernel refuses to let any file grow over the limit, as a quota does."""
    sent = []
    for largest in (0, 2, 4, 5, 6, 8, 16, 24, 28, 32, 36, 40, 48, 64, 128, 256):
        site = new_site("promise")
        site.live_together(ROUNDS, {"largest": largest * KIB})
        sent.append(len(site.sent))
        site.must_be_sound(ROUNDS)
    assert sent[0] == 0
    assert sent[-1] == len(ROUNDS)
