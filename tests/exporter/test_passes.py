"""The exporter's passes on graphs of a few nodes: what they change, that they say so, and that a second run changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PostconditionError, PreconditionError

from sievert.exporter.names import SCOPES
from sievert.exporter.passes import Float32Islands, Float32Output, HeadInCheckpointLayout, KeepScopes, NameInterface, RaiseOpset
from sievert.exporter.rotary import FuseRotary
from tests.exporter.graphs import assert_equal, run

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def model(text: str) -> ir.Model:
    return ir.from_onnx_text(HEADER + text)


def changes(each: Any, subject: ir.Model) -> bool:
    """Whether the pass changed it; a second run must not."""
    modified: bool = each(subject).modified
    assert each(subject).modified is False
    return modified


def operators(subject: ir.Model) -> list[str]:
    return [node.op_type for node in subject.graph]


def test_interface_is_named():
    subject = model("g (float[s1, s2, 4] x) => (float[s1, s2, 4] out_0) { hidden = Relu(x)\n out_0 = Relu(hidden) }")
    subject.graph.node(0).outputs[0].shape = ir.Shape(["s1", "2*s2", None])
    each = NameInterface({"x": ("batch", "sequence")}, ("logits",))
    assert changes(each, subject)
    assert str(subject.graph.inputs[0].shape) == "[batch,sequence,4]"
    assert str(subject.graph.node(0).outputs[0].shape) == "[batch,2*sequence,None]"
    assert [value.name for value in subject.graph.outputs] == ["logits"]


@pytest.mark.parametrize(("axes", "outputs", "message"), [({"y": ()}, ("a",), "dropped or renamed"), ({"x": ()}, ("a", "b"), "expected 2")])
def test_another_interface_is_refused(axes: dict[str, tuple[str, ...]], outputs: tuple[str, ...], message: str):
    subject = model("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    with pytest.raises(PreconditionError) as caught:
        NameInterface(axes, outputs)(subject)
    assert message in str(caught.value.__cause__)


ROTARY = """g (float16[2, 3, S, 8] x, float[2, S, 4] f) => (float16[2, 3, S, 8] y)
<int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {9223372036854775807}, int64[1] axis = {3}, int64[1] one = {1}, float k = {1.5}>
{
    twice = Concat<axis: int = -1>(f, f)
    c = Cos(twice)
    s = Sin(twice)
    ck = Mul(c, k)
    sk = Mul(s, k)
    ch = Cast<to: int = 10>(ck)
    sh = Cast<to: int = 10>(sk)
    cu = Unsqueeze(ch, one)
    su = Unsqueeze(sh, one)
    first = Slice(x, zero, half, axis, one)
    second = Slice(x, half, end, axis, one)
    minus = Neg(second)
    turned = Concat<axis: int = -1>(minus, first)
    a = Mul(x, cu)
    b = Mul(turned, su)
    y = Add(a, b)
}"""


def test_spelled_out_rotary_becomes_one_operator_with_the_same_numbers():
    subject, random = model(ROTARY), np.random.default_rng(0)
    feeds = {"x": random.standard_normal((2, 3, 5, 8)).astype(np.float16), "f": random.standard_normal((2, 5, 4)).astype(np.float32)}
    before = run(subject, **feeds)["y"]
    assert changes(FuseRotary(), subject)
    ir.passes.common.RemoveUnusedNodesPass()(subject)
    assert sorted(operators(subject)) == sorted(["Cos", "Sin", "Mul", "Mul", "Cast", "Cast", "RotaryEmbedding"])
    assert_equal(run(subject, **feeds)["y"], before, tolerance=2e-3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("half = {4}", "half = {3}"),  # other halves
        ("twice = Concat<axis: int = -1>(f, f)", "g2 = Neg(f)\n twice = Concat<axis: int = -1>(f, g2)"),  # interleaved or other angles
        ("c = Cos(twice)", "c = Tan(twice)"),
    ],
)
def test_what_is_not_rotary_is_left_alone(old: str, new: str):
    assert old in ROTARY
    subject = model(ROTARY.replace(old, new))
    assert not FuseRotary()(subject).modified
    assert "RotaryEmbedding" not in operators(subject)


def test_islands_of_a_16_bit_graph():
    subject = model(
        "g (float16[B, S, 8] x, float16[8] w, float16[B, 2, S, 4] q) => (float16[B, S, 8] y, float16[B, 2, S, 4] z)"
        "{ y = RMSNormalization<stash_type: int = 10>(x, w)\n z = Attention(q, q, q) }"
    )
    assert changes(Float32Islands(), subject)
    norm, attention = subject.graph
    assert norm.attributes["stash_type"].as_int() == attention.attributes["softmax_precision"].as_int() == int(ir.DataType.FLOAT)


def test_a_float32_graph_needs_no_islands():
    subject = model("g (float[B, 2, S, 4] q) => (float[B, 2, S, 4] z) { z = Attention(q, q, q) }")
    assert not changes(Float32Islands(), subject)


def test_a_16_bit_softmax_is_refused():
    subject = model("g (float16[B, S] x) => (float16[B, S] y) { y = Softmax(x) }")
    with pytest.raises(PostconditionError) as caught:
        Float32Islands()(subject)
    assert "took an attention apart" in str(caught.value.__cause__)


def test_output_is_cast():
    subject = model("g (float16[B, S] x) => (float16[B, S] y, float16[B, S] logits) { y = Relu(x)\n logits = Neg(x) }")
    assert changes(Float32Output("logits"), subject)
    assert operators(subject) == ["Relu", "Neg", "Cast"]
    assert [(value.name, value.dtype) for value in subject.graph.outputs] == [("y", ir.DataType.FLOAT16), ("logits", ir.DataType.FLOAT)]


def test_head_gets_checkpoint_layout():
    subject = model("g (float[B, 3] x) => (float[B, 4] logits) { logits = MatMul(x, w) }")
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    value = subject.graph.node(0).inputs[1]
    assert value is not None
    value.const_value = ir.Tensor(weight, name="w")
    subject.graph.register_initializer(value)
    before = run(subject, x=np.ones((2, 3), np.float32))["logits"]
    assert changes(HeadInCheckpointLayout("logits"), subject)
    assert operators(subject) == ["Transpose", "MatMul"]
    (layout,) = subject.graph.initializers.values()
    assert layout.const_value is not None
    assert np.array_equal(layout.const_value.numpy(), weight.T)
    assert np.array_equal(run(subject, x=np.ones((2, 3), np.float32))["logits"], before)


def test_a_head_of_another_form_is_refused():
    subject = model("g (float[B, 3] x, float[3, 4] w) => (float[B, 4] logits) { logits = MatMul(x, w) }")
    with pytest.raises(Exception, match="the head has another form"):
        HeadInCheckpointLayout("logits")(subject)


def test_only_scopes_stay():
    subject = model("g (float[B] x) => (float[B] y) { y = Relu(x) }")
    node = subject.graph.node(0)
    node.metadata_props.update({SCOPES: "['a']", "stack_trace": "File model.py"})
    node.outputs[0].metadata_props["note"] = "x"
    assert changes(KeepScopes(), subject)
    assert dict(node.metadata_props) == {SCOPES: "['a']"}
    assert not node.outputs[0].metadata_props


def test_opset_is_raised():
    subject = model("g (float[B] x) => (float[B] y) { y = Relu(x) }")
    assert changes(RaiseOpset(), subject)
    assert dict(subject.opset_imports) == {"": 24}


def test_operators_outside_the_standard_are_refused():
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    subject = ir.from_onnx_text(header + "g (float[B] x) => (float[B] y) { y = com.microsoft.Gelu(x) }")
    with pytest.raises(PostconditionError) as caught:
        RaiseOpset()(subject)
    assert "com.microsoft::Gelu" in str(caught.value.__cause__)
