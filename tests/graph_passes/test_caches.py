"""Caches in 16 bit: what is written and read is cast, what is computed stays; what the contract does not know is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sievert.bundle.errors import GraphError
from sievert.graph_passes.caches import NarrowCaches

DECODE = """
<ir_version: 11, opset_import: ["" : 24]>
decode (float[1,1,1,4] k, float[1,1,1,4] v, int64[1] row, float[1,1,3,4] "past_key_values.0.key", float[1,1,3,4] "past_key_values.0.value")
  => (float[1,1,1,3] scores, float[1,1,3,4] "present.0.key", float[1,1,3,4] "present.0.value") {
  "present.0.key" = TensorScatter <axis = 2> ("past_key_values.0.key", k, row)
  "present.0.value" = TensorScatter <axis = 2> ("past_key_values.0.value", v, row)
  turned = Transpose <perm = [0, 1, 3, 2]> ("present.0.key")
  scores = MatMul (k, turned)
}
"""


def read(text: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def types(model: ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)}


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_what_is_written_and_read_is_cast(kind: ir.DataType):
    model = read(DECODE)
    before = types(model)
    made = NarrowCaches(kind)
    assert made(model).modified and not made(model).modified
    changed = {name: after for name, after in types(model).items() if after != before[name]}
    assert changed == {f"{word}.0.{part}": str(kind) for word in ("past_key_values", "present") for part in ("key", "value")}
    casts = [(node.inputs[0].name, str(node.outputs[0].dtype)) for node in model.graph if node.op_type == "Cast"]  # type: ignore[union-attr]
    assert casts == [("k", str(kind)), ("present.0.key", "FLOAT"), ("v", str(kind))]  # nothing reads the values back here
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    if kind is ir.DataType.FLOAT16:
        feeds = {name: np.full((1, 1, 1, 4), 1 / 3, np.float32) for name in "kv"} | {"row": np.array([1])}
        feeds |= {f"past_key_values.0.{part}": np.zeros((1, 1, 3, 4), np.float16) for part in ("key", "value")}
        scores, key, _ = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
        assert key.dtype == np.float16 and key[0, 0, 1, 0] == np.float16(1 / 3)
        assert scores.dtype == np.float32 and scores[0, 0, 0, 1] == pytest.approx(4 / 3 * np.float32(np.float16(1 / 3)), rel=1e-6)


def test_a_cache_that_is_named_stays():
    model = read(DECODE)
    assert NarrowCaches(ir.DataType.FLOAT16, frozenset({"present.0.key"}))(model).modified
    found = types(model)
    assert found["past_key_values.0.key"] == found["present.0.key"] == "FLOAT" and found["past_key_values.0.value"] == "FLOAT16"
    both = frozenset({"past_key_values.0.key", "past_key_values.0.value"})
    assert not NarrowCaches(ir.DataType.FLOAT16, both)(read(DECODE)).modified


def test_a_cache_that_is_read_otherwise_is_refused():
    text = DECODE.replace("(k, turned)", '(k, turned)\n  other = Identity ("past_key_values.0.value")')
    with pytest.raises(GraphError, match=r"past_key_values.0.value is read by TensorScatter.*Identity.*expected one TensorScatter"):
        NarrowCaches(ir.DataType.FLOAT16)(read(text))
