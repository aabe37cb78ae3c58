"""External data is followed only where it cannot leave the bundle, and only as far as the file reaches."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sievert.bundle.errors import IntegrityError
from sievert.bundle.external_data import check_external_data
from sievert.bundle.files import sha256_bytes
from sievert.bundle.store import Bundle
from tests.bundle.small import WEIGHT, graph_bytes, make_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights.data").write_bytes(bytes(128))
    return tmp_path


def put(folder: Path, data: bytes) -> Path:
    (folder / "graph.onnx").write_bytes(data)
    return folder / "graph.onnx"


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_a_sound_graph_tells_what_it_reads(folder: Path):
    assert check_external_data(put(folder, graph_bytes("weights.data", offset=64))) == {"weights.data"}
    assert check_external_data(put(folder, graph_bytes("weights.data", offset=None, length=None))) == {"weights.data"}


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/etc/passwd", "is an absolute path"),
        ("../weights.data", "contains '..'"),
        ("sub/weights.data", "contains a path separator"),
        ("", "is not a plain file name"),
        (".sievert.lock", "is not a plain file name"),
    ],
)
def test_locations_outside_are_refused(folder: Path, location: str, reason: str):
    with pytest.raises(IntegrityError, match=f"graph.onnx, tensor 'W' names the file .*{reason}"):
        check_external_data(put(folder, graph_bytes(location)))


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_location_that_is_a_link_is_refused(folder: Path, kind: str):
    (folder / "weights.data").rename(folder / "object")
    if kind == "symbolic":
        (folder / "weights.data").symlink_to(folder / "object")
    else:
        os.link(folder / "object", folder / "weights.data")
    with pytest.raises(IntegrityError, match=f"{kind} link"):
        check_external_data(put(folder, graph_bytes("weights.data")))


def test_a_location_that_is_missing_is_refused(folder: Path):
    with pytest.raises(IntegrityError, match="elsewhere.data is missing"):
        check_external_data(put(folder, graph_bytes("elsewhere.data")))


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        (65, 64, "ends at byte 129 of weights.data, which has 128"),
        (65, None, "ends at byte 129"),
        (2**62, 64, "ends at byte"),
        (0, 60, "60 bytes of external data for 64 bytes of tensor"),
        (0, 128, "128 bytes of external data for 64"),
        (-1, 64, "offset of its external data is '-1'"),
        ("0x10", 64, "offset of its external data is '0x10'"),
        (0, "lots", "length of its external data is 'lots'"),
        ("9" * 30, 64, "expected a whole number"),
    ],
)
def test_ranges_outside_the_file_or_the_tensor_are_refused(folder: Path, offset, length, reason: str):
    with pytest.raises(IntegrityError, match=reason):
        check_external_data(put(folder, graph_bytes("weights.data", offset=offset, length=length)))


@pytest.mark.parametrize("place", ["attribute", "attribute list", "subgraph", "function", "sparse", "sparse attribute"])
def test_tensors_are_found_wherever_onnx_may_hold_them(folder: Path, place: str):
    model = onnx.load_model_from_string(graph_bytes("weights.data"))
    tensor = external("../secret")
    node = helper.make_node("Constant", [], ["k"], name="k")
    sparse = onnx.SparseTensorProto(values=tensor, indices=helper.make_tensor("i", TensorProto.INT64, [2], [0, 1]), dims=[4])
    match place:
        case "attribute":
            node.attribute.append(helper.make_attribute("value", tensor))
        case "attribute list":
            node.attribute.append(helper.make_attribute("values", [tensor]))
        case "sparse attribute":
            node.attribute.append(helper.make_attribute("sparse_value", sparse))
        case "subgraph":
            inner = helper.make_graph([], "inner", [], [], [tensor])
            node.attribute.append(helper.make_attribute("then_branch", inner))
        case "function":
            node.attribute.append(helper.make_attribute("value", tensor))
            model.functions.append(helper.make_function("own", "F", [], ["k"], [node], [helper.make_opsetid("", 24)]))
        case "sparse":
            model.graph.sparse_initializer.append(sparse)
    if place not in {"function", "sparse"}:
        model.graph.node.append(node)
    with pytest.raises(IntegrityError, match=r"tensor 'hidden' names the file '\.\./secret'"):
        check_external_data(put(folder, model.SerializeToString()))


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"not a graph at all", graph_bytes("weights.data")[:-40]])
def test_what_is_no_graph_is_refused(folder: Path, data: bytes):
    with pytest.raises(IntegrityError, match="ONNX graph"):
        check_external_data(put(folder, data))


def test_opening_a_bundle_checks_its_graphs_even_where_the_hashes_agree(tmp_path: Path):
    bundle = make_bundle(tmp_path / "b")
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    graph = bundle.graph_file("decoder")
    old, new = graph.read_bytes(), graph_bytes("../secret")
    graph.write_bytes(new)
    manifest = bundle.path / "sievert.json"
    text = manifest.read_text().replace(sha256_bytes(old), sha256_bytes(new)).replace(f'"bytes": {len(old)}', f'"bytes": {len(new)}')
    manifest.write_text(text)
    with pytest.raises(IntegrityError, match=r"contains '\.\.'"):
        Bundle.open(bundle.path)


def test_weights_the_manifest_does_not_list_are_refused(tmp_path: Path):
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "planted.data").write_bytes(WEIGHT.tobytes())
    graph = bundle.graph_file("decoder")
    old, new = graph.read_bytes(), graph_bytes("planted.data")
    graph.write_bytes(new)
    manifest = bundle.path / "sievert.json"
    text = manifest.read_text().replace(sha256_bytes(old), sha256_bytes(new)).replace(f'"bytes": {len(old)}', f'"bytes": {len(new)}')
    manifest.write_text(text)
    with pytest.raises(IntegrityError, match="reads weights from planted.data, which the manifest does not list"):
        Bundle.open(bundle.path)
