"""One query row per sequence: heads grouped, products flattened, reshapes merged; the same numbers, and only where it holds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import GraphBuilder

from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.one_row import FlattenBiased, GroupQueryHeads, MergeReshapes
from tests.graph_passes.random_run import run

KV_HEADS, SIZE, KEYS = 2, 16, 40


def make(*, heads: int = 6, rows: int = 1, batch: int = 2, mask: tuple[int, ...] | None = (2, 1, 1, KEYS), layers: int = 1) -> ir.Model:
    """``layers`` times: project with a bias, separate the heads, attend to a cache, and join the heads again."""
    width, rng = heads * SIZE, np.random.default_rng(1)
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="step"))
    op, stream = build.op, build.input("x", ir.DataType.FLOAT, [batch, rows, width])
    key, value = (build.input(name, ir.DataType.FLOAT, [batch, KV_HEADS, KEYS, SIZE]) for name in "kv")
    seen = None if mask is None else build.input("seen", ir.DataType.BOOL, list(mask))
    for layer in range(layers):
        weight = build.initializer(ir.tensor(rng.standard_normal((width, width), np.float32) / 8), f"w{layer}")
        bias = build.initializer(ir.tensor(rng.standard_normal(width, np.float32)), f"b{layer}")
        query = op.Reshape(op.Add(op.MatMul(stream, weight), bias), [batch, rows, heads, SIZE])
        query = op.Tanh(op.Transpose(query, perm=[0, 2, 1, 3]))
        operands = [query, key, value, *([] if seen is None else [seen])]
        mixed = op.Transpose(op.Attention(*operands, scale=0.3, softmax_precision=1), perm=[0, 2, 1, 3])
        stream = op.Add(stream, op.Reshape(mixed, [batch, rows, width]))
    build.add_output(stream, "y")
    model = ir.Model(build.graph, ir_version=11)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("mask", [(2, 1, 1, KEYS), (1, 1, 1, KEYS), None], ids=["own keys", "the same keys", "all keys"])
def test_the_same_numbers_from_fewer_operators(mask: tuple[int, ...] | None):
    whole = make(mask=mask, layers=3)
    less = lower(whole, "onnxruntime")
    assert np.abs(run(less) - run(whole)).max() <= 1e-5
    assert count(whole)["Transpose"] == 6 and count(less)["Transpose"] == 0
    # Of each layer: rows, heads, grouped heads, and back to rows twice merged into one.
    assert count(less)["Reshape"] == 3 * 4 and count(less)["Expand"] == (mask is not None)
    for node in less.graph:
        if node.op_type == "Attention":
            assert node.inputs[0] is not None and list(node.inputs[0].shape or ()) == [2, KV_HEADS, 3, SIZE]
            assert node.attributes.get_float("scale", 0.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "model",
    [make(rows=2, mask=(2, 1, 2, KEYS)), make(heads=KV_HEADS), make(mask=(2, 6, 1, KEYS))],
    ids=["two rows", "a kv head for every head", "heads that see different keys"],
)
def test_heads_stay_apart_where_they_must(model: ir.Model):
    before = run(model)
    result = GroupQueryHeads()(model)
    assert not result.modified and (run(result.model) == before).all()


def test_heads_stay_apart_where_the_number_of_keys_varies():
    model = make()
    for value in model.graph.inputs:
        if value.name in ("k", "v", "seen") and value.shape is not None:
            value.shape = ir.Shape(["sequence" if size == KEYS else size for size in value.shape.numpy()])
    assert not GroupQueryHeads()(model).modified


def test_products_of_several_rows_stay():
    assert not FlattenBiased()(make(rows=2, mask=(2, 1, 2, KEYS))).modified


def test_transposes_that_move_elements_stay():
    model = make(rows=2, mask=(2, 1, 2, KEYS))
    assert not MergeReshapes()(model).modified and count(model)["Transpose"] == 2


@pytest.mark.parametrize("step", [GroupQueryHeads(), FlattenBiased(), MergeReshapes()], ids=lambda step: type(step).__name__)
def test_a_second_run_finds_nothing(step: ir.passes.InPlacePass):
    first = step(make())
    assert first.modified and not step(first.model).modified


def test_named_stage_values_survive():
    model = make()
    product = next(node for node in model.graph if node.op_type == "MatMul").outputs[0]
    product.name = "stage.0.scores"
    assert any(node.outputs[0].name == "stage.0.scores" for node in lower(model, "onnxruntime").graph)


def test_other_targets_keep_the_operators():
    assert count(lower(make(), "onnxruntime-cuda")) == count(make())
