"""A real bundle of a few kilobytes: one dynamic graph reading a weights file, a config, and the variant ``full``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from sievert.bundle.files import sha256_bytes
from sievert.bundle.manifest import EngineEntry, EngineFile, GraphEntry, Manifest, Source, Variant, WeightEntry
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry, TensorSpec
from sievert.bundle.store import Bundle, NewBundle, OpenStep

WIDTH = 4
WEIGHT = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
GEOMETRY = Geometry(
    depth=2, width=WIDTH, heads=2, kv_heads=1, head_size=2, vocabulary=8, attention_scale=0.5, max_positions=64, image_token_id=3,
    pad_token_id=0, eos_token_ids=(2,), image_height=8, image_width=8, channels=3, grid=(2, 2), visual_tokens=4,
)  # fmt: skip
PROFILE = Profile(visual_tokens=4, max_text=6, max_new_tokens=5)
ENTRY = {
    "inputs": (TensorSpec(name="x", dtype="float32", shape=("B", WIDTH)),),
    "outputs": (TensorSpec(name="y", dtype="float32", shape=("B", WIDTH)),),
}


def graph_bytes(location: str, *, offset: object = 0, length: object = WEIGHT.nbytes, shift: float = 0.0) -> bytes:
    """``y = x W + shift`` with W in an external file; ``shift`` makes graphs differ."""
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=WEIGHT.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value is not None:
            weight.external_data.add(key=key, value=str(value))
    constant = helper.make_tensor("c", TensorProto.FLOAT, [1], [shift])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Add", ["h", "c"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", WIDTH])],
        [weight, constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return bytes(model.SerializeToString())


def fill(new: NewBundle, *, shift: float = 0.0) -> Manifest:
    """Write the files of the small bundle and give its manifest to ``finish``."""
    weights = new.add_bytes("weights", ".data", WEIGHT.tobytes())
    graph = new.add_bytes("decoder", ".onnx", graph_bytes(weights, shift=shift))
    (new.path / "config.json").write_text('{"model_type": "llava"}')
    manifest = Manifest(
        source=Source(model="small", architecture="Llava", family="llava", vision="clip", text="llama", dtype="float32"),
        geometry=GEOMETRY,
        weights_file=weights,
        weights=(
            WeightEntry(
                name="W", dtype="float32", shape=WEIGHT.shape, offset=0, nbytes=WEIGHT.nbytes, sha256=sha256_bytes(WEIGHT.tobytes())
            ),
        ),
        files={},
        graphs={"decoder": GraphEntry(file=graph, **ENTRY)},
        variants={"full": variant(graph)},
    )
    new.finish(manifest)
    return manifest


def variant(file: str) -> Variant:
    """A variant of one graph, ``prefill``."""
    return Variant(plan=Plan(), profile=PROFILE, capacities=(15, 15), graphs={"prefill": GraphEntry(file=file, **ENTRY)})


def make_bundle(path: Path) -> Bundle:
    """The small bundle at ``path``."""
    with Bundle.create(path) as new:
        fill(new)
    return Bundle.open(path, verify="full")


def add_variant(step: OpenStep, name: str, *, shift: float = 1.0, force: bool = False) -> str:
    """Put a variant of one new graph into a step; returns the graph's file name."""
    file = step.add_bytes(f"{name}.prefill", ".onnx", graph_bytes(step.manifest.weights_file, shift=shift))
    step.put_variant(name, variant(file), force=force)
    return file


def add_engine(bundle: Bundle, content: bytes = b"engine bytes") -> str:
    """Give variant ``full`` an engine of one file; returns the file's name."""
    lowered = bundle.variant("full").graphs["prefill"].file
    with bundle.step("build") as step:
        file = step.add_bytes("full.prefill", ".engine", content)
        built = EngineFile(lowered=lowered, built_from=step.manifest.files[lowered].sha256, file=file, builder="test", seconds=0.1)
        step.put_engine("full", "rtx", EngineEntry(target="tensorrt-rtx", graphs={"prefill": built}))
    return file


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, with its content."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".sievert.lock"}


def run_graph(path: Path) -> np.ndarray:
    """What ONNX's reference evaluator makes of a graph file and the weights beside it, on ones."""
    from onnx.reference import ReferenceEvaluator

    (out,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": np.ones((1, WIDTH), np.float32)})
    return np.asarray(out)
