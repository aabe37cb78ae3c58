"""A selector on its own: a model with the stage's values and the taps as graph inputs, for tests and measurements.

Inputs are named ``visual_index``, ``original_index``, ``text``, ``all_text``, ``real``, ``inputs_embeds`` and, for a tap, its kind
(``q``, ``k_rotary``...; ``attention_in.7`` where one kind is tapped in several layers); ``visual_scores`` where it has a vision tap, and
``carried.name`` for what an earlier stage left. What a selector does not read is no input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selector, StageGeometry, StageInputs, Tap

OPSET: Final = 24
IR_VERSION: Final = 11
WIDE: Final = ("residual", "attention_in", "attention_out", "mlp_in", "mlp_out", "final_normed")  # taps [B, S, D], the others have heads


def make_geometry(
    *,
    visual: int,
    keep: int,
    batch: int = 1,
    sequence: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 8,
    original_visual: int = 0,
    layer: int = 4,
    depth: int = 28,
    grid: tuple[int, int] = (1, 0),
    since: int = 0,
) -> StageGeometry:
    """A stage's numbers; the attention scale is ``1/sqrt(d)``.

    ``sequence`` 0 means 8 rows more than the visual tokens, ``original_visual`` 0 that nothing was cut before, a grid without columns
    one row of all visual tokens.
    """
    return StageGeometry(
        layer=layer,
        depth=depth,
        batch=batch,
        sequence=sequence or visual + 8,
        visual=visual,
        keep=keep,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        attention_scale=head_size**-0.5,
        grid=grid if grid[1] else (1, visual),
        original_visual=original_visual or visual,
        since=since,
    )


def tap_name(tap: Tap, taps: tuple[Tap, ...]) -> str:
    """The graph input of a tap: its kind, with the layer added where that kind is tapped more than once."""
    alone = sum(other.kind == tap.kind for other in taps) == 1
    return tap.kind if alone else f"{tap.kind}.{tap.layer}"


def build_standalone(
    selector: Selector,
    geometry: StageGeometry,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    width: int = 16,
    carried: Sequence[str] = (),
) -> ir.Model:
    """A model of opset 24 whose outputs are ``order``, ``scores`` and ``onward.name`` of what goes on; ``dtype`` is that of the taps,
    ``width`` is D, ``carried`` names what an earlier stage left.
    """
    g = geometry
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=f"selector_{selector.name}"))
    wide = [g.batch, g.sequence, width]
    query, key = ([g.batch, heads, g.sequence, g.head_size] for heads in (g.heads, g.kv_heads))
    shapes = {"q": query, "q_rotary": query, "k": key, "k_rotary": key, "v": key}
    taps = selector.taps(g.layer, g.depth, g.since)
    inputs = StageInputs(
        geometry=g,
        visual_index=build.input("visual_index", ir.DataType.INT64, [g.batch, g.visual]),
        original_index=build.input("original_index", ir.DataType.INT64, [g.batch, g.visual]),
        text=build.input("text", ir.DataType.BOOL, [g.batch, g.sequence]),
        all_text=build.input("all_text", ir.DataType.BOOL, [g.batch, g.sequence]),
        real=build.input("real", ir.DataType.BOOL, [g.batch, g.sequence]),
        inputs_embeds=build.input("inputs_embeds", dtype, wide),
        taps={tap: build.input(tap_name(tap, taps), dtype, shapes.get(tap.kind, wide)) for tap in taps},
        carried={name: build.input(f"carried.{name}", ir.DataType.FLOAT, [g.batch, g.sequence]) for name in carried},
        visual_scores=build.input("visual_scores", ir.DataType.FLOAT, [g.batch, g.visual]) if selector.vision_tap else None,
    )
    build.push_module(selector.name)
    selection = selector.select(build, inputs)
    build.pop_module()
    outputs = {"order": selection.order, "scores": selection.scores}
    for name, value in (outputs | {f"onward.{name}": value for name, value in selection.carried.items()}).items():
        build.add_output(build.op.Identity(value) if value.producer() is None else value, name)
    used = [value for value in build.graph.inputs if value.uses()]
    build.graph.inputs.clear()
    build.graph.inputs.extend(used)
    return ir.Model(build.graph, ir_version=IR_VERSION, producer_name="sievert")
