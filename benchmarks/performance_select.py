"""The row of the performance table about the share of prefill that selecting takes as pictures grow."""

from __future__ import annotations

from typing import Final

from benchmarks.performance_model import NEW, RUNTIME_NAME, TEXT, plan_for
from benchmarks.performance_rows import Case, Row, judge
from sievert.bundle.profile import Profile
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.ort_profile import profile_graph
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.lower import lower
from sievert.graph_passes.parts import find_part, name_parts
from sievert.graph_passes.prefill import build_prefill

VISUALS: Final = (576, 1024, 2048, 4096)
KEEP: Final = "22.2%"


def share_rows(case: Case) -> list[Row]:
    """What ONNX Runtime's profiler attributes to the selector, over all of prefill, run by run."""
    reference = case.reference()
    decoder, geometry = find_decoder(reference.dynamic("decoder")), reference.bundle.manifest.geometry
    rows = []
    for visual in VISUALS:
        profile = Profile(visual_tokens=visual, max_text=TEXT, max_new_tokens=NEW)
        plan = plan_for(visual, KEEP, reference.layer)
        made = FixShapes()(build_prefill(decoder, profile, plan, make_cuttings(plan, profile, geometry), (1, visual))).model
        prefill = lower(made, RUNTIME_NAME)
        parts = name_parts(prefill, plan)
        file = ModelFile(reference.bundle.path / f"visual-{visual}.onnx", "", to_bytes(prefill))
        nodes = profile_graph(OnnxRuntime(threads=case.threads), file, geometry, profile, runs=case.rounds)
        chosen = [node for node in nodes if find_part(parts, node.node).startswith("selector")]
        select, whole = ([sum(times) for times in zip(*(node.runs_ms for node in each), strict=True)] for each in (chosen, nodes))
        rows.append(judge(f"selecting over all of prefill, {visual} visual tokens, {KEEP}", select, whole, at_most=0.02))
    return rows
