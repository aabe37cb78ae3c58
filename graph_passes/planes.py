"""Further features of the pictures that early layers add to their output at the visual tokens' rows (DeepStack).

A model does it through a boolean mask, whose operator no TensorRT takes. Here every row looks up its own addend, and a word's is a row
of zeros.

Before::

    residual_out[B, S, D] of layer i

After::

    residual_out[B, S, D] + [deepstack.i[B, Nv, D], 0][place of each row]
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.graph_passes.decoder import Layer
from sievert.graph_passes.instance import Instance
from sievert.graph_passes.lengths import sizes
from sievert.graph_passes.op import gather_rows
from sievert.graph_passes.rows import Rows


class Planes:
    """Inputs ``deepstack.{i}[B, Nv, D]`` of a prefill graph; plane i belongs to the output of layer i."""

    def __init__(self, build: GraphBuilder, count: int, rows: Rows, *, dtype: ir.DataType, width: int) -> None:
        """``rows`` is the unpruned sequence."""
        op, self._build, self._width = build.op, build, width
        shape = [rows.batch, rows.visual, width]
        self._values = [build.input(f"deepstack.{index}", dtype, shape) for index in range(count)]
        if self._values:
            # A word's place is behind the last visual token's, where the zeros stand.
            words = op.Expand([rows.visual], sizes(op, rows.batch, rows.length))
            self._places: ir.Value = op.ScatterElements(words, rows.visual_index, rows.original_visual, axis=1)  # [B, S]

    def has(self, layer: Layer) -> bool:
        """Whether there is one for this layer."""
        return layer.index < len(self._values)

    def add(self, segment: Instance, layer: Layer, rows: Rows) -> None:
        """Let the output of ``layer`` on ``rows`` contain its plane, if it has one: of the tokens that are left, each its own."""
        if not self.has(layer):
            return
        build, op, node = self._build, self._build.op, layer.residual_out.producer()
        if node is None or node.op_type != "Add":
            raise GraphError(f"layer {layer.index} does not end with the addition of its mlp to the residual stream")
        build.push_module(f"deepstack.{layer.index}")
        stream = op.Add(*[segment.get(value) for value in node.inputs if value is not None])  # [B, S', D]
        zeros = op.CastLike(op.Expand([0.0], [rows.batch, 1, self._width]), self._values[layer.index])
        plane = op.Concat(self._values[layer.index], zeros, axis=1)  # [B, Nv + 1, D]
        place = op.GatherElements(self._places, rows.original_row, axis=1)  # [B, S']
        segment.bind(layer.residual_out, op.Add(stream, gather_rows(op, plane, place)))
        build.pop_module()
