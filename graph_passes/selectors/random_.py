"""Random tokens: the floor that every selector must beat. Seeded, and the same tokens for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs
from sievert.graph_passes.selectors.options import number
from sievert.graph_passes.selectors.rank import take_best


@dataclass(frozen=True)
class Random(Selector):
    """The first tokens that are left of one fixed permutation of the model's visual tokens, drawn from ``seed``."""

    seed: int = number(0, at_least=0)

    name: ClassVar[str] = "random"

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the number of visual tokens before any cut, minus the token's rank in the permutation (counted from 0)."""
        op, g = build.op, inputs.geometry
        scores = np.empty(g.original_visual, np.float32)
        scores[np.random.default_rng(self.seed).permutation(g.original_visual)] = np.arange(g.original_visual, 0, -1)
        table = build.initializer(ir.tensor(scores), name="permutation_scores")
        left = op.Gather(table, inputs.original_index, axis=0)  # [B, Nv]
        return Selection(take_best(op, left, g.keep), left, {})
