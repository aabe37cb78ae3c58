"""A 16-bit variant of a float32 bundle: the same to 16 bit, and what overflows is found, named and kept in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import sievert
from sievert.bundle.errors import CalibrationError, EngineError, VariantError
from sievert.bundle.store import Bundle
from sievert.calibration.collection import load_collection
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.narrow import fit
from tests.calibration.conftest import PROMPTS, edit_weight


def test_a_planted_overflow_is_kept_and_the_variant_survives_it(bundle: Path, data: Path, tmp_path: Path):
    edit_weight(bundle, "layers.1.mlp.up_proj", lambda weight: weight * 1e6)
    edit_weight(bundle, "layers.1.mlp.down_proj", lambda weight: weight * 1e-6)
    sievert.collect(bundle, data, samples=3, decode_steps=1, out=tmp_path / "collected")
    found = sievert.quantise(bundle, format="float16", collection=tmp_path / "collected")
    precision = found.variant.precision
    assert found.name == "full-float16" and precision is not None
    starts = [reason for name, reason in precision.kept.items() if name.startswith("prefill/")]
    assert any("layers.1.mlp.up_proj" in name for name in precision.kept) and all("float16 ends at 65504" in reason for reason in starts)
    opened = Bundle.open(bundle, verify="full")
    collection = load_collection(tmp_path / "collected", opened)
    for graph in ("vision_encoder", "prefill", "decode"):
        path = opened.graph_file(graph, variant="full-float16")
        narrow, feed = OnnxRuntime(threads=1).load(ModelFile(path, "")), collection.feed(graph, 0)
        before = OnnxRuntime(threads=1).load(ModelFile(opened.graph_file(graph, variant="full"), "")).run(feed)
        after = narrow.run({name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in feed.items()})
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert after[name].dtype == (np.float32 if name == "logits" else np.float16)
            lost = np.linalg.norm(after[name].astype(np.float64) - array) / np.linalg.norm(array)
            assert lost < 5e-3, (graph, name, lost)
    # Without what the ranges say it breaks: the kept tensors are what saves it.
    model = ir.load(opened.graph_file("prefill", variant="full-float16"))
    high = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    assert any("layers.1.mlp" in node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for value in high if (node := value.producer()))
    assert sum(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs) > 2 * len(high)


def test_selector_and_interface_of_a_pruned_variant(bundle: Path, data: Path, tmp_path: Path):
    sievert.collect(bundle, data, variant="iwp-22", samples=2, decode_steps=1, out=tmp_path / "collected")
    found = sievert.quantise(bundle, variant="iwp-22", format="bfloat16", collection=tmp_path / "collected", name="narrow")
    specs = {spec.name: spec.dtype for graph in found.variant.graphs.values() for spec in (*graph.inputs, *graph.outputs)}
    assert specs.pop("logits") == "float32"
    assert {dtype for dtype in specs.values() if "float" in dtype} == {"bfloat16"}
    model = ir.load(Bundle.open(bundle).graph_file("prefill", variant="narrow"))
    scores = [value for node in model.graph for value in node.outputs if str(value.name).startswith("stage.0.scores")]
    assert [value.dtype for value in scores] == [ir.DataType.FLOAT]
    assert found.bytes == pytest.approx(found.bytes_before / 2, rel=0.01)
    with pytest.raises(EngineError, match=r"Could not find an implementation.*`sievert build --engine onnxruntime`"):
        sievert.run(bundle, data.parent / "a.png", PROMPTS[:1], variant="narrow")
    report = sievert.check(bundle, variants=["narrow"], samples=2, tokens=2).outcomes[0].ran  # emulated without being built
    assert report.verdict.value in ("PASS", "AMBIGUOUS") and report.dtype == "bfloat16", report.reason
    sievert.build(bundle, variants=["narrow"], engines=["onnxruntime"])
    assert sievert.run(bundle, data.parent / "a.png", PROMPTS[:1], variant="narrow").answers[0].tokens
    with pytest.raises(VariantError, match=r"quantised already \(bfloat16\)"):
        sievert.quantise(bundle, variant="narrow", format="int4")
    with pytest.raises(CalibrationError, match="holds no calibration data"):
        sievert.quantise(bundle, format="float16")


def test_what_masks_are_made_of_fits_the_format():
    values = np.array([-3.4e38, 3.4e38, -np.inf, 7.0, 1e5], np.float32)
    np.testing.assert_array_equal(fit(values, ir.DataType.FLOAT16).astype(np.float32), [-65504, 65504, -np.inf, 7, 65504])
