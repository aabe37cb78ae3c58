"""16-bit exports: every float32 island of DESIGN.md is written in the graph, and where kernels exist the numbers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import InputError
from sievert.bundle.specs import describe_values
from sievert.exporter.confirm import confirm_decoder
from sievert.exporter.export import Exported, export_model
from tests.exporter.graphs import run

FLOAT = int(ir.DataType.FLOAT)


def nodes(exported: Exported, *operators: str) -> list[ir.Node]:
    found = [node for model in exported.graphs.values() for node in model.graph if node.op_type in operators]
    assert found
    return found


def origin(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def test_norms_compute_in_float32(sixteen: Exported):
    for node in nodes(sixteen, "RMSNormalization", "LayerNormalization"):
        assert node.attributes["stash_type"].as_int() == FLOAT


def test_softmax_computes_in_float32(sixteen: Exported):
    for node in nodes(sixteen, "Attention"):
        assert node.attributes["softmax_precision"].as_int() == FLOAT
    assert not [node for model in sixteen.graphs.values() for node in model.graph if node.op_type == "Softmax"]


def test_rotary_tables_are_float32_up_to_the_cast(sixteen: Exported):
    for node in nodes(sixteen, "RotaryEmbedding"):
        for table in node.inputs[1:]:
            cast = origin(table)
            assert cast.op_type == "Cast"
            while cast.op_type not in ("Cos", "Sin"):
                cast = origin(cast.inputs[0])
                assert cast.outputs[0].dtype in (ir.DataType.FLOAT, None)  # None: made by a rule, and typed by what it reads
            angles = origin(cast.inputs[0])
            assert angles.op_type == "Mul"
            assert {value.dtype for value in angles.inputs if value is not None} == {ir.DataType.FLOAT}
    confirm_decoder(sixteen.graphs["decoder"], sixteen.geometry)


def test_logits_are_float32_and_all_else_is_of_the_models_dtype(sixteen: Exported):
    dtype = sixteen.source.dtype
    for model in sixteen.graphs.values():
        for spec in describe_values([*model.graph.inputs, *model.graph.outputs]):
            index = spec.name in {"input_ids", "visual_index", "attention_mask", "position_ids"}
            assert spec.dtype == ("float32" if spec.name == "logits" else "int64" if index else dtype), spec.name
    head = origin(sixteen.graphs["decoder"].graph.outputs[0])
    assert head.op_type == "Cast"
    assert origin(head.inputs[0]).op_type == "MatMul"


def test_weights_are_stored_in_the_models_dtype(sixteen: Exported):
    kinds = {np.dtype(weight.tensor.dtype.numpy()).name for weight in sixteen.weights}
    assert kinds == {sixteen.source.dtype}


def test_float16_runs_and_agrees_with_float32(half: tuple[Path, Exported]):
    folder, exported = half
    loader: Any = LlavaForConditionalGeneration
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    embeds = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)).numpy()
        logits = model(inputs_embeds=embeds).logits.numpy()
    got = run(exported.graphs["vision_encoder"], pixel_values=pixels.numpy().astype(np.float16))["image_features"]
    assert got.dtype == np.float16
    assert np.abs(got - features).max() <= 1e-2 * np.abs(features).max()
    positions = np.broadcast_to(np.arange(19), (2, 19))
    feeds = {"inputs_embeds": embeds.numpy().astype(np.float16), "attention_mask": np.ones_like(positions), "position_ids": positions}
    got = run(exported.graphs["decoder"], **feeds)["logits"]
    assert got.dtype == np.float32
    assert np.abs(got - logits).max() <= 1e-2 * np.abs(logits).max()


def test_unknown_dtype_is_refused_before_anything_is_read(tmp_path: Path):
    with pytest.raises(InputError, match="dtype 'int8': choose float32, float16, bfloat16"):
        export_model(tmp_path / "nothing", dtype="int8")  # type: ignore[arg-type]
