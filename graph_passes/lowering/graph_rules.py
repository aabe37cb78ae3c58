"""Lint rules about a graph as a whole: shapes, types, constants and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from sievert.bundle.specs import SEQUENCE
from sievert.graph_passes.lengths import name_axes, varies_with_prompts
from sievert.graph_passes.lowering.rules import Rule, get_input, static_shape, walk_nodes, where
from sievert.graph_passes.lowering.targets import TARGETS
from sievert.graph_passes.lowering.widen import find_bfloat16

LARGEST_CONSTANT_BYTES: Final = 1 << 20
_ALL: Final = frozenset(TARGETS)

# Inputs that decide the shape of an output: engines of fixed shapes need them constant.
_SHAPE_INPUTS: Final = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}


def _find_symbols(model: ir.Model) -> Iterator[tuple[str, str]]:
    values = [*model.graph.inputs, *(value for node in walk_nodes(model) for value in node.outputs)]
    varies = varies_with_prompts(model)
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            # What is computed may be as long as the prompts; what is taken has a range for that axis and no other.
            if varies and (not value.is_graph_input() or name_axes(value) == {SEQUENCE}):
                continue
            yield str(value.name), f"the shape {list(value.shape)}"
        elif value.shape is None and (value.is_graph_input() or value.is_graph_output()):
            yield str(value.name), "no known shape"


def _find_shapes_from_data(model: ir.Model) -> Iterator[tuple[str, str]]:
    varies = varies_with_prompts(model)
    for node in walk_nodes(model, *_SHAPE_INPUTS):
        for index in _SHAPE_INPUTS[node.op_type]:
            value = get_input(node, index)
            if value is not None and not _is_constant(value, varies):
                yield where(node), f"a shape that follows from the data in {value.name!r}"
                break


def _find_mixed_types(model: ir.Model) -> Iterator[tuple[str, str]]:
    version = model.opset_imports.get("", 24)
    for node in walk_nodes(model):
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:
            continue
        found: dict[str, ir.DataType] = {}
        for index, value in enumerate(node.inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
            variadic = formal is not None and formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            if formal is None or value is None or value.dtype is None or (variadic and not formal.is_homogeneous):
                continue
            if (first := found.setdefault(formal.type_str, value.dtype)) != value.dtype:
                yield where(node), f"{first} and {value.dtype} together"
                break


def _find_doubles(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model):
        if any(value.dtype == ir.DataType.DOUBLE for value in node.outputs):
            yield where(node), "float64"


def _find_large_constants(model: ir.Model) -> Iterator[tuple[str, str]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > LARGEST_CONSTANT_BYTES:
            yield name, f"{tensor.nbytes / (1 << 20):.1f} MiB inside the graph file"


def _find_missing_data(model: ir.Model) -> Iterator[tuple[str, str]]:
    sizes: dict[str, int | None] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        path = tensor.path
        if str(path) not in sizes:
            sizes[str(path)] = Path(path).stat().st_size if Path(path).is_file() else None
        size, end = sizes[str(path)], (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if size is None:
            yield name, f"external data in {tensor.location}, which is not there"
        elif end > size:
            yield name, f"external data up to byte {end} of {tensor.location}, which has {size}"


def _find_cpu_bfloat16(model: ir.Model) -> Iterator[tuple[str, str]]:
    missing = sorted({node.op_type for node in find_bfloat16(model.graph)})
    if missing:
        yield model.graph.name or "graph", f"bfloat16 in {', '.join(missing)}"


def _is_constant(value: ir.Value, varies: bool) -> bool:
    """Whether ``value`` follows from constants and shapes alone: fixed ones, or any where those of the inputs vary in a known range."""
    seen, frontier = {value}, [value]
    while frontier:
        current = frontier.pop()
        node = current.producer()
        if current.const_value is not None or (node is None and current.is_initializer()):
            continue
        if node is None:
            return False
        if node.op_type in {"Shape", "Size"} and (varies or static_shape(get_input(node, 0)) is not None):
            continue
        new = [source for source in node.inputs if source is not None and source not in seen]
        seen.update(new)
        frontier.extend(new)
    return True


GRAPH_RULES: Final = (
    Rule(
        "symbolic-shape",
        seen="float[N, 9]: 'Network has dynamic or shape inputs, but no optimization profile has been defined'; float[2, 9] builds, "
        "and so do inputs whose one named axis is the prompts' length, for which the builder is given a range",
        fix="make a variant with `sievert prune`: it fixes every length, or with --dynamic-text all but that of prompts",
        find=_find_symbols,
    ),
    Rule(
        "data-dependent-shape",
        seen="Expand, Reshape, Slice, Range, Tile or TopK whose size is computed from an input is refused as a dynamic shape; computed "
        "from constants or from Shape of a fixed tensor it builds",
        fix="fold the size to a constant; a count that varies becomes a mask over a fixed maximum",
        find=_find_shapes_from_data,
    ),
    Rule(
        "mixed-types",
        seen="'ElementWiseOperation SUM must have same input types. But they are of types Half and Float'; of one type it builds",
        fix="write the Cast into the graph: engines are strongly typed and insert none",
        find=_find_mixed_types,
        targets=_ALL,
    ),
    Rule(
        "float64",
        seen="builds, but is documented to be computed in float32: values are cast down and clamped",
        fix="compute in float32, or in int64 where it is index arithmetic",
        find=_find_doubles,
        severity="warning",
    ),
    Rule(
        "large-constant",
        seen="nothing refuses it below the 2 GiB of a protobuf, but every graph and every engine carries its own copy",
        fix="compute it in the graph (Range, LessOrEqual) or keep it in the weights file",
        find=_find_large_constants,
        targets=_ALL,
        severity="warning",
    ),
    Rule(
        "missing-weights",
        seen="a graph whose data file is absent or too short does not load anywhere",
        fix="restore the bundle's weights file; graph and weights belong in one folder",
        find=_find_missing_data,
        targets=_ALL,
    ),
    Rule(
        "cpu-bfloat16",
        seen="ONNX Runtime 1.31 on the CPU: 'Could not find an implementation for MatMul(13)' and most others in bfloat16",
        fix="lower the graph for this target (`sievert build --engine onnxruntime`): a pass emulates it in float32",
        find=_find_cpu_bfloat16,
        targets=frozenset({"onnxruntime"}),
        severity="warning",
    ),
)
