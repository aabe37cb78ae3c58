"""The declared profile: every length a static graph is specialised for."""

from __future__ import annotations

from pydantic import model_validator

from sievert.bundle.errors import ProfileError
from sievert.bundle.specs import Geometry, Record


class Profile(Record):
    """Static sizes of a variant.

    ``batch`` and ``decode_batch`` count rows; ``visual_tokens`` (Nv), ``max_text`` and ``max_new_tokens`` count tokens.
    ``max_text`` is everything of the prompt that is not a visual token, template included.
    """

    batch: int = 1
    decode_batch: int = 1
    visual_tokens: int
    max_text: int
    max_new_tokens: int

    @model_validator(mode="after")
    def _positive(self) -> Profile:
        for field, value in self.model_dump().items():
            if value < 1:
                raise ProfileError(f"{field}={value}: every size of a profile is at least 1")
        return self

    @property
    def sequence(self) -> int:
        """S: the full prompt length, visual tokens included."""
        return self.visual_tokens + self.max_text

    def capacity(self, dropped: int = 0) -> int:
        """C_s: rows of a layer's cache after ``dropped`` tokens were pruned in all."""
        return self.sequence + self.max_new_tokens - dropped

    def check(self, geometry: Geometry) -> None:
        """Refuse a profile the model cannot serve.

        Raises:
            ProfileError: more positions than the model was built for, or another count of visual tokens.
        """
        if self.visual_tokens != geometry.visual_tokens:
            raise ProfileError(
                f"the profile has {self.visual_tokens} visual tokens but an image of {geometry.image_width}x"
                f"{geometry.image_height} pixels gives {geometry.visual_tokens} in this model"
            )
        if self.capacity() > geometry.max_positions:
            raise ProfileError(
                f"{self.visual_tokens} visual + {self.max_text} text + {self.max_new_tokens} new tokens = {self.capacity()} "
                f"positions, but the model has {geometry.max_positions}: lower --max-text or --max-new-tokens"
            )
