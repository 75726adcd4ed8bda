"""The attacks of the lab: one file per kind; a new one is an adapter and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentinel.stress.lab.attacks.columns import Columns
from sentinel.stress.lab.attacks.genotypes import Genotypes
from sentinel.stress.lab.attacks.labels import Labels
from sentinel.stress.lab.attacks.membership import Membership
from sentinel.stress.lab.attacks.pictures import Pictures
from sentinel.stress.lab.attacks.property import Property
from sentinel.stress.lab.attacks.rows import Rows
from sentinel.stress.lab.attacks.untold import Untold
from sentinel.stress.lab.attacks.words import Words

if TYPE_CHECKING:
    from sentinel.stress.lab.attack import Attack

_ALL: tuple[Attack, ...] = (
    Rows(),
    Pictures(),
    Words(),
    Genotypes(),
    Membership(),
    Property(),
    Labels(),
    Columns(),
    Untold(),
)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}
