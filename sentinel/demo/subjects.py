"""The demo's models and records, in the form that `sentinel stress` takes from any site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sentinel.demo import cohorts, xray_data
from sentinel.demo.hearts import network
from sentinel.demo.xray_hospital import initialise, xray_net

if TYPE_CHECKING:
    from torch import nn

HIDDEN = 256  # neurons of the attacked layer
_STARTS = 0  # seed of both models' first weights
_CATEGORIES = tuple(
    at
    for at, feature in enumerate(cohorts.FEATURES)
    if feature.name in {"sex", "cp", "fbs", "restecg", "exang", "slope", "ca", "thal"}
)
_PUBLISHED = 40  # public X-rays of each class that train here, so that the parts are no smaller


def heart_net() -> nn.Sequential:
    """A perceptron for the rows of the heart-disease hospitals."""
    features = len(cohorts.FEATURES)
    return network(features, HIDDEN, torch.Generator().manual_seed(_STARTS))


def hearts() -> dict[str, Any]:
    """One hospital's patients; another hospital's are what the attacker knows beforehand."""
    own, other = cohorts.load("cleveland"), cohorts.load("hungarian")
    sex = [feature.name for feature in cohorts.FEATURES].index("sex")
    return {
        "train": (own.rows, own.labels),
        "public": (other.rows, other.labels),
        "categorical": _CATEGORIES,
        "property": {"train": own.rows[:, sex] > 0.0, "public": other.rows[:, sex] > 0.0},
    }


def xray_model() -> nn.Sequential:
    """The convolutional net of the X-ray demo, at its start."""
    model = xray_net()
    initialise(model, torch.Generator().manual_seed(_STARTS))
    return model


def xrays() -> dict[str, Any]:
    """Chest X-rays: a radiology department's, others to hide among, and public ones."""
    data = xray_data.load()
    more, public = data.public.split(_PUBLISHED)
    own = data.hospital
    return {
        "train": (torch.cat([own.images, more.images]), torch.cat([own.labels, more.labels])),
        "held_out": (data.decoys.images, data.decoys.labels),
        "public": (public.images, public.labels),
        "rate": 0.1,
    }
