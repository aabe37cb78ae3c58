"""The graph that turns prompts and image features into decoder input; built, not traced: the model's own uses boolean indexing."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.exporter.names import BATCH, EMBED_TOKENS, OPSET, PRODUCER, SEQUENCE, VISUAL
from sievert.exporter.weights import static_shape


def build_embed_tokens(embedding: ir.TensorProtocol, *, name: str, scale: float = 1.0) -> ir.Model:
    """``input_ids[B, S]``, ``image_features[B, Nv, D]``, ``visual_index[B, Nv]`` to ``inputs_embeds[B, S, D]``.

    Rows of the embedding table ``embedding[V, D]`` (initializer ``name``), then image features over the rows ``visual_index`` of each
    prompt. The ids of those rows only need to lie inside the table. ``scale`` is what the model multiplies the table's rows by, not the
    features.
    """
    rows, width = static_shape(embedding)
    dtype = embedding.dtype
    input_ids = ir.val("input_ids", ir.DataType.INT64, (BATCH, SEQUENCE))
    image_features = ir.val("image_features", dtype, (BATCH, VISUAL, width))
    visual_index = ir.val("visual_index", ir.DataType.INT64, (BATCH, VISUAL))
    graph = ir.Graph([input_ids, image_features, visual_index], [], nodes=[], opset_imports={"": OPSET}, name=EMBED_TOKENS)
    op = GraphBuilder(graph).op
    table = ir.val(name, dtype, (rows, width), const_value=embedding)
    graph.register_initializer(table)
    embeddings = op.Gather(table, input_ids, axis=0)  # [B, S, D]
    if scale != 1.0:
        embeddings = op.Mul(embeddings, op.CastLike(scale, embeddings))
    batch = op.Squeeze(op.Shape(visual_index, start=0, end=1), [0])  # []
    sample = op.Unsqueeze(op.Range(0, batch, 1), [1])  # [B, 1]
    samples = op.Expand(sample, op.Shape(visual_index))  # [B, Nv]
    places = op.Concat(op.Unsqueeze(samples, [2]), op.Unsqueeze(visual_index, [2]), axis=2)  # [B, Nv, 2]
    merged = op.ScatterND(embeddings, places, image_features)  # [B, S, D]
    merged.name, merged.type, merged.shape = "inputs_embeds", ir.TensorType(dtype), ir.Shape((BATCH, SEQUENCE, width))
    graph.outputs.append(merged)
    return ir.Model(graph, ir_version=10, producer_name=PRODUCER)
