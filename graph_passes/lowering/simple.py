"""Small passes: one attribute or one type that a target does not take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.graph_passes.lowering.rewrite import Rewriter

_INTEGERS: Final = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_EXACT: Final = 1 << 24


@dataclass(frozen=True)
class DropSoftmaxPrecision(ir.passes.InPlacePass):
    """Leave the type of the softmax inside Attention to the engine: TensorRT's parser refuses the attribute, whatever its value.

    Before::

        Attention<softmax_precision=1>

    After::

        Attention (fused kernels keep the softmax in float32 themselves)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an attribute was removed."""
        found = [node for node in model.graph if node.op_type == "Attention" and "softmax_precision" in node.attributes]
        for node in found:
            del node.attributes["softmax_precision"]
        return ir.passes.PassResult(model, modified=bool(found))


@dataclass(frozen=True)
class CumSumInFloat(ir.passes.InPlacePass):
    """Count in float32: full TensorRT documents CumSum for floats only. Exact while every sum stays below 2**24, as row numbers do.

    Before::

        flags[B, S] int64 -> CumSum

    After::

        flags[B, S] int64 -> Cast float32 -> CumSum -> Cast int64
    """

    def requires(self, model: ir.Model) -> None:
        """The axis is short enough for sums of ones to stay exact.

        Raises:
            PreconditionError: it is not.
        """
        for node in _find_integer_sums(model):
            shape = node.outputs[0].shape
            # An axis that varies is at most as long as a prompt.
            if shape is None or max((size for size in shape if isinstance(size, int)), default=0) >= _EXACT:
                raise ir.passes.PreconditionError(f"CumSum node {node.name!r} of shape {shape} cannot be counted in float32 exactly")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an integer CumSum was found."""
        rewriter = Rewriter(model.graph, "lower.cumsum")
        for node in list(_find_integer_sums(model)):
            op, (data, axis) = rewriter.op, node.inputs
            kind = node.outputs[0].dtype
            options = {name: node.attributes.get_int(name, 0) for name in ("exclusive", "reverse")}
            total = op.CumSum(op.Cast(data, to=ir.DataType.FLOAT), axis, **options)
            rewriter.replace(node, op.Cast(total, to=kind))
        return ir.passes.PassResult(model, modified=rewriter.apply())


def _find_integer_sums(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph:
        if node.op_type == "CumSum" and node.outputs[0].dtype in _INTEGERS:
            yield node
