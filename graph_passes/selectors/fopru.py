"""FoPru (arXiv 2411.14164): the attention that patches receive in the vision encoder says which matter. No text is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage, resolve_keep
from sievert.bundle.specs import Geometry
from sievert.graph_passes.op import Op
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, VisionTap
from sievert.graph_passes.selectors.options import choice
from sievert.graph_passes.selectors.rank import take_best


@dataclass(frozen=True)
class FoPru(Selector):
    """Scores are taken from the encoder layer whose output feeds the projector; every field is an option.

    ``strategy``: the tokens of highest score (``rank``), or whole rows of the patch grid by the sum of their scores (``row``). ``queries``:
    the mean over all rows of the attention map, or the class token's alone. That the significance of a patch is this mean over heads
    and rows is our reading: the paper's own formula could not be read.
    """

    strategy: Literal["rank", "row"] = choice("rank", "row")
    queries: Literal["mean", "class_token"] = choice("mean", "class_token")

    name: ClassVar[str] = "fopru"

    @property
    def vision_tap(self) -> VisionTap:
        """The layer that feeds the projector."""
        return VisionTap("feature", self.queries)

    def check(self, stage: Stage, model: Geometry) -> None:
        """Refuse what has no scores; under ``row`` also a model without a full grid, or a keep that is no number of whole rows."""
        super().check(stage, model)
        if self.strategy == "row":
            self._check_rows(stage.keep, model)

    def resolve_keep(self, requested: str, model: Geometry, images: int = 1) -> int:
        """As the other selectors under ``rank``. Under ``row`` a percentage is of the grid's rows, and a count is one of whole rows.

        Of several images each keeps the same number of rows.
        """
        rows, columns = model.grid or (1, model.visual_tokens)
        if self.strategy == "row" and requested.strip().endswith("%"):
            keep = resolve_keep(requested, rows) * columns * images
        else:
            keep = super().resolve_keep(requested, model, images)
        if self.strategy == "row":
            self._check_rows(keep, model, images)
        return keep

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the encoder's, under ``row`` each token's is its row's; order is by score, and rows are read from left to right."""
        op: Op = build.op
        g, scores = inputs.geometry, inputs.require_visual_scores()  # [B, Nv]
        if self.strategy == "rank":
            return Selection(take_best(op, scores, g.keep), scores, {})
        rows, columns = g.grid
        sums = op.ReduceSum(op.Reshape(scores, [g.batch, rows, columns]), [2], keepdims=1)  # [B, rows, 1]
        best = take_best(op, op.Reshape(sums, [g.batch, rows]), g.keep // columns)  # [B, K / columns]
        places = build.initializer(ir.tensor(np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)), name="row_places")
        order = op.Reshape(op.Gather(places, best, axis=0), [g.batch, g.keep])
        spread = op.Reshape(op.Expand(sums, [g.batch, rows, columns]), [g.batch, g.visual])
        return Selection(order, spread, {})

    def _check_rows(self, keep: int, model: Geometry, images: int = 1) -> None:
        rows, columns = model.grid or (0, 0)
        if model.visual_tokens != rows * columns:
            raise PlanError(
                f"selector fopru: strategy=row keeps whole rows of the {rows} x {columns} patches, but the model has {model.visual_tokens} "
                "visual tokens (a class token kept, or a patch dropped): use strategy=rank"
            )
        if keep % (least := columns * images):
            nearest = max(1, round(keep / least)) * least
            of = f" in each of {images} images" if images > 1 else ""
            raise PlanError(
                f"keep={keep} but strategy=row keeps whole rows of {columns} tokens{of}: choose a multiple of {least}, such as {nearest}"
            )
