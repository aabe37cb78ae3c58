"""Prefill: the front at full length, and after each cut the tail entered at its layer with the kept rows.

Before::

    inputs_embeds[B, S, D] -> layers 0..depth-1 at one length -> logits of every row, fresh keys and values

After::

    inputs_embeds[B, S, D] -> layers 0..l-1 -> selector -> kept rows -> layers l.. -> last real row -> logits[B, V]
                                  |                                       |
                          present.{i} [B, G, C_0, d]              present.{i} [B, G, C_1, d]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.graph_passes.decoder import Decoder, Layer
from sievert.graph_passes.instance import Instance
from sievert.graph_passes.rows import Rows, cut_rows, describe_rows, gather_rows
from sievert.graph_passes.selectors.base import Selector, StageGeometry, StageInputs, Tap


@dataclass(frozen=True)
class Cutting:
    """A stage made concrete: the selector object and how many tokens it leaves."""

    selector: Selector
    layer: int
    keep: int


def build_prefill(decoder: Decoder, profile: Profile, plan: Plan, cuttings: Sequence[Cutting], grid: tuple[int, int]) -> ir.Model:
    """The static prefill graph of the contract (DESIGN.md), pruned by ``cuttings`` in order; none gives the unpruned graph.

    Inner values ``stage.{s}.residual``, ``stage.{s}.scores`` and ``stage.{s}.order`` keep these names for :func:`expose`.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="prefill")
    build = GraphBuilder(graph)
    op = build.op
    batch, length = profile.batch, profile.sequence
    stream = build.input("inputs_embeds", decoder.dtype, [batch, length, decoder.width])
    position_ids = build.input("position_ids", ir.DataType.INT64, [batch, length])
    attention_mask = build.input("attention_mask", ir.DataType.INT64, [batch, length])
    visual_index = build.input("visual_index", ir.DataType.INT64, [batch, profile.visual_tokens])
    caches = [
        add_cache_inputs(build, decoder, index, batch, profile.capacity(plan.dropped_at(index, profile.visual_tokens)))
        for index in range(decoder.depth)
    ]
    weights: dict[str, ir.Value] = {}
    outputs: list[tuple[str, ir.Value]] = []
    kept: list[tuple[str, ir.Value]] = []
    build.push_module("rows")
    rows = describe_rows(
        build,
        batch=batch,
        length=length,
        visual=profile.visual_tokens,
        attention_mask=attention_mask,
        visual_index=visual_index,
        position_ids=position_ids,
    )
    build.pop_module()
    segment = _enter(build, decoder, 0, stream, rows.position_ids, weights, "front")
    start, embeds, cuts = 0, stream, {cutting.layer: (number, cutting) for number, cutting in enumerate(cuttings)}
    for layer in decoder.layers:
        if layer.index in cuts:
            number, cutting = cuts[layer.index]
            stream = _name_value(build, segment.get(layer.residual), f"stage.{number}.residual")
            rows, source, kept_index = _cut(build, decoder, cutting, number, segment, rows, embeds, grid, start, plan.positions == "compact")
            embeds = gather_rows(build, embeds, source)
            segment = _enter(
                build, decoder, layer.index, gather_rows(build, stream, source), rows.position_ids, weights, f"tail.{number}"
            )
            start = layer.index
            kept.append((f"kept_index.{number}", kept_index))
        outputs += _attend_causally(build, segment, layer, caches[layer.index])
    dropped = length - rows.length
    last = op.Sub(op.ReduceSum(attention_mask, [1], keepdims=1), dropped + 1)  # [B, 1] row of the last real token
    hidden = op.GatherND(segment.get(decoder.layers[-1].residual_out), op.Unsqueeze(last, [2]), batch_dims=1)  # [B, 1, D]
    outputs.insert(0, ("logits", emit_logits(build, decoder, hidden, weights)))
    for name, value in outputs + kept:
        add_named_output(build, value, name)
    return ir.Model(graph, ir_version=11, producer_name="sievert")


def _enter(
    build: GraphBuilder, decoder: Decoder, layer: int, stream: ir.Value, position_ids: ir.Value, weights: dict[str, ir.Value], scope: str
) -> Instance:
    """The decoder entered at ``layer`` with ``stream[B, n, D]``: lengths, reshapes and rotary tables follow the new inputs."""
    bound = {decoder.inputs_embeds: stream, decoder.position_ids: position_ids, decoder.layers[layer].residual: stream}
    return Instance(build, decoder.model.graph, scope=scope, bound=bound, weights=weights)


def _attend_causally(build: GraphBuilder, segment: Instance, layer: Layer, cache: tuple[ir.Value, ir.Value]) -> list[tuple[str, ir.Value]]:
    """Causal attention over the fresh keys and values, which are also written to rows 0..n-1 of the caches."""
    op = build.op
    query, key, value = segment.get(layer.q_rotary), segment.get(layer.k_rotary), segment.get(layer.v)
    attended = op.Attention(query, key, value, is_causal=1, scale=layer.scale, softmax_precision=int(ir.DataType.FLOAT))
    segment.bind(layer.attended, attended)
    return [
        (f"present.{layer.index}.key", op.TensorScatter(cache[0], key, axis=2)),
        (f"present.{layer.index}.value", op.TensorScatter(cache[1], value, axis=2)),
    ]


def _cut(
    build: GraphBuilder,
    decoder: Decoder,
    cutting: Cutting,
    number: int,
    segment: Instance,
    rows: Rows,
    embeds: ir.Value,
    grid: tuple[int, int],
    start: int,
    compact: bool,
) -> tuple[Rows, ir.Value, ir.Value]:
    taps = {tap: _tap(segment, decoder, tap, start) for tap in cutting.selector.taps(cutting.layer, decoder.depth)}
    geometry = StageGeometry(
        layer=cutting.layer,
        depth=decoder.depth,
        batch=rows.batch,
        sequence=rows.length,
        visual=rows.visual,
        keep=cutting.keep,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        attention_scale=decoder.layers[cutting.layer].scale,
        grid=grid,
    )
    inputs = StageInputs(
        geometry=geometry,
        visual_index=rows.visual_index,
        original_index=rows.original_visual,
        text=rows.text,
        all_text=rows.all_text,
        inputs_embeds=embeds,
        taps=taps,
        carried=rows.carried,
    )
    build.push_module(f"select.{number}", cutting.selector.name)
    selection = cutting.selector.select(build, inputs)
    _name_value(build, selection.scores, f"stage.{number}.scores")
    order = _name_value(build, selection.order, f"stage.{number}.order")
    cut = cut_rows(build, rows, order, cutting.keep, compact=compact, carried=selection.carried)
    build.pop_module()
    return cut.rows, cut.source, cut.kept_index


def _tap(segment: Instance, decoder: Decoder, tap: Tap, start: int) -> ir.Value:
    if tap.layer < start:
        raise PlanError(f"a selector reads {tap.kind} of layer {tap.layer}, which runs before the previous cut at layer {start}: use a carry")
    value: ir.Value = getattr(decoder.layers[tap.layer], tap.kind)
    return segment.get(value)


def add_cache_inputs(build: GraphBuilder, decoder: Decoder, index: int, batch: int, capacity: int) -> tuple[ir.Value, ir.Value]:
    """Inputs ``past_key_values.{i}.key/.value[B, G, C_i, d]``."""
    shape = [batch, decoder.kv_heads, capacity, decoder.head_size]
    key = build.input(f"past_key_values.{index}.key", decoder.dtype, shape)
    return key, build.input(f"past_key_values.{index}.value", decoder.dtype, shape)


def emit_logits(build: GraphBuilder, decoder: Decoder, hidden: ir.Value, weights: dict[str, ir.Value]) -> ir.Value:
    """Final norm and lm_head on one row ``hidden[B, 1, D]``: float32 ``[B, V]``.

    The head is a Gemm on the checkpoint's own ``[V, D]``, so that a tied embedding needs no transposed second copy.
    """
    op = build.op
    bound = {decoder.inputs_embeds: hidden, decoder.layers[-1].residual_out: hidden}
    end = Instance(build, decoder.model.graph, scope="head", bound=bound, weights=weights)
    normed = op.Squeeze(end.get(decoder.head_input), [1])  # [B, D]
    end.bind(decoder.head, op.Gemm(normed, end.get(decoder.head_weight), transB=1))
    logits = end.get(decoder.logits)
    return logits if logits.dtype == ir.DataType.FLOAT else op.Cast(logits, to=ir.DataType.FLOAT)


def _name_value(build: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
    """Give an inner value a name that users and ``expose`` rely on; a graph input or constant gets an Identity to carry it."""
    if value.producer() is None:
        value = build.op.Identity(value)
    value.name = name
    return value


def add_named_output(build: GraphBuilder, value: ir.Value, name: str) -> None:
    """Make ``value`` the graph output ``name``."""
    build.add_output(build.op.Identity(value) if value.is_graph_input() or value.is_graph_output() else value, name)

