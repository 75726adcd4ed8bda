"""Settings: under which conditions an update is made and attacked."""

from __future__ import annotations

import enum
from dataclasses import dataclass

HONEST = "honest"
LOPSIDED = 0.8  # share of a lopsided update's records that have the property, or that lack it


class Stage(enum.StrEnum):
    """How far the global model is trained."""

    START = "start"  # as the factory gave it
    LATER = "later"  # after some epochs of training


@dataclass(frozen=True, slots=True)
class Setting:
    """One condition.

    Attributes:
        server: "honest", or the name of a malicious one.
        stage: of the global model.
        records: behind one update.
        epochs: of local training in batches; 0 is one step on all records (FedSGD).
        lopsided: whether most of the records have the loader's property, or most lack it, by a
            coin for each update; else they are drawn without regard to it.
    """

    server: str = HONEST
    stage: Stage = Stage.START
    records: int = 1
    epochs: int = 0
    lopsided: bool = False

    @property
    def words(self) -> str:
        """The condition for a reader."""
        who = "1 record" if self.records == 1 else f"{self.records} records"
        if self.lopsided:
            who += f", {LOPSIDED:.0%} of them with the property or {LOPSIDED:.0%} without"
        how = "one step" if self.epochs == 0 else f"{self.epochs} local epochs"
        stage = "untrained model" if self.stage is Stage.START else "trained model"
        server = "honest server" if self.server == HONEST else f"malicious server ({self.server})"
        return f"{who}, {how}, {stage}, {server}"
