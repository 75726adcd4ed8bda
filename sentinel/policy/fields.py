"""What one value in a policy file may be: types that refuse with what was expected instead."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from sentinel.policy import globs
from sentinel.terms import SMALLEST_NOISE_MULTIPLIER, Action

SCHEMA_VERSION = 1
AUTO: Literal["auto"] = "auto"
_WORDS = {action.word: action for action in Action}


def _action(value: object) -> Action:
    """Take the word of an action and nothing else: no number, no other spelling."""
    if isinstance(value, Action):
        return value
    if not isinstance(value, str) or value not in _WORDS:
        raise ValueError("expected " + ", ".join(f'"{word}"' for word in _WORDS))
    return _WORDS[value]


def _number_or_auto(value: object) -> object:
    """Refuse another text in one sentence, not in one for each form that is allowed."""
    if isinstance(value, str | list | dict) and value != AUTO:
        raise ValueError(f'expected a number, as in 0.5, or "{AUTO}"')
    return value


def _bound_kind(value: object) -> str:
    return "auto" if isinstance(value, str) else "number"


def _well_formed(glob: str) -> str:
    wrong = globs.problem(glob)
    if wrong is not None:
        raise ValueError(wrong)
    return glob


def _distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(items)) < len(items):
        raise ValueError("each entry may stand here only once")
    return items


def _true(value: bool) -> bool:  # noqa: FBT001  pydantic hands the value over by position
    if not value:
        raise ValueError("only true is offered: a rule cannot wait for a healthy model")
    return value


def _readable(version: int) -> int:
    """Refuse another format with what to do about it, not merely as a number out of range."""
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"this version reads schema {SCHEMA_VERSION}; install a newer gradient-sentinel, or "
            f"write schema = {SCHEMA_VERSION}"
        )
    if version < SCHEMA_VERSION:
        raise ValueError(f"expected {SCHEMA_VERSION}, the only format there is")
    return version


def _meant_for_noise(value: float) -> float:
    if value < SMALLEST_NOISE_MULTIPLIER:
        raise ValueError(
            f"expected {SMALLEST_NOISE_MULTIPLIER} or more: below it the privacy accountants break "
            "down numerically, and what they would report is no protection in any case"
        )
    return value


SchemaVersion = Annotated[
    int,
    Field(json_schema_extra={"minimum": SCHEMA_VERSION, "maximum": SCHEMA_VERSION}),
    AfterValidator(_readable),
]
# A norm's two ends, and the lower end of `keep`, hold every product and quotient of them finite.
Norm = Annotated[float, Field(ge=1e-12, le=1e12)]
Bound = Annotated[
    Annotated[Norm, Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_bound_kind),
    BeforeValidator(_number_or_auto),
]
NoiseMultiplier = Annotated[float, Field(le=1e6), AfterValidator(_meant_for_noise)]
Noise = Annotated[float, Field(ge=0, le=1e6)]  # of a rule; no accountant reads it
Share = Annotated[float, Field(ge=0, le=1)]
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
OnlyTrue = Annotated[bool, AfterValidator(_true)]
DISTINCT = AfterValidator(_distinct)  # for tuples of names
Glob = Annotated[str, AfterValidator(_well_formed)]
ActionWord = Annotated[
    Action,
    BeforeValidator(_action),
    WithJsonSchema({"type": "string", "enum": list(_WORDS)}),
]


class Strict(BaseModel):
    """Base of everything that is read from a TOML file: strict, closed, frozen, finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
