"""Add a variant to a bundle, or try one in memory: the only place of the passes that touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sievert.bundle.manifest import GraphEntry, Variant
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import describe_values
from sievert.bundle.store import Bundle
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lower import Target, lower
from sievert.graph_passes.selectors import registry
from sievert.graph_passes.variant import Progress, make_variant


def add_variant(
    bundle: Bundle,
    *,
    name: str,
    plan: Plan,
    profile: Profile,
    force: bool = False,
    command: str = "prune",
    progress: Progress = lambda _: None,
) -> Variant:
    """Make the static graphs of ``plan`` and ``profile`` and record them as the variant ``name``.

    The graphs refer to the bundle's weights file; nothing else is written. An empty plan gives the unpruned baseline.

    Raises:
        VariantError: the name is taken (``force`` replaces it) or cannot name a variant.
        PlanError, ProfileError, GraphError: see :func:`make_variant`; nothing is written.
    """
    bundle.require_new_variant(name, force=force)
    geometry = bundle.manifest.geometry
    graphs = make_variant(load_dynamic(bundle), geometry, plan, profile, progress=progress)
    with bundle.step(command) as step:
        files = {graph: step.add_bytes(f"{name}.{graph}", ".onnx", to_bytes(model)) for graph, model in graphs.items()}
        variant = _describe(graphs, files, plan, profile, geometry.depth)
        step.put_variant(name, variant, force=force)
    return variant


@dataclass(frozen=True)
class Preview:
    """A variant that is nowhere on disk: ``bundle`` lists it as ``name``, ``graphs`` are its ONNX files, for a pipeline to run."""

    bundle: Bundle
    name: str
    graphs: Mapping[str, bytes]


def preview_variant(
    bundle: Bundle, dynamic: Mapping[str, ir.Model], *, name: str, plan: Plan, profile: Profile, target: Target = "onnxruntime"
) -> Preview:
    """Make the graphs of ``plan`` and ``profile``, lowered for ``target``, without changing the bundle. ``dynamic``: :func:`load_dynamic`.

    Raises:
        PlanError, ProfileError, GraphError: see :func:`make_variant`.
    """
    manifest = bundle.manifest
    graphs = make_variant(dynamic, manifest.geometry, plan, profile)
    variant = _describe(graphs, {graph: f"{name}.{graph}.onnx" for graph in graphs}, plan, profile, manifest.geometry.depth)
    listed = manifest.model_copy(update={"variants": {**manifest.variants, name: variant}})
    return Preview(Bundle(bundle.path, listed), name, {graph: to_bytes(lower(model, target)) for graph, model in graphs.items()})


def load_dynamic(bundle: Bundle) -> dict[str, ir.Model]:
    """The graphs that every variant is made from; weights stay in their file."""
    return {graph: ir.load(bundle.graph_file(graph)) for graph in bundle.manifest.graphs}


def _describe(graphs: Mapping[str, ir.Model], files: Mapping[str, str], plan: Plan, profile: Profile, depth: int) -> Variant:
    """The manifest's entry of a variant whose graphs stand in ``files``."""
    entries = {
        graph: GraphEntry(file=files[graph], inputs=describe_values(model.graph.inputs), outputs=describe_values(model.graph.outputs))
        for graph, model in graphs.items()
    }
    dropped = [plan.dropped_at(layer, profile.visual_tokens) for layer in range(depth)]
    return Variant(
        plan=plan,
        profile=profile,
        capacities=tuple(profile.capacity(lost) for lost in dropped),
        graphs=entries,
        reads_question=any(registry.make(stage.selector, stage.options).reads_question for stage in plan.stages),
    )
