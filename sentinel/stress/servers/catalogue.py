"""Every malicious server by name, with its family, one plain sentence, and where it is from.

What they read of 32 records on the LeNet-like net, with public records to tune by (an honest model
gives away .25 to .32; a published figure stands in brackets):

- A: bins .81 and more (.81 to .94) on every line, sparse ones and LOKI's at least .5.
- B: trap weights .82 to .9, each row tuned (.31 to .34 with one factor for all); QBI .78 (.78).
- C: fishing for a class reduces a batch with one record of it to that record (.03 of the rows).
- D: a third to a half of a ViT's tokens in batches of eight, where an honest one gives away none.
- E: one client's gradient out of a sum, read as if it were alone.
- F: a secret decoder .63 to .71, and .4 of 64, where the honest model gives .09 to .21.
- G: eight rounds of 32 neurons read .81 of 64 rows, .95 where cuts follow what came back.
- H: `stealth` wraps them; permuting and scaling cost nothing, a tenth of jitter most bins.

What keeps an attack from a net stands in the docstring of each, and in the tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentinel.errors import MisuseError
from sentinel.stress.servers.binning import binning, isolation, sparse_binning
from sentinel.stress.servers.convolutions import loki, pass_through
from sentinel.stress.servers.craft import NOTHING, Craft, Public, then
from sentinel.stress.servers.fishing import class_separation, fishing_class, fishing_feature
from sentinel.stress.servers.learned import learned_dominance, learned_neurons
from sentinel.stress.servers.lines import Direction
from sentinel.stress.servers.scan import scan
from sentinel.stress.servers.seer import seer, seer_secret
from sentinel.stress.servers.sparse import qbi, trap_weights
from sentinel.stress.servers.suppression import suppression
from sentinel.stress.servers.transformer import token_bins

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn

    from sentinel.stress.layers import State


@dataclass(frozen=True, slots=True)
class Recipe:
    """One malicious server.

    Attributes:
        name: as figures and reports call it.
        family: A to G of the catalogue of attacks; H are the wrappers in `stealth`.
        sentence: what it does, in one plain sentence.
        source: the paper.
        function: the crafting function.
        inputs: the public inputs it takes, names of `Public`.
        needs: those of them it cannot do without.
        secret: draws what its updates are read by, for a layer of so many neurons, where they are
            not read as any other's; the function draws the same first, or is given it as `secret`.
    """

    name: str
    family: str
    sentence: str
    source: str
    function: Callable[..., State]
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    secret: Callable[[int, torch.Generator], Tensor] | None = None

    def craft(self, public: Public = NOTHING, secret: Tensor | None = None) -> Craft:
        """Return the craft with its public inputs bound, and its secret where it is settled.

        Raises:
            MisuseError: an input that the recipe needs is not there.
        """
        given = {name: getattr(public, name) for name in self.inputs}
        if missing := [name for name in self.needs if given[name] is None]:
            msg = f"{self.name} needs public {' and '.join(missing)}; give them as Public(...)"
            raise MisuseError(msg)
        if secret is not None:
            given["secret"] = secret
        return functools.partial(self.function, **given)


def traps_behind_identity(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    sample: Tensor | None = None,
    batch: int = 32,
) -> State:
    """Trap weights that see the image itself, through convolutions made transparent."""
    traps = functools.partial(trap_weights, sample=sample, batch=batch)
    return then(pass_through, traps)(model, state, generator=generator)


FOWL = "Fowl et al., ICLR 2022, arXiv 2110.13057"
BOENISCH = "Boenisch et al., EuroS&P 2023, arXiv 2112.02918"
WEN = "Wen et al., ICML 2022, arXiv 2202.00580"

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "binning-gaussian",
        "A",
        "All neurons scan one random direction at rising thresholds.",
        FOWL,
        functools.partial(binning, scale=0.1),
        ("sample",),
    ),
    Recipe(
        "binning-mean",
        "A",
        "All neurons scan the mean of a record's values.",
        FOWL,
        functools.partial(binning, direction=Direction.MEAN, scale=0.1),
        ("sample",),
    ),
    Recipe(
        "binning-cosine",
        "A",
        "All neurons scan the first cosine wave over a record's values.",
        FOWL,
        functools.partial(binning, direction=Direction.COSINE, scale=0.1),
        ("sample",),
    ),
    Recipe(
        "binning-scaled",
        "A",
        "Bins shrunk a hundredfold, so that several local steps stay close to one.",
        "Shi et al., NDSS 2025",
        functools.partial(binning, scale=0.01),
        ("sample",),
    ),
    Recipe(
        "binning-sparse",
        "A",
        "Bins divided by their width, of which two neighbours make a bounded step.",
        FOWL,
        sparse_binning,
        ("sample",),
    ),
    Recipe(
        "isolation",
        "A",
        "All neurons stand at one cut that the outermost record alone passes.",
        FOWL,
        isolation,
        ("sample", "batch"),
        ("sample",),
    ),
    Recipe(
        "loki",
        "A",
        "Each client's images go through kernels and channels of its own into bins.",
        "Zhao et al., IEEE S&P 2024, arXiv 2303.12233",
        loki,
        ("sample",),
    ),
    Recipe(
        "trap-weights",
        "B",
        "The negative half of each row outweighs the positive, so few records fire it.",
        BOENISCH,
        trap_weights,
        ("sample", "batch"),
    ),
    Recipe(
        "trap-weights-identity",
        "B",
        "Trap weights behind convolutions that pass the image through.",
        BOENISCH,
        traps_behind_identity,
        ("sample", "batch"),
    ),
    Recipe(
        "qbi",
        "B",
        "Each neuron's bias lets one record of a batch past.",
        "Nowak et al., 2024, arXiv 2406.18745",
        qbi,
        ("sample", "batch"),
    ),
    Recipe(
        "fishing-class",
        "C",
        "The loss is certain about every class but one.",
        WEN,
        fishing_class,
    ),
    Recipe(
        "fishing-feature",
        "C",
        "One feature of one class is magnified, and records past a threshold fall silent.",
        WEN,
        fishing_feature,
        ("sample", "batch"),
    ),
    Recipe(
        "class-separation",
        "C",
        "Each class has neurons of its own, so a batch falls apart into its classes.",
        "Wang et al., WACV 2024",
        class_separation,
        ("sample",),
    ),
    Recipe(
        "token-bins",
        "D",
        "Attention is made transparent and feed-forward rows scan single tokens.",
        "Fowl et al., 2022, arXiv 2201.12675",
        token_bins,
        ("sample",),
    ),
    Recipe(
        "suppression",
        "E",
        "A layer is dead for all clients but one, so their sum is that one's update.",
        "Pasquini et al., CCS 2022, arXiv 2111.07380",
        suppression,
    ),
    Recipe(
        "learned-neurons",
        "F",
        "The net is trained so that each record of a batch has neurons of its own.",
        "after EGGV, 2025, arXiv 2502.04106",
        learned_neurons,
        ("sample", "batch"),
        ("sample",),
    ),
    Recipe(
        "learned-dominance",
        "F",
        "The net is trained so that one record of a batch has most of the gradient.",
        "after Shan et al., ICCV 2025, arXiv 2411.14937",
        learned_dominance,
        ("sample", "labels", "batch"),
        ("sample",),
    ),
    Recipe(
        "seer",
        "F",
        "Records come apart in mixtures of neurons that the server alone knows.",
        "after Garov et al., ICLR 2024, arXiv 2306.03013",
        seer,
        ("sample", "batch"),
        ("sample",),
        seer_secret,
    ),
    Recipe(
        "scan",
        "G",
        "Parallel rows scan one part of a line in each round, and the next part in the next.",
        "Diana, 2025, arXiv 2505.10264",
        scan,
        ("sample",),
    ),
)


def recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        MisuseError: there is none.
    """
    for one in RECIPES:
        if one.name == name:
            return one
    msg = f"no malicious server is called {name!r}; there are {', '.join(r.name for r in RECIPES)}"
    raise MisuseError(msg)
