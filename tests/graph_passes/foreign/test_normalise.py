"""What is matched in decoders of other tools, and what is refused: why, after what, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sievert.bundle.errors import GraphError
from sievert.graph_passes.causal import prove_causal
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.foreign.normalise import ForeignDecoder, check_lengths, normalise
from tests.graph_passes.foreign.sources import TINY, Compact, random_state


class Spelled(Compact):
    """Rotary tables are computed, cast and scaled; rotary embedding and attention are written out on four axes, the cache joined before."""

    softcap = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        op, size = self.op, self.sizes.head_size
        frequencies = (self.sizes.theta ** (-np.arange(0, size, 2) / size)).astype(np.float32)
        angle = op.Mul(op.Cast(op.Unsqueeze(self.positions, [2]), to=ir.DataType.FLOAT), op.Constant(value=ir.tensor(frequencies)))
        both = op.Concat(angle, angle, axis=-1)
        self.wide = [op.Unsqueeze(op.Cast(op.Mul(f(both), 1.0), to=ir.DataType.FLOAT), [1]) for f in (op.Cos, op.Sin)]
        row = op.Range(0, op.Squeeze(op.Shape(self.mask, start=3, end=4)), 1)
        queries = op.Slice(row, op.Sub(op.Shape(row), op.Shape(self.ids, start=1, end=2)), op.Shape(row), [0])
        causal = op.LessOrEqual(row, op.Unsqueeze(queries, [1]))
        self.additive = op.Where(op.And(self.mask, causal), 0.0, -1e9)

    def split(self, value: ir.Value, heads: int) -> ir.Value:
        split: ir.Value = self.op.Transpose(self.op.Reshape(value, [0, 0, heads, self.sizes.head_size]), perm=[0, 2, 1, 3])
        return split

    def turn(self, value: ir.Value) -> ir.Value:
        op, size = self.op, self.sizes.head_size
        first, second = op.Slice(value, [0], [size // 2], [3], [1]), op.Slice(value, [size // 2], [1 << 40], [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        turned: ir.Value = op.Add(op.Mul(value, self.wide[0]), op.Mul(rotated, self.wide[1]))
        return turned

    def repeat(self, value: ir.Value) -> ir.Value:
        op, s = self.op, self.sizes
        length = op.Shape(value, start=2, end=3)
        batch = op.Shape(value, start=0, end=1)
        wide = op.Concat(batch, [s.kv_heads], [s.heads // s.kv_heads], length, [s.head_size], axis=0)
        flat = op.Concat(batch, [s.heads], length, [s.head_size], axis=0)
        repeated: ir.Value = op.Reshape(op.Expand(op.Unsqueeze(value, [2]), wide), flat)
        return repeated

    def layer(self, stream: ir.Value, index: int) -> Any:
        s, op, at = self.sizes, self.op, f"model.layers.{index}"
        normed = self.norm(stream, f"{at}.input_layernorm")
        q, k, v = (
            self.split(self.project(normed, f"{at}.self_attn.{name}_proj"), heads)
            for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
        )
        q = self.turn(q)
        k, v = op.Concat(self.past[index][0], self.turn(k), axis=2), op.Concat(self.past[index][1], v, axis=-2)
        for present, part in ((k, "key"), (v, "value")):
            present.name = f"present.{index}.{part}"
            present.type, present.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", s.kv_heads, "total", s.head_size])
            self.presents.append(present)
        scores = op.Div(op.MatMul(q, op.Transpose(self.repeat(k), perm=[0, 1, 3, 2])), float(s.head_size**0.5))
        if self.softcap:
            scores = op.Mul(op.Tanh(op.Div(scores, self.softcap)), self.softcap)
        attended = op.MatMul(op.Softmax(op.Add(scores, self.additive), axis=-1), self.repeat(v))
        joined = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, -1])
        stream = op.Add(stream, self.project(joined, f"{at}.self_attn.o_proj"))
        normed = self.norm(stream, f"{at}.post_attention_layernorm")
        hidden = op.Relu(self.project(normed, f"{at}.mlp.up_proj"))
        return op.Add(stream, self.project(hidden, f"{at}.mlp.down_proj"))


class Capped(Spelled):
    softcap = 30.0


def compact(**options: Any) -> ir.Model:
    return Compact(TINY, random_state(TINY), **options).finish()


def spelled(form: type[Spelled] = Spelled) -> ir.Model:
    return form(TINY, random_state(TINY)).finish()


def nodes(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


SOURCES: dict[str, Callable[[], ir.Model]] = {
    "compact": compact,
    "tables inside the operator": lambda: compact(inside=True),
    "spelled out": spelled,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_form_becomes_the_one_that_is_known(kind: str):
    foreign = normalise(SOURCES[kind]())
    decoder = foreign.decoder
    assert (decoder.depth, decoder.heads, decoder.kv_heads, decoder.head_size, decoder.width) == (3, 4, 2, 8, 32)
    assert [value.name for value in foreign.model.graph.inputs] == ["inputs_embeds", "attention_mask", "position_ids"]
    presents = {f"present.{layer}.{part}" for layer in range(3) for part in ("key", "value")}
    assert {value.name for value in foreign.model.graph.outputs} == {"logits", *presents}
    assert foreign.embedding is not None and [past.name for past in foreign.past][:2] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert foreign.max_positions == (None if kind == "spelled out" else 512)
    assert foreign.roles.ids == "input_ids" and foreign.roles.mask == "attention_mask" and foreign.roles.positions == "position_ids"
    assert not nodes(foreign.model, "Softmax") and all(len(node.outputs) == 1 for node in nodes(foreign.model, "Attention"))
    prove_causal(decoder, 20)
    again = find_decoder(foreign.model)
    assert [layer.q_rotary.name for layer in again.layers] == [layer.q_rotary.name for layer in decoder.layers]


@pytest.mark.parametrize("kind", SOURCES)
def test_logits_are_those_of_the_source(kind: str):
    expected = run(SOURCES[kind](), {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": POSITIONS, **empty_past()})
    foreign = normalise(SOURCES[kind]())
    found = run(foreign.model, {"inputs_embeds": TABLE[IDS], "attention_mask": np.ones_like(IDS), "position_ids": POSITIONS})
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


IDS = np.random.default_rng(0).integers(0, TINY.vocabulary, (2, 9))
POSITIONS = np.broadcast_to(np.arange(9), IDS.shape).copy()
TABLE = random_state(TINY)["model.embed_tokens.weight"]


def empty_past() -> dict[str, np.ndarray]:
    shape = (2, TINY.kv_heads, 0, TINY.head_size)
    return {f"past_key_values.{i}.{part}": np.zeros(shape, np.float32) for i in range(TINY.layers) for part in ("key", "value")}


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    logits: np.ndarray = session.run(["logits"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    return logits


def no_attention(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        value = node.inputs[0]
        assert value is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
    del model.graph.outputs[1:]


def encoder(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, None)
        node.attributes.pop("is_causal")


def one_bidirectional(model: ir.Model) -> None:
    nodes(model, "Attention")[1].attributes.pop("is_causal")


def capped_logits(model: ir.Model) -> None:
    product = model.graph.outputs[0].producer()
    assert product is not None
    cap = ir.node("Tanh", [product.outputs[0]])
    cap.outputs[0].shape, cap.outputs[0].type = product.outputs[0].shape, product.outputs[0].type
    product.outputs[0].name, cap.outputs[0].name = "uncapped", "logits"
    model.graph.append(cap)
    model.graph.outputs[0] = cap.outputs[0]


def partial_rotary(model: ir.Model) -> None:
    for node in nodes(model, "RotaryEmbedding"):
        node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 4)


def two_logits(model: ir.Model) -> None:
    second = ir.node("Neg", [model.graph.outputs[0]])
    second.outputs[0].name, second.outputs[0].shape, second.outputs[0].type = (
        "scores",
        model.graph.outputs[0].shape,
        ir.TensorType(ir.DataType.FLOAT),
    )
    model.graph.append(second)
    model.graph.outputs[0].name = "first"
    model.graph.outputs.append(second.outputs[0])


def contrib(model: ir.Model) -> None:
    node = nodes(model, "Attention")[0]
    node.domain, node.op_type = "com.microsoft", "GroupQueryAttention"
    model.opset_imports["com.microsoft"] = 1


def old_opset(model: ir.Model) -> None:
    model.opset_imports[""] = model.graph.opset_imports[""] = 17


def fixed_cache(model: ir.Model) -> None:
    node = nodes(model, "Attention")[0]
    past = node.inputs[4]
    written = ir.node("TensorScatter", [past, past], num_outputs=1)
    written.outputs[0].type, written.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), past.shape if past is not None else None
    model.graph.insert_before(node, written)
    node.replace_input_with(4, written.outputs[0])


def another_input(model: ir.Model) -> None:
    extra = ir.val("temperature", ir.DataType.FLOAT, (1,))
    model.graph.inputs.append(extra)
    node = nodes(model, "Sigmoid")[0]
    added = ir.node("Mul", [node.inputs[0], extra])
    added.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(node, added)
    node.replace_input_with(0, added.outputs[0])


def three_axes(model: ir.Model) -> None:
    old = next(value for value in model.graph.inputs if value.name == "position_ids")
    new = ir.val("positions", ir.DataType.INT64, (3, "batch", "sequence"))
    first = ir.node("Gather", [new, ir.val("zero", const_value=ir.tensor(np.array(0)))], {"axis": 0})
    first.outputs[0].type, first.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", "sequence"])
    zero = first.inputs[1]
    assert zero is not None
    model.graph.register_initializer(zero)
    ir.convenience.replace_all_uses_with(old, first.outputs[0])
    model.graph.insert_before(next(iter(model.graph)), first)
    model.graph.inputs[model.graph.inputs.index(old)] = new


def fused_projection(model: ir.Model) -> None:
    norm = nodes(model, "RMSNormalization")[0]
    between = ir.node("Relu", [norm.outputs[0]])
    between.outputs[0].type, between.outputs[0].shape = norm.outputs[0].type, norm.outputs[0].shape
    value = nodes(model, "Attention")[0].inputs[2]
    product = value.producer() if value is not None else None
    assert product is not None
    model.graph.insert_before(product, between)
    product.replace_input_with(0, between.outputs[0])


def no_head(model: ir.Model) -> None:
    product = model.graph.outputs[0].producer()
    assert product is not None and product.inputs[0] is not None
    model.graph.outputs[0] = product.inputs[0]
    product.inputs[0].shape, product.inputs[0].type = ir.Shape(["batch", "sequence", 32]), ir.TensorType(ir.DataType.FLOAT)


def lost_cache(model: ir.Model) -> None:
    model.graph.outputs.pop()


def swapped_layers(model: ir.Model) -> None:
    model.graph.outputs[1].name, model.graph.outputs[3].name = "present.1.key", "present.0.key"


REFUSED: dict[Callable[[ir.Model], None], tuple[str, str, str]] = {
    no_attention: ("attention", "no Attention, and no attention spelled out", "Matched: standard operators of opset 24"),
    encoder: ("masks", "no mask and is not causal", "3 layers of attention"),
    capped_logits: ("lm_head", "the logits are capped (softcap)", "logits and caches"),
    partial_rotary: ("layers", "rotates only a part of the head", "inputs 'input_ids'"),
    two_logits: ("outputs", "'first', 'scores'; expected one", "inputs 'input_ids'"),
    contrib: ("operators", "com.microsoft::GroupQueryAttention is no standard operator", "Matched: nothing"),
    old_opset: ("operators", "opset 17, expected 18 to 24", "Matched: nothing"),
    fixed_cache: ("caches", "a cache of fixed length", "3 layers of attention"),
    another_input: ("inputs", "purpose is not known: 'temperature'", "6 cache inputs"),
    three_axes: ("inputs", "expected one input of positions [batch, sequence]", "6 cache inputs"),
    fused_projection: ("layers", "the value projection reads", "logits and caches"),
    no_head: ("lm_head", "without an lm_head", "logits and caches"),
    lost_cache: ("outputs", "5 cache outputs for 3 layers", "inputs 'input_ids'"),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_cannot_be_read_is_refused_with_what_was_matched_and_where_it_stopped(change: Callable[[ir.Model], None]):
    model = compact()
    change(model)
    step, reason, matched = REFUSED[change]
    with pytest.raises(GraphError) as caught:
        normalise(model)
    text = str(caught.value)
    assert f"Stopped at {step}: " in text and reason in text, text
    assert matched in text.split("Stopped at", maxsplit=1)[0], text


def test_a_layer_without_a_causal_mask_is_refused_when_its_length_is_known():
    model = compact()
    one_bidirectional(model)
    with pytest.raises(GraphError, match="layer 1 is not causal at 20 tokens: row 0 sees row 1"):
        prove_causal(normalise(model).decoder, 20)


@pytest.mark.parametrize(
    ("name", "axis", "what"), [("input_ids", 1, "length"), ("attention_mask", 0, "batch"), ("past_key_values.1.key", 2, "length")]
)
def test_a_graph_of_one_size_is_refused(name: str, axis: int, what: str):
    model = compact()
    check_lengths(model)
    value = next(value for value in model.graph.inputs if value.name == name)
    assert value.shape is not None
    value.shape = ir.Shape([7 if place == axis else size for place, size in enumerate(value.shape)])
    with pytest.raises(GraphError, match=f"'{name}'.* has a fixed {what}"):
        check_lengths(model)


def test_a_softcap_inside_spelled_out_attention_is_named():
    with pytest.raises(GraphError, match="caps its logits"):
        normalise(spelled(Capped))


def test_what_looks_like_attention_and_is_not_is_found_out_by_running_it():
    model = spelled()
    nodes(model, "Softmax")[1].attributes["axis"] = ir.AttrInt64("axis", -2)
    with pytest.raises(GraphError, match="computes something else on random numbers"):
        normalise(model)


def test_cache_outputs_are_named_by_the_layer_that_makes_them():
    model = compact()
    swapped_layers(model)
    foreign: ForeignDecoder = normalise(model)
    outputs = {value.name: value for value in foreign.model.graph.outputs}
    assert outputs["present.0.key"] is foreign.decoder.layers[0].k_rotary
    assert outputs["present.1.key"] is foreign.decoder.layers[1].k_rotary
