"""What there is to choose from: model families, selectors, engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sievert.bundle.plan import Option
from sievert.diagnosing import EngineInfo, inspect_engines


@dataclass(frozen=True)
class Family:
    """A family of checkpoints that can be exported: ``towers`` and ``decoders`` are transformers' model types."""

    name: str
    model_class: str
    towers: tuple[str, ...]
    decoders: tuple[str, ...]


@dataclass(frozen=True)
class SelectorInfo:
    """A selector, its options with their defaults, and its paper (empty where there is none)."""

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]


def list_families() -> tuple[Family, ...]:
    """The families ``export`` takes."""
    from sievert.exporter.architectures import ARCHITECTURES

    return tuple(Family(each.name, each.model_class, tuple(each.towers), each.decoders) for each in ARCHITECTURES)


def list_selectors() -> tuple[SelectorInfo, ...]:
    """The selectors ``prune`` takes."""
    from sievert.graph_passes.selectors import registry

    return tuple(SelectorInfo(name, each.summary, each.paper, registry.options(name)) for name, each in registry.SELECTORS.items())


def list_engines() -> tuple[EngineInfo, ...]:
    """The engines ``build`` and ``run`` take, and whether this machine can do either."""
    return inspect_engines()
