from importlib import metadata
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper, parser

from sievert.bundle.errors import EngineError, EngineUnavailableError, IntegrityError, ProfileError
from sievert.bundle.specs import TensorSpec
from sievert.engines.run import ort
from sievert.engines.run.base import Cache, ModelFile
from sievert.engines.run.memory import Buffer
from sievert.engines.run.ort import OnnxRuntime, OrtSession, wheel_fault
from tests.engines.run.toy import Toy, make_bundle

TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
RUNTIME = OnnxRuntime(threads=1)


def load(folder: Path, text: str) -> OrtSession:
    path = folder / "graph.onnx"
    path.write_bytes(parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}').SerializeToString())
    return RUNTIME.load(ModelFile(path, ""))


def scatter(folder: Path, kind: str = "float") -> OrtSession:
    return load(
        folder,
        f"g ({kind}[2,2,16,8] past, {kind}[2,2,4,8] new, int64[2] row) => ({kind}[2,2,16,8] present, {kind}[2,2,4,8] echo)"
        '{ present = TensorScatter <axis=-2, mode="linear"> (past, new, row)\n echo = Identity(new) }',
    )


@pytest.mark.parametrize("kind", TYPES)
def test_a_bound_cache_is_written_in_place(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.setattr(ort, "_ERRORS_ONLY", 2)  # the library warns where it copies
    session = scatter(tmp_path, kind)
    spec = next(spec for spec in session.inputs if spec.name == "past")
    buffer = Buffer(session.memory, spec)
    rng = np.random.default_rng(0)
    expected = rng.standard_normal(buffer.shape).astype(TYPES[kind])
    session.memory.upload(buffer.address, expected)
    before = buffer.address
    session.bind([Cache("past", "present", buffer)])
    for row in ([0, 12], [3, 5]):
        new = rng.standard_normal((2, 2, 4, 8)).astype(TYPES[kind])
        outputs = session.run({"new": new, "row": np.array(row)})
        for batch, start in enumerate(row):
            expected[batch, :, start : start + 4] = new[batch]
        assert list(outputs) == ["echo"]
        np.testing.assert_array_equal(outputs["echo"], new)
        np.testing.assert_array_equal(buffer.numpy(), expected)
    assert buffer.address == before
    assert "in-place optimization not activated" not in capfd.readouterr().err
    session.bind([])
    session.run({"past": expected, "new": new, "row": np.array(row)})
    assert "in-place optimization not activated" in capfd.readouterr().err


def test_unbound_caches_are_ordinary_inputs_and_outputs(tmp_path):
    session = scatter(tmp_path)
    past, new = np.zeros((2, 2, 16, 8), np.float32), np.ones((2, 2, 4, 8), np.float32)
    outputs = session.run({"past": past, "new": new, "row": np.array([1, 2])}, ["present"])
    assert outputs.keys() == {"present"}
    assert outputs["present"][0, 0, :, 0].tolist() == [0, 1, 1, 1, 1] + [0] * 11
    assert not past.any()


def test_buffers_of_another_shape_or_name_are_refused(tmp_path):
    session = scatter(tmp_path)
    small = Buffer(session.memory, TensorSpec(name="past", dtype="float32", shape=(2, 2, 15, 8)))
    with pytest.raises(EngineError, match=r"cache past is float32\(2, 2, 16, 8\), got float32\(2, 2, 15, 8\)"):
        session.bind([Cache("past", "present", small)])
    with pytest.raises(EngineError, match="no cache gone"):
        session.bind([Cache("gone", "present", small)])


@pytest.fixture
def adder(tmp_path):
    return load(tmp_path, "g (float16[2] x, int64[2] n) => (float16[2] y, int64[2] m) { y = Add(x, x)\n m = Add(n, n) }")


def test_feeds_are_cast_within_their_kind(adder):
    outputs = adder.run({"x": np.array([1.5, 2.0], np.float64), "n": np.array([3, 4], np.int32)})
    assert outputs["y"].dtype == np.float16
    assert outputs["m"].dtype == np.int64
    assert (outputs["y"].tolist(), outputs["m"].tolist()) == ([3.0, 4.0], [6, 8])
    strided = np.arange(4, dtype=np.int64)[::2]
    assert adder.run({"x": np.ones(2, np.float16), "n": strided}, ["m"])["m"].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        ({"x": np.ones(2, np.float16)}, EngineError, r"inputs missing: \['n'\], not taken: none"),
        ({"x": np.ones(2), "n": np.ones(2, int), "z": np.ones(1)}, EngineError, r"missing: none, not taken: \['z'\]"),
        ({"x": np.ones(3), "n": np.ones(2, int)}, ProfileError, r"x has shape \(3,\), expected \(2,\)"),
        ({"x": np.ones(2, int), "n": np.ones(2, int)}, ProfileError, "x has type int64, expected float16"),
        ({"x": np.ones(2), "n": np.ones(2)}, ProfileError, "n has type float64, expected int64"),
        ({"x": np.ones(2), "n": np.ones(2, np.uint64)}, ProfileError, "n has type uint64, expected int64"),
    ],
)
def test_wrong_feeds_are_named(adder, feeds, error, message):
    with pytest.raises(error, match=message):
        adder.run(feeds)


def test_an_unknown_output_is_named(adder):
    with pytest.raises(EngineError, match=r"no output z; it gives \['m', 'y'\]"):
        adder.run({"x": np.ones(2), "n": np.ones(2, int)}, ["z"])


def test_a_model_in_memory_finds_its_weights_beside_the_path(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", a=Toy())
    path = bundle.graph_file("vision_encoder", variant="a")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    first, second = (RUNTIME.load(ModelFile(path, "", content)).run({"pixel_values": pixels}) for content in (None, path.read_bytes()))
    np.testing.assert_array_equal(first["image_features"], second["image_features"])


def test_broken_and_missing_graphs(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken\.onnx: ONNX Runtime refused the graph"):
        RUNTIME.load(ModelFile(tmp_path / "broken.onnx", ""))
    with pytest.raises(IntegrityError, match=r"gone\.onnx is missing"):
        RUNTIME.load(ModelFile(tmp_path / "gone.onnx", ""))


def test_wheels_that_are_missing_or_exclude_each_other():
    assert wheel_fault(["onnxruntime"], True) is None
    assert wheel_fault([], True) is None  # an own build
    assert 'pip install "sievert[cpu]"' in (wheel_fault([], False) or "")
    both = wheel_fault(["onnxruntime", "onnxruntime-gpu"], True) or ""
    assert "pip uninstall onnxruntime onnxruntime-gpu" in both
    assert 'pip install "sievert[gpu]"' in both


def test_installed_wheels_are_read_from_the_metadata(monkeypatch):
    there = {"onnxruntime": object(), "onnxruntime-gpu": object()}

    def distribution(name: str) -> object:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert ort.installed_wheels() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.raises(EngineUnavailableError, match="overwrite each other"):
        RUNTIME.load(ModelFile(Path("x.onnx"), ""))
    del there["onnxruntime-gpu"]
    assert ort.installed_wheels() == ["onnxruntime"]


def test_cuda_never_falls_back_in_silence(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    cuda = OnnxRuntime("CUDAExecutionProvider")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "no CUDA provider" in (cuda.unavailable() or "")
    # A wheel that offers the provider but cannot start it: the library itself goes on with the CPU.
    session = scatter(tmp_path)._session
    monkeypatch.setattr(OnnxRuntime, "unavailable", lambda self: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: session)
    with pytest.raises(EngineUnavailableError, match=r"could not start CUDAExecutionProvider and offers \['CPUExecutionProvider'\]"):
        cuda.load(ModelFile(tmp_path / "graph.onnx", ""))


def test_sessions_without_packed_weights_compute_the_same(tmp_path: Path):
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    text = '<ir_version: 11, opset_import: ["" : 24]>\ng (float[3,96] x) => (float[3,64] y) { y = MatMul(x, w) }'
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    file, x = ModelFile(tmp_path / "graph.onnx", ""), np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    for prepack in (True, False):
        runtime = OnnxRuntime(threads=1, prepack=prepack)
        np.testing.assert_allclose(runtime.load(file).run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-4)
        entries = runtime._options(file)
        if prepack:
            with pytest.raises(RuntimeError, match="disable_prepacking"):
                entries.get_session_config_entry("session.disable_prepacking")
        else:
            assert entries.get_session_config_entry("session.disable_prepacking") == "1"
