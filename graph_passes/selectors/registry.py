"""The selectors by name. A new one is a file, a test and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option
from sievert.graph_passes.selectors.base import Selector
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.magnitude import Magnitude
from sievert.graph_passes.selectors.options import check_names, list_options
from sievert.graph_passes.selectors.random_ import Random
from sievert.graph_passes.selectors.schedule import SEVENTH, Schedule
from sievert.graph_passes.selectors.uniform import Uniform


@dataclass(frozen=True)
class Entry:
    """A selector's class, what it does in one line, where its paper cuts, and the paper (empty where there is none)."""

    factory: Callable[..., Selector]
    summary: str
    schedule: Schedule = SEVENTH
    paper: str = ""


SELECTORS: Final[Mapping[str, Entry]] = MappingProxyType(
    {
        "iwp": Entry(Iwp, "tokens with large weight updates toward the question, without duplicates", paper="arXiv:2604.00757"),
        "magnitude": Entry(Magnitude, "iwp's first half: tokens with large weight updates toward the question", paper="arXiv:2604.00757"),
        "random": Entry(Random, "a seeded random choice, the same for every image: a floor to beat"),
        "uniform": Entry(Uniform, "every n-th token: a floor to beat"),
    }
)


def make(name: str, options: Mapping[str, Option]) -> Selector:
    """The selector ``name``; options that are not given keep their defaults.

    Raises:
        PlanError: no such selector, no such option, or a value of the wrong type or out of range.
    """
    entry = _find_entry(name)
    check_names(name, options, tuple(list_options(entry.factory)))
    return entry.factory(**options)


def options(name: str) -> dict[str, Option]:
    """The options of the selector ``name`` and their defaults; a default's type is the option's type.

    Raises:
        PlanError: no such selector.
    """
    return list_options(_find_entry(name).factory)


def _find_entry(name: str) -> Entry:
    if name not in SELECTORS:
        raise PlanError(f"no selector {name!r}: choose from {', '.join(SELECTORS)}")
    return SELECTORS[name]
