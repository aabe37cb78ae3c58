"""bfloat16 on the CPU: each result is rounded as a bfloat16 engine rounds it, and names, types and kernels that there are stay."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sievert.bundle.errors import EngineError
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.widen import EmulateBfloat16

CHAIN = """
<ir_version: 11, opset_import: ["" : 24]>
chain (bfloat16[4,64] x, bfloat16[4,64] y, bool[4,64] b) => (bfloat16[64,4] out, bfloat16[4,64] "stage.0.residual", float[4,64] wide) {
  product = Mul (x, y)
  "stage.0.residual" = Mul (product, y)
  chosen = Where (b, "stage.0.residual", product)
  cubed = Mul (chosen, x)
  wide = Cast <to = 1> (cubed)
  out = Transpose <perm = [1, 0]> (cubed)
}
"""


def test_every_stored_result_is_rounded(tmp_path: Path):
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(CHAIN)))
    place = tmp_path / "chain.onnx"
    place.write_bytes(to_bytes(model))
    with pytest.raises(EngineError, match=r"Could not find an implementation.*`sievert build --engine onnxruntime`.*emulate"):
        OnnxRuntime(threads=1).load(ModelFile(place, ""))
    assert [found.rule for found in lint(model, "onnxruntime")] == ["cpu-bfloat16"]
    lowered = lower(model, "onnxruntime")  # which compares interface, names and weights, and checks the graph
    assert not lint(lowered, "onnxruntime") and not EmulateBfloat16()(lowered).modified
    assert next(node for node in lowered.graph if node.op_type == "Transpose").inputs[0].dtype == ir.DataType.BFLOAT16  # type: ignore[union-attr]
    place.write_bytes(to_bytes(lowered))
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(4, 64)).astype(ml_dtypes.bfloat16) for _ in range(2))
    chosen = rng.random((4, 64)) < 0.5
    found = OnnxRuntime(threads=1).load(ModelFile(place, "")).run({"x": x, "y": y, "b": chosen})
    product = x * y  # of ml_dtypes: in float32, rounded
    residual = product * y
    cubed = np.where(chosen, residual, product) * x
    np.testing.assert_array_equal(found["stage.0.residual"], residual)
    np.testing.assert_array_equal(found["out"], cubed.T)
    np.testing.assert_array_equal(found["wide"], cubed.astype(np.float32))
    exact = np.where(chosen, x.astype(np.float32) * y * y, x.astype(np.float32) * y) * x.astype(np.float32)
    assert (exact.astype(ml_dtypes.bfloat16) != cubed).any()  # rounding once, at the end, would be seen
