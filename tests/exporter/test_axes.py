"""Rotary tables of several axes: one form of the graph for every way they are spelled, and the numbers of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.exporter.axes import GatherPositions
from sievert.exporter.rotary import FuseRotary
from tests.exporter.graphs import assert_equal, run
from tests.tiny_axes import FAMILIES, SECTIONS, export_decoder, export_tiny, geometry_of, make_tiny

EXPECTED = {
    "qwen2_vl": [0, 0, 1, 1, 1, 2, 2, 2],
    "qwen2_5_vl": [0, 0, 1, 1, 1, 2, 2, 2],
    "qwen3_vl": [0, 1, 2, 0, 1, 2, 0, 1],
}
HALF = sum(SECTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gather_and_two_tables(family: str) -> None:
    _, geometry, graphs = export_tiny(family)
    nodes = list(graphs["decoder"].graph)
    gathered = [node for node in nodes if node.op_type == "Gather"]
    assert [node.inputs[1].producer().attributes["value"].as_tensor().numpy().tolist() for node in gathered] == [EXPECTED[family]]  # type: ignore[union-attr]
    counts = {name: sum(node.op_type == name for node in nodes) for name in ("Cos", "Sin", "RotaryEmbedding", "ScatterND", "NonZero")}
    assert counts == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 2 * geometry.depth, "ScatterND": 0, "NonZero": 0}
    for node in nodes:
        if node.op_type == "RotaryEmbedding":
            tables = [value.producer() for value in node.inputs[1:]]  # type: ignore[union-attr]
            assert [table.op_type for table in tables if table is not None] == ["Cos", "Sin"]


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_the_model(family: str) -> None:
    """Positions that mean nothing, so that every axis counts; padding on the right."""
    model, geometry, graphs = export_tiny(family)
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "inputs_embeds": rng.standard_normal((3, 11, geometry.width)).astype(np.float32),
        "attention_mask": np.array([[1] * 11, [1] * 9 + [0] * 2, [1] * 4 + [0] * 7], np.int64),
        "position_ids": rng.integers(0, 400, (3, 3, 11)),
    }
    got, text, head = run(graphs["decoder"], **feeds), model.get_submodule("model.language_model"), model.get_submodule("lm_head")
    with torch.inference_mode():
        outputs = text(**{name: torch.tensor(value) for name, value in feeds.items()}, use_cache=True)
        logits = head(outputs.last_hidden_state).numpy()
    real = feeds["attention_mask"] > 0
    assert_equal(got["logits"][real], logits[real])
    for number, layer in enumerate(outputs.past_key_values.layers):
        for part, tensor in (("key", layer.keys), ("value", layer.values)):
            cache = got[f"present.{number}.{part}"].swapaxes(1, 2)
            assert_equal(cache[real], tensor.numpy().swapaxes(1, 2)[real])


def test_tables_of_a_sixteen_bit_model_are_float32() -> None:
    model = make_tiny("qwen3_vl", layers=1, dtype=torch.float16)
    graph = export_decoder(model, geometry_of(model), torch.float16)["decoder"].graph
    tables = [node for node in graph if node.op_type in ("Cos", "Sin")]
    assert len(tables) == 2 and all(next(iter(node.outputs[0].consumers())).op_type == "Cast" for node in tables)
    angles = tables[0].inputs[0].producer() if tables[0].inputs[0] is not None else None
    assert angles is not None and angles.inputs[0] is not None
    cast = angles.inputs[0].producer()
    assert cast is not None and cast.attributes["to"].as_int() == ir.DataType.FLOAT


def make_rotary(order: str, *, factor: float = 1.0) -> ir.Model:
    """``x[B, 2, S, 16]`` turned by ``position_ids[3, B, S]``, spelled out; the tables are put together as ``order`` says."""
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="rotary"))
    x = build.input("x", ir.DataType.FLOAT, ["batch", 2, "sequence", 2 * HALF])
    positions = build.input("position_ids", ir.DataType.INT64, [3, "batch", "sequence"])
    op: Any = build.op
    inverse = build.initializer(ir.tensor((0.5 ** np.arange(HALF)).astype(np.float32)), name="inv_freq")
    angles = op.Mul(op.Cast(op.Unsqueeze(positions, [3]), to=ir.DataType.FLOAT), inverse)  # [3, B, S, f]
    angles.shape = ir.Shape([3, "batch", "sequence", HALF])

    def table(name: str) -> ir.Value:
        values = getattr(op, name)(angles)
        if factor != 1.0:
            values = op.Mul(values, factor)
        values.shape = angles.shape
        parts = op.Split(values, list(SECTIONS), axis=3, _outputs=3)
        if order == "sections":
            half = op.Concat(*[op.Gather(part, axis, axis=0) for axis, part in enumerate(parts)], axis=-1)
        elif order == "moved":
            half = op.Concat(*[op.Gather(part, axis, axis=0) for axis, part in reversed(list(enumerate(parts)))], axis=-1)
        else:
            half = op.ReduceMean(values, [0], keepdims=0)
        half.shape = ir.Shape(["batch", "sequence", HALF])
        return op.Unsqueeze(op.Concat(half, half, axis=-1), [1])  # type: ignore[no-any-return]

    first, second = op.Slice(x, [0], [HALF], [3], [1]), op.Slice(x, [HALF], [2 * HALF], [3], [1])
    turned = op.Add(op.Mul(x, table("Cos")), op.Mul(op.Concat(op.Neg(second), first, axis=-1), table("Sin")))
    turned.type, turned.shape = x.type, x.shape
    build.add_output(turned, "turned")
    return ir.Model(build.graph, ir_version=11)


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_same_tables_and_nothing_left_to_do(factor: float) -> None:
    rng, model = np.random.default_rng(1), make_rotary("sections", factor=factor)
    feeds = {"x": rng.standard_normal((2, 2, 5, 2 * HALF)).astype(np.float32), "position_ids": rng.integers(0, 90, (3, 2, 5))}
    before = run(model, **feeds)["turned"]
    assert GatherPositions()(model).modified
    assert_equal(run(model, **feeds)["turned"], before)
    assert not GatherPositions()(model).modified
    assert FuseRotary()(model).modified
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 1
    assert_equal(run(model, **feeds)["turned"], before)


@pytest.mark.parametrize("order", ["moved", "mean"])
def test_other_mixtures_are_refused(order: str) -> None:
    with pytest.raises(GraphError, match="every frequency should come from one axis, unmoved"):
        GatherPositions()(make_rotary(order))
