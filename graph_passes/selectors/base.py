"""What a selector is to the splice: the tensors it reads, and the subgraph that ranks visual tokens.

A selector never gathers, renumbers or writes caches: it only says, in order, which visual tokens it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.plan import Option

TapKind = Literal[
    "q",  # [B, H, S, d] before rotary, after any q norm
    "q_rotary",  # [B, H, S, d] what attention multiplies
    "k",  # [B, G, S, d] before rotary, after any k norm
    "k_rotary",  # [B, G, S, d] what attention multiplies
    "v",  # [B, G, S, d]
    "residual",  # [B, S, D] the stream entering the layer
    "attention_in",  # [B, S, D] normed input of attention
    "attention_out",  # [B, S, D] its output before the residual add
    "mlp_in",  # [B, S, D] normed input of the mlp
    "mlp_out",  # [B, S, D] its output before the residual add
]


@dataclass(frozen=True)
class Tap:
    """A tensor of layer ``layer`` (counted from 0) at full length of the stage that reads it."""

    kind: TapKind
    layer: int


@dataclass(frozen=True)
class Carry:
    """A per-token float32 value ``[B, S]`` a stage leaves for later ones; the splice gathers it along every cut."""

    name: str


@dataclass(frozen=True)
class StageGeometry:
    """Static numbers of one stage. ``sequence`` (S) and ``visual`` (Nv) are what *enters* it; ``keep`` (K) what it leaves.

    ``original_visual`` is the model's number of visual tokens, before any cut.
    """

    layer: int
    depth: int
    batch: int
    sequence: int
    visual: int
    keep: int
    heads: int
    kv_heads: int
    head_size: int
    attention_scale: float
    grid: tuple[int, int]
    original_visual: int


@dataclass(frozen=True)
class StageInputs:
    """Values the splice hands to a selector.

    ``visual_index[B, Nv]`` int64, ascending rows of the stage's sequence; ``original_index[B, Nv]`` the same tokens' number among
    the model's visual tokens (0..Nv-1 before any cut); ``text[B, S]`` bool, real text after the first visual token;
    ``all_text[B, S]`` bool, all real text. ``taps`` have the model's dtype. ``inputs_embeds[B, S, D]`` is gathered along like a tap.
    ``carried`` holds the carries that earlier stages left; ``visual_scores[B, Nv]`` float32 is there where a selector asked for it.
    """

    geometry: StageGeometry
    visual_index: ir.Value
    original_index: ir.Value
    text: ir.Value
    all_text: ir.Value
    inputs_embeds: ir.Value
    taps: Mapping[Tap, ir.Value]
    carried: Mapping[str, ir.Value]
    visual_scores: ir.Value | None = None


@dataclass(frozen=True)
class Selection:
    """``order[B, K]`` int64: places 0..Nv-1 among the stage's visual tokens, in the order they were taken (no duplicates);
    ``scores[B, Nv]`` float32: the score the first choice was made by; ``carried``: values ``[B, S]`` for later stages.
    """

    order: ir.Value
    scores: ir.Value
    carried: Mapping[str, ir.Value]


class Selector(Protocol):
    """One selector with its options; a frozen dataclass whose fields are the options (``options()`` of the registry)."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        ...

    def taps(self, layer: int, depth: int) -> tuple[Tap, ...]:
        """Which tensors to hand over, for a cut before ``layer`` of ``depth``."""
        ...

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Add the subgraph to the builder's graph. Static shapes only; no NonZero, Compress, Loop or If."""
        ...

    def largest_topk(self, visual: int, keep: int) -> int:
        """The largest K of any TopK the subgraph holds, for lint."""
        ...


SelectorOptions = Mapping[str, Option]
