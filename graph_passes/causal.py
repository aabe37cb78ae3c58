"""Prove that a decoder's mask is causal and nothing else, so that ``is_causal`` may stand for it.

With right padding no real row of a causal layer sees a padded one: the padding part of the mask is then not needed either. A sliding window
shorter than the cache, or a bidirectional image block, is not causal and is refused.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sievert.bundle.errors import GraphError
from sievert.graph_passes.decoder import Decoder


def prove_causal(decoder: Decoder, length: int) -> None:
    """Evaluate each layer's exported mask at ``length`` tokens without padding and compare it with the causal one.

    Raises:
        GraphError: a layer whose mask is not causal at this length; the message names the layer and the first pair that differs.
    """
    first_layer: dict[ir.Value, int] = {}
    for layer in decoder.layers:
        if layer.mask is not None:
            first_layer.setdefault(layer.mask, layer.index)
    causal = np.tri(length, dtype=bool)
    for mask, index in first_layer.items():
        allowed = np.broadcast_to(_evaluate(decoder, mask, length), (1, 1, length, length))[0, 0]
        if not np.array_equal(allowed, causal):
            query, key = (int(number) for number in np.argwhere(allowed != causal)[0])
            verb = "sees" if allowed[query, key] else "does not see"
            raise GraphError(
                f"layer {index} is not causal at {length} tokens: row {query} {verb} row {key} (a sliding window shorter than "
                "the cache, or bidirectional attention); lower --max-text or --max-new-tokens below the window, or use another model"
            )


def _evaluate(decoder: Decoder, mask: ir.Value, length: int) -> np.ndarray:
    """Which keys each query may see, ``[1, 1, length, length]`` or broadcastable, bool."""
    inputs = [decoder.inputs_embeds, decoder.attention_mask, decoder.position_ids]
    graph = ir.convenience.extract(decoder.model.graph, inputs, [mask])
    model = ir.Model(graph, ir_version=decoder.model.ir_version)
    feeds = {
        "inputs_embeds": np.zeros((1, length, decoder.width), decoder.dtype.numpy()),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int64), decoder.position_shape(1, length)),
    }
    value = np.asarray(next(iter(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds))))
    # An additive mask holds 0 where attention is allowed and the dtype's minimum (at least 1e4 in magnitude) elsewhere.
    return value if value.dtype == np.bool_ else value.astype(np.float32) > -1e4
