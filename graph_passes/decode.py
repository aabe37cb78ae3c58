"""Decode: one token per row, every layer attending to its own cache.

Before::

    inputs_embeds[B, S, D] -> layers at one length -> logits of every row

After::

    input_ids[B, 1] -> embedding -> layers, k and v written to row ``cache_row - dropped`` of caches [B, G, C_i, d] -> logits[B, V]
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.graph_passes.decoder import Decoder, Layer
from sievert.graph_passes.instance import Instance
from sievert.graph_passes.op import Op
from sievert.graph_passes.prefill import add_cache_inputs, add_named_output, attention_options, emit_logits, enter_decoder
from sievert.graph_passes.sight import ALL_CAUSAL, Sights, find_displaced, name_original_row, stage_before


def build_decode(decoder: Decoder, embed_tokens: ir.Model | None, profile: Profile, plan: Plan, *, sights: Sights = ALL_CAUSAL) -> ir.Model:
    """The static decode graph of the contract (DESIGN.md). Each stage's own row, mask and position are computed in the graph.

    It takes ``original_row.{s}[B, C_s]`` where prefill gives it. A new token is in no block: it sees what is before it, in its window.
    Without ``embed_tokens`` it takes ``inputs_embeds[B, 1, D]`` in the place of ids.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="decode")
    build = GraphBuilder(graph)
    op = build.op
    batch = profile.decode_batch
    embeds_or_ids = (
        build.input("inputs_embeds", decoder.dtype, [batch, 1, decoder.width])
        if embed_tokens is None
        else build.input("input_ids", ir.DataType.INT64, [batch, 1])
    )
    position_ids = build.input("position_ids", ir.DataType.INT64, decoder.position_shape(batch, 1))
    cache_row = build.input("cache_row", ir.DataType.INT64, [batch])
    dropped = [plan.dropped_at(index, profile.visual_tokens) for index in range(decoder.depth)]
    caches = [add_cache_inputs(build, decoder, index, batch, profile.capacity(dropped[index])) for index in range(decoder.depth)]
    origins: dict[int | None, ir.Value] = {}
    for stage in find_displaced(plan, sights):
        capacity = profile.capacity(dropped[plan.stages[stage].layer])
        origins[stage] = build.input(name_original_row(stage), ir.DataType.INT64, [batch, capacity])
    weights: dict[str, ir.Value] = {}
    stream = embeds_or_ids if embed_tokens is None else _embed(build, embed_tokens, embeds_or_ids, weights)
    presents: list[tuple[str, ir.Value]] = []
    segment, row, masks = None, cache_row, dict[int, ir.Value]()
    for layer in decoder.layers:
        if segment is None or dropped[layer.index] != dropped[layer.index - 1]:
            lost = dropped[layer.index]
            if segment is not None:
                stream = segment.get(layer.residual)
            row = op.Sub(cache_row, lost) if lost else cache_row
            masks = {0: _mask_rows(build.op, row, profile.capacity(lost))}
            positions = op.Sub(position_ids, lost) if lost and plan.positions == "compact" else position_ids
            segment = enter_decoder(build, decoder, layer.index, stream, positions, scope=f"decode.{layer.index}", weights=weights)
        window = sights.of(layer.index).window
        if window not in masks:
            origin = origins.get(stage_before(plan, layer.index))
            masks[window] = _mask_window(build.op, masks[0], cache_row, window, origin, profile.capacity(dropped[layer.index]))
        presents += _attend_to_cache(build, segment, layer, caches[layer.index], row, masks[window])
    if segment is None:
        raise GraphError("the decoder has no layers")
    logits = emit_logits(build, decoder, segment.get(decoder.layers[-1].residual_out), weights)
    for name, value in [("logits", logits), *presents]:
        add_named_output(build, value, name)
    return ir.Model(graph, ir_version=11, producer_name="sievert")


def _embed(build: GraphBuilder, embed_tokens: ir.Model, input_ids: ir.Value, weights: dict[str, ir.Value]) -> ir.Value:
    """The text embedding of ``embed_tokens``, without the merge of image features: [B, 1, D]."""
    graph = embed_tokens.graph
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    merge = graph.outputs[0].producer()
    while merge is not None and not merge.op_type.startswith("Scatter"):
        merge = merge.inputs[0].producer() if merge.inputs and merge.inputs[0] is not None else None
    if ids is None or merge is None or merge.inputs[0] is None:
        raise GraphError("embed_tokens does not scatter image features over a text embedding: export it with sievert export")
    return Instance(build, graph, scope="embed", bound={ids: input_ids}, weights=weights).get(merge.inputs[0])


def _mask_rows(op: Op, row: ir.Value, capacity: int) -> ir.Value:
    """Rows 0..row of a cache: ``[B, 1, 1, C]`` bool."""
    return op.LessOrEqual(op.Unsqueeze(op.Range(0, capacity, 1), [0, 1, 2]), op.Unsqueeze(row, [1, 2, 3]))


def _mask_window(op: Op, mask: ir.Value, cache_row: ir.Value, window: int, origin: ir.Value | None, capacity: int) -> ir.Value:
    """``mask`` without rows that are ``window`` or more rows of the unpruned sequence back: ``[B, 1, 1, C]`` bool.

    ``origin[B, C]`` says which row of that sequence each cache row is; None where nothing was cut: its own.
    """
    rows = op.Unsqueeze(op.Range(0, capacity, 1), [0, 1, 2]) if origin is None else op.Unsqueeze(origin, [1, 2])
    return op.And(mask, op.Greater(rows, op.Sub(op.Unsqueeze(cache_row, [1, 2, 3]), window)))


def _attend_to_cache(
    build: GraphBuilder, segment: Instance, layer: Layer, cache: tuple[ir.Value, ir.Value], row: ir.Value, mask: ir.Value
) -> list[tuple[str, ir.Value]]:
    op = build.op
    keys = op.TensorScatter(cache[0], segment.get(layer.k_rotary), row, axis=2)
    values = op.TensorScatter(cache[1], segment.get(layer.v), row, axis=2)
    query = segment.get(layer.q_rotary)
    attended = op.Attention(query, keys, values, mask, **attention_options(layer))
    segment.bind(layer.attended, attended)
    return [(f"present.{layer.index}.key", keys), (f"present.{layer.index}.value", values)]
