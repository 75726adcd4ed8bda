"""Attack: the one seam between the lab and everything that reads updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from sentinel.stress.lab.deadline import Deadline
    from sentinel.stress.lab.exchange import Case
    from sentinel.stress.lab.finding import Finding
    from sentinel.stress.lab.setting import Setting
    from sentinel.stress.lab.subject import Subject
    from sentinel.stress.records import Records


class Attack(Protocol):
    """One way to get something out of an update.

    Attributes:
        name: by which it is chosen on the command line.
        title: what it looks for, for a reader.
        knows: what it is given beforehand, for a reader.
        worth: how much its answer matters; the plan begins with the largest.
        seconds: about how long one update takes, on one core.
        wanted: records over which it should be measured, where time allows; updates, where it asks
            of a group.
        of_groups: whether it asks what the records of a lopsided update have in common; it is then
            tried on such updates alone.
    """

    name: str
    title: str
    knows: str
    worth: float
    seconds: float
    wanted: int
    of_groups: bool

    def misfit(self, subject: Subject, setting: Setting) -> str | None:
        """Why it cannot be tried here, as a sentence for the report; None where it can."""

    def run(
        self,
        case: Case,
        behind: Records,
        generator: torch.Generator,
        deadline: Deadline,
    ) -> Finding:
        """Attack one update.

        Args:
            case: what the attacker has.
            behind: the records behind the update; to score by, never to guess by.
            generator: the attacker's randomness.
            deadline: where it passes, the attack ends with what it has and says that it was cut.

        Raises:
            OutOfTimeError: not even a weaker form of it fits into the time.
        """
