"""What a transcription reads and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Tap = tuple[str, int]
"""A tensor of the decoder: its kind, named as the graph passes name it (``q``, ``k_rotary``, ``mlp_out``...), and its layer."""
Text = Literal["after_image", "all"]


@dataclass(frozen=True)
class VisionTap:
    """The attention that patches receive in a layer of the vision encoder.

    ``layer``: ``feature`` is the one that feeds the projector, ``second_last`` the encoder's second-last. ``queries``: the mean over all
    rows of the map, the class token's row, or (``auto``) that row where the encoder has a class token and the mean elsewhere.
    """

    layer: Literal["feature", "second_last"]
    queries: Literal["mean", "class_token", "auto"]


@dataclass(frozen=True)
class TokenInputs:
    """One unpadded sample at the input of ``layer`` of ``depth``; all floats are float64.

    ``taps``: what the selector asked for, on the stage's S rows: ``q``, ``q_rotary`` ``[H, S, d]``, ``k``, ``k_rotary``, ``v``
    ``[G, S, d]``, before and after the rotary step, after any q/k norm; the others ``[S, D]``. ``embeds[S, D]``: the input embeddings.
    ``visual[Nv]``: rows of the stage's visual tokens, ascending; ``original[Nv]``: their numbers among the model's ``visual_total``
    visual tokens. ``text``: rows of the text after the first visual token, ``all_text``: of all text. ``scale``: what q.k is
    multiplied by, the ``1/sqrt(d)`` of the formulas. ``since``: the layer of the cut before this one, 0 if there is none.
    ``grid``: rows and columns of the picture's patches. ``carried[S]``: what earlier stages left. ``visual_scores[Nv]``: what the
    vision encoder says, where the selector has a vision tap. ``seen[i]``: which of the stage's rows each row sees in layer i, ``[S, S]``,
    where that is not plainly causal; ``softcap``: the bound of the decoder's attention scores, 0 without one.
    """

    taps: Mapping[Tap, Array]
    embeds: Array
    visual: Index
    original: Index
    visual_total: int
    text: Index
    all_text: Index
    scale: float
    layer: int = 0
    depth: int = 1
    since: int = 0
    grid: tuple[int, int] = (1, 1)
    carried: Mapping[str, Array] = field(default_factory=dict)
    visual_scores: Array | None = None
    seen: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)
    softcap: float = 0.0

    def tap(self, kind: str, layer: int | None = None) -> Array:
        """The tensor ``kind`` of ``layer``, which is the stage's own if not given."""
        return self.taps[kind, self.layer if layer is None else layer]

    def text_rows(self, which: Text) -> Index:
        """Rows of the text that the option ``which`` means.

        Raises:
            ValueError: there are none.
        """
        rows = self.text if which == "after_image" else self.all_text
        if len(rows) == 0:
            raise ValueError("no text row to rate the visual tokens by")
        return rows


@dataclass(frozen=True)
class Choice:
    """``order[K]``: places 0..Nv-1 among the stage's visual tokens as they were taken; ``scores[Nv]``: what the first was chosen by.

    ``condition``: the absolute error of a score per relative error of what it was computed from. ``carried``: values ``[S]`` for
    later stages.
    """

    order: Index
    scores: Array
    condition: float
    carried: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Margin:
    """What counts as a near tie.

    ``score``: relative error allowed to a score before it is scaled; ``similarity``: absolute error allowed to a similarity.
    """

    score: float
    similarity: float


EXACT = Margin(0.0, 0.0)
