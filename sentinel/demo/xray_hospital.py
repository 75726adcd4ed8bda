"""The hospital of the X-ray demo: its pictures, its model, and what its attacker has beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sentinel.demo import xray_data
from sentinel.stress.layers import State, copied
from sentinel.stress.passive.local_training import LocalTraining
from sentinel.stress.passive.prior import ImagePrior, fit_prior

if TYPE_CHECKING:
    from torch import Tensor

    from sentinel.demo.xray_data import Pictures, XrayData
    from sentinel.demo.xray_result import XraySettings

NET = "three 3x3 convolutions (16, 32, 32 channels; strides 2, 2, 1), ReLU, one linear layer"
SIDE = 28  # pixels


def xray_net() -> nn.Sequential:
    """The model, its weights not yet set: grey [N, 1, 28, 28] in, two classes out."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, device="meta"),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, device="meta"),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, device="meta"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 2, device="meta"),
    ).to_empty(device="cpu")


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Set weights as PyTorch does by default, without its global generator."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


@dataclass(frozen=True)
class Hospital:
    """One hospital, and what its attacker has beforehand.

    Attributes:
        settings: what is run.
        data: the shipped pictures.
        others: public pictures kept out of the prior, as many as the hospital has.
        prior: fitted on the other public pictures.
        model: trained in place.
        global_state: the model as the server sent it.
        generator: of the attacker.
    """

    settings: XraySettings
    data: XrayData
    others: Pictures
    prior: ImagePrior
    model: nn.Module
    global_state: State
    generator: torch.Generator

    @classmethod
    def draw(cls, settings: XraySettings) -> Hospital:
        """Set the hospital up; the seed fixes everything."""
        generator = torch.Generator().manual_seed(settings.seed)
        model = xray_net()
        initialise(model, generator)
        data = xray_data.load()
        others, known = data.public.split(int(data.hospital.labels.bincount().max()))
        prior = fit_prior(known.images, known.labels, settings.components)
        return cls(settings, data, others, prior, model, copied(model.state_dict()), generator)

    def fit(self, pictures: Pictures) -> None:
        """Train the model in place: one step on all pictures."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.settings.rate)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(self.model(pictures.images), pictures.labels).backward()
        optimizer.step()

    def replayed(self, labels: Tensor) -> LocalTraining:
        """The same training, as the attacker simulates it."""
        everything = (torch.arange(len(labels)),)
        return LocalTraining(self.model, self.global_state, labels, everything, self.settings.rate)

    def raw_update(self, pictures: Pictures) -> Tensor:
        """What would leave without the guard, [D]."""
        training = self.replayed(pictures.labels)
        return training.update(pictures.images, differentiable=False)

    def stand_ins(self) -> Pictures:
        """For each of the hospital's pictures another one of its class, so with the same labels."""
        hospital = self.data.hospital
        images = torch.empty_like(hospital.images)
        for label in range(len(self.prior.means)):
            images[hospital.labels == label] = self.others.of_class(label)
        return xray_data.Pictures(images, hospital.labels)

    def one(self, index: int) -> Pictures:
        """A single picture."""
        chosen = slice(index, index + 1)
        hospital = self.data.hospital
        return xray_data.Pictures(hospital.images[chosen], hospital.labels[chosen])
