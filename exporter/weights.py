"""Weights are content: initializers get the names of the checkpoint parameters whose bytes they hold."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from sievert.exporter.names import SCOPES

SMALL = 1024
"""Tensors below this many bytes stay inside the graph."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the weights file. ``name`` and content belong together in all graphs of a bundle; the tensor may be lazy."""

    name: str
    tensor: ir.TensorProtocol
    sha256: str


class WeightBinder:
    """Renames the large initializers of graphs, one graph after the other, and collects each distinct tensor once.

    ``state`` are the parameters by their names. A parameter is recognised by its bytes, as it stands or transposed (``.T``); what
    matches none is named after the place it is used at. Bound tensors refer to ``state``: the tracer's transposed copies are freed.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = {name: tensor.detach() for name, tensor in state.items() if tensor.nbytes >= SMALL}
        self._names: dict[tuple[ir.DataType, str], tuple[str, bool]] = {}
        self._turned: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self._weights: dict[tuple[ir.DataType, str, tuple[int, ...]], Weight] = {}
        for name, tensor in self._state.items():
            # The first of several equal parameters gives the name: a tied head is the embedding table.
            self._names.setdefault((_dtype(tensor), _digest(tensor)), (name, False))
            if tensor.ndim == 2:
                self._turned[tuple(reversed(tensor.shape))].append(name)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Everything bound so far, in order of first use."""
        return tuple(self._weights.values())

    def bind(self, graph_name: str, model: ir.Model) -> None:
        """Rename the large initializers of ``model``; equal ones become one."""
        graph = model.graph
        for value in list(graph.initializers.values()):
            if value.const_value is None or value.const_value.nbytes < SMALL:
                continue
            weight = self._weight(graph_name, value)
            graph.initializers.pop(str(value.name))
            if (same := graph.initializers.get(weight.name)) is not None:
                ir.convenience.replace_all_uses_with(value, same)
                continue
            value.name = weight.name
            value.const_value = weight.tensor
            graph.register_initializer(value)

    def _weight(self, graph_name: str, value: ir.Value) -> Weight:
        tensor = value.const_value
        assert tensor is not None  # noqa: S101 - bind has looked
        digest, shape = _digest(tensor), static_shape(tensor)
        key = (tensor.dtype, digest, shape)
        if key not in self._weights:
            self._weights[key] = self._find(graph_name, value, tensor, digest, shape)
        return self._weights[key]

    def _find(self, graph_name: str, value: ir.Value, tensor: ir.TensorProtocol, digest: str, shape: tuple[int, ...]) -> Weight:
        known = (tensor.dtype, digest)
        if known not in self._names:
            for name in self._turned.pop(shape, []):
                turned = self._state[name].t()
                self._names.setdefault((_dtype(turned), _digest(turned)), (name, True))
        if known not in self._names:
            name = f"{graph_name}.{_scope(value)}.{digest[:8]}"
            return Weight(name, tensor, digest)
        name, transposed = self._names[known]
        parameter = self._state[name]
        if transposed:
            name = f"{name}.T"
        elif tuple(parameter.shape) != shape:
            name = f"{name}.{'x'.join(map(str, shape))}"
        return Weight(name, _lazy(parameter, name, transposed=transposed, shape=shape, dtype=tensor.dtype), digest)


def parameter_tensor(parameter: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A parameter as a tensor of onnx_ir, without a copy."""
    return TorchTensor(parameter.detach(), name=name)


def static_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape as plain numbers."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def _lazy(parameter: torch.Tensor, name: str, *, transposed: bool, shape: tuple[int, ...], dtype: ir.DataType) -> ir.TensorProtocol:
    if not transposed and tuple(parameter.shape) == shape:
        return parameter_tensor(parameter, name)

    def evaluate() -> ir.TensorProtocol:
        return parameter_tensor(parameter.t().contiguous() if transposed else parameter.reshape(shape), name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


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
    if not isinstance(tensor, torch.Tensor) and isinstance(raw := getattr(tensor, "raw", None), torch.Tensor):
        tensor = raw
    if isinstance(tensor, torch.Tensor):
        array = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return hashlib.sha256(array.data).hexdigest()
