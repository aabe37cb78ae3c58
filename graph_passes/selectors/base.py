"""What a selector is to the splice: the tensors it reads, and the subgraph that ranks visual tokens.

A selector never gathers, renumbers or writes caches: it only says, in order, which visual tokens it takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage, resolve_keep
from sievert.bundle.specs import Geometry
from sievert.graph_passes.lengths import Length
from sievert.graph_passes.selectors.options import check_values
from sievert.graph_passes.selectors.rank import limit_topk
from sievert.graph_passes.selectors.schedule import Schedule
from sievert.graph_passes.sight import ALL_CAUSAL, Places, Sights

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
    "final_normed",  # [B, S, D] the decoder's final norm of the stream entering the layer
]


@dataclass(frozen=True)
class Tap:
    """A tensor of layer ``layer`` (counted from 0) at full length of the stage that reads it."""

    kind: TapKind
    layer: int


@dataclass(frozen=True)
class VisionTap:
    """What the vision encoder scores its patches by: the attention they receive in one of its layers.

    ``layer``: ``feature`` is the last one whose output feeds the projector, ``second_last`` the encoder's second-last. ``queries``: the
    mean over all rows of the map (class token included), the class token's row alone, or (``auto``) that row where there is one.
    """

    layer: Literal["feature", "second_last"]
    queries: Literal["mean", "class_token", "auto"]

    def reads_class_token(self, model: Geometry) -> bool:
        """Whether the class token's row alone counts, for a model that was checked."""
        return self.queries == "class_token" or (self.queries == "auto" and model.class_tokens > 0)

    def check(self, selector: str, stage: Stage, model: Geometry) -> None:
        """Refuse a stage or a model that ``selector`` cannot read this of.

        Raises:
            PlanError: not before layer 0, or an encoder without such a layer or without a class token.
        """
        if stage.layer != 0:
            raise PlanError(
                f"selector {selector} scores in the vision encoder and can only be the first cut, before layer 0, but it is to cut before "
                f"layer {stage.layer}: use layer 0"
            )
        if model.vision_layers == 0 and model.picture:
            raise PlanError(
                f"selector {selector} ranks by the vision encoder's attention, which cannot be read in this family (its pictures are tiles "
                "or of any size): use a selector that reads the decoder or the embeddings"
            )
        if model.vision_layers == 0 and (self.layer == "second_last" or self.queries != "mean"):
            raise PlanError(
                f"selector {selector} must know the vision encoder's layers and class token, which this bundle was made without: "
                "export the model again"
            )
        if self.layer == "second_last" and model.vision_layers < 2:
            raise PlanError(
                f"selector {selector} reads the second-last layer of the vision encoder, which has but one: use another selector"
            )
        if self.queries == "class_token" and model.class_tokens == 0:
            raise PlanError(f"selector {selector}: the vision encoder has no class token for queries=class_token: use queries=mean")


@dataclass(frozen=True)
class StageGeometry:
    """Static numbers of one stage. ``sequence`` (S) and ``visual`` (Nv) are what *enters* it; ``keep`` (K) what it leaves.

    ``original_visual`` is the image's number of visual tokens, before any cut; ``since`` the layer of the previous cut, 0 if there is none.
    ``other_images`` counts rows of the sequence that are visual tokens of other images, which are ranked by themselves. ``softcap`` bounds
    the decoder's attention scores, 0 does not. ``varying`` is the sequence's length where it is not fixed: ``sequence`` is then its most.
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
    since: int = 0
    other_images: int = 0
    softcap: float = 0.0
    varying: Length | None = None

    @property
    def length(self) -> Length:
        """S, the rows that enter the stage."""
        return self.varying or Length(self.sequence)

    @property
    def others(self) -> Length:
        """T: how many rows are no image's, text and padding together."""
        return self.length.less(self.visual + self.other_images)


@dataclass(frozen=True)
class StageInputs:
    """Values the splice hands to a selector.

    ``visual_index[B, Nv]`` int64, ascending rows of the stage's sequence; ``original_index[B, Nv]`` the same tokens' number among
    the image's visual tokens (0..Nv-1 before any cut); ``text[B, S]`` bool, real text after the prompt's first visual token;
    ``all_text[B, S]`` bool, all real text; ``real[B, S]`` bool, everything but padding, which stands at the end. ``taps`` have the
    model's dtype. ``inputs_embeds[B, S, D]`` is gathered along like a tap. ``carried`` holds the values that earlier stages left, gathered
    likewise; ``visual_scores[B, Nv]`` float32 is there where the selector has a vision tap. ``all_visual_index`` are the rows of all
    images, where ``visual_index`` is one of several. ``sights`` are what the decoder's layers attend to, ``places`` what that depends on.
    """

    geometry: StageGeometry
    visual_index: ir.Value
    original_index: ir.Value
    text: ir.Value
    all_text: ir.Value
    real: ir.Value
    inputs_embeds: ir.Value
    taps: Mapping[Tap, ir.Value]
    carried: Mapping[str, ir.Value]
    visual_scores: ir.Value | None = None
    all_visual_index: ir.Value | None = None
    sights: Sights = ALL_CAUSAL
    places: Places | None = None

    def require_visual_scores(self) -> ir.Value:
        """``visual_scores``, for a selector with a vision tap.

        Raises:
            PlanError: there are none at this stage.
        """
        if self.visual_scores is None:
            raise PlanError(
                f"no scores of the vision encoder before layer {self.geometry.layer}: they are for the first cut, before layer 0"
            )
        return self.visual_scores


@dataclass(frozen=True)
class Selection:
    """``order[B, K]`` int64: places 0..Nv-1 among the stage's visual tokens, in the order they were taken (no duplicates);
    ``scores[B, Nv]`` float32: the score the first choice was made by; ``carried``: values ``[B, S]`` for later stages.
    """

    order: ir.Value
    scores: ir.Value
    carried: Mapping[str, ir.Value]


class Selector(ABC):
    """One selector with its options: a frozen dataclass whose fields are the options (``options()`` of the registry)."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_values(self.name, self)

    @property
    def vision_tap(self) -> VisionTap | None:
        """What it reads of the vision encoder; such a selector cuts before layer 0."""
        return None

    @property
    def own_schedule(self) -> Schedule | None:
        """Where it cuts with these options, if that is not where the registry says."""
        return None

    @property
    def reads_question(self) -> bool:
        """Whether it is guided by the text after the image, so that a prompt without any cannot be pruned: the option ``text`` tells."""
        return getattr(self, "text", "") == "after_image"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (some read nothing)
        """Which tensors of the decoder to hand over, for a cut before ``layer`` of ``depth``.

        ``since`` is the layer of the cut before this one, 0 if there is none: what lies before it ran on another sequence.
        """
        return ()

    def check(self, stage: Stage, model: Geometry) -> None:
        """Refuse a stage this selector cannot make: of most, none.

        Raises:
            PlanError: says why, and what would do.
        """
        if self.vision_tap is not None:
            self.vision_tap.check(self.name, stage, model)

    def resolve_keep(self, requested: str, model: Geometry, images: int = 1) -> int:
        """``22%`` or a count as the number of tokens that are really kept, of all ``images`` together.

        Raises:
            PlanError: neither form, out of range, or a count this selector cannot make.
        """
        return resolve_keep(requested, images * model.visual_tokens)

    @abstractmethod
    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Add the subgraph to the builder's graph. S alone may vary (``length``, ``others``); no NonZero, Compress, Loop or If."""

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (most have no TopK over all tokens)
        """The largest K of any TopK the subgraph holds; of most it takes all kept tokens at once."""
        return limit_topk(keep)
