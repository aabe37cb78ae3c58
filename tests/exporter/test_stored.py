"""Checkpoints in another dtype and in several files: converted tensor by tensor on the way to the disk, the decoder never in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from sievert.bundle.errors import CheckpointError, GraphError
from sievert.bundle.store import Bundle
from sievert.exporter.export import examine_checkpoint, export_model
from sievert.exporter.load import Loaded, load_model, load_to_trace
from sievert.exporter.stored import INDEX, LARGE, WHOLE, make_blanks, open_stored
from sievert.exporter.weights import WeightBinder
from sievert.exporter.write import write_bundle
from tests.tiny_llava import make_tiny_llava

Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Tensors, *, shards: int = 1) -> None:
    """Write the weights of a checkpoint folder anew, dealt out over ``shards`` files."""
    (folder / WHOLE).unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
        return
    places = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(tensors)}
    for name in set(places.values()):
        save_file({key: tensor for key, tensor in tensors.items() if places[key] == name}, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices that are large enough to be stood in for, of numbers that bfloat16 holds."""
    folder = make_tiny_llava(tmp_path_factory.mktemp("source"), layers=1, width=256, heads=4, kv_heads=2, head_size=64, vocabulary=300)
    save(folder, {key: tensor.bfloat16().float() for key, tensor in load_file(folder / WHOLE).items()})
    return folder


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with its weights changed and saved in another way."""

    def make(change: Callable[[Tensors], Tensors], *, shards: int = 1, name: str = "checkpoint") -> Path:
        folder = shutil.copytree(source, tmp_path / name)
        save(folder, change(load_file(source / WHOLE)), shards=shards)
        return folder

    return make


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()}


def load(folder: Path, dtype: torch.dtype) -> Loaded:
    examined = examine_checkpoint(folder)
    return load_to_trace(examined.checkpoint, examined.config, dtype)


def content(loaded: Loaded) -> Tensors:
    """Every parameter's numbers, those of blanks from the checkpoint."""
    return {
        name: loaded.values.get(parameter.data_ptr(), parameter.detach()).to(parameter.dtype)
        for name, parameter in loaded.model.named_parameters()
    }


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_stored_tensors_are_views_of_the_files(source: Path):
    tensors = open_stored(source, given="it")
    assert same(tensors, load_file(source / WHOLE))
    pages = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(source / WHOLE))]
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in pages]
    assert all(any(low <= tensor.data_ptr() < high for low, high in places) for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_matrix_of_the_decoder_is_converted_before_it_is_written(checkpoint: Callable[..., Path], dtype: torch.dtype):
    folder = checkpoint(cast(torch.bfloat16), shards=3)
    loaded = load(folder, dtype)
    large = {name: each for name, each in loaded.model.named_parameters() if each.numel() > LARGE}
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} < large.keys()
    for name, parameter in large.items():
        assert parameter.dtype == dtype
        assert (parameter.data_ptr() in loaded.values) == ("vision" not in name and "projector" not in name)
    held = {loaded.model.get_parameter(name).untyped_storage().nbytes() for name in large}
    assert max(held) < 4096
    examined = examine_checkpoint(folder)
    whole = load_model(examined.checkpoint, examined.config, dtype)
    assert same(content(loaded), {name: parameter.detach() for name, parameter in whole.named_parameters()})
    assert same(dict(loaded.model.named_buffers()), dict(whole.named_buffers()))


def test_nothing_stands_in_for_what_needs_no_conversion(source: Path):
    loaded = load(source, torch.float32)
    assert loaded.values == {}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in loaded.model.parameters())


def test_keys_of_older_and_newer_checkpoints_lead_to_the_same_model(checkpoint: Callable[..., Path]):
    old = checkpoint(cast(torch.bfloat16), name="old")
    assert any(key.startswith("language_model.model.layers.") for key in open_stored(old, given="it"))
    names = content(load(old, torch.float16))
    new = checkpoint(lambda _: {name: tensor.bfloat16() for name, tensor in names.items()}, name="new")
    assert any(key.startswith("model.language_model.layers.") for key in open_stored(new, given="it"))
    assert same(content(load(new, torch.float16)), names)


def test_the_bytes_written_do_not_depend_on_how_the_checkpoint_is_stored(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sharded = checkpoint(cast(torch.bfloat16), shards=3, name="sharded")
    plain = checkpoint(cast(torch.float16), name="plain")
    bundles = []
    for folder in (sharded, plain):
        exported = export_model(folder, dtype="float16")
        bundles.append(write_bundle(exported, tmp_path / f"{folder.name}-bundle"))
    one, other = (bundle.manifest for bundle in bundles)
    assert one.weights == other.weights
    assert one.weights_file == other.weights_file
    assert {name: entry.file for name, entry in one.graphs.items()} == {name: entry.file for name, entry in other.graphs.items()}
    Bundle.open(bundles[0].path, verify="full")
    matrices = open_stored(plain, given="it")
    data = bundles[0].weights_path.read_bytes()
    entry = next(each for each in one.weights if each.name == "model.language_model.layers.0.mlp.up_proj.weight.T")
    stored = np.frombuffer(data[entry.offset : entry.offset + entry.nbytes], np.float16).reshape(entry.shape)
    assert np.array_equal(stored, matrices["language_model.model.layers.0.mlp.up_proj.weight"].numpy().T)


def test_a_tied_checkpoint_that_stores_both_is_written_once(tmp_path: Path):
    folder = make_tiny_llava(tmp_path / "tied", layers=1, width=256, heads=4, kv_heads=2, head_size=64, vocabulary=300, tied=True)
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / WHOLE).items()}
    table = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    save(folder, tensors | {"language_model.lm_head.weight": tensors[table].clone()})
    exported = export_model(folder, dtype="float16")
    assert sum(weight.tensor.size == tensors[table].numel() for weight in exported.weights) == 1


def test_a_tensor_in_no_shard_is_named(checkpoint: Callable[..., Path]):
    folder = checkpoint(cast(torch.bfloat16), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["language_model.model.norm.weight.more"] = "model-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"says that model-1.safetensors holds language_model.model.norm.weight.more, which it does not"
    ):
        load(folder, torch.float16)


def test_a_shard_cut_short(checkpoint: Callable[..., Path]):
    folder = checkpoint(cast(torch.bfloat16), shards=2)
    (folder / "model-0.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its weights cannot be loaded"):
        load(folder, torch.float16)


@pytest.mark.parametrize("number", [1e6, float("nan"), float("-inf")])
def test_numbers_that_the_dtype_cannot_hold_are_found_without_conversion(checkpoint: Callable[..., Path], number: float):
    def change(tensors: Tensors) -> Tensors:
        tensors = cast(torch.bfloat16)(tensors)
        tensors["language_model.model.layers.0.mlp.up_proj.weight"][3, 5] = number
        return tensors

    with pytest.raises(CheckpointError, match=r"layers.0.mlp.up_proj.weight holds numbers that are not finite in float16"):
        load(checkpoint(change), torch.float16)


def binder_with_a_blank() -> tuple[WeightBinder, torch.Tensor, torch.Tensor]:
    stored = torch.randn(512, 512).bfloat16()
    blank = make_blanks({"w": stored}, torch.float32)["w"]
    return WeightBinder({"w": blank}, {blank.data_ptr(): stored}), blank, stored


def graph_of(array: np.ndarray) -> ir.Model:
    value = ir.val("v", const_value=ir.Tensor(array, name="v"))
    node = ir.node("Identity", [value])
    return ir.Model(ir.Graph([], node.outputs, nodes=[node], initializers=[value], name="g", opset_imports={"": 24}), ir_version=10)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_square_blank_is_known_by_its_strides(transposed: bool):
    binder, blank, stored = binder_with_a_blank()
    model = graph_of(blank.t().numpy() if transposed else blank.numpy())
    binder.bind("decoder", model)
    (bound,) = binder.weights
    assert bound.name == ("w.T" if transposed else "w")
    assert np.array_equal(bound.tensor.numpy(), (stored.t() if transposed else stored).float().numpy())


@pytest.mark.parametrize("size", [1, 512])
def test_a_constant_computed_from_a_blank_is_refused(size: int):
    binder, blank, _ = binder_with_a_blank()
    with pytest.raises(GraphError, match="was computed from a weight that is only read when it is written"):
        binder.bind("decoder", graph_of(blank.numpy()[:size] + 1))
