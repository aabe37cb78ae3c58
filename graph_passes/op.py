"""onnxscript's operators with types, and the small steps that splice, selectors and lowering all take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

import onnx_ir as ir

FLOAT: Final = ir.DataType.FLOAT


class Op(Protocol):
    """onnxscript's OpBuilder, with a type for what its operators return."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]: ...


def take_outputs(values: ir.Value) -> Sequence[ir.Value]:
    """What an operator of several outputs really returned."""
    return cast("Sequence[ir.Value]", values)


def cast_float(op: Op, value: ir.Value) -> ir.Value:
    """``value`` in float32; strong typing wants the cast written, and a cast to the same type is left out."""
    return value if value.dtype == FLOAT else op.Cast(value, to=FLOAT)


def gather_rows(op: Op, stream: ir.Value, index: ir.Value) -> ir.Value:
    """Rows ``index[B, N]`` of ``stream[B, S, ...]``: [B, N, ...]."""
    return op.GatherND(stream, op.Unsqueeze(index, [2]), batch_dims=1)


def make_cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """A node, in no graph yet, that gives ``value`` in ``dtype`` under ``name``."""
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{name}.cast")
    made = node.outputs[0]
    made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
    return node
