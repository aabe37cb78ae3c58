"""Tiny random models whose text decoder turns by three axes of positions (time, height, width), and the dynamic graph of it."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import GraphBuilder
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from sievert.bundle.specs import Geometry
from sievert.exporter import export
from sievert.exporter.confirm import confirm_interface
from tests.tiny_llava import randomise

SECTIONS: Final = (2, 3, 3)
FAMILIES: Final = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, MERGE = 4, 5, 2
_VISION: Final = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4},
    "qwen3_vl": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}


def make_tiny(family: str, *, layers: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of ``family`` with random weights: width 64, four heads of 16 over two of keys and values, 96 words."""
    text: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": list(SECTIONS)},
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 6, "vision_end_token_id": 7}
    config = AutoConfig.for_model(family, text_config=text, vision_config=_VISION[family], **tokens)
    auto: Any = AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    randomise(model, seed=seed)
    model.eval()
    return model


def geometry_of(model: PreTrainedModel) -> Geometry:
    """The numbers of the decoder; those of the vision encoder stand for a picture of 4 x 6 tokens after merging."""
    text = model.config.get_text_config()
    return Geometry(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=16,
        vocabulary=text.vocab_size,
        attention_scale=16**-0.5,
        max_positions=text.max_position_embeddings,
        image_token_id=IMAGE,
        pad_token_id=0,
        eos_token_ids=(2,),
        image_height=32,
        image_width=48,
        channels=3,
        grid=(4, 6),
        visual_tokens=24,
        position_axes=3,
    )


def export_decoder(model: PreTrainedModel, geometry: Geometry, dtype: torch.dtype = torch.float32) -> dict[str, ir.Model]:
    """The dynamic decoder and embedding, as an export makes them."""
    graphs = {"decoder": export._decoder(model, geometry, dtype), "embed_tokens": export._embed_tokens(model)}
    for name, graph in graphs.items():
        confirm_interface(name, graph, geometry)
    return graphs


@cache
def export_tiny(family: str) -> tuple[PreTrainedModel, Geometry, dict[str, ir.Model]]:
    """A model, its numbers and its dynamic graphs, with patches of the picture in place of the vision encoder. Do not change."""
    model = make_tiny(family)
    geometry = geometry_of(model)
    return model, geometry, {**export_decoder(model, geometry), "vision_encoder": _patches(geometry)}


def _patches(geometry: Geometry) -> ir.Model:
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="vision_encoder"))
    pixels = build.input("pixel_values", ir.DataType.FLOAT, ["batch", 3, geometry.image_height, geometry.image_width])
    weight = np.random.default_rng(0).normal(0, 0.1, (geometry.width, 3, 8, 8)).astype(np.float32)
    op: Any = build.op
    patches = op.Conv(pixels, build.initializer(ir.tensor(weight), name="patch"), strides=[8, 8], kernel_shape=[8, 8])
    flat = op.Reshape(patches, [0, geometry.width, geometry.visual_tokens])
    build.add_output(op.Transpose(flat, perm=[0, 2, 1]), "image_features")
    return ir.Model(build.graph, ir_version=11)
