"""Wrap: make a model, an optimizer and a loader private."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sentinel.dpsgd.loader import PrivateLoader, require_loader
from sentinel.dpsgd.plan import Plan
from sentinel.dpsgd.training import PrivateTraining
from sentinel.dpsgd.units import Units
from sentinel.errors import MisuseError
from sentinel.terms import Unit

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from sentinel.house import House

_MOST_OVER = 2  # times the public cohort; the bound on the sums' error counts on it


def wrap(  # noqa: PLR0913 - each names one thing that the loop has
    house: House,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: object,
    *,
    patients: Iterable[Hashable] | None,
    loss_reduction: str,
    max_records: int | None,
) -> tuple[PrivateTraining, PrivateLoader]:
    """Tap the model, take hold of the optimizer's steps, and draw batches by chance.

    Args:
        house: policy, ledger and entropy.
        model: to be trained; changed in place, by hooks alone.
        optimizer: fresh, of torch.optim, over the model's trainable parameters.
        loader: a DataLoader; its data set, collating and workers are used.
        patients: one id for each index of the data set; only for unit "patient".
        loss_reduction: "mean" or "sum": what the loop's loss does over a batch.
        max_records: most records that the loader gives out at once; None for whole batches.

    Raises:
        MisuseError: something that private training refuses, and what to use in its place.
        PolicyError: the policy lacks a figure.

    Guarantees:
        Batches and training are of one plan, read from the policy once; nothing that the caller
        passes loosens it. What is refused leaves model and optimizer as they were.

    Edges:
        ids under unit "patient" left out:            MisuseError
        ids under unit "record":                      MisuseError
        more than twice the public cohort:            MisuseError
        no promise, or one for a site:                MisuseError
        `max_records` below a patient's cap:          MisuseError
        a record that cannot be blanked:              MisuseError; the model is not tapped
        a layer that mixes records:                   MisuseError, which names it
        an optimizer used before, or of its own kind: MisuseError
    """
    plan = Plan.of(house.rules)
    if loss_reduction not in ("mean", "sum"):
        raise MisuseError('loss_reduction must be "mean" or "sum", as the loss does over a batch.')
    if max_records is not None and max_records < max(1, plan.records_per_unit):
        raise MisuseError(
            "max_records must be at least privacy.records_per_patient: all of a patient's records "
            "in a batch go through the model together."
        )
    if not isinstance(model, nn.Module):
        raise MisuseError("model must be a torch.nn.Module; pass the model itself.")
    known = require_loader(loader)
    units = _units(plan, known.dataset, patients)
    training = PrivateTraining(house, plan, model, optimizer, mean_loss=loss_reduction == "mean")
    try:
        batches = PrivateLoader(
            known,
            units,
            plan.rate,
            house.entropy(),
            most=max_records,
            on_epoch=training.require_epoch,
            on_piece=training.open_batch,
        )
    except BaseException:
        training.remove()  # a refusal leaves model and optimizer as they were
        raise
    return training, batches


def _units(plan: Plan, dataset: Any, patients: Iterable[Hashable] | None) -> Units:  # noqa: ANN401 - as torch types it
    records = len(dataset)
    if plan.unit is Unit.RECORD:
        if patients is not None:
            raise MisuseError(
                "The policy promises privacy per record, and ids of patients were given: a patient "
                'of several records would be protected less. Set privacy.unit = "patient" in the '
                "policy, or leave out patients=."
            )
        units = Units.single(records)
    elif patients is None:
        raise MisuseError(
            "The policy promises privacy per patient: say whose each record is, with patients=ids, "
            "one id for each index of the data set."
        )
    else:
        units = Units.grouped(patients, records, plan.records_per_patient)
    if len(units) > _MOST_OVER * plan.rate.cohort:
        raise MisuseError(
            "The data set holds more than twice as many patients (or records) as the policy says. "
            "Correct the public figure in the policy, or train on the data that it is for."
        )
    return units
