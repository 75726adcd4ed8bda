"""Whatever privacy rests on says what it guarantees and what it does at its edges, each shown."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent
SHOWN: dict[str, dict[str, str | list[str]]] = tomllib.loads((TESTS / "edges.toml").read_text())
PACKAGES = ("mechanism", "privacy", "dpsgd", "adaptive", "distributed")
ALONE = (
    "audit.peers",
    "bounds",
    "gate",
    "guard",
    "policy.decide",
    "release",
    "releases",
    "round",
    "source",
    "stress.inference.canaries",
    "stress.inference.one_run",
    "update",
)
FACE = {  # the others belong to their modules
    "audit.peers": ("Digests", "digests_of", "read_digests", "claims_of", "compare"),
    "guard": ("Guard", "connect"),
    "policy.decide": ("decide", "let_out"),
    "release": ("release",),
    "releases": ("Releases",),
    "round": ("Round",),
    "source": ("Differences", "Held", "Desk"),
    "update": ("Update", "Assembly", "model_digest"),
}

DATA = "figures alone; what makes them says what holds for them"
READS = "reads what is there"
ASKS = "asks for it; what implements it guarantees it"
EXEMPT = {
    "mechanism.entropy.Entropy": ASKS,
    "mechanism.entropy.Entropy.branch": ASKS,
    "mechanism.entropy.Entropy.fill": ASKS,
    "mechanism.entropy.SystemEntropy": "its one edge, a fork, is among its guarantees",
    "mechanism.entropy.SystemEntropy.branch": "as its class",
    "mechanism.entropy.SystemEntropy.fill": "as its class",
    "mechanism.rounded_normal.slack": "a count times what its module guarantees of one draw",
    "mechanism.transform.Prepared": DATA,
    "privacy.accounting.Promise": DATA,
    "privacy.accounting.Spent": DATA,
    "privacy.events.UnboundedEvent": "has no field",
    "privacy.ledger.Charge": DATA,
    "privacy.ledger.Head": DATA,
    "privacy.ledger.Row": DATA,
    "privacy.ledger.Ledger.counted": READS,
    "privacy.ledger.Ledger.hash_at": READS,
    "privacy.ledger.Ledger.head": READS,
    "privacy.ledger.Ledger.last_log_head": READS,
    "privacy.ledger.Ledger.rows": READS,
    "privacy.ledger.Ledger.spent": "`total` of what is there",
    "privacy.ledger.Ledger.was_charged": READS,
    "adaptive.bound.Seen": DATA,
    "adaptive.memory.Keeper": ASKS,
    "adaptive.memory.Keeper.locked": ASKS,
    "adaptive.memory.Keeper.read": ASKS,
    "adaptive.memory.Keeper.write": ASKS,
    "adaptive.shown.Fill": DATA,
    "adaptive.shown.Shown": DATA,
    "distributed.guard.Guard.private": "always refuses",
    "guard.Guard.round_of": "`round` without its checks, for the guard of several processes",
    "guard.connect": "always refuses",
    "stress.inference.canaries.CanaryAttack": DATA,
    "stress.inference.canaries.CanaryAudit": DATA,
    "stress.inference.one_run.Guesses": DATA,
}


def name_of(thing: Any) -> str:
    """Without the package's own name."""
    return f"{thing.__module__}.{thing.__qualname__}".removeprefix("sentinel.")


def is_made_here(thing: object) -> bool:
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith(
        "sentinel."
    )


def members(thing: object) -> Iterator[Any]:
    """A function, or a class and its own functions; properties are figures."""
    yield thing
    if inspect.isclass(thing):
        for value in vars(thing).values():
            value = getattr(value, "__func__", value)  # noqa: PLW2901 - of a class method
            if inspect.isfunction(value) and value.__module__ == thing.__module__:
                yield value


@cache
def public() -> dict[str, Any]:
    """Every name that a caller may use, and that privacy rests on."""
    found = []
    for package in PACKAGES:
        module = import_module(f"sentinel.{package}")
        found += [getattr(module, name) for name in module.__all__]
    for name in ALONE:
        module = import_module(f"sentinel.{name}")
        own = [thing for thing in vars(module).values() if is_made_here(thing)]
        found += [
            thing
            for thing in own
            if thing.__module__ == module.__name__
            and not thing.__name__.startswith("_")
            and thing.__name__ in FACE.get(name, (thing.__name__,))
        ]
    return {
        name_of(one): one
        for thing in filter(is_made_here, found)
        for one in members(thing)
        if not one.__name__.startswith("_")
    }


@cache
def documented() -> dict[str, list[str]]:
    """Every name with an Edges section, public or not, and the cases that it names."""
    names = [f"sentinel.{name}" for name in (*PACKAGES, *ALONE)]
    for package in PACKAGES:
        path = import_module(f"sentinel.{package}").__path__
        names += [found.name for found in pkgutil.iter_modules(path, f"sentinel.{package}.")]
    found = {}
    for module in map(import_module, names):
        for thing in filter(is_made_here, map(inspect.unwrap, vars(module).values())):
            if thing.__module__ == module.__name__:
                for one in members(thing):
                    if section(one, "Edges"):
                        found[name_of(one)] = cases(one)
    return found


def section(thing: object, title: str) -> list[str]:
    """The lines under a title of a docstring, without their common indent."""
    lines = (inspect.getdoc(thing) or "").split("\n")
    if f"{title}:" not in lines:
        return []
    found = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        found.append(line.removeprefix("    "))
    return found


def cases(thing: object) -> list[str]:
    """What stands before the colon; lines that go on are indented further."""
    lines = [line for line in section(thing, "Edges") if line and not line.startswith(" ")]
    assert all(": " in line for line in lines), name_of(thing)
    return [line.partition(": ")[0] for line in lines]


def told(thing: Any) -> bool:
    """Whether it says both by itself, or its class says it of it by name."""
    if section(thing, "Guarantees") and section(thing, "Edges"):
        return True
    module, parent = import_module(thing.__module__), thing.__qualname__.rpartition(".")[0]
    holder = getattr(module, parent, None)
    return f"`{thing.__name__}`" in "\n".join(section(holder, "Edges"))


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("name", sorted(public().keys() - EXEMPT.keys()))
def test_what_privacy_rests_on_says_what_it_guarantees_and_does_at_its_edges(name: str) -> None:
    assert told(public()[name])


def test_no_exemption_is_for_what_is_gone_or_has_been_told_since() -> None:
    assert public().keys() >= EXEMPT.keys()
    assert [name for name in EXEMPT if told(public()[name])] == []


@pytest.mark.parametrize("name", sorted(documented().keys() | SHOWN.keys()))
def test_every_line_of_an_edges_section_has_a_test(name: str) -> None:
    """Under the same words in `edges.toml`, and the test is there."""
    assert sorted(documented()[name]) == sorted(SHOWN[name])
    for place in SHOWN[name].values():
        for one in [place] if isinstance(place, str) else place:
            file, _, test = one.partition("::")
            assert test in functions_of(file), one


def test_the_walk_finds_what_there_is() -> None:
    """A walk that found nothing would pass as well."""
    assert {"mechanism.clip.clip_factor", "guard.Guard.private", "bounds.learn"} <= public().keys()
    assert {"dpsgd.clipping.clip_and_add_", "round.Round.release"} <= documented().keys()
    steps = {"gate.gate", "update.Update.from_states", "policy.decide.decide", "release.release"}
    assert steps | {"releases.Releases.load", "source.Desk.lay"} <= public().keys()
    assert not told(lambda: None)
    assert re.fullmatch(r"[a-z0-9_.A-Z]+", "".join(public()))
