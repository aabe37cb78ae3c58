"""What a traced graph goes through: names, float32 islands, the head in checkpoint layout, the opset. See also rotary.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from sievert.bundle.errors import GraphError
from sievert.exporter.names import OPSET, SCOPES

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class NameInterface(InPlacePass):
    """Give outputs and symbolic axes their names. ``axes`` names the leading axes of each input, as in :func:`trace`."""

    axes: Mapping[str, Sequence[str | None]]
    outputs: tuple[str, ...]

    def requires(self, model: ir.Model) -> None:
        """Inputs as traced, outputs as many as there are names."""
        inputs = [value.name for value in model.graph.inputs]
        if inputs != list(self.axes):
            raise GraphError(f"traced inputs are {inputs}, expected {list(self.axes)}: the tracer dropped or renamed one")
        if len(model.graph.outputs) != len(self.outputs):
            got = [value.name for value in model.graph.outputs]
            raise GraphError(f"{len(got)} traced outputs ({', '.join(map(str, got))}), expected {len(self.outputs)}: {self.outputs}")

    def call(self, model: ir.Model) -> PassResult:
        """Rename."""
        graph = model.graph
        modified = False
        names: dict[str, str] = {}
        for value in graph.inputs:
            for axis, name in zip(value.shape or (), self.axes[str(value.name)], strict=False):
                if not isinstance(axis, int) and name is not None and str(axis.value) != name:
                    names[str(axis.value)] = name
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and names:
                shape = ir.Shape(axis if isinstance(axis, int) else _renamed(axis, names) for axis in value.shape)
                modified |= shape != value.shape
                value.shape = shape
        for value, name in zip(graph.outputs, self.outputs, strict=True):
            modified |= value.name != name
            value.name = name
        return PassResult(model, modified)


def _renamed(axis: ir.SymbolicDim, names: Mapping[str, str]) -> ir.SymbolicDim:
    text = None if axis.value is None else re.sub(r"\w+", lambda match: names.get(match[0], match[0]), axis.value)
    return ir.SymbolicDim(text)


@dataclass(frozen=True)
class Float32Islands(InPlacePass):
    """Norms and softmax of a 16-bit graph compute in float32: ``stash_type`` and ``softmax_precision`` say so."""

    def call(self, model: ir.Model) -> PassResult:
        """Write the attributes."""
        modified = False
        for node in model.graph:
            wanted = "stash_type" if node.op_type in _NORMS else "softmax_precision" if node.op_type == "Attention" else None
            sixteen = node.inputs and node.inputs[0] is not None and node.inputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            if wanted and sixteen and node.attributes.get_int(wanted, 0) != int(ir.DataType.FLOAT):
                node.attributes[wanted] = ir.AttrInt64(wanted, int(ir.DataType.FLOAT))
                modified = True
        return PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No softmax outside Attention, where its precision could not be said."""
        for node in model.graph:
            if node.op_type == "Softmax" and node.outputs[0].dtype != ir.DataType.FLOAT:
                raise GraphError(f"softmax {node.name} computes in {node.outputs[0].dtype}: the exporter took an attention apart")


@dataclass(frozen=True)
class Float32Output(InPlacePass):
    """Cast the output ``name`` to float32. Before: ``y[fp16]``. After: ``y[fp32] = cast(y[fp16])``."""

    name: str

    def call(self, model: ir.Model) -> PassResult:
        """Add the cast."""
        graph = model.graph
        place, value = next((place, value) for place, value in enumerate(graph.outputs) if value.name == self.name)
        if value.dtype == ir.DataType.FLOAT:
            return PassResult(model, False)
        node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        value.name = f"{self.name}.{str(value.dtype).lower()}"
        cast = node.outputs[0]
        cast.name, cast.shape, cast.type = self.name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs[place] = cast
        return PassResult(model, True)


@dataclass(frozen=True)
class HeadInCheckpointLayout(InPlacePass):
    """The head's weight stands as in the checkpoint, so that a tied one is the embedding table.

    Before: ``MatMul(h, W.T[D, V])``. After: ``MatMul(h, Transpose(W[V, D]))``.
    """

    output: str

    def call(self, model: ir.Model) -> PassResult:
        """Put the transpose in."""
        graph = model.graph
        node = next(value for value in graph.outputs if value.name == self.output).producer()
        while node is not None and node.op_type in ("Cast", "Div", "Tanh", "Mul"):  # logits may be capped
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        weight = node.inputs[1] if node is not None and node.op_type == "MatMul" else None
        if node is None or weight is None or not (weight.is_initializer() or _transposes_initializer(weight)):
            raise GraphError(f"{self.output} comes from {node}, expected a MatMul with a weight: the head has another form")
        if not weight.is_initializer():
            return PassResult(model, False)
        if weight.const_value is None or len(weight.const_value.shape) != 2 or len(weight.uses()) != 1:
            raise GraphError(f"the head's weight {weight.name} is not a matrix of its own")
        turned = weight.const_value.numpy().T  # a view: it tells whose parameter it is, see WeightBinder
        layout = ir.val(
            f"{weight.name}.layout", weight.const_value.dtype, turned.shape, const_value=ir.Tensor(turned, dtype=weight.const_value.dtype)
        )
        transpose = ir.node("Transpose", [layout], {"perm": [1, 0]})
        transpose.metadata_props.update(node.metadata_props)
        transpose.outputs[0].shape, transpose.outputs[0].type = weight.shape, ir.TensorType(weight.const_value.dtype)
        graph.initializers.pop(str(weight.name))
        graph.register_initializer(layout)
        graph.insert_before(node, transpose)
        node.replace_input_with(1, transpose.outputs[0])
        return PassResult(model, True)


@dataclass(frozen=True)
class KeepScopes(InPlacePass):
    """Of the exporter's notes only each node's module path stays: the rest is stack traces of the machine that exported."""

    def call(self, model: ir.Model) -> PassResult:
        """Drop the others."""
        modified = bool(model.metadata_props or model.graph.metadata_props or model.graph.doc_string)
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.graph.doc_string = None
        for node in model.graph:
            modified |= bool(node.metadata_props.keys() - {SCOPES})
            scopes = node.metadata_props.get(SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[SCOPES] = scopes
            for value in node.outputs:
                modified |= bool(value.metadata_props)
                value.metadata_props.clear()
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            modified |= bool(value.metadata_props)
            value.metadata_props.clear()
        return PassResult(model, modified)


@dataclass(frozen=True)
class RaiseOpset(InPlacePass):
    """Declare opset 24. The operators used did not change their meaning between 23 and 24."""

    def call(self, model: ir.Model) -> PassResult:
        """Set the version of the default domain."""
        modified = model.opset_imports.get("") != OPSET
        model.opset_imports[""] = OPSET
        for node in model.graph.all_nodes():
            node.version = OPSET if node.domain == "" else node.version
        return PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Standard operators only."""
        other = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain not in ("", "ai.onnx")})
        if other or model.functions:
            raise GraphError(f"operators outside the standard ({', '.join(other) or 'model functions'}): the exporter changed")


def _transposes_initializer(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
