"""What says that attention is causal, in one form: a mask that can be evaluated.

Before::

    Attention(q, k, v, mask; is_causal = 1)

After::

    Attention(q, k, v, mask and row >= column)
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sievert.graph_passes.foreign.match import Mismatch, add_before, at, integer_constant, nodes_of


def write_masks(model: ir.Model) -> Mismatch | int:
    """Refuse attention without any mask, and let masks beside ``is_causal`` say what both say; gives how many did."""
    both: dict[ir.Value, ir.Value] = {}
    for node in nodes_of(model.graph, "Attention"):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = node.attributes.get_int("is_causal", 0) == 1
        if mask is None and not causal:
            return Mismatch("attention has no mask and is not causal: every row sees every other, as in an encoder", at(node))
        if mask is not None and causal:
            if mask not in both:
                both[mask] = _and_causal(model.graph, node, mask)
            node.replace_input_with(3, both[mask])
        node.attributes.pop("is_causal", None)
    return len(both)


def _and_causal(graph: ir.Graph, place: ir.Node, mask: ir.Value) -> ir.Value:
    tape = Tape()
    length = tape.op("Shape", [mask], {"start": -1})
    zero, one = (tape.op("Constant", [], {"value": ir.tensor(number, dtype=ir.DataType.INT64)}) for number in (0, 1))
    row = tape.op("Range", [zero, tape.op("Squeeze", [length]), one])
    causal = tape.op("LessOrEqual", [row, tape.op("Unsqueeze", [row, integer_constant(tape, [1])])])
    if mask.dtype == ir.DataType.BOOL:
        combined = tape.op("And", [mask, causal])
    else:
        forbidden = tape.op("CastLike", [tape.op("Constant", [], {"value": ir.tensor(-6e4, dtype=ir.DataType.FLOAT)}), mask])
        combined = tape.op("Where", [causal, mask, forbidden])
    combined.type = mask.type
    add_before(graph, place, tape)
    return combined
