"""What is tested: a model, the site's records, and how the site trains on them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from sentinel.crew import one_thread
from sentinel.errors import MisuseError
from sentinel.stress.lab.normalisation import Normalisation
from sentinel.stress.layers import copied

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from sentinel.stress.layers import State
    from sentinel.stress.records import Records

FEWEST = 32  # records of which a test says anything
_AXES = {"table": 2, "image": 4, "text": 2, "genotypes": 2}


class Kind(enum.StrEnum):
    """What a record is."""

    TABLE = "table"  # inputs [N, features], floating
    IMAGE = "image"  # inputs [N, channels, height, width], floating
    TEXT = "text"  # inputs [N, length], whole numbers: tokens
    GENOTYPES = "genotypes"  # inputs [N, variants], floating: 0, 1 or 2 minor alleles


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Everything that a site hands over for a test; nothing of it is changed.

    Attributes:
        name: for the report; from the command line, never from the data.
        kind: of the records.
        model: the architecture, with the weights that it starts from.
        train: records behind the updates.
        held_out: records of the same site that are behind none; the yardstick of every figure.
        public: records that the attacker has beforehand; None where there are none.
        loss: of the model's answers and the labels, the mean over a batch.
        rate: learning rate of plain SGD.
        batch: records per step of local training.
        categorical: columns of a table that hold categories.
        normalisation: of pictures, as the training plan has it; None to measure it.
        pixels: how pictures stand to pixels from 0 to 1: as given, or by the range of all records.
    """

    name: str
    kind: Kind
    model: nn.Module
    train: Records
    held_out: Records
    public: Records | None
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float = 0.05
    batch: int = 32
    categorical: tuple[int, ...] = ()
    normalisation: Normalisation | None = None
    pixels: Normalisation = field(init=False)
    start: State = field(init=False)

    def __post_init__(self) -> None:
        """Check that model and records fit one another.

        Raises:
            MisuseError: they do not; the sentence says what was expected.
        """
        if not self.rate > 0.0 or self.batch < 1:
            raise MisuseError("The learning rate must be above 0 and the batch at least 1 record.")
        for part in self._parts():
            _require_records(part, self.kind)
            _require_alike(part, self.train)
        object.__setattr__(self, "pixels", self._pixels())
        object.__setattr__(self, "start", copied(self.model.state_dict()))
        self._require_fit()

    @property
    def classes(self) -> int:
        """How many classes the labels have; two for a single output."""
        return 2 if self.train.labels.is_floating_point() else int(self._labels().max()) + 1

    def _labels(self) -> Tensor:
        return torch.cat([part.labels for part in self._parts()])

    def _parts(self) -> list[Records]:
        parts = (self.train, self.held_out, self.public)
        return [part for part in parts if part is not None]

    def _pixels(self) -> Normalisation:
        if self.kind is not Kind.IMAGE:
            if self.normalisation is not None:
                raise MisuseError("mean and std are of pictures; leave them out.")
            return Normalisation()
        parts = [part.inputs for part in self._parts()]
        if self.normalisation is None:
            return Normalisation.measured(parts)
        self.normalisation.require_fit(parts)
        return self.normalisation

    @one_thread()
    def _require_fit(self) -> None:
        """One step of training on two records gives a finite loss and a gradient."""
        few = self.train.take(torch.arange(2))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise MisuseError("The model has no trainable parameter; give one that can be trained.")
        shape = list(few.inputs.shape[1:])
        try:
            loss = self.loss(self.model(few.inputs), few.labels)
            torch.autograd.grad(loss, parameters, allow_unused=True)
        except Exception as error:  # noqa: BLE001 - the site's own code; its text may hold values
            raise MisuseError(
                f"The model cannot be trained on these records: {type(error).__name__} for a batch "
                f"of 2 records of shape {shape}. Expected: loss(model(inputs), labels) is the mean "
                "over the batch. Check the shapes and types of inputs and labels, and the loss."
            ) from None
        finally:
            self.model.load_state_dict(self.start)  # running statistics moved
        if loss.ndim or not bool(torch.isfinite(loss)):
            raise MisuseError("The loss of two records is not one finite number; check loss, data.")


def default_loss(labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy for class numbers; for decimal labels binary cross-entropy of one logit."""
    return binary_loss if labels.is_floating_point() else F.cross_entropy


def binary_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits [N, 1] or [N] and labels [N]."""
    return F.binary_cross_entropy_with_logits(answers.reshape(len(labels)), labels)


def kind_of(inputs: Tensor) -> Kind:
    """What records of this shape and type are taken for."""
    if not inputs.is_floating_point():
        return Kind.TEXT
    return Kind.TABLE if inputs.ndim == _AXES["table"] else Kind.IMAGE


def _require_alike(part: Records, train: Records) -> None:
    """Held-out and public records are of the shape and type of those that are trained on."""
    alike = (
        part.inputs.shape[1:] == train.inputs.shape[1:]
        and part.inputs.is_floating_point() == train.inputs.is_floating_point()
        and part.labels.is_floating_point() == train.labels.is_floating_point()
    )
    if not alike:
        raise MisuseError(
            "Held-out and public records must have the shape and type of the records of train, "
            f"inputs {list(train.inputs.shape[1:])}; got {list(part.inputs.shape[1:])}."
        )


def _require_records(part: Records, kind: Kind) -> None:
    inputs, labels = part.inputs, part.labels
    if len(inputs) != len(labels) or labels.ndim != 1:
        raise MisuseError(
            f"Inputs and labels must be of one length, labels of shape [N]; got {len(inputs)} "
            f"inputs and labels of shape {list(labels.shape)}."
        )
    if len(labels) < FEWEST:
        raise MisuseError(f"At least {FEWEST} records are needed in each part; got {len(labels)}.")
    if not inputs.is_floating_point() and inputs.ndim > _AXES["text"]:
        raise MisuseError(
            f"Inputs of shape {list(inputs.shape)} hold whole numbers, which are taken for tokens "
            "of texts. Give pictures as decimals, such as images.float() / 255, normalised where "
            "the model takes them so."
        )
    if inputs.ndim != _AXES[kind.value]:
        raise MisuseError(
            f'Kind "{kind.value}" takes inputs of {_AXES[kind.value]} axes; got shape '
            f"{list(inputs.shape)}."
        )
    _require_values(inputs, kind)
    if part.flags is not None and part.flags.shape != labels.shape:
        raise MisuseError("The property must be one value, 0 or 1, for each record.")
    if labels.is_floating_point():
        if not bool(((labels == 0.0) | (labels == 1.0)).all()):
            raise MisuseError("Decimal labels must be 0 or 1; use whole numbers for classes.")
    elif int(labels.min()) < 0:
        raise MisuseError("Classes are numbered from 0; a label is below that.")


def _require_values(inputs: Tensor, kind: Kind) -> None:
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise MisuseError("The inputs hold NaN or infinity; prepare them as for training.")
    alleles = (inputs == 0) | (inputs == 1) | (inputs == 2)  # noqa: PLR2004 - of two haplotypes
    if kind is Kind.GENOTYPES and not (inputs.is_floating_point() and bool(alleles.all())):
        raise MisuseError('Kind "genotypes" takes decimal inputs of 0, 1 or 2 minor alleles.')
