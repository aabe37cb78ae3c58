"""Options of selectors: typed dataclass fields that know their range, checked once when a selector is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option


@dataclass(frozen=True)
class Range:
    """What a value must be: one of ``choices`` where there are any, else within the bounds (``above`` excludes the lower one)."""

    choices: tuple[str, ...] = ()
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf

    def holds(self, value: Option) -> bool:
        """Whether a value of the right type lies in the range; NaN never does."""
        if isinstance(value, str):
            return value in self.choices
        return value >= self.at_least and value > self.above and value <= self.at_most and math.isfinite(value)

    def describe(self, kind: type) -> str:
        """The range in words, for options of type ``kind``."""
        if kind is str:
            return " or ".join(self.choices)
        bounds = {">=": self.at_least, ">": self.above, "<=": self.at_most}
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
        return {bool: "true or false", int: f"a whole number {limits}", float: f"a number {limits}"}[kind].rstrip()


def choice(*choices: str) -> Any:
    """A text option; the first choice is the default."""
    return dataclasses.field(default=choices[0], metadata={"range": Range(choices=choices)})


def number(default: float, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf) -> Any:
    """A number, whole where the default is; the default's type is the option's type."""
    return dataclasses.field(default=default, metadata={"range": Range(at_least=at_least, above=above, at_most=at_most)})


def flag(default: bool) -> Any:
    """A yes-or-no option."""
    return dataclasses.field(default=default, metadata={"range": Range()})


def list_options(selector: Any) -> dict[str, Option]:
    """Options and defaults of a selector class, in the order of its fields."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(selector)
    return {field.name: cast("Option", field.default) for field in fields}


def list_values(selector: Any) -> dict[str, tuple[Option, Range]]:
    """What the options of a selector are set to, and what each may be."""
    return {field.name: (getattr(selector, field.name), field.metadata["range"]) for field in dataclasses.fields(selector)}


def check_names(name: str, given: Mapping[str, Option], known: Sequence[str]) -> None:
    """Refuse an option a selector does not have.

    Raises:
        PlanError: names the options it has.
    """
    for option in given:
        if option not in known:
            raise PlanError(f"selector {name} has no option {option!r}: choose from {', '.join(known) or 'none (it takes no options)'}")


def check_values(name: str, selector: Any) -> None:
    """Refuse a selector whose fields have a wrong type or lie out of range; to be called by its ``__post_init__``.

    Raises:
        PlanError: names the option, its value and what it may be.
    """
    for field in dataclasses.fields(selector):
        value, kind, allowed = getattr(selector, field.name), type(field.default), field.metadata["range"]
        right_type = type(value) is kind or (kind is float and type(value) is int)
        if not right_type or not allowed.holds(value):
            raise PlanError(f"selector {name}: {field.name}={value!r} must be {allowed.describe(kind)}")
