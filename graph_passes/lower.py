"""Write a static graph in words its target takes: one visible list of passes per target.

The very file that results is handed to the builder *and* run in ONNX Runtime by parity, so a lowering may only use standard operators.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import onnx
import onnx_ir as ir
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from sievert.bundle.errors import GraphError
from sievert.graph_passes.lowering.blocks import SplitCausalAttention
from sievert.graph_passes.lowering.decompose import DecomposeAttention
from sievert.graph_passes.lowering.one_row import FlattenBiased, GroupQueryHeads, MergeReshapes
from sievert.graph_passes.lowering.simple import CumSumInFloat, DropSoftmaxPrecision
from sievert.graph_passes.lowering.targets import TARGETS, Target
from sievert.graph_passes.lowering.widen import EmulateBfloat16

__all__ = ["PASSES", "TARGETS", "Target", "lower"]

logger = logging.getLogger(__name__)

_TENSORRT: Final[tuple[ir.passes.InPlacePass, ...]] = (
    DecomposeAttention(),  # first: what it writes out has its float32 softmax in the graph
    DropSoftmaxPrecision(),  # after it: only operators that stay whole
)

PASSES: Final[Mapping[Target, tuple[ir.passes.InPlacePass, ...]]] = MappingProxyType(
    {
        # Both take the contract's operators as they are. The CPU's kernel computes all scores of a causal attention, a fused one on a GPU
        # does not. bfloat16 has few kernels on the CPU: what is split is emulated like the rest, so last.
        "onnxruntime": (
            SplitCausalAttention(),
            GroupQueryHeads(),
            FlattenBiased(),
            MergeReshapes(),  # after what adds them
            EmulateBfloat16(),
        ),
        "onnxruntime-cuda": (),
        "tensorrt-rtx": _TENSORRT,
        "tensorrt": (*_TENSORRT, CumSumInFloat()),
    }
)


def lower(model: ir.Model, target: Target) -> ir.Model:
    """A copy of ``model`` for ``target``: same inputs, outputs and ``stage.*`` values, same weights at the same external places.

    It computes the same; where attention is written out, up to the rounding of a differently ordered float32 sum.

    Raises:
        GraphError: an unknown target, or a pass failed or broke the graph; the message names the pass.
    """
    if target not in PASSES:
        raise GraphError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    lowered = model.clone()
    before = _describe(model)
    for step in PASSES[target]:
        try:
            changed = step(lowered).modified
            if changed:
                _check(lowered)
        except (ir.passes.InvariantError, ValidationError, InferenceError) as error:
            raise GraphError(f"{step} failed on graph {model.graph.name!r} for {target}: {error}") from error
        if _describe(lowered) != before:
            raise GraphError(f"{step} changed the inputs, outputs, weights or stage values of graph {model.graph.name!r}")
        logger.debug("%s: %s %s", model.graph.name, step, "changed it" if changed else "found nothing")
    return lowered


def _check(model: ir.Model) -> None:
    """Run ONNX's checker and its strict shape inference.

    Raises:
        ValidationError, InferenceError: the graph is not valid ONNX.
    """
    proto = ir.to_proto(model)
    # Weights become inputs: the checker would look for their file in the current folder.
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]:
        proto.graph.initializer.remove(tensor)
        if all(value.name != tensor.name for value in proto.graph.input):
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(proto, full_check=True)


def _describe(model: ir.Model) -> tuple[list[str], list[str], set[str], set[str]]:
    """What a lowering must preserve: interface, names users expose, and external weights."""
    graph = model.graph
    stages = {str(value.name) for node in graph for value in node.outputs if str(value.name).startswith("stage.")}
    weights = {name for name, value in graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}
    inputs, outputs = ([f"{value.name} {value.type} {value.shape}" for value in values] for values in (graph.inputs, graph.outputs))
    return inputs, outputs, stages, weights
