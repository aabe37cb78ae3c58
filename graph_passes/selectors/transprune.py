"""TransPrune (arXiv 2507.20630): how much the layers transform a token, and how much the question attends to it.

A module that turns a token (small cosine) and stretches it (large ratio of norms) is at work on it; that is summed over the middle layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Final, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage
from sievert.bundle.specs import Geometry
from sievert.graph_passes.lengths import sizes
from sievert.graph_passes.op import FLOAT, Op, cast_float
from sievert.graph_passes.selectors.attention import attend_mean, gather_columns, mask_softmax
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, Tap, TapKind
from sievert.graph_passes.selectors.options import choice, number
from sievert.graph_passes.selectors.rank import TINY, take_best

TRANSITION: Final = "transition"
MODULES: Final[tuple[tuple[TapKind, TapKind], ...]] = (("attention_in", "attention_out"), ("mlp_in", "mlp_out"))


@dataclass(frozen=True)
class TransPrune(Selector):
    """One TopK of transition plus attention, each as a share of its sum over the visual tokens.

    ``weights``: a token's turn against the whole sequence's (the authors' code), or against the image's, either way round (the paper).
    ``text``: whose attention counts. ``first``: the first layer that is summed; -1 is the paper's 6 of 32, scaled by depth.
    """

    weights: Literal["sequence", "image"] = choice("sequence", "image")
    text: Literal["after_image", "all"] = choice("after_image", "all")
    first: int = number(-1, at_least=-1)

    name: ClassVar[str] = "transprune"

    def layers(self, layer: int, depth: int, since: int = 0) -> range:
        """The layers that are summed anew for a cut before ``layer``; at least the one before it."""
        first = self.first if self.first >= 0 else (12 * depth + 32) // 64  # 6/32 of the depth, rounded half up
        return range(max(min(first, layer - 1), since), layer)

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:
        """Both modules' inputs and outputs in each layer that is summed, and q and k of the layer that is cut before."""
        modules = [Tap(kind, each) for each in self.layers(layer, depth, since) for pair in MODULES for kind in pair]
        return *modules, Tap("q_rotary", layer), Tap("k_rotary", layer)

    def check(self, stage: Stage, model: Geometry) -> None:
        """Refuse a cut before layer 0: nothing was transformed there.

        Raises:
            PlanError: names the layers that would do.
        """
        if stage.layer < 1:
            raise PlanError(
                f"layer={stage.layer}, but transprune reads what the layers before the cut did: choose 1..{model.depth - 1}, "
                "or divprune, which needs no layer"
            )

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the sum of both shares, 0 to 2; the transition of every row, ``[B, S]``, goes on to later stages."""
        op: Op = build.op
        g = inputs.geometry
        build.push_module(TRANSITION)
        transition = self._sum_transitions(op, inputs)  # [B, S]
        build.pop_module()
        text = op.Cast(inputs.text if self.text == "after_image" else inputs.all_text, to=FLOAT)
        attention = attend_mean(op, inputs, g.layer, text)  # [B, Nv]
        scores = op.Add(_share(op, gather_columns(op, transition, inputs.visual_index)), _share(op, attention))
        return Selection(take_best(op, scores, g.keep), scores, {TRANSITION: transition})

    def _sum_transitions(self, op: Op, inputs: StageInputs) -> ir.Value:
        """Over both modules of the layers that count, and what earlier stages summed: [B, S] float32."""
        g = inputs.geometry
        layers = self.layers(g.layer, g.depth, g.since)
        pairs = [(inputs.taps[Tap(before, layer)], inputs.taps[Tap(after, layer)]) for layer in layers for before, after in MODULES]
        terms = [self._measure_transition(op, inputs, before, after) for before, after in pairs]
        if TRANSITION in inputs.carried:
            terms.insert(0, inputs.carried[TRANSITION])
        return reduce(op.Add, terms)

    def _measure_transition(self, op: Op, inputs: StageInputs, before: ir.Value, after: ir.Value) -> ir.Value:
        """Stretch times the softmax of the turn, of a module from ``before`` to ``after``, both ``[B, S, D]``: [B, S] float32."""
        g = inputs.geometry
        if self.weights == "sequence":
            stretch, cosine = _compare_rows(op, before, after)  # [B, S]
            return op.Mul(stretch, mask_softmax(op, op.Sub(1.0, cosine), inputs.real))
        rows = op.Unsqueeze(inputs.visual_index, [2])  # [B, Nv, 1]
        stretch, cosine = _compare_rows(op, *(op.GatherND(stream, rows, batch_dims=1) for stream in (before, after)))  # [B, Nv]
        values = op.Mul(stretch, op.Softmax(op.Sub(1.0, op.Abs(cosine)), axis=-1))
        return op.ScatterElements(op.Expand(0.0, sizes(op, g.batch, g.length)), inputs.visual_index, values, axis=1)


def _compare_rows(op: Op, before: ir.Value, after: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Ratio of norms and cosine of each row of ``before`` and ``after``, both ``[B, n, D]``: [B, n] float32 each."""
    before, after = cast_float(op, before), cast_float(op, after)
    old, new = (op.ReduceL2(stream, [2], keepdims=0) for stream in (before, after))
    product = op.ReduceSum(op.Mul(before, after), [2], keepdims=0)
    old = op.Max(old, TINY)
    return op.Div(new, old), op.Div(op.Div(product, old), op.Max(new, TINY))


def _share(op: Op, values: ir.Value) -> ir.Value:
    """``values[B, Nv]`` as shares of their sum."""
    return op.Div(values, op.Add(op.ReduceSum(values, [1], keepdims=1), 1e-8))
