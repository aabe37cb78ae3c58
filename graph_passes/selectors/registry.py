"""The selectors by name. A new one is a file, a test and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option
from sievert.graph_passes.selectors.base import Selector
from sievert.graph_passes.selectors.cdpruner import CdPruner
from sievert.graph_passes.selectors.dart import Dart
from sievert.graph_passes.selectors.divprune import DivPrune
from sievert.graph_passes.selectors.fastv import FastV
from sievert.graph_passes.selectors.fopru import FoPru
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.magnitude import Magnitude
from sievert.graph_passes.selectors.options import check_names, list_options
from sievert.graph_passes.selectors.pyramiddrop import PyramidDrop
from sievert.graph_passes.selectors.random_ import Random
from sievert.graph_passes.selectors.schedule import EMBEDDINGS, SEVENTH, Schedule
from sievert.graph_passes.selectors.sparsevlm import SparseVlm
from sievert.graph_passes.selectors.transprune import TransPrune
from sievert.graph_passes.selectors.uniform import Uniform
from sievert.graph_passes.selectors.visionzip import VisionZip


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
        "dart": Entry(Dart, "tokens least like a few pivots of large keys", Schedule(32, (2,)), "arXiv:2502.11494"),
        "divprune": Entry(DivPrune, "embeddings farthest apart from one another", EMBEDDINGS, "arXiv:2503.02175"),
        "cdpruner": Entry(CdPruner, "embeddings close to the question and far from one another", EMBEDDINGS, "arXiv:2506.10967"),
        "fastv": Entry(
            FastV, "what the last token of the prompt attended to in the layer before", Schedule(32, (2,)), paper="arXiv:2403.06764"
        ),
        "pyramiddrop": Entry(
            PyramidDrop,
            "what the last token of the prompt attends to, at each of three cuts",
            Schedule(32, (8, 16, 24), (0.5, 0.25, 0.125), "compact"),
            paper="arXiv:2410.17247",
        ),
        "sparsevlm": Entry(
            SparseVlm,
            "what the text tokens that speak of the image attend to, at each of three cuts",
            Schedule(32, (3, 7, 16), (300 / 576, 200 / 576, 110 / 576)),
            paper="arXiv:2410.04417",
        ),
        "transprune": Entry(
            TransPrune,
            "tokens that the layers transform much and the question attends to, at each of three cuts",
            Schedule(32, (7, 9, 12), (0.875, 0.625, 0.125), "compact"),
            paper="arXiv:2507.20630",
        ),
        "fopru": Entry(FoPru, "patches that the vision encoder itself attends to, or whole rows of them", EMBEDDINGS, "arXiv:2411.14164"),
        "visionzip": Entry(VisionZip, "patches that the vision encoder's class token attends to", EMBEDDINGS, "arXiv:2412.04467"),
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


def find_schedule(name: str, options: Mapping[str, Option]) -> Schedule:
    """Where the selector ``name`` with ``options`` cuts by default.

    Raises:
        PlanError: as :func:`make`.
    """
    return make(name, options).own_schedule or SELECTORS[name].schedule


def _find_entry(name: str) -> Entry:
    if name not in SELECTORS:
        raise PlanError(f"no selector {name!r}: choose from {', '.join(SELECTORS)}")
    return SELECTORS[name]
