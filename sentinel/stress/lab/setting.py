"""Settings: under which conditions an update is made and attacked."""

from __future__ import annotations

import enum
from dataclasses import dataclass

HONEST = "honest"


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
    """

    server: str = HONEST
    stage: Stage = Stage.START
    records: int = 1
    epochs: int = 0

    @property
    def words(self) -> str:
        """The condition for a reader."""
        who = "1 record" if self.records == 1 else f"{self.records} records"
        how = "one step" if self.epochs == 0 else f"{self.epochs} local epochs"
        stage = "untrained model" if self.stage is Stage.START else "trained model"
        server = "honest server" if self.server == HONEST else f"malicious server ({self.server})"
        return f"{who}, {how}, {stage}, {server}"
