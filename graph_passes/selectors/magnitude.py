"""Magnitude alone: IWP without its duplication part, the paper's own ablation (arXiv 2604.00757)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, Tap
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.options import choice, flag


@dataclass(frozen=True)
class Magnitude(Selector):
    """One TopK of the magnitude; every field is an option and means what it means for :class:`Iwp`."""

    head_norm: Literal["global", "softmax"] = choice("global", "softmax")
    scaling: Literal["minmax", "max"] = choice("minmax", "max")
    text: Literal["after_image", "all"] = choice("after_image", "all")
    magnitude_rotary: bool = flag(False)

    name: ClassVar[str] = "magnitude"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:
        """q, k and v of the layer that is cut before."""
        return self._make_iwp().taps(layer, depth, since)

    def largest_topk(self, visual: int, keep: int) -> int:
        """All kept tokens at once."""
        return self._make_iwp().largest_topk(visual, keep)

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the scaled magnitudes, the order is theirs."""
        return self._make_iwp().select(build, inputs)

    def _make_iwp(self) -> Iwp:
        return Iwp(strength=0.0, head_norm=self.head_norm, scaling=self.scaling, text=self.text, magnitude_rotary=self.magnitude_rotary)
