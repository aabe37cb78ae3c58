"""The subgraphs themselves: static, small, strongly typed, of operators every engine takes."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import StageInputs
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.registry import SELECTORS, make
from tests.graph_passes.selectors.harness import WIDE, build_standalone, make_geometry

# Seen to build in TensorRT for RTX; a selector that needs another one shows there first that it builds.
OPERATORS = {
    *("Abs", "Add", "And", "Cast", "Concat", "Div", "Equal", "Exp", "Expand", "Gather", "GatherElements", "GatherND", "Greater"),
    *("Identity", "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Pad", "Range", "ReduceL2", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceSum", "ReduceSumSquare", "Reshape", "ScatterElements", "Slice", "Softmax", "Split", "Squeeze", "Sub", "TopK"),
    *("Transpose", "Unsqueeze", "Where"),
    *("Neg", "ReduceL1", "Sqrt"),
}
DTYPES = {ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL}
MODELS = [
    *((name, {}) for name in SELECTORS),
    ("iwp", {"head_norm": "softmax", "duplication": "square_of_mean", "scaling": "max"}),
    ("transprune", {"weights": "image"}),
]
FULL_SIZE = make_geometry(visual=576, keep=128, sequence=616, heads=14, kv_heads=2, head_size=64)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_operators_shapes_and_types(name, options, dtype):
    selector = make(name, options)
    model = build_standalone(selector, FULL_SIZE, dtype=dtype)
    assert {node.op_type for node in model.graph} <= OPERATORS
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True))
    for node in inferred.graph:
        for value in node.outputs:
            assert value.shape is not None and value.shape.is_static(), f"{value.name} of {node.name} is not static"
            if node.op_type not in ("Transpose", "GatherND"):  # a tap is rearranged in its own dtype, then cast
                assert value.dtype in DTYPES, f"{value.name} of {node.name} is {value.dtype}"
    for value in inferred.graph.initializers.values():
        assert value.const_value is not None and value.const_value.nbytes <= 2**20, f"{value.name} is too large a constant"
    topks = [node.outputs[0].shape for node in inferred.graph if node.op_type == "TopK"]
    assert max((shape.numpy()[1] for shape in topks if shape is not None), default=0) == selector.largest_topk(576, 128)


@pytest.mark.parametrize("name", SELECTORS)
def test_two_stages_fit_into_one_graph(name):
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="two_stages"))
    for stage in range(2):
        geometry = make_geometry(visual=12 - 4 * stage, keep=8 - 4 * stage, original_visual=12)
        scope = f"select.{stage}"
        heads = {"q": geometry.heads, "q_rotary": geometry.heads}
        taps = {
            tap: build.input(
                f"{scope}.{tap.kind}.{tap.layer}",
                ir.DataType.FLOAT,
                [1, geometry.sequence, 16] if tap.kind in WIDE else [1, heads.get(tap.kind, 2), geometry.sequence, 8],
            )
            for tap in make(name, {}).taps(4, 28)
        }
        embeds = build.input(f"{scope}.embeds", ir.DataType.FLOAT, [1, geometry.sequence, 16])
        visual_scores = build.input(f"{scope}.visual_scores", ir.DataType.FLOAT, [1, geometry.visual])
        index = build.input(f"{scope}.index", ir.DataType.INT64, [1, geometry.visual])
        text = build.input(f"{scope}.text", ir.DataType.BOOL, [1, geometry.sequence])
        inputs = StageInputs(geometry, index, index, text, text, text, embeds, taps, {}, visual_scores)
        build.push_module(scope)
        selection = make(name, {}).select(build, inputs)
        build.pop_module()
        build.add_output(build.op.Identity(selection.order), f"{scope}.order")
    onnx.checker.check_model(ir.to_proto(ir.Model(build.graph, ir_version=11)), full_check=True)


def test_graphs_stay_small():
    # Deployed engines run this between two layers: a round more of IWP may cost no more than it does now.
    nodes = [build_standalone(Iwp(), make_geometry(visual=576, keep=keep)).graph.num_nodes() for keep in (62, 126)]
    assert nodes[1] - nodes[0] <= 18
    assert nodes[1] <= 140
    assert build_standalone(make("magnitude", {}), FULL_SIZE).graph.num_nodes() <= 30


def _builds():
    """Every model at full size, in 16 and 32 bit; the one that is unrolled token by token is slow to build, and smaller in 32 bit."""
    for name, options in MODELS:
        yield pytest.param(name, options, ir.DataType.FLOAT16, FULL_SIZE)
        if name == "cdpruner":
            yield pytest.param(name, options, ir.DataType.FLOAT, replace(FULL_SIZE, keep=16))
            yield pytest.param(name, options, ir.DataType.FLOAT, FULL_SIZE, marks=pytest.mark.exhaustive)
        else:
            yield pytest.param(name, options, ir.DataType.FLOAT, FULL_SIZE)


@pytest.mark.parametrize(("name", "options", "dtype", "size"), list(_builds()))
def test_builds_in_tensorrt_for_rtx_without_a_gpu(name, options, dtype, size):
    rtx = pytest.importorskip("tensorrt_rtx")
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    model = build_standalone(make(name, options), size, dtype=dtype)
    parsed = parser.parse(ir.to_proto(model).SerializeToString())
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None
    assert [network.get_output(index).dtype for index in range(2)] == [rtx.int64, rtx.float32]
    assert [tuple(network.get_output(index).shape) for index in range(2)] == [(1, size.keep), (1, 576)]
