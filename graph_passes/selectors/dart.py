"""DART (arXiv 2502.11494): a few pivot tokens, and the tokens that resemble each of them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage
from sievert.bundle.specs import Geometry
from sievert.graph_passes.op import Op, cast_float, gather_rows, take_outputs
from sievert.graph_passes.selectors.base import Selection, Selector, StageGeometry, StageInputs, Tap
from sievert.graph_passes.selectors.cosine import multiply_rows, normalise_rows
from sievert.graph_passes.selectors.options import choice
from sievert.graph_passes.selectors.rank import limit_topk, take_best
from sievert.graph_passes.selectors.schedule import EMBEDDINGS, Schedule

PIVOTS = 4  # of each kind


@dataclass(frozen=True)
class Dart(Selector):
    """Pivots are the 4 visual and 4 text tokens of largest 1-norm; each in turn takes the least similar visual tokens that are left.

    ``on``: norms of the rotated keys of the layer before the cut and cosines of the normed stream at the cut, or both of the input
    embeddings. ``text``: which text tokens may be pivots.
    """

    on: Literal["keys", "embeddings"] = choice("keys", "embeddings")
    text: Literal["after_image", "all"] = choice("after_image", "all")

    name: ClassVar[str] = "dart"

    @property
    def own_schedule(self) -> Schedule | None:
        """On embeddings nothing has to run first: before layer 0."""
        return EMBEDDINGS if self.on == "embeddings" else None

    @property
    def reads_question(self) -> bool:
        """No: without text tokens the visual pivots do."""
        return False

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (every layer alike)
        """Keys of the layer before, and the final norm of what enters the layer; nothing where embeddings are read."""
        return (Tap("k_rotary", layer - 1), Tap("final_normed", layer)) if self.on == "keys" else ()

    def check(self, stage: Stage, model: Geometry) -> None:  # noqa: ARG002 (any model)
        """Refuse a cut with no layer before it to take keys from.

        Raises:
            PlanError: ``on=keys`` at layer 0.
        """
        if self.on == "keys" and stage.layer == 0:
            raise PlanError(
                "selector dart with on=keys reads the keys of the layer before its cut, and there is none before layer 0: "
                "cut before layer 1 or later, or set on=embeddings"
            )

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (whatever is there)
        """The pivots of a kind, or what one pivot takes in a prompt without text."""
        return keep if keep <= PIVOTS else max(PIVOTS, limit_topk(_most_taken(keep)))

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the visual tokens' 1-norms; the order is the visual pivots, then what each pivot takes."""
        op: Op = build.op
        g = inputs.geometry
        if self.on == "keys":
            keys = cast_float(op, inputs.taps[Tap("k_rotary", g.layer - 1)])  # [B, G, S, d]
            norms, stream = op.ReduceL1(keys, [1, 3], keepdims=0), inputs.taps[Tap("final_normed", g.layer)]
        else:
            norms, stream = op.ReduceL1(cast_float(op, inputs.inputs_embeds), [2], keepdims=0), inputs.inputs_embeds
        scores = op.GatherElements(norms, inputs.visual_index, axis=1)  # [B, Nv]
        first = take_best(op, scores, min(PIVOTS, g.keep))  # [B, 4]
        if g.keep <= PIVOTS:
            return Selection(first, scores, {})
        build.push_module("pivots")
        rows = op.GatherElements(inputs.visual_index, first, axis=1)  # [B, 4]
        texts = min(PIVOTS, g.others.most)
        found = op.Expand(0, [g.batch])  # [B] text pivots of each sample
        if texts:
            text = inputs.text if self.text == "after_image" else inputs.all_text
            found = op.Min(op.ReduceSum(op.Cast(text, to=ir.DataType.INT64), [1], keepdims=0), texts)
            # No text row is below 0, so what a sample lacks comes last, and takes nothing.
            rows = op.Concat(rows, take_best(op, op.Where(text, norms, -1.0), texts), axis=1)  # [B, P]
        pivots = normalise_rows(op, gather_rows(op, stream, rows))  # [B, P, D]
        tokens = normalise_rows(op, gather_rows(op, stream, inputs.visual_index))  # [B, Nv, D]
        cosines = op.Split(multiply_rows(op, pivots, tokens), axis=1, num_outputs=PIVOTS + texts, _outputs=PIVOTS + texts)
        build.pop_module()
        return Selection(_take_unlike(build, g, first, found, take_outputs(cosines)), scores, {})


def _take_unlike(build: GraphBuilder, g: StageGeometry, first: ir.Value, found: ir.Value, cosines: Sequence[ir.Value]) -> ir.Value:
    """Pivot by pivot the least similar of those left: order [B, K], the visual pivots ``first[B, 4]`` before all others.

    How many a pivot takes depends on the sample's number of text pivots, ``found[B]``. So every pivot ranks as many as any could take;
    tables over that number say which of them count (as marks to lower taken tokens by) and where the order finds its tokens.
    """
    op: Op = build.op
    marks, places = _tabulate(g.keep, len(cosines) - PIVOTS)
    count = marks.shape[2]
    sample_marks = op.Gather(build.initializer(ir.tensor(marks), name="marks"), found, axis=0)  # [B, P, count]
    sample_places = op.Gather(build.initializer(ir.tensor(places), name="places"), found, axis=0)  # [B, K - 4]
    nothing = op.Expand(0.0, [g.batch, g.visual])
    taken = op.ScatterElements(nothing, first, op.Expand(TAKEN, [g.batch, PIVOTS]), axis=1)  # [B, Nv]
    ranked: list[ir.Value] = []
    split = take_outputs(op.Split(sample_marks, axis=1, num_outputs=len(cosines), _outputs=len(cosines)))
    for pivot, (cosine, mark) in enumerate(zip(cosines, split, strict=True)):
        build.push_module(f"pivot.{pivot}")
        unlike = op.Sub(taken, op.Reshape(cosine, [g.batch, g.visual]))  # [B, Nv]
        ranked.append(take_best(op, unlike, count))  # [B, count]
        newly = op.ScatterElements(nothing, ranked[-1], op.Reshape(mark, [g.batch, count]), axis=1)
        # Where fewer are left than were ranked, the last ones were taken before: they keep their marks.
        taken = op.Min(taken, newly)
        build.pop_module()
    rest = op.GatherElements(op.Concat(*ranked, axis=1), sample_places, axis=1)  # [B, K - 4]
    return op.Concat(first, rest, axis=1)


TAKEN = -4.0
"""Added to a negative cosine: further down than any token that is left."""


def _most_taken(keep: int) -> int:
    """The most one pivot takes: the first one's share where there are no text pivots."""
    return -(-(keep - PIVOTS) // PIVOTS)


def _tabulate(keep: int, texts: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For 0..``texts`` text pivots: marks ``[texts + 1, P, count]`` of what each pivot takes, and places ``[texts + 1, K - 4]`` of the
    taken ones among all that were ranked, pivot after pivot.
    """
    rest, count = keep - PIVOTS, _most_taken(keep)
    marks = np.zeros((texts + 1, PIVOTS + texts, count), np.float32)
    places = np.empty((texts + 1, rest), np.int64)
    for found in range(texts + 1):
        each, more = divmod(rest, PIVOTS + found)
        for pivot in range(PIVOTS + found):
            marks[found, pivot, : each + (pivot < more)] = TAKEN
        places[found] = np.flatnonzero(marks[found])
    return marks, places
