"""External data of ONNX graphs, checked before any library follows it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sievert.bundle.errors import IntegrityError
from sievert.bundle.files import open_plain, plain_status
from sievert.bundle.names import check_name

if TYPE_CHECKING:
    import onnx

# TensorProto.DataType by its number in onnx.proto, which never changes; 6-bit types are left out, as their packing is not settled.
_BITS = (
    dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8)  # uint8, int8, bool, float8 in five kinds
    | dict.fromkeys((4, 5, 10, 16), 16)  # uint16, int16, float16, bfloat16
    | dict.fromkeys((1, 6, 12), 32)  # float, int32, uint32
    | dict.fromkeys((7, 11, 13, 14), 64)  # int64, double, uint64, complex64
    | {15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # complex128, uint4, int4, float4, uint2, int2
)


def check_external_data(path: Path, shared: Collection[str] = ()) -> frozenset[str]:
    """Names of the data files an ONNX graph reads its weights from, all found safe. No weight is loaded. Those named in ``shared`` may be
    hard links.

    Each location must be a plain name, the file of that name beside the graph a plain file, and offset and length must lie within
    it; the length must be what the tensor's type and shape need.

    Raises:
        IntegrityError: any of that fails, or the file is no ONNX graph; the message names the graph and the tensor.
    """
    model = _parse(path)
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        where = f"{path.name}, tensor {tensor.name!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = check_name(entries.get("location", ""), where=where)
        if location not in sizes:
            sizes[location] = plain_status(path.parent / location, shared=location in shared).st_size
        offset, length = (_count(entries, key, where) for key in ("offset", "length"))
        start, needed = offset or 0, _nbytes(tensor)
        if length is not None and needed is not None and length != needed:
            raise IntegrityError(f"{where}: {length} bytes of external data for {needed} bytes of tensor: export the model again")
        end = start + (length if length is not None else needed or 0)
        if end > sizes[location]:
            raise IntegrityError(
                f"{where}: its data ends at byte {end} of {location}, which has {sizes[location]}: the graph and its weights do not "
                "belong together, or the file was cut short; restore both or export the model again"
            )
    return frozenset(sizes)


def _parse(path: Path) -> onnx.ModelProto:
    # Here and not at the top: reading a manifest must not import onnx.
    import onnx
    from google.protobuf.message import DecodeError

    with open_plain(path) as file:
        data = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise IntegrityError(f"{path} is no readable ONNX graph ({error}): restore it or export the model again") from error
    if not model.HasField("graph"):
        raise IntegrityError(f"{path} holds no ONNX graph: restore it or export the model again")
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = [*attribute.sparse_tensors, *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _graph_tensors(graph)


def _count(entries: dict[str, str], key: str, where: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise IntegrityError(f"{where}: {key} of its external data is {text!r}, expected a whole number of bytes: export the model again")
    return int(text)


def _nbytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that the tensor's type and shape need; None for types of no fixed size."""
    bits = _BITS.get(tensor.data_type)
    return None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8
