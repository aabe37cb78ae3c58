"""Build engines for the variants of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sievert.bundle.errors import EngineUnavailableError, InputError
from sievert.bundle.manifest import EngineEntry
from sievert.bundle.store import Bundle
from sievert.progress import Progress, silent


@dataclass(frozen=True)
class Built:
    """The engine of one variant."""

    variant: str
    engine: str
    entry: EngineEntry


def build(
    bundle: str | Path,
    *,
    variants: Sequence[str] = (),
    engines: Sequence[str] = ("onnxruntime",),
    capabilities: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[Built, ...]:
    """Build engines for some variants, for all if none is named. Each one is a step of its own: those that are done stay.

    ``capabilities`` are the GPU generations to build for, such as ``SM89``; none takes the builder's portable default.

    Raises:
        InputError: an engine that does not exist.
        EngineUnavailableError: one that this machine cannot build; nothing is built then.
        EngineError: a build failed, or a graph would be refused; the message names the rule and what to do.
        VariantError: no such variant.
        BundleError: the bundle is not what its manifest says, or cannot be written.
    """
    require_builders(engines)
    progress("checking the bundle")
    opened = Bundle.open(bundle, verify="full")
    names = tuple(variants) or tuple(sorted(opened.manifest.variants))
    for name in names:
        opened.variant(name)
    return tuple(build_variant(opened, name, engine, capabilities=capabilities, progress=progress) for name in names for engine in engines)


def require_builders(engines: Sequence[str]) -> None:
    """Refuse engines that cannot be built here, before any work is done.

    Raises:
        InputError: an engine that does not exist, or none at all.
        EngineUnavailableError: its library or device is missing.
    """
    from sievert.engines.build.builders import BUILDERS, unavailable_to_build

    if not engines:
        raise InputError(f"no engine is named: choose from {', '.join(BUILDERS)}")
    for engine in engines:
        if engine not in BUILDERS:
            raise InputError(f"there is no engine {engine!r}: choose from {', '.join(BUILDERS)}")
        if reason := unavailable_to_build(engine):
            raise EngineUnavailableError(f"{engine} cannot be built here: {reason}")


def build_variant(bundle: Bundle, variant: str, engine: str, *, capabilities: Sequence[str] = (), progress: Progress = silent) -> Built:
    """Build one engine of one variant of a verified bundle. Raises as :func:`build`."""
    from sievert.engines.build.variant import build as build_engine

    chosen = "".join(f" --capability {name}" for name in capabilities)
    entry = build_engine(
        bundle,
        variant,
        engine,
        capabilities=capabilities,
        progress=lambda graph, _: progress(f"building {engine} for {variant}: {graph}"),
        command=f"build --variant {variant} --engine {engine}{chosen}",
    )
    return Built(variant, engine, entry)
