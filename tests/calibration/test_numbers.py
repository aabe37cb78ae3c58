"""Codes and scales of single tensors, against ONNX's and ONNX Runtime's own words on them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization.quant_utils import quantize_nparray

from sievert.bundle.errors import CalibrationError
from sievert.calibration.numbers import FORMATS, encode, find_number_format, quantise_weight, scale_of

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((64, 48)) * np.exp(RNG.standard_normal(48))).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_weights_are_those_of_onnxruntime(axis: int):
    made = quantise_weight(WEIGHT, FORMATS["int8"], channel_axis=axis)
    for channel in range(WEIGHT.shape[axis]):
        column = np.take(WEIGHT, channel, axis=axis)
        largest = np.abs(column).max()
        codes = quantize_nparray(TensorProto.INT8, column, np.float32(largest / 127), np.int8(0))
        np.testing.assert_array_equal(np.take(made.codes, channel, axis=axis), codes)
        assert made.scale[channel] == pytest.approx(largest / 127)
    half = made.scale / 2
    assert (np.abs(made.restore() - WEIGHT) <= (half[:, None] if axis == 0 else half[None]) * 1.0001).all()


@pytest.mark.parametrize(("name", "kind"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_codes_are_those_of_onnx(name: str, kind: int):
    values = np.concatenate([WEIGHT.ravel(), [0, 0.5, 1.5, 2.5, 1e4, -1e4]]).astype(np.float32)
    scale = scale_of(3.0, FORMATS[name])
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=kind)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None), helper.make_tensor_value_info("s", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    (expected,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])).run(
        None, {"x": values, "s": scale}
    )
    ours = encode(values, scale, FORMATS[name])
    np.testing.assert_array_equal(ours.astype(np.float32), np.asarray(expected).view(ours.dtype).astype(np.float32))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_four_bit_blocks_lose_no_more_than_their_largest_value_would(block: int, channel_axis: int):
    form = FORMATS["int4"]
    weight = WEIGHT if channel_axis == 1 else np.ascontiguousarray(WEIGHT.T)
    made = quantise_weight(weight, form, channel_axis=channel_axis, block=block)
    assert made.codes.dtype == ml_dtypes.int4 and made.codes.shape == weight.shape
    assert made.scale.shape == ((64 // block, 48) if channel_axis == 1 else (48, 64 // block))
    blocks, restored = (
        (array if channel_axis == 1 else array.T).reshape(-1, block, 48).astype(np.float64) for array in (weight, made.restore())
    )
    plain = scale_of(np.abs(blocks).max(axis=1, keepdims=True), form)
    naive = np.square(np.clip(np.rint(blocks / plain), -8, 7) * plain - blocks).sum(axis=1)
    searched = np.square(restored - blocks).sum(axis=1)
    assert (searched <= naive * 1.0001).all() and searched.sum() < 0.9 * naive.sum()


def test_scales_are_of_the_graphs_own_type():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        made = quantise_weight(WEIGHT, FORMATS["int8"], channel_axis=1, dtype=dtype)
        assert made.scale.dtype == dtype
        assert np.linalg.norm(made.restore() - WEIGHT) < 0.02 * np.linalg.norm(WEIGHT)
    assert scale_of(0.0, FORMATS["int8"]) == 1 and scale_of(1e-12, FORMATS["int8"], np.float16) > 0


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        quantise_weight(np.array([[1, np.nan]], np.float32), FORMATS["int8"], channel_axis=1)
    with pytest.raises(CalibrationError, match="'int3'.*int8, fp8, int4"):
        find_number_format("int3")
