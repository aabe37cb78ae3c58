"""Every float tensor's range is measured, and what a narrower format cannot hold is found, named, and traced to where it starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import sievert
from sievert.bundle.errors import CalibrationError, VariantError
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection
from sievert.calibration.formats import FORMATS, find_format
from sievert.calibration.judging import Seen
from sievert.calibration.ranges import measure_ranges
from sievert.calibration.scopes import find_scope, is_float32_island
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.scopes import BUILT, EXPORTED
from tests.calibration.conftest import edit_weight

FP16 = FORMATS["float16"]


@pytest.fixture(scope="module")
def collection(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return sievert.collect(made, random=True, variant="iwp-22", samples=3, decode_steps=2, out=tmp_path_factory.mktemp("ranges") / "data")


def test_ranges_are_those_of_all_runs_whatever_the_chunks(collection: Collection):
    bundle = collection.bundle
    whole, parts = (measure_ranges(collection, "iwp-22", chunk_bytes=size) for size in (1 << 30, 200_000))
    assert [each.name for each in whole.tensors] == [each.name for each in parts.tensors]
    found = {(each.graph, each.name): each for each in parts.tensors}
    for each in whole.tensors:
        assert each.magnitude == pytest.approx(found[each.graph, each.name].magnitude, rel=1e-4, abs=1e-6)
    path = bundle.graph_file("prefill", variant="iwp-22")
    model = ir.load(path)
    floats = [value for node in model.graph for value in node.outputs if value.dtype is not None and value.dtype.is_floating_point()]
    names = [str(value.name) for value in floats]
    assert set(names) <= {name for graph, name in found if graph == "prefill"}
    session = OnnxRuntime(threads=1).load(ModelFile(path, "", to_bytes(expose(model, names))))
    runs = [session.run(feed) for feed in collection.feeds("prefill")]
    for name in names:
        values = np.stack([run[name] for run in runs])
        usual = values[np.abs(values) < np.finfo(np.float32).max]
        measured = found["prefill", name]
        if usual.size:
            assert (measured.low, measured.high) == pytest.approx((float(usual.min()), float(usual.max())), rel=1e-3, abs=1e-5)
        assert measured.infinities + measured.fills + measured.nans == values.size - usual.size
    inputs = {each.name for each in whole.tensors if each.kind == "input" and each.graph == "decode"}
    assert inputs == {f"past_key_values.{layer}.{part}" for layer in range(4) for part in ("key", "value")}
    weights = [each.name for each in whole.tensors if each.kind == "weight"]
    assert {weight.name for weight in bundle.manifest.weights} & set(weights) and len([n for n in weights if "lm_head" in n]) == 1


def test_modules_are_named_and_islands_left_alone(collection: Collection):
    found = measure_ranges(collection, "iwp-22")
    assert not found.keep_float32 and found.random and not found.emulated and found.samples == 3
    modules = {each.module for each in found.tensors if each.kind == "computed"}
    assert {"model.layers.1.mlp.down_proj", "vision_tower.embeddings.patch_embedding"} <= {
        m.removeprefix("model.vision_tower") for m in modules
    } | modules
    caches = [each for each in found.tensors if each.name.startswith("present.1.")]
    assert caches and all(each.module.startswith("model.layers.1.self_attn") for each in caches)
    islands = {each.module.split("/")[0] for each in found.tensors if each.verdict == "float32"}
    assert islands == {"select.0", "model.rotary_emb"}
    assert all(each.verdict != "float32" and each.headroom for each in found.worst(1000))
    written_out = measure_ranges(collection, "iwp-22", lowered_for="tensorrt-rtx")
    scores = [each for each in written_out.tensors if each.name.startswith("v_lower.attention.MatMul")]
    assert scores and {each.module for each in scores if each.graph == "decode"} <= {f"model.layers.{i}.self_attn" for i in range(4)}
    assert not written_out.keep_float32  # a mask's fill is no overflow
    assert any(each.fills for each in written_out.tensors)


def test_a_planted_overflow_is_found_named_and_traced(bundle: Path, data: Path, tmp_path: Path):
    edit_weight(bundle, "layers.1.mlp.up_proj", lambda weight: weight * 1e6)
    edit_weight(bundle, "layers.1.mlp.down_proj", lambda weight: weight * 1e-6)
    sievert.collect(bundle, data, samples=3, decode_steps=1, out=tmp_path / "collected")
    found = sievert.ranges(bundle, tmp_path / "collected")
    starts = [each for each in found.keep_float32 if each.starts]
    computed = [(each.graph, each.module) for each in starts if each.kind == "computed"]
    assert computed == [("prefill", "model.layers.1.mlp.up_proj"), ("decode", "model.layers.1.mlp.up_proj")]
    assert all("so does its input" in each.reason and "up_proj.weight" in each.reason for each in starts if each.kind == "computed")
    (weight,) = [each for each in starts if each.kind == "weight"]
    assert "layers.1.mlp.up_proj" in weight.name
    model = ir.load(Bundle.open(bundle).graph_file("prefill", variant="full"))
    (down,) = [
        node for node in model.graph if node.op_type == "MatMul" and "'model.layers.1.mlp.down_proj'" in node.metadata_props[EXPORTED]
    ]
    reached = {each.name: each for each in found.tensors if each.graph == "prefill"}
    assert down.inputs[0] is not None
    planted = reached[str(down.inputs[0].name)]
    assert planted.verdict == "overflow" and planted.magnitude > 1e5 and planted.headroom is not None and planted.headroom < 1
    assert "3 of 3 runs, float16 ends at 65504; so does its input" in planted.reason and "model.layers.1.mlp" in planted.module
    assert planted.at in ("line 2", "line 3", "line 4")
    assert reached[str(down.outputs[0].name)].verdict == "fits"
    (narrow,) = [each for each in found.tensors if "layers.1.mlp.down_proj" in each.name and each.kind == "weight"]
    assert narrow.verdict == "fits" and narrow.tiny > 0.99  # what was divided is lost below the smallest normal
    assert found.worst(1)[0].verdict == "overflow"
    assert {each["name"] for each in json.loads(json.dumps(found.to_json()))["keep_float32"]} >= {planted.name}
    assert not sievert.ranges(bundle, tmp_path / "collected", dtype="bfloat16").keep_float32


def test_ranges_refuses_what_does_not_belong_together(collection: Collection, made: Path):
    path = collection.path
    for options, error, says in (
        ({"variant": "full"}, CalibrationError, "keeps other tokens than 'full'"),
        ({"variant": "gone"}, VariantError, "no variant 'gone'"),
        ({"dtype": "int8"}, CalibrationError, "'int8'.*float16, bfloat16"),
        ({"lowered_for": "fastest"}, CalibrationError, "'fastest'.*tensorrt-rtx"),
        ({"chunk_mib": 0}, CalibrationError, "chunk_mib=0"),
    ):
        with pytest.raises(error, match=says):
            sievert.ranges(made, path, **options)
    with pytest.raises(CalibrationError, match="bundle-calibration holds no calibration data"):
        sievert.ranges(made)


def test_what_is_seen_is_counted_apart_from_masks():
    seen = Seen()
    largest = np.finfo(np.float32).max
    seen.add(np.array([0, -7e4, 3, 1e-5, -1e-9, largest, -largest, np.inf, np.nan], np.float32), FP16)
    seen.add(np.array([5, 6, 0, 0], np.float32), FP16, 1)
    assert seen.largest_run == 0
    assert (seen.low, seen.high, seen.magnitude, seen.overflowing_runs) == (-7e4, 6.0, 7e4, 1)
    assert (seen.values, seen.tiny, seen.fills, seen.infinities, seen.nans) == (13, 2, 2, 1, 1)
    masked = Seen()
    masked.add(np.full(3, -65504, np.float16), FP16)
    assert (masked.fills, masked.magnitude) == (3, 0.0)


def test_formats_are_what_numpy_says():
    import ml_dtypes

    for name, each in FORMATS.items():
        info = ml_dtypes.finfo(name)
        assert (each.largest, each.smallest_normal) == (float(info.max), float(info.smallest_normal))
    with pytest.raises(CalibrationError, match="'float8'"):
        find_format("float8")


def test_a_node_without_a_module_has_that_of_its_neighbour():
    first = ir.node("Relu", [ir.val("x")])
    bare = ir.node("Neg", [first.outputs[0]])
    lowered = ir.node("Abs", [bare.outputs[0]])
    last = ir.node("Exp", [lowered.outputs[0]])
    alone = ir.node("Neg", [ir.val("y")])
    ir.Graph([], [last.outputs[0]], nodes=[first, bare, lowered, last, alone])
    first.metadata_props[EXPORTED] = "['', 'model', 'model.layers.3', 'model.layers.3.mlp', 'relu']"
    lowered.metadata_props[BUILT] = "['lower.attention']"
    last.metadata_props[BUILT] = "['select.0', 'round.2']"
    alone.metadata_props[BUILT] = "not a list"
    assert [find_scope(node) for node in (first, bare, lowered)] == ["model.layers.3.mlp"] * 3
    assert find_scope(last) == "select.0/round.2" and find_scope(alone) == ""
    assert is_float32_island("select.0/round.2") and is_float32_island("model.rotary_emb") and not is_float32_island("model.layers.3")
    first.metadata_props[EXPORTED] = ""
    assert find_scope(first) == "select.0/round.2"
