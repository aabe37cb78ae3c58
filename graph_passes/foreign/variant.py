"""The static graphs of a pruned foreign decoder: values in, values out, no disk."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.causal import prove_causal
from sievert.graph_passes.decode import build_decode
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.foreign.normalise import ForeignDecoder
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.prefill import build_prefill
from sievert.graph_passes.specialise import specialise

_ENDLESS = 1 << 30
"""Positions of a decoder that computes its rotary tables."""


def describe_geometry(foreign: ForeignDecoder, visual_tokens: int, grid: tuple[int, int] | None) -> Geometry:
    """What plans and profiles are checked against. ``visual_tokens`` are those of one image; of its pixels nothing is known."""
    decoder = foreign.decoder
    rows = decoder.head_weight.shape
    return Geometry(
        depth=decoder.depth,
        width=decoder.width,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        vocabulary=rows[0] if rows is not None and isinstance(rows[0], int) else 0,
        attention_scale=decoder.layers[0].scale,
        max_positions=foreign.max_positions or _ENDLESS,
        image_token_id=-1,
        pad_token_id=-1,
        eos_token_ids=(),
        image_height=0,
        image_width=0,
        channels=0,
        grid=grid,
        visual_tokens=visual_tokens,
    )


def make_pruned(
    foreign: ForeignDecoder, geometry: Geometry, plan: Plan, profile: Profile, *, progress: Callable[[str], None] = lambda _: None
) -> dict[str, ir.Model]:
    """``prefill`` and ``decode`` of the graphs' contract, and ``embed_tokens`` where the source had an embedding.

    Raises:
        PlanError, ProfileError: the plan or profile does not fit the decoder.
        GraphError: it is not causal at the profile's length, or a shape stays unknown.
    """
    profile.check(geometry)
    plan.check(geometry, profile.images)
    cuttings = make_cuttings(plan, profile, geometry)
    decoder = foreign.decoder
    prove_causal(decoder, profile.capacity())
    graphs = {}
    if foreign.embedding is not None:
        progress("embed_tokens")
        rows = (profile.batch, profile.visual_tokens)
        shapes = {"input_ids": (profile.batch, profile.sequence), "image_features": (*rows, decoder.width), "visual_index": rows}
        graphs["embed_tokens"] = specialise(foreign.embedding, shapes)
    progress("prefill")
    grid = geometry.grid or (1, geometry.visual_tokens)
    graphs["prefill"] = FixShapes()(build_prefill(decoder, profile, plan, cuttings, grid)).model
    progress("decode")
    graphs["decode"] = FixShapes()(build_decode(decoder, foreign.embedding, profile, plan)).model
    return graphs
