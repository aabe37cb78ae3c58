"""Narrowing a graph to 16 bit: what is left in float32 and why."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from sievert.graph_passes.narrow import Narrow

ROTARY = """
<ir_version: 11, opset_import: ["" : 24]>
rotary (int64[1,4] position_ids, float[1,4] x) => (float[1,4] y) <float[1] frequency = {0.5}> {
  positions = Cast <to = 1> (position_ids)
  angles = Mul (positions, frequency)
  both = Concat <axis = 1> (angles)
  table = Cos (both)
  y = Mul (x, table)
}
"""


def no_weights(name: str) -> ir.TensorProtocol:
    raise AssertionError(f"{name} is no parameter")


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_angles_of_positions_stay_float32_until_they_are_a_table(kind: ir.DataType):
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(ROTARY)))
    assert Narrow(kind, no_weights)(model).modified
    made = {str(value.name): value.dtype for node in model.graph for value in node.outputs}
    assert {made[name] for name in ("positions", "angles", "both", "table")} == {ir.DataType.FLOAT}
    assert made["y"] == model.graph.inputs[1].dtype == kind
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
