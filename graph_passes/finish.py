"""What every static graph goes through last: folding, deduplication, and the check that nothing dynamic is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
    TopologicalSortPass,
)
from onnxscript import optimizer

from sievert.bundle.errors import GraphError
from sievert.bundle.specs import SEQUENCE
from sievert.graph_passes.lengths import name_axes, varies_with_prompts

# Folding below this many elements; a folded constant stays far under 1 MiB, and weights are never touched.
_FOLD_ELEMENTS: Final = 8192
_NOTES: Final = "pkg.onnxscript.shape_inference_error"
NAMED: Final = "stage."
"""Inner values whose name starts so are part of the interface: `expose` makes outputs of them."""
_ROUNDS: Final = 8
_CLEAN_UP: Final = ir.passes.Sequential(
    IdentityEliminationPass(),
    RemoveUnusedNodesPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    CommonSubexpressionEliminationPass(),
    TopologicalSortPass(),
)


@dataclass(frozen=True)
class FixShapes(ir.passes.InPlacePass):
    """Fold what fixed lengths make constant (shapes, ranges, reshapes' targets) and merge what is computed twice.

    Before::

        Shape(x[2, 24, 64]) -> Gather -> Concat -> Reshape

    After::

        Reshape(x, const)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold, clean up and deduplicate in place."""
        # Named values may be mere aliases (at layer 0, of an input): as outputs they outlive the clean-up.
        named = [value for node in model.graph for value in node.outputs if str(value.name).startswith(NAMED)]
        model.graph.outputs.extend(named)
        modified = False
        # In rounds: a folded shape may make the next shape known, a removed identity the next constant.
        for _ in range(_ROUNDS):
            folded = optimizer.fold_constants_ir(
                model,
                onnx_shape_inference=True,
                input_size_limit=_FOLD_ELEMENTS,
                output_size_limit=_FOLD_ELEMENTS,
                should_fold=_should_fold,
            )
            cleaned = _CLEAN_UP(model)
            if not (folded.modified or cleaned.modified):
                break
            modified = True
        for _ in named:
            model.graph.outputs.pop()
        ShapeInferencePass()(model)  # the files say every shape, of what `expose` shows too
        for node in model.graph:
            node.metadata_props.pop(_NOTES, None)  # the builder's, of values whose shape was not known to it yet
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():  # a named value that turned out constant
                del model.graph.initializers[name]
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No symbolic size is left; where an input has the one axis that may vary, none in what the graph gives but that axis itself.

        Raises:
            GraphError: a value whose shape is not all numbers; the message names it.
        """
        varies = varies_with_prompts(model)
        outputs = {value for value in model.graph.outputs if SEQUENCE not in name_axes(value)}
        for node in model.graph:
            for value in node.outputs:
                if value.shape is not None and value.shape.is_dynamic() and (not varies or value in outputs):
                    raise GraphError(f"{value.name!r} of {node.op_type} node {node.name!r} still has the shape {value.shape}")


def _should_fold(node: ir.Node) -> bool | None:
    """Weights stay as the checkpoint has them, whatever their size: never fold an operator over a named parameter."""
    if any(value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs):
        return False
    # onnx's own evaluator cannot gather along axis 1 of a batch, and says so in the log; onnxscript folds one output only.
    return False if node.op_type in ("GatherElements", "TopK") else None
