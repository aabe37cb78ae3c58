"""Standard operators of one version, written whole: functions inlined, norms that a tool took apart as one operator again."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import onnx_fusions

from sievert.graph_passes.foreign.fuse_rotary import fuse_rotary
from sievert.graph_passes.foreign.match import Mismatch, at

OLDEST: Final = 18
"""Since this version no operator of a decoder has changed its meaning, only its types."""
_FUSED: Final = 23
OPSET: Final = 24
_STANDARD: Final = ("", "ai.onnx")
_CONTROL: Final = ("If", "Loop", "Scan")


def clean(model: ir.Model) -> Mismatch | list[str]:
    """Inline, raise the opset, fuse; gives what was done."""
    done = []
    if model.functions:
        names = sorted({f"{domain}::{name}" for domain, name, _ in model.functions})
        common.InlinePass()(model)
        done.append(f"functions written out: {', '.join(names)}")
    version = max((model.opset_imports[domain] for domain in _STANDARD if domain in model.opset_imports), default=0)
    if not OLDEST <= version <= OPSET:
        return Mismatch(f"the graph is of opset {version}, expected {OLDEST} to {OPSET}: export it again with another version", "the model")
    for node in model.graph.all_nodes():
        if node.domain not in _STANDARD:
            return Mismatch(
                f"{node.domain}::{node.op_type} is no standard operator: export with the tool's standard-operator target", at(node)
            )
        if node.op_type in _CONTROL:
            return Mismatch("the graph branches or loops: prefill and decode in one graph are not supported, export them apart", at(node))
    _set_version(model, _FUSED)  # the version the fusions are made for
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.IdentityEliminationPass()(model)
    common.ShapeInferencePass()(model)
    _spell_sizes(model.graph)
    fused = onnx_fusions.fuse(model)
    fused["RotaryEmbedding"] = fused.get("RotaryEmbedding", 0) + fuse_rotary(model)
    done += [f"{count} {name} put together" for name, count in fused.items() if count]
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _set_version(model, OPSET)
    done.insert(0, f"standard operators of opset {version}")
    return done


def _set_version(model: ir.Model, version: int) -> None:
    for domain in list(model.opset_imports):
        del model.opset_imports[domain]
    model.opset_imports[""] = version
    model.graph.opset_imports[""] = version
    for node in model.graph.all_nodes():
        node.version = version
        node.domain = ""


def _spell_sizes(graph: ir.Graph) -> None:
    """Some tools write fixed axes as symbols that spell a number."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None and any(isinstance(axis, ir.SymbolicDim) and str(axis.value).isdigit() for axis in value.shape):
            value.shape = ir.Shape(
                [axis if isinstance(axis, int) or not str(axis.value).isdigit() else int(str(axis.value)) for axis in value.shape]
            )
