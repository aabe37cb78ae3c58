"""Weights are content: initializers get the names of the checkpoint parameters whose bytes they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from sievert.bundle.errors import GraphError
from sievert.exporter.names import SCOPES

SMALL = 1024
"""Tensors below this many bytes stay inside the graph."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the weights file. ``name`` and content belong together in all graphs of a bundle; the tensor is lazy."""

    name: str
    tensor: ir.TensorProtocol


@dataclass(frozen=True)
class _View:
    """How a tensor stands for a parameter: as it is, transposed, or in another shape."""

    parameter: str
    transposed: bool = False


class WeightBinder:
    """Renames the large initializers of graphs, one graph after the other, and collects each distinct tensor once.

    ``state`` are the parameters by their names, and ``values`` what the checkpoint holds for those that are blanks, by address (see
    :class:`~sievert.exporter.load.Loaded`). A parameter is recognised by the memory it lies in, which the tracer's transposed views
    share, or else by its bytes, as it stands or transposed (``.T``); what matches none is named after the place it is used at. Bound
    tensors read and convert their parameter when they are asked for bytes, and keep nothing.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], values: Mapping[int, torch.Tensor] = MappingProxyType({})) -> None:
        self._state = {name: tensor.detach() for name, tensor in state.items() if tensor.nbytes >= SMALL}
        self._values = values
        self._places: dict[int, str] = {}
        for name, tensor in self._state.items():
            # The first of several names of one parameter counts: a tied head is the embedding table.
            self._places.setdefault(tensor.data_ptr(), name)
        self._digests: dict[tuple[str, bool], str] = {}
        self._weights: dict[str, Weight] = {}

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Everything bound so far, in order of first use."""
        return tuple(self._weights.values())

    def bind(self, graph_name: str, model: ir.Model) -> None:
        """Rename the large initializers of ``model``; equal ones become one.

        Raises:
            GraphError: one was computed from a parameter whose numbers were not read.
        """
        graph = model.graph
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes < SMALL:
                self._require_numbers(value, tensor)
                continue
            weight = self._weight(graph_name, value, tensor)
            graph.initializers.pop(str(value.name))
            if (same := graph.initializers.get(weight.name)) is not None:
                ir.convenience.replace_all_uses_with(value, same)
                continue
            value.name = weight.name
            value.const_value = weight.tensor
            graph.register_initializer(value)

    def _weight(self, graph_name: str, value: ir.Value, tensor: ir.TensorProtocol) -> Weight:
        view = self._find_by_place(tensor)
        if view is None:
            self._require_numbers(value, tensor)
            digest = _digest(tensor)
            view = self._find_by_content(tensor, digest)
        if view is None:
            name, made = f"{graph_name}.{_scope(value)}.{digest[:8]}", tensor
        else:
            name = self._name(view, static_shape(tensor))
            made = self._lazy(view, name, tensor)
        return self._weights.setdefault(name, Weight(name, made))

    def _find_by_place(self, tensor: ir.TensorProtocol) -> _View | None:
        """The parameter that a tensor is a view of, from its address and strides."""
        place, strides = _place(tensor)
        name = self._places.get(place)
        if name is None:
            return None
        parameter, shape = self._state[name], static_shape(tensor)
        if _dtype(parameter) != tensor.dtype or parameter.numel() != tensor.size:
            return None
        own = tuple(step * parameter.element_size() for step in parameter.stride())
        if (shape, strides) == (tuple(parameter.shape), own):
            return _View(name)
        if parameter.ndim == 2 and (shape, strides) == (tuple(parameter.shape)[::-1], own[::-1]):
            return _View(name, transposed=True)
        row_major = np.cumprod((parameter.element_size(), *shape[:0:-1]))[::-1]
        return _View(name) if parameter.is_contiguous() and strides == tuple(row_major) else None

    def _find_by_content(self, tensor: ir.TensorProtocol, digest: str) -> _View | None:
        """The parameter of these bytes, among those whose numbers are there."""
        alike = [
            name
            for name, each in self._state.items()
            if each.data_ptr() not in self._values and (_dtype(each), each.nbytes) == (tensor.dtype, tensor.nbytes)
        ]
        for transposed in (False, True):
            for name in alike:
                parameter = self._state[name]
                if transposed and (parameter.ndim != 2 or tuple(parameter.shape)[::-1] != static_shape(tensor)):
                    continue
                key = name, transposed
                if key not in self._digests:
                    self._digests[key] = _digest(parameter.t() if transposed else parameter)
                if self._digests[key] == digest:
                    return _View(name, transposed)
        return None

    def _name(self, view: _View, shape: tuple[int, ...]) -> str:
        if view.transposed:
            return f"{view.parameter}.T"
        return view.parameter if tuple(self._state[view.parameter].shape) == shape else f"{view.parameter}.{'x'.join(map(str, shape))}"

    def _lazy(self, view: _View, name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        parameter, shape = self._state[view.parameter], static_shape(tensor)
        stored, dtype = self._values.get(parameter.data_ptr(), parameter), parameter.dtype

        def evaluate() -> ir.TensorProtocol:
            turned = stored.t() if view.transposed else stored.reshape(shape)
            return parameter_tensor(turned.to(dtype).contiguous(), name)

        return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)

    def _require_numbers(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Refuse what was computed from a blank: it is not a number."""
        if self._values and tensor.dtype.is_floating_point() and bool(np.isnan(tensor.numpy()).any()):
            raise GraphError(
                f"the constant {value.name!r} of {_scope(value)} was computed from a weight that is only read when it is written: "
                "the exporter has changed; export in the checkpoint's own dtype"
            )


def parameter_tensor(parameter: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A parameter as a tensor of onnx_ir, without a copy."""
    return TorchTensor(parameter.detach(), name=name)


def static_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape as plain numbers."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def _place(tensor: ir.TensorProtocol) -> tuple[int, tuple[int, ...]]:
    """Where a tensor's first element lies, and its strides in bytes."""
    array = tensor.numpy()
    return int(array.__array_interface__["data"][0]), array.strides


def _scope(value: ir.Value) -> str:
    """The module path of the first node that uses the value."""
    for node in value.consumers():
        scopes = node.metadata_props.get(SCOPES, "").strip("[]").split(",")
        path = [scope.strip().strip("'") for scope in scopes[:-1]]
        if path and path[-1]:
            return path[-1]
    return "constant"


def _dtype(tensor: torch.Tensor) -> ir.DataType:
    return from_torch_dtype(tensor.dtype)


def _digest(tensor: torch.Tensor | ir.TensorProtocol) -> str:
    """SHA-256 of the bytes as they would stand in a file, row-major and little-endian."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor | ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor as they stand in a file, row-major and little-endian; a view where they lie like that already."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
