"""What is found in an exported decoder, and what is refused with which reason."""

from __future__ import annotations

import ast
from collections.abc import Callable

import onnx_ir as ir
import pytest

from sievert.bundle.errors import GraphError
from sievert.graph_passes.causal import prove_causal
from sievert.graph_passes.decoder import find_decoder
from tests.graph_passes.conftest import Tiny
from tests.tiny_llava import SHAPES

SCOPES = "pkg.torch.onnx.name_scopes"


def sizes(value: ir.Value) -> list[int | None]:
    assert value.shape is not None
    return [axis if isinstance(axis, int) else None for axis in value.shape]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_values_around_each_attention(tiny: Tiny, shape: str) -> None:
    _, exported = tiny(shape)
    g, found = exported.geometry, find_decoder(exported.graphs["decoder"])
    assert (found.depth, found.heads, found.kv_heads, found.head_size, found.width) == (g.depth, g.heads, g.kv_heads, g.head_size, g.width)
    assert found.layers[0].residual is found.inputs_embeds
    for layer in found.layers:
        assert layer.scale == pytest.approx(g.attention_scale)
        for value, heads in ((layer.q, g.heads), (layer.q_rotary, g.heads), (layer.k, g.kv_heads), (layer.v, g.kv_heads)):
            assert sizes(value) == [None, heads, None, g.head_size]
        for value in (layer.residual, layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out, layer.residual_out):
            assert sizes(value) == [None, None, g.width]
        assert len({id(getattr(layer, name)) for name in ("q", "q_rotary", "k", "k_rotary", "v", "attention_in", "mlp_in")}) == 7
    assert found.head_weight.const_value is not None and tuple(found.head_weight.const_value.shape) == (g.vocabulary, g.width)


def rename_input(graph: ir.Graph) -> None:
    graph.inputs[0].name = "hidden_states"


def drop_attention(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type == "Attention":
            node.op_type = "Softmax"


def drop_rotary(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "RotaryEmbedding").op_type = "Relu"


def turn_a_part(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "RotaryEmbedding").attributes.add(ir.AttrInt64("rotary_embedding_dim", 8))


def move_scope(graph: ir.Graph) -> None:
    node = next(node for node in graph if node.op_type == "Attention")
    scopes = [scope.replace("layers.0", "layers.3") for scope in ast.literal_eval(node.metadata_props[SCOPES])]
    node.metadata_props[SCOPES] = repr(scopes)


def feed_value_elsewhere(graph: ir.Graph) -> None:
    node = next(node for node in graph if node.op_type == "Attention")
    value = node.inputs[2]
    while node.op_type != "MatMul":
        assert value is not None
        producer = value.producer()
        assert producer is not None
        node, value = producer, producer.inputs[0]
    node.replace_input_with(0, graph.inputs[0])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (rename_input, "no input 'inputs_embeds'"),
        (drop_attention, "no Attention operator"),
        (drop_rotary, "layer 0: the query comes from Relu"),
        (turn_a_part, "partial rotary"),
        (move_scope, "was exported from layer"),
        (feed_value_elsewhere, "layer 0: the value projection reads 'inputs_embeds'"),
    ],
)
def test_refusals_name_reason_and_culprit(tiny: Tiny, edit: Callable[[ir.Graph], None], reason: str) -> None:
    model = tiny("clip-llama")[1].graphs["decoder"].clone()
    for node, original in zip(model.graph, tiny("clip-llama")[1].graphs["decoder"].graph, strict=True):
        node.metadata_props.update(original.metadata_props)
    edit(model.graph)
    with pytest.raises(GraphError, match=reason):
        find_decoder(model)


def test_causal_mask_is_proved(tiny: Tiny) -> None:
    for shape in SHAPES:
        prove_causal(find_decoder(tiny(shape)[1].graphs["decoder"]), 40)


def see_the_future(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "LessOrEqual").op_type = "GreaterOrEqual"


def forget_oneself(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "LessOrEqual").op_type = "Less"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [(see_the_future, "row 0 sees row 1"), (forget_oneself, "row 0 does not see row 0")],
)
def test_a_mask_that_is_not_causal_is_refused(tiny: Tiny, edit: Callable[[ir.Graph], None], reason: str) -> None:
    model = tiny("clip-llama")[1].graphs["decoder"].clone()
    edit(model.graph)
    with pytest.raises(GraphError, match=f"layer 0 is not causal at 9 tokens: {reason}"):
        prove_causal(find_decoder(model), 9)
