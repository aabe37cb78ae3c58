"""Causal attention in blocks: the same numbers, fewer scores, and only where it is causal and long enough."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.blocks import SplitCausalAttention
from tests.graph_passes.random_run import run

BATCH, HEADS, GROUPS, SIZE = 2, 6, 2, 16


def make(
    rows: int | str, keys: int | None = None, *, causal: bool = True, layers: int = 1, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Model:
    """Attention of ``rows`` queries, ``layers`` times over the same keys."""
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="attention"))
    query = build.input("q", dtype, [BATCH, HEADS, rows, SIZE])
    key, value = (build.input(name, dtype, [BATCH, GROUPS, keys or rows, SIZE]) for name in "kv")
    for _ in range(layers):
        query = build.op.Attention(query, key, value, scale=0.3, softmax_precision=1, **({"is_causal": 1} if causal else {}))
    build.add_output(query, "y")
    model = ir.Model(build.graph, ir_version=11)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def count(model: ir.Model) -> int:
    return sum(node.op_type == "Attention" for node in model.graph)


@pytest.mark.parametrize(("rows", "blocks"), [(128, 2), (129, 2), (200, 3), (616, 9), (1000, 12), (4136, 12)])
def test_the_blocks_compute_the_same(rows: int, blocks: int):
    whole = make(rows)
    split = lower(whole, "onnxruntime")
    assert count(split) == blocks and count(whole) == 1
    if rows < 1000:
        found, expected = run(split), run(whole)
        assert found.shape == expected.shape == (BATCH, HEADS, rows, SIZE)
        assert np.abs(found - expected).max() <= 1e-6
    # Blocks are equal but for the last: their work is that of the triangle and half a block more.
    assert (0.5 + 0.4 / blocks) * count_flops(whole) < count_flops(split) < (0.5 + 0.7 / blocks) * count_flops(whole)


def test_the_blocks_of_a_length_that_varies_suit_the_shortest_prompt():
    whole = make("sequence", layers=2)
    visual = ir.val("visual_index", ir.DataType.INT64, [BATCH, 200])
    whole.graph.inputs.append(visual)
    split = lower(whole, "onnxruntime")
    assert count(split) == 2 * 3 and count(lower(make("sequence"), "onnxruntime")) == 1
    rng = np.random.default_rng(0)
    for rows in (201, 350):
        shapes = {"q": (BATCH, HEADS, rows, SIZE), "k": (BATCH, GROUPS, rows, SIZE), "v": (BATCH, GROUPS, rows, SIZE)}
        feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        feeds["visual_index"] = np.zeros((BATCH, 200), np.int64)
        found, expected = (ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0] for model in (split, whole))
        assert np.abs(found - expected).max() <= 1e-6


def test_what_the_operator_says_is_carried_and_masks_are_made_once():
    split = lower(make(200, layers=3), "onnxruntime")
    attentions = [node for node in split.graph if node.op_type == "Attention"]
    assert {round(node.attributes.get_float("scale", 0.0), 6) for node in attentions} == {0.3}
    assert {node.attributes.get_int("softmax_precision", 0) for node in attentions} == {1}
    assert not any(node.attributes.get_int("is_causal", 0) for node in attentions)
    assert len(attentions) == 9 and sum(node.op_type == "LessOrEqual" for node in split.graph) == 3
    assert np.abs(run(split) - run(make(200, layers=3))).max() <= 1e-6


def test_half_precision():
    whole = make(150, dtype=ir.DataType.FLOAT16)
    assert np.abs(run(lower(whole, "onnxruntime")).astype(np.float32) - run(whole).astype(np.float32)).max() <= 2e-3


@pytest.mark.parametrize("model", [make(127), make(1, 300, causal=False), make(300, causal=False)], ids=["short", "decode", "not causal"])
def test_everything_else_stays(model: ir.Model):
    result = SplitCausalAttention()(model)
    assert not result.modified and count(result.model) == 1


def test_a_second_run_finds_nothing():
    first = SplitCausalAttention()(make(300))
    assert first.modified and not SplitCausalAttention()(first.model).modified


def test_other_targets_keep_their_causal_kernels():
    for target in ("onnxruntime-cuda", "tensorrt-rtx"):
        assert count(lower(make(300, dtype=ir.DataType.FLOAT16), target)) == 1
