"""The first choice by score, also where it takes more than TensorRT's TopK can."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lowering.limits import LARGEST_TOPK
from sievert.graph_passes.selectors import rank
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.magnitude import Magnitude
from sievert.graph_passes.selectors.random_ import Random
from tests.graph_passes.selectors.harness import build_standalone, make_geometry, random_feeds, run_standalone


def build_choice(batch: int, visual: int, count: int) -> ir.Model:
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="choice"))
    scores = build.input("scores", ir.DataType.FLOAT, [batch, visual])
    build.add_output(rank.take_best(build.op, scores, count), "order")
    return ir.Model(build.graph, ir_version=11)


def choose(scores: np.ndarray, count: int) -> np.ndarray:
    model = ir.to_proto(build_choice(scores.shape[0], scores.shape[1], count))
    return np.asarray(ort.InferenceSession(model.SerializeToString()).run(None, {"scores": scores})[0])


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("visual", [4, 5, 7, 60, 61, 64])
@pytest.mark.parametrize("block", [1, 7 * 60, 2**22])
def test_ranks_give_the_order_of_a_stable_sort(visual, block, monkeypatch):
    monkeypatch.setattr(rank, "LARGEST_TOPK", 3)
    monkeypatch.setattr(rank, "LARGEST_BLOCK", block)
    rng = np.random.default_rng(visual)
    scores = np.stack(
        [
            rng.normal(size=visual),
            rng.integers(0, 3, visual),
            np.zeros(visual),
            np.where(rng.random(visual) < 0.5, 0.0, -0.0),
            np.arange(visual)[::-1] * 1e-40,
            rng.choice([-np.inf, -1e38, 1e38, np.inf], visual),
        ]
    ).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")
    for count in (4, visual):
        found = choose(scores, count)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected[:, :count])


@pytest.mark.parametrize(("count", "by_rank"), [(LARGEST_TOPK, False), (LARGEST_TOPK + 1, True)])
def test_ranks_are_for_what_topk_cannot_take(count, by_rank):
    model = build_choice(1, 5000, count)
    assert ("TopK" not in operators(model)) == by_rank
    assert rank.limit_topk(count) == (0 if by_rank else count)
    assert not [finding for finding in lint(model, "tensorrt-rtx") if finding.rule == "topk-limit"]


def test_scores_of_unknown_length_are_refused():
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="choice"))
    scores = build.input("scores", ir.DataType.FLOAT, [1, "Nv"])
    with pytest.raises(GraphError, match="ranks are counted for a static"):
        rank.take_best(build.op, scores, 5000)


def test_no_intermediate_is_large():
    inferred = build_choice(1, 8192, 5000)
    sizes = [value.shape.numpy() for node in inferred.graph for value in node.outputs if value.shape is not None]
    assert max(np.prod(shape) for shape in sizes) * 4 <= 18 * 2**20
    assert inferred.graph.num_nodes() <= 220
    constants = [value.const_value.nbytes for value in inferred.graph.initializers.values() if value.const_value is not None]
    assert max(constants) <= 64


@pytest.mark.parametrize(
    ("selector", "largest"), [(Magnitude(), 0), (Random(), 0), (Iwp(), 2048), (Iwp(strength=0.0), 0), (Iwp(first_chunk=4000), 1000)]
)
def test_selectors_tell_the_largest_topk_they_really_hold(selector, largest):
    assert selector.largest_topk(8192, 5000) == largest
    model = build_standalone(selector, make_geometry(visual=8192, keep=5000))
    shapes = [node.outputs[0].shape for node in model.graph if node.op_type == "TopK"]
    sizes = [shape.numpy()[1] for shape in shapes if shape is not None]
    assert max(sizes, default=0) == largest


@pytest.mark.parametrize("ties", [False, True])
def test_magnitude_takes_5000_of_8192(ties):
    geometry = make_geometry(visual=8192, keep=5000, head_size=1)
    feeds = random_feeds(geometry, 11)
    if ties:
        feeds["q"][:] = 0
        feeds["v"][:] = np.random.default_rng(11).integers(1, 5, feeds["v"].shape)
    result = run_standalone(Magnitude(), geometry, feeds)
    assert (len(np.unique(result.scores)) < 10) == ties
    np.testing.assert_array_equal(result.order, np.argsort(-result.scores, axis=1, kind="stable")[:, :5000])


def test_5000_of_8192_build_in_tensorrt_for_rtx_without_a_gpu():
    rtx = pytest.importorskip("tensorrt_rtx")
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    model = build_standalone(Magnitude(), make_geometry(visual=8192, keep=5000))
    parsed = parser.parse(ir.to_proto(model).SerializeToString())
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None
    assert tuple(network.get_output(0).shape) == (1, 5000)
