"""Engines of a whole variant: built from the lowered file, recorded by hash, nothing half-written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from sievert.bundle.errors import EngineError, EngineUnavailableError, IntegrityError, VariantError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.manifest import GraphEntry, Manifest, Source, Variant
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import describe_values
from sievert.bundle.store import Bundle
from sievert.engines.build import builders
from sievert.engines.build.builders import BUILDERS, unavailable_to_build
from sievert.engines.build.process import build_engine
from sievert.engines.build.variant import build
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lint import lint
from tests.bundle.small import GEOMETRY, snapshot
from tests.graph_passes.static_graphs import MAKERS, Weights, make_feeds
from tests.graph_passes.test_lower import assert_same, run

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


def make_bundle(folder: Path, dtype: str = "float32", *, graphs: tuple[str, ...] = tuple(MAKERS), extra: ir.Model | None = None) -> Bundle:
    """A bundle whose variant ``v`` holds the small static graphs, and ``extra`` as ``prefill`` where given."""
    with Bundle.create(folder / "bundle") as new:
        made = Weights(folder, dtype)
        name = new.add_file(folder / made.name, "weights", ".data")
        made.name, made.folder = name, new.path
        models = {graph: MAKERS[graph](made) for graph in graphs} | ({"prefill": extra} if extra is not None else {})
        entries = {
            graph: GraphEntry(
                file=new.add_bytes(f"v.{graph}", ".onnx", to_bytes(model)),
                inputs=describe_values(model.graph.inputs),
                outputs=describe_values(model.graph.outputs),
            )
            for graph, model in models.items()
        }
        profile = Profile(visual_tokens=4, max_text=6, max_new_tokens=5)
        new.finish(
            Manifest(
                source=Source(model="small", architecture="Llava", family="llava", vision="clip", text="llama", dtype=dtype),
                geometry=GEOMETRY,
                weights_file=name,
                weights=(),
                files={},
                graphs={},
                variants={"v": Variant(plan=Plan(), profile=profile, capacities=(16, 12), graphs=entries)},
            )
        )
    return Bundle.open(folder / "bundle", verify="full")


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_four_graphs_build_for_rtx_without_a_gpu(tmp_path: Path, dtype: str):
    bundle = make_bundle(tmp_path, dtype)
    originals = {graph: ir.load(bundle.graph_file(graph, variant="v")) for graph in MAKERS}
    seen: list[tuple[str, float]] = []
    entry = build(bundle, "v", "tensorrt-rtx", progress=lambda graph, share: seen.append((graph, share)))
    assert entry == bundle.variant("v").engines["tensorrt-rtx"]
    assert (entry.target, set(entry.graphs)) == ("tensorrt-rtx", set(MAKERS))
    again = Bundle.open(bundle.path, verify="full")
    for graph, made in entry.graphs.items():
        lowered = again.file(made.lowered)
        assert made.built_from == sha256_bytes(lowered.read_bytes()) == again.manifest.files[made.lowered].sha256
        assert lint(ir.load(lowered), "tensorrt-rtx") == []
        if dtype == "float32":  # the very file the engine was built from
            feeds = make_feeds(graph, dtype)
            assert_same(run(originals[graph], feeds, bundle.path), run(ir.load(lowered), feeds, bundle.path))
        assert len(again.engine_bytes("v", "tensorrt-rtx", graph)) > 1000
        assert made.builder.startswith("tensorrt_rtx 1.")
        assert made.builder.endswith("default capabilities")
        shares = [share for name, share in seen if name == graph]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        assert len(shares) > 3
    assert entry.graphs["embed_tokens"].lowered == again.variant("v").graphs["embed_tokens"].file, "nothing to lower, nothing written"
    assert entry.graphs["prefill"].lowered != again.variant("v").graphs["prefill"].file
    assert sum(name.endswith(".data") for name in again.manifest.files) == 1, "weights stand once"


@pytest.mark.parametrize(("engine", "own"), [("onnxruntime", {"decode"}), ("onnxruntime-cuda", set())])
def test_onnx_runtime_gets_its_graphs_recorded_and_only_what_was_lowered_written(tmp_path: Path, engine: str, own: set[str]):
    bundle = make_bundle(tmp_path)
    before = set(snapshot(bundle.path))
    entry = build(bundle, "v", engine, command="build --engine x")
    lowered = {graph: made.lowered for graph, made in entry.graphs.items()}
    assert set(snapshot(bundle.path)) - before == {lowered[graph] for graph in own}
    kept = {graph: listed.file for graph, listed in bundle.variant("v").graphs.items() if graph not in own}
    assert {graph: file for graph, file in lowered.items() if graph not in own} == kept
    assert {made.file for made in entry.graphs.values()} == {None}
    assert bundle.manifest.history[-1].command == "build --engine x"
    assert entry.target == engine


@needs_rtx
def test_building_again_replaces_the_engines_and_leaves_no_file_behind(tmp_path: Path):
    bundle = make_bundle(tmp_path, graphs=("embed_tokens",))
    build(bundle, "v", "tensorrt-rtx")
    build(bundle, "v", "tensorrt-rtx", capabilities=["SM89", "SM120"])
    made = bundle.variant("v").engines["tensorrt-rtx"].graphs["embed_tokens"]
    assert made.builder.endswith(", SM89+SM120")
    assert [name for name in snapshot(bundle.path) if name.endswith(".engine")] == [made.file]
    assert set(snapshot(bundle.path)) == {*bundle.manifest.files, "sievert.json"}


@needs_rtx
def test_lint_errors_stop_the_build_before_it_starts(tmp_path: Path):
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 24]> g (float[1,5000] x) => (float[1,4000] y, int64[1,4000] i) '
        "{ k = Constant<value_ints=[4000]>() y, i = TopK(x, k) }"
    )
    bundle = make_bundle(tmp_path, graphs=("embed_tokens",), extra=ir.from_proto(proto))
    before, told = snapshot(bundle.path), []
    with pytest.raises(EngineError, match=r"tensorrt-rtx would refuse prefill: error topk-limit: .*K=4000.*To do: take fewer"):
        build(bundle, "v", "tensorrt-rtx", progress=lambda graph, _share: told.append(graph))
    assert told == []
    assert snapshot(bundle.path) == before
    assert build(bundle, "v", "onnxruntime").graphs["prefill"].file is None


@needs_rtx
def test_a_build_that_fails_after_others_succeeded_leaves_the_bundle_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle(tmp_path, graphs=("embed_tokens", "prefill"))
    before = snapshot(bundle.path)
    calls: list[str] = []

    def fail_second(module: str, graph: Path, engine: Path, *rest: object, **options: object) -> None:
        calls.append(graph.name)
        if len(calls) == 2:
            raise EngineError("the builder refused the graph: no")
        build_engine(module, graph, engine)

    monkeypatch.setattr("sievert.engines.build.variant.build_engine", fail_second)
    with pytest.raises(EngineError, match="refused the graph: no"):
        build(bundle, "v", "tensorrt-rtx")
    assert len(calls) == 2
    assert snapshot(bundle.path) == before
    assert bundle.variant("v").engines == {}


def test_a_graph_that_changed_is_not_built(tmp_path: Path):
    bundle = make_bundle(tmp_path, graphs=("decode",))
    path = bundle.graph_file("decode", variant="v")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="SHA-256"):
        build(bundle, "v", "onnxruntime")


def test_unknown_engines_variants_and_capabilities_are_refused(tmp_path: Path):
    bundle = make_bundle(tmp_path, graphs=("decode",))
    before = snapshot(bundle.path)
    with pytest.raises(EngineError, match="unknown engine 'openvino': choose one of onnxruntime, onnxruntime-cuda, tensorrt-rtx, tensorrt"):
        build(bundle, "v", "openvino")
    with pytest.raises(VariantError, match="no variant 'w'"):
        build(bundle, "w", "onnxruntime")
    with pytest.raises(EngineError, match="tensorrt-rtx cannot build for SM90; it offers SM75, SM80"):
        build(bundle, "v", "tensorrt-rtx", capabilities=["SM90"])
    with pytest.raises(EngineError, match="its engines run where they were built"):
        build(bundle, "v", "onnxruntime", capabilities=["SM89"])
    assert snapshot(bundle.path) == before


@needs_rtx
def test_bfloat16_for_turing_is_refused_before_the_builder_does(tmp_path: Path):
    bundle = make_bundle(tmp_path, "bfloat16", graphs=("decode",))
    with pytest.raises(EngineError, match=r"decode compute in bfloat16, which Turing \(SM75\) has not"):
        build(bundle, "v", "tensorrt-rtx", capabilities=["SM75"])
    (tmp_path / "half").mkdir()
    half = make_bundle(tmp_path / "half", "float16", graphs=("embed_tokens",))
    assert build(half, "v", "tensorrt-rtx", capabilities=["SM75"]).graphs["embed_tokens"].builder.endswith("SM75")


def test_bfloat16_for_onnx_runtime_is_emulated(tmp_path: Path):
    bundle = make_bundle(tmp_path, "bfloat16", graphs=("decode",))
    made = build(bundle, "v", "onnxruntime").graphs["decode"]
    assert made.lowered != bundle.variant("v").graphs["decode"].file
    session = OnnxRuntime(threads=1).load(ModelFile(bundle.path / made.lowered, made.built_from))
    assert {spec.dtype for spec in session.inputs if spec.name.startswith("past")} == {"bfloat16"}


def test_availability_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    assert unavailable_to_build("onnxruntime") is None
    with pytest.raises(EngineError, match="unknown engine"):
        unavailable_to_build("x")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert (
        unavailable_to_build("tensorrt-rtx")
        == 'the Python package tensorrt_rtx is not installed: run `pip install "sievert[tensorrt-rtx]"`'
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    monkeypatch.setattr(builders, "has_gpu", lambda: False)
    assert unavailable_to_build("tensorrt-rtx") is None, "its builder needs no GPU"
    reason = unavailable_to_build("tensorrt")
    assert reason is not None
    assert "no NVIDIA GPU" in reason
    monkeypatch.setattr(builders, "has_gpu", lambda: True)
    assert unavailable_to_build("tensorrt") is None


def test_an_engine_that_cannot_be_built_here_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle(tmp_path, graphs=("decode",))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EngineUnavailableError, match="tensorrt is not installed"):
        build(bundle, "v", "tensorrt")


def test_a_driver_that_is_not_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builders, "_DRIVER", "libno-such-driver.so.1")
    assert builders.has_gpu() is False


@needs_rtx
def test_the_parsers_words_and_the_node_reach_the_user(tmp_path: Path):
    proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 24]> g (bool[9] x) => (int64[1,N] y) { [find] y = NonZero(x) }')
    onnx.save(proto, tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"g.onnx: the parser refused NonZero node 'find': .*plugin registry"):
        build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "g.engine")


@needs_rtx
def test_the_builder_is_given_the_range_of_a_length_that_varies(tmp_path: Path):
    text = '<ir_version: 11, opset_import: ["": 24]> g (float[2,sequence] x) => (float[2,sequence] y) { y = Add(x, x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "g.engine", lengths=(3, 9))
    trt = importlib.import_module("tensorrt_rtx")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine((tmp_path / "g.engine").read_bytes())
    if engine is not None:  # only where there is a GPU
        assert [tuple(shape) for shape in engine.get_tensor_profile_shape("x", 0)] == [(2, 3), (2, 6), (2, 9)]
    with pytest.raises(EngineError, match="profile|dimension"):
        build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "h.engine", lengths=(9, 3))


@needs_rtx
def test_weights_are_found_beside_the_graph_and_missed_when_they_are_not_there(tmp_path: Path):
    model = MAKERS["embed_tokens"](Weights(tmp_path, "float32"))
    (tmp_path / "g.onnx").write_bytes(to_bytes(model))
    build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "g.engine")
    (tmp_path / "weights.data").unlink()
    with pytest.raises(EngineError, match=r"weights.data|Failed to"):
        build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "h.engine")


def test_a_worker_that_dies_is_an_error_that_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 1 without a word.*No module named 'no_such_builder'"):
        build_engine("no_such_builder", tmp_path / "g.onnx", tmp_path / "g.engine")
    script = tmp_path / "die"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        build_engine("tensorrt_rtx", tmp_path / "g.onnx", tmp_path / "g.engine")


def test_every_line_the_worker_reports_becomes_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "report"
    lines = [{"done": 0.25}, {"done": 0.5}, {"built": 7}]
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{json.dumps(line)}'\n" for line in lines))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    seen: list[float] = []
    build_engine("x", tmp_path / "g.onnx", tmp_path / "g.engine", progress=seen.append)
    assert seen == [0.25, 0.5]


def test_engines_and_targets_are_those_lowering_knows():
    from sievert.graph_passes.lower import TARGETS

    assert {builder.target for builder in BUILDERS.values()} == set(TARGETS)
    assert all(builder.engine == name for name, builder in BUILDERS.items())
