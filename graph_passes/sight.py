"""Which rows a row of a layer attends to, as a rule over rows of the *unpruned* sequence: after a cut those are not contiguous any more.

A row sees the rows up to itself, those of them only that are less than ``window`` rows back where the layer has a window, and, where tokens
see one another both ways, every row of its own block. A window counts rows of the prompt as it was, so what a cut drops brings nothing
nearer; a block is what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sievert.bundle.plan import Plan
from sievert.graph_passes.op import Op

ORIGINAL_ROW = "original_row"
"""Output of prefill and input of decode, followed by the stage's number: which row of the unpruned sequence each cache row is."""


TwoWay = Literal["none", "images", "prompt"]


@dataclass(frozen=True)
class Sight:
    """What one layer's rows see. ``window`` is in rows, 0 without a limit; ``two_way``: a block sees itself in both directions, and
    ``clipped`` says whether the window limits that too.
    """

    window: int = 0
    two_way: bool = False
    clipped: bool = True

    @property
    def causal(self) -> bool:
        """Whether a row sees exactly those up to itself."""
        return not self.window and not self.two_way

    def allow(self, block: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[S, S]`` over an unpruned sequence: which key (last axis) each query sees; ``block[S]``, -1 in none."""
        query, key = np.arange(len(block))[:, None], np.arange(len(block))[None]
        seen = key <= query
        near = key > query - self.window if self.window else np.ones_like(seen)
        own = (block[:, None] == block) & (block >= 0) & self.two_way
        allowed: NDArray[np.bool_] = (seen | own) & near if self.clipped else (seen & near) | own
        return allowed


CAUSAL: Final = Sight()


@dataclass(frozen=True)
class Sights:
    """Those of all layers of a decoder; without any, every layer is causal. ``two_way``: whose tokens are blocks, as Geometry has it."""

    layers: tuple[Sight, ...] = ()
    two_way: TwoWay = "none"

    def of(self, layer: int) -> Sight:
        """What layer ``layer`` attends to."""
        return self.layers[layer] if self.layers else CAUSAL


ALL_CAUSAL: Final = Sights()


@dataclass(frozen=True)
class Places:
    """Rows as a rule needs them, int64 ``[B, n]``: their number in the unpruned sequence, and their block, -1 in none."""

    row: ir.Value
    block: ir.Value | None = None


def see(op: Op, sight: Sight, query: Places, key: Places) -> ir.Value:
    """Which of the rows ``key`` ``[B, m]`` each of ``query`` ``[B, n]`` sees: ``[B, n, m]`` bool."""

    def pair(ask: ir.Value, seen: ir.Value) -> tuple[ir.Value, ir.Value]:
        return op.Unsqueeze(ask, [2]), op.Unsqueeze(seen, [1])

    asking, asked = pair(query.row, key.row)
    allowed = op.LessOrEqual(asked, asking)
    near = op.Greater(asked, op.Sub(asking, sight.window)) if sight.window else None
    if near is not None and not (sight.two_way and sight.clipped):
        allowed = op.And(allowed, near)
    if sight.two_way and query.block is not None and key.block is not None:
        mine, its = pair(query.block, key.block)
        allowed = op.Or(allowed, op.And(op.Equal(mine, its), op.GreaterOrEqual(its, 0)))
        if near is not None and sight.clipped:
            allowed = op.And(allowed, near)
    return allowed


def stage_before(plan: Plan, layer: int) -> int | None:
    """The number of the last cut before ``layer``, None where there is none."""
    before = [number for number, stage in enumerate(plan.stages) if stage.layer <= layer]
    return before[-1] if before else None


def find_displaced(plan: Plan, sights: Sights) -> tuple[int, ...]:
    """The stages behind which a layer has a window: decode must be told which rows of the unpruned sequence their caches hold."""
    stages = {stage_before(plan, layer) for layer, sight in enumerate(sights.layers) if sight.window}
    return tuple(sorted(stage for stage in stages if stage is not None))


def name_original_row(stage: int) -> str:
    """``original_row.{s}``."""
    return f"{ORIGINAL_ROW}.{stage}"
