"""Fix every length of a dynamic graph: pruning by nothing, and the way the vision encoder and the embedding become static."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.instance import Instance
from sievert.graph_passes.prefill import add_named_output


def specialise(model: ir.Model, shapes: Mapping[str, Sequence[int | str]]) -> ir.Model:
    """A copy of ``model`` whose inputs have the given shapes and whose inner shapes are all numbers, but for an axis given by name.

    Before::

        pixel_values[batch, 3, 336, 336] -> ... -> image_features[batch, 576, D]

    After::

        pixel_values[2, 3, 336, 336] -> ... -> image_features[2, 576, D]

    Raises:
        GraphError: an input without a shape in ``shapes``, a fixed axis that differs, or a shape that stays unknown.
    """
    source = model.graph
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name=source.name)
    build = GraphBuilder(graph)
    bound = {}
    for value in source.inputs:
        name = str(value.name)
        if name not in shapes:
            raise GraphError(f"no shape given for input {name!r} of {source.name}; expected one for each of its inputs")
        wanted, declared = tuple(shapes[name]), value.shape
        if declared is None or len(declared) != len(wanted):
            raise GraphError(f"input {name!r} of {source.name} has shape {declared}, not {len(wanted)} axes")
        for axis, size in enumerate(declared):
            if isinstance(size, int) and size != wanted[axis]:
                raise GraphError(f"axis {axis} of input {name!r} of {source.name} is fixed to {size}, asked for {wanted[axis]}")
        bound[value] = build.input(name, value.dtype, list(wanted))
    whole = Instance(build, source, scope="static", bound=bound, weights={})
    for value in source.outputs:
        add_named_output(build, whole.get(value), str(value.name))
    fixed = ir.Model(graph, ir_version=model.ir_version, producer_name="sievert")
    return FixShapes()(fixed).model


def merge_images(model: ir.Model, batch: int, images: int) -> ir.Model:
    """A copy of a static vision encoder of ``batch * images`` pictures that takes and gives them prompt by prompt.

    Before::

        pixel_values[B*M, C, H, W] -> ... -> image_features[B*M, n, D], visual_scores[B*M, n]

    After::

        pixel_values[B, M, C, H, W] -> ... -> image_features[B, M*n, D], visual_scores[B, M*n]

    Raises:
        GraphError: not one input, or a first axis that is not ``batch * images``.
    """
    source = model.graph
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name=source.name)
    build = GraphBuilder(graph)
    bound = {}
    for value in source.inputs:
        sizes = _sizes(value, source, batch * images)
        split = build.input(str(value.name), value.dtype, [batch, images, *sizes[1:]])
        bound[value] = build.op.Reshape(split, list(sizes))
    whole = Instance(build, source, scope="images", bound=bound, weights={})
    for value in source.outputs:
        _, tokens, *rest = _sizes(value, source, batch * images)
        add_named_output(build, build.op.Reshape(whole.get(value), [batch, images * tokens, *rest]), str(value.name))
    return FixShapes()(ir.Model(graph, ir_version=model.ir_version, producer_name="sievert")).model


def _sizes(value: ir.Value, graph: ir.Graph, rows: int) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static() or value.shape[0] != rows:
        raise GraphError(f"{value.name!r} of {graph.name} has shape {value.shape}, expected {rows} rows of fixed size")
    return tuple(value.shape.numpy())
