"""What there is to choose from: model families, selectors, engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sievert.bundle.plan import Option, PositionPolicy
from sievert.diagnosing import EngineInfo, inspect_engines

SHOWN_DEPTH = 32
"""The depth that schedules are shown for: that of most 7B decoders."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints that can be exported: ``towers`` and ``decoders`` are transformers' model types."""

    name: str
    model_class: str
    towers: tuple[str, ...]
    decoders: tuple[str, ...]


@dataclass(frozen=True)
class SelectorInfo:
    """A selector, its options with their defaults, and its paper (empty where there is none).

    ``layers`` are those it cuts before by default in a decoder of 32; ``shares`` what each leaves of all visual tokens, from 0 to 1, none
    where that is the user's choice; ``positions`` what it does to positions there.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    layers: tuple[int, ...]
    shares: tuple[float, ...]
    positions: PositionPolicy


def list_families() -> tuple[Family, ...]:
    """The families ``export`` takes."""
    from sievert.exporter.architectures import ARCHITECTURES

    return tuple(Family(each.name, each.model_class, tuple(each.towers), each.decoders) for each in ARCHITECTURES)


def list_selectors() -> tuple[SelectorInfo, ...]:
    """The selectors ``prune`` takes."""
    from sievert.graph_passes.selectors import registry
    from sievert.graph_passes.selectors.schedule import scale_layers

    found = []
    for name, each in registry.SELECTORS.items():
        plan = registry.find_schedule(name, {})
        layers = scale_layers(plan.layers, plan.depth, SHOWN_DEPTH)
        found.append(SelectorInfo(name, each.summary, each.paper, registry.options(name), layers, plan.shares, plan.positions))
    return tuple(found)


def list_engines() -> tuple[EngineInfo, ...]:
    """The engines ``build`` and ``run`` take, and whether this machine can do either."""
    return inspect_engines()
