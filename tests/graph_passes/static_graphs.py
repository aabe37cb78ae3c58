"""Small static graphs that keep the contract: two layers, one cut between them, caches of two capacities, weights in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

B, S, NV, K, D, H, G, HEAD, V, TEXT, NEW = 2, 12, 6, 2, 64, 4, 2, 16, 32, 6, 4
CUT = S - NV + K
CAPACITIES = (S + NEW, CUT + NEW)
I64, F32 = ir.DataType.INT64, ir.DataType.FLOAT
DTYPES = {"float32": F32, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPES = {"embed": (V, D), "patch": (D, 3, 4, 4), "norm": (D,), "shift": (D,)} | {
    f"layer.{i}.{name}": shape
    for i in (0, 1)
    for name, shape in (("q", (D, H * HEAD)), ("k", (D, G * HEAD)), ("v", (D, G * HEAD)), ("o", (H * HEAD, D)), ("gain", (D,)))
}


class Weights:
    """One weights file, and initializers that refer to it."""

    def __init__(self, folder: Path, dtype: str, name: str = "weights.data") -> None:
        self.folder, self.dtype, self.name, self._offsets = folder, dtype, name, {}
        rng, content = np.random.default_rng(5), b""
        for key, shape in SHAPES.items():
            self._offsets[key] = len(content)
            values = rng.normal(1.0, 0.1, shape) if len(shape) == 1 else rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
            content += values.astype(NUMPY[dtype]).tobytes()
        (folder / name).write_bytes(content)

    def get(self, build: GraphBuilder, key: str) -> ir.Value:
        if key in build.graph.initializers:
            return build.graph.initializers[key]
        length = int(np.prod(SHAPES[key])) * np.dtype(NUMPY[self.dtype]).itemsize
        tensor = ir.ExternalTensor(
            self.name, self._offsets[key], length, DTYPES[self.dtype], shape=ir.Shape(SHAPES[key]), name=key, base_dir=self.folder
        )
        return build.initializer(tensor, name=key, qualify=False)


def start(name: str) -> GraphBuilder:
    return GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name=name))


def finish(build: GraphBuilder, **outputs: ir.Value) -> ir.Model:
    for name, value in outputs.items():
        build.add_output(value, name.replace("__", "."))
    return ir.Model(build.graph, ir_version=11)


def make_layer(build: GraphBuilder, weights: Weights, layer: int, stream: ir.Value, rows: int, positions: ir.Value) -> tuple[ir.Value, ...]:
    """q, k (both after rotary) and v of a layer."""
    op: Any = build.op
    dtype = DTYPES[weights.dtype]
    frequencies = (100.0 ** -(np.arange(HEAD // 2) / (HEAD // 2))).astype(np.float32)
    angles = op.Mul(op.Unsqueeze(op.Cast(positions, to=F32), [2]), build.initializer(ir.tensor(frequencies), name=f"inv_freq.{layer}"))
    cos, sin = op.Cast(op.Cos(angles), to=dtype), op.Cast(op.Sin(angles), to=dtype)  # [B, S, d/2]
    normed = op.RMSNormalization(stream, weights.get(build, f"layer.{layer}.gain"), axis=-1, epsilon=1e-5, stash_type=1)

    def project(name: str, heads: int) -> ir.Value:
        product = op.MatMul(normed, weights.get(build, f"layer.{layer}.{name}"))
        return cast("ir.Value", op.Transpose(op.Reshape(product, [B, rows, heads, HEAD]), perm=[0, 2, 1, 3]))

    return op.RotaryEmbedding(project("q", H), cos, sin), op.RotaryEmbedding(project("k", G), cos, sin), project("v", G)


def add_attended(build: GraphBuilder, weights: Weights, layer: int, stream: ir.Value, attended: ir.Value, rows: int) -> ir.Value:
    op: Any = build.op
    flat = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [B, rows, H * HEAD])
    return cast("ir.Value", op.Add(stream, op.MatMul(flat, weights.get(build, f"layer.{layer}.o"))))


def add_caches(build: GraphBuilder, dtype: ir.DataType, layer: int) -> tuple[ir.Value, ir.Value]:
    shape = [B, G, CAPACITIES[layer], HEAD]
    return tuple(build.input(f"past_key_values.{layer}.{kind}", dtype, shape) for kind in ("key", "value"))  # type: ignore[return-value]


def make_prefill(weights: Weights) -> ir.Model:
    """Layer 0 at full length, the two visual tokens of largest norm, layer 1 on what is left."""
    build = start("prefill")
    op: Any = build.op
    dtype = DTYPES[weights.dtype]
    stream = build.input("inputs_embeds", dtype, [B, S, D])
    positions, mask = build.input("position_ids", I64, [B, S]), build.input("attention_mask", I64, [B, S])
    visual_index = build.input("visual_index", I64, [B, NV])
    caches = [add_caches(build, dtype, layer) for layer in (0, 1)]
    presents = {}
    q, k, v = make_layer(build, weights, 0, stream, S, positions)
    attended = op.Attention(q, k, v, is_causal=1, scale=HEAD**-0.5, softmax_precision=1)
    presents["present__0__key"], presents["present__0__value"] = (
        op.TensorScatter(c, n, axis=2) for c, n in zip(caches[0], (k, v), strict=True)
    )
    stream = add_attended(build, weights, 0, stream, attended, S)
    stream.name = "stage.0.residual"
    visual = op.Cast(op.GatherND(stream, op.Unsqueeze(visual_index, [2]), batch_dims=1), to=F32)
    scores = op.ReduceL2(visual, [2], keepdims=0)  # [B, Nv]
    scores.name = "stage.0.scores"
    _, order = op.TopK(scores, [K], axis=1, _outputs=2)
    order.name = "stage.0.order"
    kept = op.GatherElements(visual_index, order, axis=1)
    ones = [op.Expand(build.initializer(ir.tensor(np.ones((1, 1), np.int64)), name=f"one.{n}"), [B, n]) for n in (NV, K)]
    flags = op.ScatterElements(op.Expand(build.initializer(ir.tensor(np.ones((1, 1), np.int64)), name="one"), [B, S]), visual_index,
                               op.Sub(ones[0], 1), axis=1)  # fmt: skip
    flags = op.ScatterElements(flags, kept, ones[1], axis=1)  # [B, S] rows that stay
    before = op.CumSum(flags, 1)
    counter = op.Unsqueeze(op.Range(0, S, 1), [0])
    slot = op.Sub(op.Where(op.Greater(flags, 0), before, op.Add(op.Sub(op.Add(counter, 1), before), CUT)), 1)
    source = op.Slice(op.ScatterElements(op.Expand(counter, [B, S]), slot, op.Expand(counter, [B, S]), axis=1), [0], [CUT], [1])
    stream = op.GatherND(stream, op.Unsqueeze(source, [2]), batch_dims=1)
    q, k, v = make_layer(build, weights, 1, stream, CUT, op.GatherElements(positions, source, axis=1))
    attended = op.Attention(q, k, v, is_causal=1, scale=HEAD**-0.5, softmax_precision=1)
    presents["present__1__key"], presents["present__1__value"] = (
        op.TensorScatter(c, n, axis=2) for c, n in zip(caches[1], (k, v), strict=True)
    )
    stream = add_attended(build, weights, 1, stream, attended, CUT)
    last = op.Sub(op.ReduceSum(mask, [1], keepdims=1), NV - K + 1)
    hidden = op.GatherND(stream, op.Unsqueeze(last, [2]), batch_dims=1)
    return finish(build, logits=make_logits(build, weights, hidden), **presents, kept_index__0=op.TopK(
        kept, [K], axis=1, largest=0, _outputs=2)[0])  # fmt: skip


def make_logits(build: GraphBuilder, weights: Weights, hidden: ir.Value) -> ir.Value:
    op: Any = build.op
    normed = op.Squeeze(op.RMSNormalization(hidden, weights.get(build, "norm"), axis=-1, epsilon=1e-5, stash_type=1), [1])
    logits = op.Gemm(normed, weights.get(build, "embed"), transB=1)
    return cast("ir.Value", logits if weights.dtype == "float32" else op.Cast(logits, to=F32))


def make_decode(weights: Weights) -> ir.Model:
    """One token per row, each layer over its whole cache with a boolean mask."""
    build = start("decode")
    op: Any = build.op
    input_ids, positions = build.input("input_ids", I64, [B, 1]), build.input("position_ids", I64, [B, 1])
    cache_row = build.input("cache_row", I64, [B])
    caches = [add_caches(build, DTYPES[weights.dtype], layer) for layer in (0, 1)]
    stream = op.Gather(weights.get(build, "embed"), input_ids)
    presents: dict[str, ir.Value] = {}
    for layer, dropped in ((0, 0), (1, NV - K)):
        row = op.Sub(cache_row, dropped) if dropped else cache_row
        mask = op.LessOrEqual(op.Unsqueeze(op.Range(0, CAPACITIES[layer], 1), [0, 1, 2]), op.Unsqueeze(row, [1, 2, 3]))
        q, k, v = make_layer(build, weights, layer, stream, 1, positions)
        keys, values = (op.TensorScatter(cache, new, row, axis=2) for cache, new in zip(caches[layer], (k, v), strict=True))
        attended = op.Attention(q, keys, values, mask, scale=HEAD**-0.5, softmax_precision=1)
        stream = add_attended(build, weights, layer, stream, attended, 1)
        presents |= {f"present__{layer}__key": keys, f"present__{layer}__value": values}
    return finish(build, logits=make_logits(build, weights, stream), **presents)


def make_vision(weights: Weights) -> ir.Model:
    """Patches, a layer norm, attention over all of them, a tanh Gelu."""
    build = start("vision_encoder")
    op: Any = build.op
    pixels = build.input("pixel_values", DTYPES[weights.dtype], [B, 3, 8, 12])
    patches = op.Conv(pixels, weights.get(build, "patch"), strides=[4, 4], kernel_shape=[4, 4])  # [B, D, 2, 3]
    tokens = op.Transpose(op.Reshape(patches, [B, D, NV]), perm=[0, 2, 1])
    normed = op.LayerNormalization(tokens, weights.get(build, "norm"), weights.get(build, "shift"), axis=-1, stash_type=1)
    heads = op.Transpose(op.Reshape(normed, [B, NV, H, D // H]), perm=[0, 2, 1, 3])
    attended = op.Attention(op.Mul(heads, 0.5), op.Add(heads, 0.1), heads, scale=HEAD**-0.5)
    merged = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [B, NV, D])
    return finish(build, image_features=op.Gelu(op.Add(tokens, merged), approximate="tanh"))


def make_embed(weights: Weights) -> ir.Model:
    """Text embeddings with image features scattered over them."""
    build = start("embed_tokens")
    op: Any = build.op
    input_ids = build.input("input_ids", I64, [B, S])
    features = build.input("image_features", DTYPES[weights.dtype], [B, NV, D])
    visual_index = build.input("visual_index", I64, [B, NV])
    rows = build.initializer(ir.tensor(np.repeat(np.arange(B), NV).reshape(B, NV, 1).astype(np.int64)), name="rows")
    index = op.Concat(rows, op.Unsqueeze(visual_index, [2]), axis=2)
    return finish(build, inputs_embeds=op.ScatterND(op.Gather(weights.get(build, "embed"), input_ids), index, features))


MAKERS = {"vision_encoder": make_vision, "embed_tokens": make_embed, "prefill": make_prefill, "decode": make_decode}


def make_feeds(graph: str, dtype: str) -> dict[str, np.ndarray]:
    """Inputs of a graph: both rows differ in text length and in where their image stands."""
    rng, kind = np.random.default_rng(9), NUMPY[dtype]
    caches = {
        f"past_key_values.{layer}.{name}": rng.normal(size=(B, G, CAPACITIES[layer], HEAD)).astype(kind)
        for layer in (0, 1)
        for name in ("key", "value")
    }
    visual_index = np.array([np.arange(1, 1 + NV), np.arange(3, 3 + NV)])
    mask = (np.arange(S) < np.array([[S - 2], [S]])).astype(np.int64)
    ids = rng.integers(0, V, (B, S))
    feeds: dict[str, dict[str, np.ndarray]] = {
        "vision_encoder": {"pixel_values": rng.normal(size=(B, 3, 8, 12)).astype(kind)},
        "embed_tokens": {"input_ids": ids, "image_features": rng.normal(size=(B, NV, D)).astype(kind), "visual_index": visual_index},
        "prefill": {"inputs_embeds": rng.normal(size=(B, S, D)).astype(kind), "position_ids": np.tile(np.arange(S), (B, 1)),
                    "attention_mask": mask, "visual_index": visual_index, **caches},
        "decode": {"input_ids": ids[:, :1], "position_ids": mask.sum(1, keepdims=True), "cache_row": mask.sum(1), **caches},
    }  # fmt: skip
    return feeds[graph]
