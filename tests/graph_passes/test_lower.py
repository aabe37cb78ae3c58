"""Lowered graphs compute the same, keep their interface and weights, and hold nothing the target refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from sievert.bundle.errors import GraphError
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import PASSES, TARGETS, lower
from sievert.graph_passes.lowering.decompose import DecomposeAttention
from sievert.graph_passes.lowering.simple import CumSumInFloat, DropSoftmaxPrecision
from sievert.graph_passes.lowering.targets import Target
from tests.graph_passes.static_graphs import DTYPES, MAKERS, Weights, make_feeds


def run(model: ir.Model, feeds: dict[str, np.ndarray], folder: Path | None = None) -> dict[str, np.ndarray]:
    """All outputs in ONNX Runtime, weights read from ``folder``, its own rewriting of the graph left off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    return dict(zip([str(value.name) for value in model.graph.outputs], session.run(None, feeds), strict=True))


def parse(text: str) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 24]>\n' + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def interface(model: ir.Model) -> list[tuple[str, str, str]]:
    return [(str(value.name), str(value.type), str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]


def assert_same(before: dict[str, np.ndarray], after: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert list(before) == list(after)
    assert before
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        if expected.dtype == np.int64:
            np.testing.assert_array_equal(after[name], expected, err_msg=name)
        else:
            scale = max(1.0, float(np.abs(expected.astype(np.float64)).max()))
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("graph", MAKERS)
def test_a_lowered_graph_computes_the_same_with_the_same_interface_and_weights(tmp_path: Path, graph: str, target: Target):
    model = MAKERS[graph](Weights(tmp_path, "float32"))
    before = to_bytes(model)
    lowered = lower(model, target)
    assert to_bytes(model) == before, "the original changed"
    assert interface(lowered) == interface(model)
    feeds = make_feeds(graph, "float32")
    assert_same(run(model, feeds, tmp_path), run(lowered, feeds, tmp_path))
    external = {name for name, value in lowered.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}
    assert external
    assert external == {name for name, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}
    assert [finding for finding in lint(lowered, target) if finding.severity == "error"] == []
    assert to_bytes(lower(lowered, target)) == to_bytes(lowered), "lowering twice changes something"


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_a_lowered_float16_graph_computes_the_same(tmp_path: Path, graph: str):
    model = MAKERS[graph](Weights(tmp_path, "float16"))
    feeds = make_feeds(graph, "float16")
    lowered = lower(model, "tensorrt-rtx")
    assert "Attention" in types(lowered), "fused kernels exist for float16"
    assert_same(run(model, feeds, tmp_path), run(lowered, feeds, tmp_path), tolerance=2e-3)


def test_onnx_runtime_takes_short_prompts_as_they_are(tmp_path: Path):
    for graph, make in MAKERS.items():
        model = make(Weights(tmp_path, "float32"))
        assert graph == "decode" or to_bytes(lower(model, "onnxruntime")) == to_bytes(model), graph
        assert to_bytes(lower(model, "onnxruntime-cuda")) == to_bytes(model), graph


def test_decode_for_the_cpu_computes_the_same(tmp_path: Path):
    model, feeds = MAKERS["decode"](Weights(tmp_path, "float32")), make_feeds("decode", "float32")
    lowered = lower(model, "onnxruntime")
    assert sum(node.op_type == "Transpose" for node in lowered.graph) == 0 < sum(node.op_type == "Transpose" for node in model.graph)
    assert_same(run(model, feeds, tmp_path), run(lowered, feeds, tmp_path), tolerance=1e-5)


def test_stage_values_keep_their_names(tmp_path: Path):
    for target in TARGETS:
        lowered = lower(MAKERS["prefill"](Weights(tmp_path, "float32")), target)
        names = {str(value.name) for node in lowered.graph for value in node.outputs}
        assert {"stage.0.residual", "stage.0.scores", "stage.0.order"} <= names


def test_an_unknown_target_is_refused(tmp_path: Path):
    with pytest.raises(GraphError, match=r"'openvino': choose one of onnxruntime, onnxruntime-cuda, tensorrt-rtx, tensorrt"):
        lower(MAKERS["decode"](Weights(tmp_path, "float32")), "openvino")  # type: ignore[arg-type]


def test_a_failing_pass_is_named():
    long = parse("g (int64[20000000] x) => (int64[20000000] y) { a = Constant<value_int=0>() y = CumSum(x, a) }")
    with pytest.raises(GraphError, match=r"CumSumInFloat\(\) failed on graph 'g' for tensorrt"):
        lower(long, "tensorrt")


def test_float32_attention_of_many_rows_is_written_out_and_of_one_row_stays(tmp_path: Path):
    weights = Weights(tmp_path, "float32")
    assert "Attention" not in types(lower(MAKERS["prefill"](weights), "tensorrt-rtx"))
    assert types(lower(MAKERS["decode"](weights), "tensorrt-rtx")).count("Attention") == 2
    for dtype in DTYPES:
        for make in MAKERS.values():
            lowered = lower(make(Weights(tmp_path, dtype)), "tensorrt")
            assert not any("softmax_precision" in node.attributes for node in lowered.graph)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1), (1, 1)])
@pytest.mark.parametrize(
    ("query", "keys", "mask", "causal"),
    [
        (1, 7, None, 0), (1, 7, "bool[2,1,1,7]", 0), (5, 5, None, 1), (5, 5, "bool[2,1,5,5]", 1), (5, 5, "float[5,5]", 1),
        (5, 9, "bool[5,9]", 0), (5, 9, "float[2,1,1,9]", 0), (5, 9, "bool[1,H,5,9]", 0), (5, 9, "float[2,H,1,9]", 0), (5, 9, None, 0),
        (5, 9, "float[H,5,9]", 0),
    ],
)  # fmt: skip
def test_written_out_attention_is_attention(heads: tuple[int, int], query: int, keys: int, mask: str | None, causal: int):
    h, g = heads
    mask = mask and mask.replace("H", str(h))
    scale = ", scale=0.3" if keys == 9 else ""
    model = parse(
        f"g (float[2,{h},{query},12] q, float[2,{g},{keys},12] k, float[2,{g},{keys},20] v{f', {mask} m' if mask else ''}) => "
        f"(float[2,{h},{query},20] y) {{ y = Attention<is_causal={causal}{scale}>(q, k, v{', m' if mask else ''}) }}"
    )
    lowered = model.clone()
    assert DecomposeAttention()(lowered).modified
    assert "Attention" not in types(lowered)
    assert not {"Expand", "Tile", "Concat"} & set(types(lowered)), "keys are not repeated"
    assert not DecomposeAttention()(lowered).modified
    rng = np.random.default_rng(0)
    shapes = {str(value.name): tuple(value.shape.numpy()) for value in model.graph.inputs if value.shape is not None}
    feeds: dict[str, Any] = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in "qkv"}
    if mask:
        noise = rng.normal(size=shapes["m"])
        feeds["m"] = (noise < 0.5) | (np.arange(keys) == 0) if mask.startswith("bool") else noise.astype(np.float32)
    # Not ONNX Runtime here: it wants a mask for every query row, which the standard does not.
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert_same({"y": np.asarray(expected)}, run(lowered, feeds))


@pytest.mark.parametrize("query", [5, 1])
def test_capped_attention_is_written_out_as_onnx_runtime_computes_it(query: int):
    model = parse(
        f"g (float[2,4,{query},8] q, float[2,2,5,8] k, float[2,2,5,8] v, bool[2,1,{query},5] m) => (float[2,4,{query},8] y) "
        "{ y = Attention<scale=1.5, softcap=2.0>(q, k, v, m) }"
    )
    lowered = lower(model, "tensorrt-rtx")
    assert "Attention" not in types(lowered)
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {"q": rng.normal(size=(2, 4, query, 8)), "k": rng.normal(size=(2, 2, 5, 8)), "v": rng.normal(size=(2, 2, 5, 8))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    feeds["m"] = (rng.random((2, 1, query, 5)) < 0.6) | (np.arange(5) == 0)
    scores = 1.5 * feeds["q"] @ np.repeat(feeds["k"], 2, axis=1).swapaxes(2, 3)
    weights = np.where(feeds["m"], np.exp(2 * np.tanh(scores / 2)), 0)
    expected = {"y": (weights / weights.sum(-1, keepdims=True) @ np.repeat(feeds["v"], 2, axis=1)).astype(np.float32)}
    assert_same(expected, run(model, feeds))
    assert_same(expected, run(lowered, feeds))


def test_attention_of_sixteen_bit_without_a_kernel_is_written_out_in_float32():
    model = parse(
        "g (float16[2,4,5,8] q, float16[2,2,5,8] k, float16[2,2,5,8] v) => (float16[2,4,5,8] y) { y = Attention<is_causal=1>(q, k, v) }"
    )
    lowered = lower(model, "tensorrt-rtx")
    softmax = next(node for node in lowered.graph if node.op_type == "Softmax")
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 4 if name == "q" else 2, 5, 8)).astype(np.float16) for name in "qkv"}
    assert_same(run(model, feeds), run(lowered, feeds), tolerance=2e-3)


def test_layers_share_one_causal_mask():
    layers = "".join(
        f"h{i + 1} = Attention<is_causal=1>(h{i}, k{i}, v{i}) k{i + 1} = Exp(h{i + 1}) v{i + 1} = Neg(h{i + 1})\n" for i in range(3)
    )
    model = parse(f"g (float[1,2,5,8] h0, float[1,2,5,8] k0, float[1,2,5,8] v0) => (float[1,2,5,8] h3) {{ {layers} }}")
    lowered = lower(model, "tensorrt-rtx")
    assert types(lowered).count("Softmax") == 3
    assert types(lowered).count("LessOrEqual") == 1


def test_a_long_causal_mask_is_no_constant():
    model = parse(
        "g (float[1,2,2048,8] q, float[1,2,2048,8] k, float[1,2,2048,8] v) => (float[1,2,2048,8] y) { y = Attention<is_causal=1>(q, k, v) }"
    )
    assert len(to_bytes(lower(model, "tensorrt-rtx"))) < 40_000


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,2,5,8] q, float[1,2,9,8] k, float[1,2,9,8] v) => (float[1,2,5,8] y) { y = Attention<is_causal=1>(q, k, v) }",
        "g (float[1,5,16] q, float[1,5,16] k, float[1,5,16] v) => (float[1,5,16] y) { y = Attention<q_num_heads=2,kv_num_heads=2>(q,k,v) }",
    ],
)
def test_what_cannot_be_written_out_stays_for_lint(text: str):
    model = parse(text)
    assert not DecomposeAttention()(model).modified
    assert any(finding.severity == "error" for finding in lint(model, "tensorrt-rtx"))


def test_small_passes_tell_whether_they_changed_anything():
    model = parse("g (int64[2,9] x) => (int64[2,9] y) { a = Constant<value_int=1>() y = CumSum<exclusive=1, reverse=1>(x, a) }")
    feeds = {"x": np.arange(18).reshape(2, 9)}
    before = run(model, feeds)
    assert CumSumInFloat()(model).modified
    assert not CumSumInFloat()(model).modified
    assert types(model) == ["Constant", "Cast", "CumSum", "Cast"]
    assert_same(before, run(model, feeds))
    assert not DropSoftmaxPrecision()(model).modified
    attention = parse("g (float[1,2,1,8] q) => (float[1,2,1,8] y) { k = Exp(q) y = Attention<softmax_precision=1>(q, k, k) }")
    assert DropSoftmaxPrecision()(attention).modified
    assert not DropSoftmaxPrecision()(attention).modified


def test_every_pass_says_in_one_line_what_it_does():
    for steps in PASSES.values():
        for step in steps:
            assert repr(step).startswith(type(step).__name__)
            assert "Before::" in (type(step).__doc__ or "")
