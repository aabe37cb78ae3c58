"""Uniform stride: evenly spaced tokens, whatever they show. A floor that every selector must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs


@dataclass(frozen=True)
class Uniform(Selector):
    """Places floor((i + 0.5) * Nv / K) of the tokens that enter the stage. No options."""

    name: ClassVar[str] = "uniform"

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (there is no TopK)
        """0: there is none."""
        return 0

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Both outputs are constants; scores are 1 where taken, else 0."""
        g = inputs.geometry
        places = (2 * np.arange(g.keep) + 1) * g.visual // (2 * g.keep)
        scores = np.zeros((g.batch, g.visual), np.float32)
        scores[:, places] = 1
        order = np.tile(places.astype(np.int64), (g.batch, 1))
        return Selection(
            build.initializer(ir.tensor(order), name="uniform_order"), build.initializer(ir.tensor(scores), name="uniform_scores"), {}
        )
