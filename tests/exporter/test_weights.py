"""Weights are content: named by parameter, once on disk, aligned, and exactly the checkpoint's bytes."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import BundleError
from sievert.bundle.store import Bundle
from sievert.exporter.export import Exported, export_model
from sievert.exporter.weights import SMALL, WeightBinder
from sievert.exporter.write import ALIGNMENT, write_bundle
from tests.exporter.graphs import run
from tests.tiny_llava import export_tiny, make_tiny_llava

TABLE = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_model(make_tiny_llava(tmp_path_factory.mktemp("tied"), layers=1, tied=True))


@pytest.fixture(scope="module")
def untied_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(export_tiny("clip-llama")[1], tmp_path_factory.mktemp("bundles") / "untied")


def expected_size(parameters: dict[str, torch.Tensor]) -> int:
    """Bytes of a weights file with each of these once, all but the last padded to the alignment."""
    sizes = [tensor.nbytes for tensor in parameters.values() if tensor.nbytes >= SMALL]
    return sum(size + -size % ALIGNMENT for size in sizes)


def used(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the tower's last layer and final norm, which come after the hidden state that is used."""
    return {name: tensor for name, tensor in parameters.items() if ".layers.2." not in name or "vision" not in name}


def unpadded_end(bundle: Bundle) -> int:
    last = max(bundle.manifest.weights, key=lambda weight: weight.offset)
    return bundle.weights_path.stat().st_size + -last.nbytes % ALIGNMENT


def test_untied_weights_stand_once_on_disk(untied_bundle: Bundle):
    folder, _ = export_tiny("clip-llama")
    parameters = load_file(folder / "model.safetensors")
    assert any("lm_head" in name for name in parameters)
    assert unpadded_end(untied_bundle) == expected_size(used(parameters))


def test_a_tied_head_is_the_embedding_table(tied: Exported, tmp_path: Path):
    bundle = write_bundle(tied, tmp_path / "tied")
    parameters = load_file(tied.folder / "model.safetensors")
    assert not any("lm_head" in name for name in parameters)
    assert unpadded_end(bundle) == expected_size(used(parameters))
    transposes = [node for node in tied.graphs["decoder"].graph if node.op_type == "Transpose" and node.inputs[0] is not None]
    assert [node.inputs[0].name for node in transposes if node.inputs[0].is_initializer()] == [TABLE]  # type: ignore[union-attr]
    assert TABLE in tied.graphs["embed_tokens"].graph.initializers


def test_an_untied_head_stands_in_checkpoint_layout():
    _, exported = export_tiny("clip-llama")
    graph = exported.graphs["decoder"].graph
    head = graph.initializers["lm_head.weight"]
    assert list(head.shape or ()) == [96, 64]
    (transpose,) = head.consumers()
    (product,) = transpose.outputs[0].consumers()
    assert (transpose.op_type, product.op_type, product.outputs[0].name) == ("Transpose", "MatMul", "logits")


@pytest.mark.parametrize("shape", ["clip-llama", "siglip-qwen2"])
def test_names_say_whose_bytes_they_are(shape: str):
    _, exported = export_tiny(shape)
    folder, _ = export_tiny(shape)
    assert exported.folder == folder
    large = {str(value.name) for model in exported.graphs.values() for value in model.graph.initializers.values()}
    assert {weight.name for weight in exported.weights} <= large
    for weight in exported.weights:
        name = weight.name.removesuffix(".T")
        name = name if name in exported.parameters else name.rpartition(".")[0]
        assert name in exported.parameters
    names = {weight.name for weight in exported.weights}
    assert "model.language_model.layers.3.mlp.down_proj.weight.T" in names
    assert "model.multi_modal_projector.linear_2.weight.T" in names


def test_content_is_the_parameters(untied_bundle: Bundle):
    folder, exported = export_tiny("clip-llama")
    loader: Any = LlavaForConditionalGeneration
    parameters = loader.from_pretrained(folder, dtype=torch.float32).state_dict()
    data = untied_bundle.weights_path.read_bytes()
    assert len(untied_bundle.manifest.weights) == len(exported.weights) > 40
    for entry in untied_bundle.manifest.weights:
        stored = data[entry.offset : entry.offset + entry.nbytes]
        assert hashlib.sha256(stored).hexdigest() == entry.sha256
        parameter = parameters[entry.name.removesuffix(".T").removesuffix(".1x17x48")].numpy()
        expected = parameter.T if entry.name.endswith(".T") else parameter
        assert np.array_equal(np.frombuffer(stored, np.float32).reshape(entry.shape), expected.reshape(entry.shape))


def test_offsets_are_aligned_and_nothing_overlaps(untied_bundle: Bundle):
    places = sorted((weight.offset, weight.nbytes) for weight in untied_bundle.manifest.weights)
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(offset + size <= following for (offset, size), (following, _) in pairwise(places))


def test_small_tensors_are_inline_and_large_ones_external(untied_bundle: Bundle):
    for name in untied_bundle.manifest.graphs:
        model = onnx.load(untied_bundle.graph_file(name), load_external_data=False)
        for tensor in model.graph.initializer:
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            size = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
            assert external == (size >= SMALL)
            assert external or len(tensor.SerializeToString()) < SMALL + 256
        assert untied_bundle.graph_file(name).stat().st_size < 100_000


def test_a_bundle_runs_and_holds_the_small_files(untied_bundle: Bundle, tmp_path: Path):
    folder, exported = export_tiny("clip-llama")
    moved = tmp_path / "moved"
    shutil.copytree(untied_bundle.path, moved)
    bundle = Bundle.open(moved, verify="full")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert bundle.file(name).read_bytes() == (folder / name).read_bytes()
    assert (bundle.manifest.geometry, bundle.manifest.source) == (exported.geometry, exported.source)
    positions = np.broadcast_to(np.arange(5), (2, 5))
    feeds = {"inputs_embeds": np.ones((2, 5, 64), np.float32), "attention_mask": np.ones_like(positions), "position_ids": positions}
    from_disk = run(bundle.graph_file("decoder"), **feeds)
    in_memory = run(exported.graphs["decoder"], **feeds)
    assert all(np.array_equal(from_disk[name], in_memory[name]) for name in in_memory)
    assert [spec.name for spec in bundle.manifest.graphs["decoder"].outputs] == list(in_memory)


def test_exporting_over_a_bundle_needs_force(untied_bundle: Bundle, tmp_path: Path):
    shutil.copytree(untied_bundle.path, tmp_path / "there")
    _, exported = export_tiny("clip-llama")
    with pytest.raises(BundleError, match="--force"):
        write_bundle(exported, tmp_path / "there")
    assert Bundle.open(tmp_path / "there", verify="full").manifest == untied_bundle.manifest
    assert write_bundle(exported, tmp_path / "there", force=True).manifest.weights == untied_bundle.manifest.weights


def graph_of(**tensors: np.ndarray) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 24})
    for name, array in tensors.items():
        value = ir.val(name, const_value=ir.Tensor(array, name=name))
        graph.register_initializer(value)
        node = ir.node("Identity", [value], metadata_props={"pkg.torch.onnx.name_scopes": "['', 'model.layers.0', 'linear']"})
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def test_binding_merges_equal_tensors_and_names_strangers_by_place():
    matrix = np.arange(512, dtype=np.float32).reshape(16, 32)
    model = graph_of(a=matrix.T.copy(), b=matrix.T.copy(), c=matrix + 1, d=np.ones(4, np.float32), e=matrix.reshape(1, 16, 32))
    binder = WeightBinder({"w": torch.from_numpy(matrix), "same": torch.from_numpy(matrix.copy())})
    binder.bind("decoder", model)
    names = list(model.graph.initializers)
    assert names[0] == "d"
    assert set(names) == {"d", "w.T", "w.1x16x32", next(name for name in names if name.startswith("decoder.model.layers.0."))}
    assert model.graph.outputs[0].producer().inputs == model.graph.outputs[1].producer().inputs  # type: ignore[union-attr]
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.name == value.name or value.name == "d" or str(value.name).startswith("decoder.")
    assert np.array_equal(model.graph.initializers["w.T"].const_value.numpy(), matrix.T)  # type: ignore[union-attr]
    assert len(binder.weights) == 3
    again = graph_of(z=matrix.T.copy())
    binder.bind("other", again)
    assert list(again.graph.initializers) == ["w.T"]
    assert len(binder.weights) == 3
