"""Honest federations of every kind that a detector must let pass, as a guard sees them.

A run is a few sites, a server that averages, and what it sends each round. Nothing in it is
crafted: whatever a detector says about one of these models, bar that it diverged, is a false alarm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sentinel.detection.rounds import loss_of
from sentinel.stress.bench.nets import INITS, LOW_RANK, NETS, TIED, WIDE, Net, Site, World, sites
from sentinel.stress.layers import State, copied
from sentinel.stress.nets import BasicBlock, Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LATE = 101  # rounds before the first one of a late run
DIVERGED = 3.0  # times the first round's loss, from which a model is broken and not merely bad


@dataclass(frozen=True, slots=True)
class Way:
    """How a federation trains.

    Attributes:
        sites: how many there are.
        alpha: of the Dirichlet distribution of class shares; 0 for one class each.
        steps: local steps of each site in a round.
        batch: records per step.
        factor: learning rate of round n as a multiple of the run's own.
        momentum: of the server, on the mean update.
        prox: weight of FedProx's pull to the global model.
        scaffold: sites correct their drift by control variates.
        noise: standard deviation of what is added to each value of the mean update.
        frozen: share of the parameters, from the first, that is not trained.
    """

    sites: int = 2
    alpha: float | None = 0.5
    steps: int = 2
    batch: int = 16
    factor: Callable[[int], float] = lambda _: 1.0
    momentum: float = 0.0
    prox: float = 0.0
    scaffold: bool = False
    noise: float = 0.0
    frozen: float = 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of honest run.

    Attributes:
        name: as figures call it.
        way: how it trains.
        nets: on which architectures, in turn.
        runs: how many in the full corpus.
        rounds: global models that are looked at in each.
        before: rounds that pass before the first of them.
        init: first values; in turn where left out.
        begins: what is done to the module before round 0.
        turns: what happens to the server's model once, before which round.
        keeps: what the server makes of each mean, given the model before, and goes on from.
        sends: what it sends of that, and does not go on from.
        back: the round whose model is rolled back to, and when.
    """

    name: str
    way: Way = field(default_factory=Way)
    nets: tuple[Net, ...] = NETS
    runs: int = 11
    rounds: int = 10
    before: int = 0
    init: str | None = None
    begins: Callable[[nn.Module, torch.Generator], None] | None = None
    turns: tuple[int, Callable[[State, torch.Generator], State]] | None = None
    keeps: Callable[[State, State], State] | None = None
    sends: Callable[[State, torch.Generator], State] | None = None
    back: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One honest global model.

    Attributes:
        number: of the round, from 0.
        state: what the server sends.
        broken: whether it diverged: its loss is not finite, or far above the first round's.
    """

    number: int
    state: State
    broken: bool


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """An honest run.

    Attributes:
        kind: what is special about it.
        net: the architecture.
        module: a module of it.
        site: one hospital, for its records.
        world: what all records look like.
        rounds: its global models, in order; made one by one.
    """

    kind: str
    net: Net
    module: nn.Module
    site: Site
    world: World
    rounds: Iterator[Round]


def honest_runs(
    share: float,
    seed: int,
    kinds: Sequence[Kind] | None = None,
    chunk: tuple[int, int] = (0, 1),
) -> Iterator[Run]:
    """Yield honest runs of every kind, over architectures, first values and optimizers in turn.

    Args:
        share: of the full corpus, above 0 to 1: runs per kind, at least one.
        seed: of everything.
        kinds: all where left out.
        chunk: (first, step): only every `step`-th kind from the first; the runs of all chunks
            together are those of the whole.
    """
    every = list(enumerate(KINDS if kinds is None else kinds))
    for place, kind in every[chunk[0] :: chunk[1]]:
        for index in range(math.ceil(share * kind.runs)):
            generator = torch.Generator().manual_seed(seed * 100_003 + 1009 * place + index)
            yield honest_run(kind, _turn(kind.nets, index, place, share), index, generator)


def _turn(nets: tuple[Net, ...], index: int, place: int, share: float) -> Net:
    """Return the architecture of one run: each cheap one once, then as many others, in turn."""
    cheap = [net for net in nets if not net.costly]
    others = [net for net in nets if net.costly]
    if share < 1.0 or not cheap or not others:  # a small corpus takes other nets in every kind
        return nets[(index + (0 if share >= 1.0 else 5 * place)) % len(nets)]
    if index < len(cheap):
        return cheap[index]
    return others[(index - len(cheap) + 3 * place) % len(others)]


def honest_run(kind: Kind, net: Net, index: int, generator: torch.Generator) -> Run:
    """Make one run; its rounds are trained as they are asked for.

    Args:
        kind: of run.
        net: the architecture.
        index: of the run, which settles first values and optimizer.
        generator: draws the rest.
    """
    module = net.fresh(generator, kind.init or INITS[index % len(INITS)])
    if kind.begins is not None:
        with torch.no_grad():
            kind.begins(module, generator)
    world = World(net, generator)
    way = replace(kind.way, batch=8) if net.costly else kind.way
    hospitals = sites(world, way.sites, way.alpha, generator)
    adam = index % 3 == 2  # noqa: PLR2004 - every third run
    rate = (0.002 if adam else 0.03) * 4.0 ** float(torch.rand(1, generator=generator))
    trainer = _Trainer(module, hospitals, way, rate, adam, generator)
    rounds = _rounds(kind, trainer, generator)
    return Run(kind.name, net, module, hospitals[0], world, rounds)


def _rounds(kind: Kind, trainer: _Trainer, generator: torch.Generator) -> Iterator[Round]:
    state = copied(trainer.module.state_dict())
    probe = trainer.hospitals[0].draw(32)
    first = trainer.loss(state, probe)
    past: list[State] = []
    for number in range(kind.before + kind.rounds):
        if kind.turns is not None and number == kind.turns[0]:
            state = kind.turns[1](state, generator)
        if kind.back is not None and number == kind.back[1]:
            state = copied(past[kind.back[0]])
        if kind.back is not None:
            past.append(copied(state))
        if number >= kind.before:
            loss = trainer.loss(state, probe)
            broken = not math.isfinite(loss) or loss > DIVERGED * max(first, 0.5)
            sent = kind.sends(copied(state), generator) if kind.sends else copied(state)
            yield Round(number, sent, broken)
        before, state = state, trainer.round(state, number)
        if kind.keeps is not None:
            state = kind.keeps(state, before)


class _Trainer:
    """The sites and the server of one run."""

    def __init__(  # noqa: PLR0913, PLR0917 - private: all that a run consists of
        self,
        module: nn.Module,
        hospitals: list[Site],
        way: Way,
        rate: float,
        adam: bool,  # noqa: FBT001 - private
        generator: torch.Generator,
    ) -> None:
        self.module, self.hospitals, self.way = module, hospitals, way
        self._rate, self._adam, self._generator = rate, adam and not way.scaffold, generator
        names = [name for name, _ in module.named_parameters()]
        self._trained = names[math.floor(way.frozen * len(names)) :]
        self._speed: State = {}
        self._drifts: list[State] = [{} for _ in hospitals]

    def loss(self, state: State, batch: tuple[Tensor, Tensor]) -> float:
        """Loss of a state, with the batch's own statistics where it normalises by them.

        In evaluation mode a sound model would look broken until its running statistics are there.
        """
        self.module.load_state_dict(state)
        with torch.no_grad():
            loss = float(loss_of(self.module.train()(batch[0]), batch[1], batch[0]))
        self.module.eval()
        return loss

    def round(self, state: State, number: int) -> State:
        """Return the next global model."""
        rate = self._rate * self.way.factor(number)
        common = self._common_drift()
        locals_ = [self._local(state, place, rate, common) for place in range(len(self.hospitals))]
        following = {
            name: torch.stack([one[name] for one in locals_]).mean(0)
            if value.is_floating_point()
            else locals_[0][name]
            for name, value in state.items()
        }
        for name in self._trained:
            step = following[name] - state[name]
            if self.way.momentum:
                step = self._speed[name] = step + self.way.momentum * self._speed.get(name, 0.0)
            if self.way.noise:
                step = step + self.way.noise * torch.randn(step.shape, generator=self._generator)
            following[name] = state[name] + step
        # Names of one shared weight hold one value.
        self.module.load_state_dict(following)
        return copied(self.module.state_dict())

    def _local(self, state: State, place: int, rate: float, common: State) -> State:
        """Train one site, and return its local state."""
        module, site, way = self.module, self.hospitals[place], self.way
        module.load_state_dict(state)
        module.train()
        values = dict(module.named_parameters())
        chosen = {name: values[name] for name in self._trained}
        start = {name: value.detach().clone() for name, value in chosen.items()}
        optimizer = torch.optim.Adam(chosen.values(), lr=rate) if self._adam else None
        drift = self._drifts[place]
        for _ in range(way.steps):
            records, labels = site.draw(way.batch)
            loss = loss_of(module(records), labels, records)
            grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
            with torch.no_grad():
                for (name, value), grad in zip(chosen.items(), grads, strict=True):
                    step = torch.zeros_like(value) if grad is None else grad
                    step = step + way.prox * (value - start[name])
                    step = step + common.get(name, 0.0) - drift.get(name, 0.0)
                    if optimizer is None:
                        value.sub_(step, alpha=rate)
                    value.grad = step
            if optimizer is not None:
                optimizer.step()
        module.eval()
        for value in chosen.values():
            value.grad = None
        if way.scaffold:
            self._learn_drift(place, start, chosen, common, rate)
        return copied(module.state_dict())

    def _common_drift(self) -> State:
        """Mean of the sites' control variates."""
        if not self.way.scaffold or not self._drifts[0]:
            return {}
        return {
            name: torch.stack([drift[name] for drift in self._drifts]).mean(0)
            for name in self._drifts[0]
        }

    def _learn_drift(
        self,
        place: int,
        start: State,
        now: Mapping[str, Tensor],
        common: State,
        rate: float,
    ) -> None:
        """Set a site's control variate (Karimireddy et al., ICML 2020, option II)."""
        before = self._drifts[place]
        self._drifts[place] = {
            name: before.get(name, torch.zeros_like(value))
            - common.get(name, torch.zeros_like(value))
            + (start[name] - value.detach()) / (self.way.steps * rate)
            for name, value in now.items()
        }


def _matrices(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating entries of two axes and more."""
    for name, value in state.items():
        if value.is_floating_point() and value.ndim > 1:
            yield name, value


def _pruned(share: float) -> Callable[[State, torch.Generator], State]:
    """Set the smallest entries of each matrix to zero."""

    def turn(state: State, _: torch.Generator) -> State:
        for _name, value in _matrices(state):
            sizes = value.abs().flatten()
            cut = sizes.kthvalue(max(1, int(share * len(sizes)))).values
            value[value.abs() <= cut] = 0.0
        return state

    return turn


def _masked(state: State, before: State) -> State:
    """Keep at zero what was zero, as a pruned model is trained on."""
    for name, value in _matrices(state):
        value[before[name] == 0.0] = 0.0
    return state


def _units_pruned(state: State, _: torch.Generator) -> State:
    """Set the smaller half of each hidden layer's units to zero, bias and all."""
    for name in _hidden(state):
        norms = state[name].flatten(1).norm(dim=1)
        gone = norms <= norms.median()
        state[name][gone] = 0.0
        bias = state.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape == gone.shape:
            bias[gone] = 0.0
    return state


def _rounded(bits: int) -> Callable[[State, torch.Generator], State]:
    """Round each matrix to as many levels, symmetric, one scale for each."""
    most = 2 ** (bits - 1) - 1

    def send(state: State, _: torch.Generator) -> State:
        for _name, value in _matrices(state):
            scale = value.abs().max().clamp_min(1e-12) / most
            value.copy_((value / scale).round() * scale)
        return state

    return send


def _cast(dtype: torch.dtype) -> Callable[[State, torch.Generator], State]:
    """Send floating values in another dtype."""

    def send(state: State, _: torch.Generator) -> State:
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in state.items()
        }

    return send


def _hidden(state: State) -> list[str]:
    """Names of the matrices between the first and the last."""
    names = [
        name for name, _ in _matrices(state) if name.endswith("weight") and "words" not in name
    ]
    return names[:-1]


def _redrawn(state: State, generator: torch.Generator) -> State:
    """Draw one hidden layer anew, as PyTorch would."""
    names = _hidden(state)
    name = names[int(torch.randint(len(names), (1,), generator=generator))]
    bound = 1.0 / math.sqrt(state[name][0].numel())
    state[name].uniform_(-bound, bound, generator=generator)
    bias = state.get(f"{name.removesuffix('weight')}bias")
    if bias is not None:
        bias.uniform_(-bound, bound, generator=generator)
    return state


def _headed(state: State, generator: torch.Generator) -> State:
    """Give a trained model a fresh last layer."""
    name = [name for name, value in _matrices(state) if value.ndim == 2][-1]  # noqa: PLR2004 - a dense layer
    bound = 1.0 / math.sqrt(state[name].shape[1])
    state[name].uniform_(-bound, bound, generator=generator)
    bias = state.get(f"{name.removesuffix('weight')}bias")
    if bias is not None:
        bias.zero_()
    return state


def _faded(state: State, generator: torch.Generator) -> State:
    """Shrink 30 to 60 % of the units of each hidden layer to a hundredth."""
    share = 0.3 + 0.3 * float(torch.rand(1, generator=generator))
    for name in _hidden(state):
        chosen = torch.rand(len(state[name]), generator=generator) < share
        state[name][chosen] *= 0.01
        bias = state.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape == chosen.shape:
            bias[chosen] *= 0.01
    return state


def _zero_residuals(module: nn.Module, _: torch.Generator) -> None:
    """Let every residual branch begin at zero."""
    for part in module.modules():
        if isinstance(part, BasicBlock):
            part.bn2.weight.zero_()  # type: ignore[operator]  # a normalisation
        elif isinstance(part, Block):
            part.attention.out_proj.weight.zero_()
            part.feed[2].weight.zero_()  # type: ignore[operator]  # a dense layer


def _zero_adapters(module: nn.Module, _: torch.Generator) -> None:
    """Let every low-rank adapter begin at zero."""
    for name, part in module.named_modules():
        if name.endswith("lora_b"):
            part.weight.zero_()


def _imbalanced(module: nn.Module, generator: torch.Generator) -> None:
    """Begin with the logarithms of class shares from a half down to a thousandth."""
    head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    logs = -math.log(1000.0) * torch.rand(head.out_features, generator=generator)
    logs[0] = -math.log(2.0)
    head.bias.copy_(logs)


def _small_head(module: nn.Module, _: torch.Generator) -> None:
    """Begin with a last layer of zeros."""
    head = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    head.weight.zero_()
    head.bias.zero_()


def _restarts(number: int) -> float:
    """Cosine from 3 to nearly 0 in four rounds, then again (Loshchilov and Hutter, ICLR 2017)."""
    return 1.5 * (1.0 + math.cos(math.pi * (number % 4) / 4.0)) + 0.01


CLASSIFIERS = tuple(net for net in NETS if not net.name.startswith("autoencoder"))
RESIDUAL = tuple(net for net in NETS if net.name.startswith(("resnet", "vit", "text")))
CHEAP = tuple(net for net in NETS if not net.costly)
KINDS: tuple[Kind, ...] = (
    Kind("rounds 0 to 5", runs=18, rounds=6),
    Kind("rounds 6 to 30", before=6, rounds=24),
    Kind("rounds over 100", nets=NETS, before=LATE),
    Kind("a hundred rounds", nets=CHEAP, runs=16, rounds=100),
    Kind("pretrained, fresh head", nets=CLASSIFIERS, before=20, turns=(20, _headed)),
    Kind("Dirichlet .1", replace(Way(), alpha=0.1, steps=4)),
    Kind("Dirichlet 1", replace(Way(), alpha=1.0, sites=4)),
    Kind("single-class sites", replace(Way(), alpha=0.0, sites=3, steps=4)),
    Kind("learning rate x10", replace(Way(), factor=lambda n: 10.0 if n >= 3 else 1.0)),  # noqa: PLR2004 - from round 3
    Kind("warm restarts", replace(Way(), factor=_restarts)),
    Kind("server momentum", replace(Way(), momentum=0.9)),
    Kind("FedProx", replace(Way(), prox=1.0, steps=4)),
    Kind("SCAFFOLD", replace(Way(), scaffold=True)),
    Kind("noise .001", replace(Way(), noise=0.001)),
    Kind("noise .01", replace(Way(), noise=0.01)),
    Kind("noise .05", replace(Way(), noise=0.05)),
    Kind("int8", sends=_rounded(8)),
    Kind("4-bit", sends=_rounded(4)),
    Kind("float16", sends=_cast(torch.float16)),
    Kind("bfloat16", sends=_cast(torch.bfloat16)),
    Kind("pruned 50 %", turns=(2, _pruned(0.5)), keeps=_masked),
    Kind("pruned 75 %", turns=(2, _pruned(0.75)), keeps=_masked),
    Kind("pruned 90 %", turns=(2, _pruned(0.9)), keeps=_masked),
    Kind("half of the units pruned", turns=(4, _units_pruned), keeps=_masked),
    Kind("a re-initialised layer", before=2, turns=(6, _redrawn)),
    Kind("near-dead units", before=2, turns=(5, _faded)),
    Kind(
        "dying units", replace(Way(), factor=lambda n: 30.0 if n in {3, 4} else 1.0), init="kaiming"
    ),
    Kind("tied embeddings", nets=TIED, runs=12),
    Kind("zero-init residuals", nets=RESIDUAL, runs=12, begins=_zero_residuals),
    Kind("LoRA, B = 0", nets=LOW_RANK, runs=12, begins=_zero_adapters),
    Kind("zero-init head", nets=CLASSIFIERS, begins=_small_head),
    Kind("identity inits", replace(Way(), factor=lambda _: 0.2), init="identity"),
    Kind("class-imbalanced bias", replace(Way(), alpha=0.1), nets=CLASSIFIERS, begins=_imbalanced),
    Kind("rollback", rounds=12, back=(1, 9)),
    Kind("frozen layers", replace(Way(), frozen=0.5)),
    Kind(
        "over 5 M parameters",
        replace(Way(), sites=1, steps=1, batch=8, factor=lambda _: 0.2),  # wide layers move faster
        nets=WIDE,
        runs=6,
        rounds=9,
    ),
)
