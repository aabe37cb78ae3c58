"""From a variant's graphs to engines recorded in its bundle: lower, lint, build, one step of the bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import EngineError, EngineUnavailableError
from sievert.bundle.integrity import check_file
from sievert.bundle.manifest import EngineEntry, EngineFile, Variant
from sievert.bundle.step import OpenStep
from sievert.bundle.store import Bundle
from sievert.engines.build.builders import Builder, describe_builder, find_builder, unavailable_to_build
from sievert.engines.build.process import build_engine
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower

__all__ = ["Lowered", "Progress", "build", "lower_graph", "unavailable_to_build"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

_FLOAT8_SINCE: Final = 89


@dataclass(frozen=True)
class Lowered:
    """A graph for the target: its file's ``name`` in the bundle, and the new ``content`` unless nothing was to lower."""

    name: str
    content: bytes | None
    bfloat16: bool


def build(
    bundle: Bundle,
    variant_name: str,
    engine: str,
    *,
    capabilities: Sequence[str] = (),
    progress: Progress | None = None,
    command: str = "build",
) -> EngineEntry:
    """Build ``engine`` for every graph of a variant and record it; an older one of that name is replaced.

    Every graph is lowered and linted before the first is built. The lowered file is written only where it differs from the graph, over the
    same weights file, and is what the engine is built from. Engines that read ONNX get their lowered files recorded. ``capabilities`` are
    names such as ``SM89``; none takes the builder's portable default. ``progress(graph, share)`` gets 0 to 1 for each graph. The weights
    are as intact as ``bundle`` was found to be: open it with ``verify="full"``.

    Raises:
        EngineUnavailableError: this machine cannot build it.
        EngineError: an unknown engine or capability, a graph the target would refuse (naming rule and remedy), or a build that failed.
        VariantError, IntegrityError, BundleError: as the bundle's own methods. Nothing is recorded and no file stays in all these cases.
    """
    builder = find_builder(engine)
    chosen = _check_capabilities(builder, capabilities)
    if reason := unavailable_to_build(engine):
        raise EngineUnavailableError(reason)
    tell = progress or (lambda _graph, _share: None)
    with bundle.step(command) as step:
        variant = bundle.variant(variant_name)
        _check_precision(builder, variant_name, variant, chosen)
        graphs = {name: entry.file for name, entry in variant.graphs.items()}
        lowered = {name: lower_graph(bundle, builder, name, file) for name, file in graphs.items()}
        if "SM75" in chosen and (half := [name for name, graph in lowered.items() if graph.bfloat16]):
            raise EngineError(f"{', '.join(half)} compute in bfloat16, which Turing (SM75) has not: leave SM75 out, or export in float16")
        made = {}
        for name, graph in lowered.items():
            tell(name, 0.0)
            made[name] = _build_graph(step, builder, f"{variant_name}.{name}", graph, chosen, variant.profile.lengths, partial(tell, name))
            tell(name, 1.0)
        entry = EngineEntry(target=builder.target, graphs=made)
        step.put_engine(variant_name, engine, entry)
    return entry


def lower_graph(bundle: Bundle, builder: Builder, name: str, file: str) -> Lowered:
    """Lower and lint the graph ``name`` of the bundle, which is in ``file``.

    Raises:
        EngineError: lint found errors.
        GraphError: it cannot be lowered.
        IntegrityError: the file is not the one that the manifest lists.
    """
    check_file(bundle.path, bundle.manifest, file, full=True)
    model = ir.load(bundle.file(file))
    lowered = lower(model, builder.target)
    findings = lint(lowered, builder.target)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    for finding in findings:
        if finding.severity == "warning":
            logger.warning("%s for %s: %s", name, builder.engine, finding)
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise EngineError(f"{builder.engine} would refuse {name}: " + "; ".join(errors[:3]) + more)
    content = to_bytes(lowered)
    half = any(value.dtype == ir.DataType.BFLOAT16 for node in lowered.graph for value in node.outputs)
    return Lowered(file, None if content == to_bytes(model) else content, half)


def _build_graph(
    step: OpenStep,
    builder: Builder,
    stem: str,
    graph: Lowered,
    capabilities: tuple[str, ...],
    lengths: tuple[int, int],
    progress: Callable[[float], None],
) -> EngineFile:
    start = time.monotonic()
    source = graph.name if graph.content is None else step.add_bytes(f"{stem}.{builder.target}", ".onnx", graph.content)
    sha256 = (step.added.get(source) or step.manifest.files[source]).sha256
    file = None
    if builder.module is not None:
        plan = step.temporary(".engine")
        build_engine(builder.module, step.path / source, plan, capabilities, lengths=lengths, progress=progress)
        file = step.add_file(plan, f"{stem}.{builder.engine}", ".engine")
    seconds = round(time.monotonic() - start, 3)
    logger.info("%s: built for %s in %.1f s", stem, builder.engine, seconds)
    return EngineFile(lowered=source, built_from=sha256, file=file, builder=describe_builder(builder, capabilities), seconds=seconds)


def _check_precision(builder: Builder, name: str, variant: Variant, capabilities: Sequence[str]) -> None:
    """Refuse a number format that a capability has no arithmetic for, and say what an engine for any GPU leaves open.

    Raises:
        EngineError: 8-bit floats below SM89.
    """
    precision = variant.precision
    if precision is None:
        return
    if precision.random:
        logger.warning("%s: its scales come from random data, and say nothing about the model in use", name)
    if builder.module is None or not any(weight.dtype.startswith("float8") for weight in precision.weights):
        return
    if older := [each for each in capabilities if each.removeprefix("SM").isdigit() and int(each.removeprefix("SM")) < _FLOAT8_SINCE]:
        raise EngineError(
            f"variant {name!r} computes in fp8, which GPUs have from SM{_FLOAT8_SINCE} (Ada) on, not {', '.join(older)}: leave these out, "
            "or quantise to int8"
        )
    if not capabilities:
        logger.warning("%s computes in fp8: its engine runs on SM%d (Ada) and later GPUs only", name, _FLOAT8_SINCE)


def _check_capabilities(builder: Builder, capabilities: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(capabilities))
    if unknown := [name for name in chosen if name not in builder.capabilities]:
        known = ", ".join(builder.capabilities) or "none: its engines run where they were built"
        raise EngineError(f"{builder.engine} cannot build for {', '.join(unknown)}; it offers {known}")
    return chosen
