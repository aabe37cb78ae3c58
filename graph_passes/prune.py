"""Add a variant to a bundle: the only place of the passes that touches the disk."""

from __future__ import annotations

import onnx_ir as ir

from sievert.bundle.manifest import GraphEntry, Variant
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import describe_values
from sievert.bundle.store import Bundle
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
    manifest = bundle.manifest
    dynamic = {graph: ir.load(bundle.graph_file(graph)) for graph in manifest.graphs}
    graphs = make_variant(dynamic, manifest.geometry, plan, profile, progress=progress)
    dropped = [plan.dropped_at(layer, profile.visual_tokens) for layer in range(manifest.geometry.depth)]
    with bundle.step(command) as step:
        entries = {}
        for graph, model in graphs.items():
            file = step.add_bytes(f"{name}.{graph}", ".onnx", ir.to_proto(model).SerializeToString())
            entries[graph] = GraphEntry(file=file, inputs=describe_values(model.graph.inputs), outputs=describe_values(model.graph.outputs))
        variant = Variant(plan=plan, profile=profile, capacities=tuple(profile.capacity(lost) for lost in dropped), graphs=entries)
        step.put_variant(name, variant, force=force)
    return variant
