"""A selector on its own: an ONNX model with the stage's values and the taps as graph inputs, run by ONNX Runtime.

Used by the selectors' own tests and by the property tests that compare them with the float64 transcriptions.
Inputs are named ``visual_index``, ``original_index``, ``text``, ``all_text``, ``inputs_embeds`` and, for a tap, its kind
(``q``, ``k_rotary``...; ``attention_in.7`` where one kind is tapped in several layers); ``visual_scores`` where it has a vision tap, and
``carried.name`` for what an earlier stage left. What a selector does not read is no input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selector, StageGeometry, StageInputs, Tap

OPSET = 24
WIDE = ("residual", "attention_in", "attention_out", "mlp_in", "mlp_out", "final_normed")


@dataclass(frozen=True)
class StandaloneResult:
    """``order[B, K]`` int64, ``scores[B, Nv]`` float32 and what is carried on, ``[B, S]`` float32, as the graph gave them."""

    order: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    carried: Mapping[str, np.ndarray[Any, Any]]


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
    """A model of opset 24 whose outputs are ``order``, ``scores`` and ``carried.name`` of what goes on; ``dtype`` is that of the taps,
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
    for name, value in (outputs | {f"carried.{name}": value for name, value in selection.carried.items()}).items():
        build.add_output(build.op.Identity(value) if value.producer() is None else value, name)
    used = [value for value in build.graph.inputs if value.uses()]
    build.graph.inputs.clear()
    build.graph.inputs.extend(used)
    return ir.Model(build.graph, ir_version=11, producer_name="sievert")


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray[Any, Any]]) -> StandaloneResult:
    """Check the model, run it in ONNX Runtime on the CPU; feeds it has no input for are left out."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in session.get_outputs()]
    found = dict(zip(names, session.run(names, {spec.name: feeds[spec.name] for spec in session.get_inputs()}), strict=True))
    order, scores = found.pop("order"), found.pop("scores")
    return StandaloneResult(order, scores, {name.removeprefix("carried."): value for name, value in found.items()})


def run_standalone(selector: Selector, geometry: StageGeometry, feeds: Mapping[str, np.ndarray[Any, Any]]) -> StandaloneResult:
    """Build and run; the taps' dtype and D are those of the feeds, and feeds named ``carried.name`` are what an earlier stage left.

    Feeds beyond the selector's inputs are ignored.
    """
    carried = [name.removeprefix("carried.") for name in feeds if name.startswith("carried.")]
    taps = selector.taps(geometry.layer, geometry.depth, geometry.since)
    read = [feeds[name] for name in ("inputs_embeds", *(tap_name(tap, taps) for tap in taps)) if name in feeds]
    dtypes = {feed.dtype for feed in read}
    if len(dtypes) > 1:
        raise ValueError(f"taps of one dtype wanted, got {sorted(map(str, dtypes))}")
    dtype = ir.DataType.from_numpy(dtypes.pop()) if dtypes else ir.DataType.FLOAT
    width = next((feed.shape[-1] for feed in read if feed.ndim == 3), 16)
    return run_model(build_standalone(selector, geometry, dtype=dtype, width=width, carried=carried), feeds)


def random_feeds(
    geometry: StageGeometry,
    seed: int,
    *,
    dtype: type[np.floating[Any]] = np.float32,
    spread: float = 1.0,
    taps: tuple[Tap, ...] = (),
) -> dict[str, np.ndarray[Any, Any]]:
    """Normal taps of standard deviation ``spread`` for one stage, for right-padded prompts of several lengths.

    Visual tokens stand at random rows among real text, so there is text before, between and after them (or none); rows of padding
    hold values like any other, which no selector may read. ``taps`` are what the selector under test reads, for kinds in several layers.
    """
    g, rng = geometry, np.random.default_rng(seed)
    visual_index = np.empty((g.batch, g.visual), np.int64)
    real_rows, all_text, text = np.zeros((3, g.batch, g.sequence), bool)
    for sample in range(g.batch):
        real = int(rng.integers(g.visual, g.sequence + 1))
        visual_index[sample] = np.sort(rng.permutation(real)[: g.visual])
        real_rows[sample, :real] = all_text[sample, :real] = True
        all_text[sample, visual_index[sample]] = False
        text[sample] = all_text[sample] & (np.arange(g.sequence) > visual_index[sample, 0])
    heads = {"q": g.heads, "q_rotary": g.heads, "k": g.kv_heads, "k_rotary": g.kv_heads, "v": g.kv_heads}
    wide = {"inputs_embeds", *WIDE, *(tap_name(tap, taps) for tap in taps if tap.kind in WIDE)}
    narrow = heads | {tap_name(tap, taps): heads[tap.kind] for tap in taps if tap.kind in heads}
    original = [np.sort(rng.permutation(g.original_visual)[: g.visual]) for _ in range(g.batch)]
    return {
        "visual_index": visual_index,
        "original_index": np.stack(original).astype(np.int64),
        "text": text,
        "all_text": all_text,
        "real": real_rows,
        "visual_scores": rng.random((g.batch, g.visual), np.float32),
        **{name: rng.normal(0, spread, (g.batch, g.sequence, 16)).astype(dtype) for name in sorted(wide)},
        **{name: rng.normal(0, spread, (g.batch, count, g.sequence, g.head_size)).astype(dtype) for name, count in narrow.items()},
    }
