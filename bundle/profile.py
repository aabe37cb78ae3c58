"""The declared profile: every length a static graph is specialised for."""

from __future__ import annotations

from pydantic import model_validator

from sievert.bundle.errors import ProfileError
from sievert.bundle.specs import SEQUENCE, Geometry, Record


class Profile(Record):
    """Static sizes of a variant.

    ``batch`` and ``decode_batch`` count rows, ``images`` the images of one prompt; ``visual_tokens`` (Nv, of all its images),
    ``max_text`` and ``max_new_tokens`` count tokens. ``max_text`` is everything of the prompt that is not a visual token, template
    included. With ``dynamic_text`` prompts are as long as the longest of their batch, up to that; all else stays fixed, caches too.
    """

    batch: int = 1
    decode_batch: int = 1
    images: int = 1
    visual_tokens: int
    max_text: int
    max_new_tokens: int
    dynamic_text: bool = False

    @model_validator(mode="after")
    def _positive(self) -> Profile:
        for field, value in self.model_dump(exclude={"dynamic_text"}).items():
            if value < 1:
                raise ProfileError(f"{field}={value}: every size of a profile is at least 1")
        return self

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Visual tokens of each image of a prompt, in the order of the prompt: their sum is Nv."""
        return (self.visual_tokens // self.images,) * self.images

    @property
    def sequence(self) -> int:
        """S: the full prompt length, visual tokens included; with dynamic text the largest."""
        return self.visual_tokens + self.max_text

    @property
    def sequence_axis(self) -> int | str:
        """S as shapes have it: a number, or its name where text is dynamic."""
        return SEQUENCE if self.dynamic_text else self.sequence

    @property
    def lengths(self) -> tuple[int, int]:
        """The shortest and the longest a graph's sequence may be: an image and a word, and S. Equal without dynamic text."""
        return (self.visual_tokens + 1 if self.dynamic_text else self.sequence), self.sequence

    def capacity(self, dropped: int = 0) -> int:
        """C_s: rows of a layer's cache after ``dropped`` tokens were pruned in all."""
        return self.sequence + self.max_new_tokens - dropped

    def check(self, geometry: Geometry) -> None:
        """Refuse a profile the model cannot serve.

        Raises:
            ProfileError: more positions than the model was built for, another count of visual tokens, or another number of images than
                the bundle's images were encoded for.
        """
        if geometry.film and self.images > 1:
            raise ProfileError(f"images={self.images}, but a prompt of this bundle has one video: leave --images out")
        if geometry.images not in (0, self.images):
            raise ProfileError(
                f"images={self.images}, but the bundle was exported for {geometry.images} per prompt, and this model encodes an image "
                f"otherwise in prompts of several: export it again with --images {self.images}"
            )
        if self.visual_tokens != self.images * geometry.visual_tokens:
            what, give = ("an image", "gives") if self.images == 1 else (f"{self.images} images", "give")
            raise ProfileError(
                f"the profile has {self.visual_tokens} visual tokens but {what} of {geometry.image_width}x{geometry.image_height} pixels "
                f"{give} {self.images * geometry.visual_tokens} in this model"
            )
        if self.capacity() > geometry.max_positions:
            raise ProfileError(
                f"{self.visual_tokens} visual + {self.max_text} text + {self.max_new_tokens} new tokens = {self.capacity()} "
                f"positions, but the model has {geometry.max_positions}: lower {'--images, ' if self.images > 1 else ''}--max-text or "
                "--max-new-tokens"
            )
