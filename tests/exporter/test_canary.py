"""An update of the exporter that takes operators apart, or puts others in, is seen here first."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest

from sievert.bundle.errors import GraphError
from sievert.exporter.confirm import confirm_decoder, confirm_interface
from sievert.exporter.names import SCOPES
from tests.tiny_llava import SHAPES, export_tiny

NORMS_PER_LAYER = {"clip-llama": 2, "siglip-qwen2": 2, "clip-mistral": 2, "clip-qwen3": 4}
STANDARD = {"Softmax", "Pow", "Sqrt", "ReduceMean", "Slice", "Neg", "NonZero", "If", "Loop", "Scan"}  # none of these is in a decoder


def counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_per_layer_of_the_decoder(shape: str):
    _, exported = export_tiny(shape)
    found, depth = counts(exported.graphs["decoder"]), exported.geometry.depth
    assert found["Attention"] == depth
    assert found["RotaryEmbedding"] == 2 * depth
    assert found["RMSNormalization"] == NORMS_PER_LAYER[shape] * depth + 1
    assert found["MatMul"] == 7 * depth + 1
    assert found["Cos"] == found["Sin"] == 1
    assert not STANDARD & found.keys()
    assert sum(found.values()) <= 36 * depth + 40


@pytest.mark.parametrize("shape", ["clip-llama", "siglip-qwen2"])
def test_operators_of_the_vision_encoder(shape: str):
    _, exported = export_tiny(shape)
    found = counts(exported.graphs["vision_encoder"])
    assert found["Attention"] == 2  # of three layers: hidden state -2 is what the second leaves
    assert found["Conv"] == 1
    assert not {"Softmax", "ReduceMean", "NonZero", "If"} & found.keys()


def test_embed_tokens_is_gather_and_scatter():
    _, exported = export_tiny("clip-llama")
    found = counts(exported.graphs["embed_tokens"])
    assert found["Gather"] == found["ScatterND"] == 1
    assert found.keys() <= {"Gather", "ScatterND", "Shape", "Squeeze", "Unsqueeze", "Range", "Expand", "Concat"}


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_are_valid_standard_onnx(shape: str):
    _, exported = export_tiny(shape)
    for model in exported.graphs.values():
        assert dict(model.opset_imports) == {"": 24}
        assert {node.domain for node in model.graph} == {""}
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_every_node_knows_its_module_and_nothing_else():
    _, exported = export_tiny("clip-llama")
    for name in ("vision_encoder", "decoder"):
        model = exported.graphs[name]
        assert all(node.metadata_props.keys() <= {SCOPES} for node in model.graph)
        assert not model.metadata_props
        assert not any(value.metadata_props for node in model.graph for value in node.outputs)
    decoder = exported.graphs["decoder"].graph
    for layer in range(exported.geometry.depth):
        inside = [node.op_type for node in decoder if f"'model.layers.{layer}.self_attn'" in node.metadata_props.get(SCOPES, "")]
        assert inside.count("Attention") == 1
        assert inside.count("RotaryEmbedding") == 2
    assert b".py" not in ir.to_proto(exported.graphs["decoder"]).SerializeToString()


def test_interface_has_the_contracts_names():
    _, exported = export_tiny("siglip-qwen2")
    geometry = exported.geometry
    assert (geometry.heads, geometry.kv_heads, geometry.head_size, geometry.visual_tokens) == (14, 2, 8, 16)
    assert [value.name for value in exported.graphs["decoder"].graph.inputs] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert [value.name for value in exported.graphs["decoder"].graph.outputs][:3] == ["logits", "present.0.key", "present.0.value"]
    for name, model in exported.graphs.items():
        confirm_interface(name, model, geometry)


def test_confirmation_names_what_is_missing():
    _, exported = export_tiny("clip-llama")
    geometry = exported.geometry
    with pytest.raises(GraphError, match="4 Attention nodes for 5 layers, expected 5"):
        confirm_decoder(exported.graphs["decoder"], geometry.model_copy(update={"depth": 5}))
    with pytest.raises(GraphError, match=r"scales by 0\.25, expected 0\.5"):
        confirm_decoder(exported.graphs["decoder"], geometry.model_copy(update={"attention_scale": 0.5}))
    with pytest.raises(GraphError, match="image_features has shape"):
        confirm_interface("vision_encoder", exported.graphs["vision_encoder"], geometry.model_copy(update={"visual_tokens": 17}))
