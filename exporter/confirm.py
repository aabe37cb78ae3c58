"""What must hold of an exported graph: a change of the exporter is an error here, not a surprise three stages later."""

from __future__ import annotations

import math
from collections import Counter

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.bundle.specs import Geometry
from sievert.exporter.names import BATCH, DECODER, EMBED_TOKENS, SEQUENCE, VISION_ENCODER, VISUAL, vision_outputs

_ADVICE = "this version of transformers, torch or onnxscript translates models differently: install the versions of constraints.txt"


def confirm_decoder(model: ir.Model, geometry: Geometry) -> None:
    """Check that every layer kept its operators and the model's own attention scale.

    Raises:
        GraphError: naming the operator with the counts found and expected.
    """
    counts = Counter(node.op_type for node in model.graph)
    for operator, expected in (("Attention", geometry.depth), ("RotaryEmbedding", 2 * geometry.depth)):
        if counts[operator] != expected:
            raise GraphError(f"{counts[operator]} {operator} nodes for {geometry.depth} layers, expected {expected}: {_ADVICE}")
    norms = counts["RMSNormalization"]
    if norms < 2 * geometry.depth + 1 or (norms - 1) % geometry.depth:
        raise GraphError(f"{norms} RMSNormalization nodes for {geometry.depth} layers, expected 2 or 4 in each and 1 at the end: {_ADVICE}")
    for node in model.graph:
        scale = node.attributes.get_float("scale", 0.0) if node.op_type == "Attention" else geometry.attention_scale
        if not math.isclose(scale, geometry.attention_scale, rel_tol=1e-6):
            raise GraphError(f"attention {node.name} scales by {scale}, expected {geometry.attention_scale} from the head size")


def confirm_interface(name: str, model: ir.Model, geometry: Geometry) -> None:
    """Check shapes of everything that the graph takes and gives.

    Raises:
        GraphError: naming the value, its shape, and the one expected.
    """
    g = geometry
    text, images = (BATCH, SEQUENCE), (BATCH, VISUAL, g.width)
    pictures = BATCH if g.vision_layers else 1  # a tower of one size takes any number
    positions = text if g.position_axes == 1 else (g.position_axes, *text)
    hidden, cache = (BATCH, SEQUENCE, g.width), (BATCH, g.kv_heads, SEQUENCE, g.head_size)
    features = dict.fromkeys(vision_outputs(g.visual_planes), (pictures, g.visual_tokens, g.width))
    expected: dict[str, dict[str, tuple[int | str, ...]]] = {
        VISION_ENCODER: {"pixel_values": (pictures, *g.picture_shape), **features},
        EMBED_TOKENS: {"input_ids": text, "image_features": images, "visual_index": (BATCH, VISUAL), "inputs_embeds": hidden},
        DECODER: {"inputs_embeds": hidden, "attention_mask": text, "position_ids": positions, "logits": (BATCH, SEQUENCE, g.vocabulary)},
    }
    if name == DECODER and g.two_way != "none":
        expected[name]["two_way"] = text
    if name == DECODER:
        expected[name] |= {f"present.{layer}.{part}": cache for layer in range(g.depth) for part in ("key", "value")}
    found = {str(value.name): _shape(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    if found != expected[name]:
        differing = sorted(key for key in found.keys() | expected[name].keys() if found.get(key) != expected[name].get(key))
        key = differing[0]
        raise GraphError(f"{name}: {key} has shape {found.get(key)}, expected {expected[name].get(key)}: {_ADVICE}")


def _shape(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape or ())
