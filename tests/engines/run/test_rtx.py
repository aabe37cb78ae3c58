import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from sievert.bundle.errors import EngineError, EngineUnavailableError, IntegrityError, ProfileError
from sievert.bundle.store import Bundle
from sievert.engines.run import rtx
from sievert.engines.run.base import Cache, ModelFile
from sievert.engines.run.memory import Buffer
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.rtx import TensorRT, TensorRTSession, deserialise
from tests.engines.run.fake_trt import FakeTrt, Memory
from tests.engines.run.test_pipeline import add_engine
from tests.engines.run.toy import Toy, make_batch, make_bundle


@dataclass
class FakeRuntime:
    """A runtime over the fake module; everything but the module and the memory is the real one's."""

    trt: FakeTrt
    name: str = "tensorrt-rtx"
    reads_onnx: bool = False
    tested: bool = False

    def version(self) -> str | None:
        return self.trt.__version__

    def unavailable(self) -> str | None:
        return None

    def load(self, model: ModelFile) -> TensorRTSession:
        return deserialise(self.trt, "Fake", model, self.trt.memory)


def engine_file(folder: Path, text: str) -> ModelFile:
    content = parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}').SerializeToString()
    path = folder / "graph.engine"
    path.write_bytes(content)
    return ModelFile(path, hashlib.sha256(content).hexdigest())


DOUBLE = "g (float[2] x, int64[3] n) => (float[2] y, int64[3] m) { y = Add(x, x)\n m = Add(n, n) }"


def make_engines(folder: Path, **toys: Toy) -> Bundle:
    """A bundle whose "engines" are the graphs with their weights inside."""
    bundle = make_bundle(folder, **toys)
    for name in toys:
        whole = {graph: onnx.load(bundle.graph_file(graph, variant=name)).SerializeToString() for graph in bundle.variant(name).graphs}
        add_engine(bundle, name, "tensorrt-rtx", lowered=whole, built=True)
    return bundle


@pytest.mark.parametrize("aliases", [True, False])
@pytest.mark.parametrize("toy", [Toy(batch=2, decode_batch=2), Toy(batch=2, decode_batch=3)])
def test_an_engine_answers_like_onnx_runtime(tmp_path, aliases, toy):
    bundle = make_engines(tmp_path / "bundle", toy=toy)
    batch = make_batch(toy, [[5, 6, 7, 8, 9], [10, 11, 12]], [1, 2])
    trt = FakeTrt(Memory(), aliases=aliases)
    with Pipeline(bundle, "toy", FakeRuntime(trt)) as engine, Pipeline(bundle, "toy", OnnxRuntime(threads=1)) as plain:
        for _ in range(2):
            features = plain.encode(batch.pixel_values)
            np.testing.assert_allclose(engine.encode(batch.pixel_values).image_features, features.image_features, atol=1e-6)
            for pipeline in (engine, plain):
                result = pipeline.prefill(batch, features)
                for row in range(2):
                    pipeline.fill(row, row)
            np.testing.assert_array_equal(result.kept_index[0], batch.visual_index[:, toy.kept])
            for token in (20, 21, 22):
                tokens = np.array([token, token + 1, -1][: toy.decode_batch])
                logits = [pipeline.decode(tokens) for pipeline in (engine, plain)]
                np.testing.assert_allclose(logits[0][:2], logits[1][:2], atol=1e-6)
            for pair in zip(engine.caches(), plain.caches(), strict=True):
                for ours, theirs in zip(*pair, strict=True):
                    np.testing.assert_allclose(ours[:2], theirs[:2], atol=1e-6)


def test_a_plain_engine_runs_and_gives_only_what_is_asked(tmp_path):
    session = deserialise(FakeTrt(Memory(), aliases=False), "Fake", engine_file(tmp_path, DOUBLE), memory := Memory())
    outputs = session.run({"x": np.array([1.5, 2]), "n": np.array([1, 2, 3])}, ["m"])
    assert {name: array.tolist() for name, array in outputs.items()} == {"m": [2, 4, 6]}
    assert session.run({"x": np.array([1.5, 2]), "n": np.zeros(3, int)})["y"].tolist() == [3, 4]
    assert session.memory is memory


def test_an_engine_takes_prompts_of_every_length_in_its_range(tmp_path):
    text = "g (float[1,sequence,2] x, float[2] b) => (float[1,sequence,2] y) { y = Add(x, b) }"
    session = deserialise(trt := FakeTrt(Memory(), aliases=True), "Fake", engine_file(tmp_path, text), trt.memory)
    assert [spec.shape for spec in (*session.inputs, *session.outputs)] == [(1, "sequence", 2), (2,), (1, "sequence", 2)]
    for length in (3, 9, 2):
        x = np.arange(length * 2, dtype=np.float32).reshape(1, length, 2)
        np.testing.assert_array_equal(session.run({"x": x, "b": np.ones(2, np.float32)})["y"], x + 1)
    with pytest.raises(EngineError, match=r"TensorRT refused x of shape \(1, 10, 2\): outside the range it was built for"):
        session.run({"x": np.zeros((1, 10, 2), np.float32), "b": np.ones(2, np.float32)})
    with pytest.raises(ProfileError, match="x has shape"):
        session.run({"x": np.zeros((2, 3, 2), np.float32), "b": np.ones(2, np.float32)})


def test_only_the_bytes_the_manifest_lists_are_deserialised(tmp_path, monkeypatch):
    model = engine_file(tmp_path, DOUBLE)
    model.path.write_bytes(model.path.read_bytes() + b"\0")
    trt = FakeTrt(Memory(), aliases=False)
    monkeypatch.setattr(trt, "Runtime", lambda log: pytest.fail("deserialised"), raising=False)
    with pytest.raises(IntegrityError, match=r"graph\.engine has SHA-256 .* but the manifest lists .*: it is not loaded"):
        deserialise(trt, "Fake", model, trt.memory)
    link = tmp_path / "link.engine"
    link.symlink_to(model.path)
    with pytest.raises(IntegrityError, match="symbolic link"):
        deserialise(trt, "Fake", ModelFile(link, model.sha256), trt.memory)


def test_failures_carry_the_library_s_words(tmp_path):
    trt = FakeTrt(Memory(), aliases=False)
    session = deserialise(trt, "Fake", engine_file(tmp_path, DOUBLE), trt.memory)
    trt.fail = True
    with pytest.raises(EngineError, match=r"graph\.engine: TensorRT failed: kernel failed"):
        session.run({"x": np.ones(2), "n": np.zeros(3, int)})
    junk = tmp_path / "junk.engine"
    junk.write_bytes(b"junk")
    with pytest.raises(EngineError, match=r"junk\.engine: Fake 0\.0 refused the engine \(bad magic\).*build it again"):
        deserialise(trt, "Fake", ModelFile(junk, hashlib.sha256(b"junk").hexdigest()), trt.memory)


def test_engines_with_unusual_borders_are_refused(tmp_path):
    trt = FakeTrt(Memory(), aliases=False, host_inputs=frozenset({"n"}))
    with pytest.raises(EngineError, match="n would have to lie in host memory"):
        deserialise(trt, "Fake", engine_file(tmp_path, DOUBLE), trt.memory)
    four = "g (double[2] x) => (double[2] y) { y = Identity(x) }"
    with pytest.raises(EngineError, match="x has type FP4"):
        deserialise(FakeTrt(Memory(), aliases=False), "Fake", engine_file(tmp_path, four), Memory())


@pytest.mark.parametrize("runtime", [TensorRT("tensorrt-rtx"), TensorRT("tensorrt")])
def test_one_sentence_says_why_it_cannot_run(tmp_path, runtime, monkeypatch):
    def no_driver() -> None:
        raise EngineUnavailableError("no NVIDIA driver was found")

    monkeypatch.setattr(rtx, "cuda_memory", no_driver)
    monkeypatch.setattr(TensorRT, "version", lambda self: "9.9")
    able = "engines can be built here, not run" if runtime.name == "tensorrt-rtx" else "engines can be neither built nor run here"
    expected = f"{runtime.title} 9.9 is installed but no NVIDIA driver was found: {able}"
    assert runtime.unavailable() == expected
    with pytest.raises(EngineUnavailableError, match=expected):
        runtime.load(engine_file(tmp_path, DOUBLE))
    monkeypatch.setattr(TensorRT, "version", lambda self: None)
    assert f'pip install "sievert[{runtime.name}]"' in (runtime.unavailable() or "")
    with pytest.raises(EngineError, match="needs the engine onnxruntime"):
        runtime.load(ModelFile(tmp_path / "graph.engine", "", b"onnx"))


def test_the_real_library_refuses_junk_in_our_words(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    (tmp_path / "junk.engine").write_bytes(b"junk" * 100)
    model = ModelFile(tmp_path / "junk.engine", hashlib.sha256(b"junk" * 100).hexdigest())
    with pytest.raises(EngineError, match=r"junk\.engine: TensorRT for RTX [\d.]+ refused the engine \(.+\)"):
        deserialise(trt, "TensorRT for RTX", model, Memory())


def test_the_real_library_has_every_name_that_is_used():
    trt = pytest.importorskip("tensorrt_rtx")
    for name in rtx._DTYPES:
        assert hasattr(trt.DataType, name)
    for owner, names in {
        trt.ICudaEngine: ("get_tensor_name", "num_io_tensors", "get_tensor_location", "get_tensor_mode", "get_tensor_dtype",
                          "get_tensor_shape", "create_execution_context", "get_aliased_input_tensor"),
        trt.IExecutionContext: ("set_tensor_address", "execute_async_v3"),
        trt.Runtime: ("deserialize_cuda_engine",),
    }.items():  # fmt: skip
        assert [name for name in names if not hasattr(owner, name)] == []
    assert trt.Runtime(rtx._make_logger(trt)).engine_host_code_allowed is False


@pytest.mark.gpu
def test_a_real_engine_runs(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    log = rtx._make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parsed = trt.OnnxParser(network, log)
    text = (
        "g (float16[1,2,16,8] past, float16[1,2,4,8] new, int64[1] row) => (float16[1,2,16,8] present, float16[1,2,4,8] twice)"
        '{ present = TensorScatter <axis=-2, mode="linear"> (past, new, row)\n twice = Add(new, new) }'
    )
    assert parsed.parse(parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}').SerializeToString())
    content = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    (tmp_path / "real.engine").write_bytes(content)
    session = TensorRT().load(ModelFile(tmp_path / "real.engine", hashlib.sha256(content).hexdigest()))
    past = Buffer(session.memory, next(spec for spec in session.inputs if spec.name == "past"))
    session.bind([Cache("past", "present", past)])
    for row in (0, 7):
        outputs = session.run({"new": np.full((1, 2, 4, 8), row + 1, np.float16), "row": np.array([row])})
        assert outputs["twice"].tolist() == np.full((1, 2, 4, 8), 2 * row + 2).tolist()
    assert past.numpy()[0, 1, :, 3].tolist() == [1] * 4 + [0] * 3 + [8] * 4 + [0] * 5
