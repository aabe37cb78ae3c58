"""The pruning plan: which selector cuts before which layer, and how many visual tokens it keeps."""

from __future__ import annotations

import math
import re
from typing import Literal

from sievert.bundle.errors import PlanError
from sievert.bundle.specs import Geometry, Record

Option = bool | int | float | str
PositionPolicy = Literal["keep", "compact"]


class Stage(Record):
    """One cut: layers before ``layer`` see all tokens that are left, ``layer`` is the first to run on the ``keep`` kept ones.

    ``requested`` is what the user wrote (``22%`` or ``64``); ``options`` holds only what differs from the selector's defaults.
    """

    selector: str
    layer: int
    keep: int
    requested: str
    options: dict[str, Option] = {}


class Plan(Record):
    """Stages in the order of their layers. ``positions``: ``keep`` original ids, or renumber (``compact``) after each cut."""

    stages: tuple[Stage, ...] = ()
    positions: PositionPolicy = "keep"

    def dropped(self, visual_tokens: int) -> tuple[int, ...]:
        """Tokens dropped in all after each stage, as the graph contract's ``dropped_s``."""
        return tuple(visual_tokens - stage.keep for stage in self.stages)

    def dropped_at(self, layer: int, visual_tokens: int) -> int:
        """Tokens that layer ``layer`` no longer sees."""
        return max((visual_tokens - stage.keep for stage in self.stages if stage.layer <= layer), default=0)

    def check(self, geometry: Geometry, images: int = 1) -> None:
        """Refuse a plan this model cannot take in prompts of ``images`` images.

        Raises:
            PlanError: a layer or keep out of range, stages out of order, a keep that grows, or one that leaves an image without a token;
                or positions renumbered that are places in a picture.
        """
        if self.positions == "compact" and geometry.position_axes > 1:
            raise PlanError(
                f"positions compact, but a position of this model is {geometry.position_axes} numbers (time, row and column in the "
                "picture): renumbering the kept tokens would move them in the picture; choose positions keep"
            )
        total = images * geometry.visual_tokens
        where = f"{total} visual tokens" if images == 1 else f"{total} visual tokens in {images} images, which keep at least 1 each"
        keep, layer = total, -1
        for stage in self.stages:
            if not 0 <= stage.layer < geometry.depth:
                raise PlanError(f"layer={stage.layer} but the decoder has {geometry.depth} layers: choose 0..{geometry.depth - 1}")
            if not images <= stage.keep <= total:
                raise PlanError(f"keep={stage.keep} but the model has {where}: choose {images}..{total}")
            if stage.layer <= layer:
                raise PlanError(f"stages cut before layers {layer} and {stage.layer}: list them in ascending order, one per layer")
            if stage.keep > keep:
                raise PlanError(f"a later stage keeps {stage.keep} tokens of the {keep} that are left: a keep may not grow")
            keep, layer = stage.keep, stage.layer


def resolve_keep(text: str, visual_tokens: int) -> int:
    """``22%`` or a count, as a number of visual tokens.

    A percentage p keeps ``floor(p/100 * Nv + 0.5)`` tokens, at least 1 (METHODS: rules common to all selectors).

    Raises:
        PlanError: neither form, or out of range. A bare fraction such as ``0.22`` is refused with the percentage it may mean.
    """
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?%", text):
        percent = float(text[:-1])
        if not 0 < percent <= 100:
            raise PlanError(f"keep={text}: a percentage lies above 0% and at most at 100%")
        return max(1, math.floor(percent / 100 * visual_tokens + 0.5))
    if re.fullmatch(r"\d+", text):
        count = int(text)
        if not 1 <= count <= visual_tokens:
            raise PlanError(f"keep={count} but the model has {visual_tokens} visual tokens: choose 1..{visual_tokens}")
        return count
    if re.fullmatch(r"\d*\.\d+", text):
        fraction = float(text)
        meant = f"{fraction * 100 if fraction <= 1 else fraction:g}%"
        raise PlanError(f"keep={text} is ambiguous: write {meant} for a share or a whole number for a count")
    raise PlanError(f"keep={text!r} is neither a percentage such as 22% nor a count such as 64")
