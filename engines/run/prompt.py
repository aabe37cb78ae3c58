"""Pictures and questions to what a variant's graphs take: template, tokens, padding, and the places of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from sievert.bundle.errors import BundleError, ImageError, ProfileError, PromptError
from sievert.bundle.films import GRID, SECONDS, FrameProcessor, FrameTimes, process_film, rename_pixels, stamp
from sievert.bundle.pictures import same_layout, split_pictures
from sievert.bundle.processor import load_pictures
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.engines.run.dtypes import Array
from sievert.engines.run.images import load_image
from sievert.engines.run.positions import Grid, multi_axis_positions
from sievert.engines.run.text import Detokenizer, Tokenizer
from sievert.engines.run.videos import Video, load_video

Picture = Path | str | Image.Image
Pictures = Picture | Video | Sequence[Picture]
"""What one prompt is about: a picture, or all of the profile's in the order of the prompt; or a video, also as the folder of its frames."""
_NO_TEMPLATE: Final = "this model has no chat template: write the whole prompt yourself and turn the template off"


@dataclass(frozen=True)
class PromptBatch:
    """Right-padded prompts for one prefill: int64, except ``pixel_values``.

    ``pixel_values[B, *picture]`` float32 (``[B, M, *picture]`` where prompts have several images), ``input_ids[B, S]``,
    ``attention_mask[B, S]`` (1 for real tokens), ``position_ids[B, S]``, or ``[3, B, S]`` (padding repeats the last real one),
    ``visual_index[B, Nv]`` (ascending), ``lengths`` real tokens of each row; the next token's position is the row's length and its
    ``shifts``, 0 where there are none; ``processed`` each row's arrays as the processor made them of its ``pictures``. Rows
    from ``rows`` on are copies of the last real one: a static graph always computes all B.
    """

    pixel_values: Array
    input_ids: Array
    attention_mask: Array
    position_ids: Array
    visual_index: Array
    lengths: tuple[int, ...]
    rows: int
    processed: tuple[Mapping[str, Array], ...] = ()
    pictures: tuple[tuple[Image.Image, ...], ...] = ()
    shifts: tuple[int, ...] = ()

    def unpadded(self, row: int) -> Array:
        """The real tokens ``[length]`` of one row."""
        return self.input_ids[row, : self.lengths[row]]

    def without_question(self) -> int | None:
        """The first row whose text all stands before its first image, or None."""
        first, visual = self.visual_index[:, 0], self.visual_index.shape[1]
        after = np.asarray(self.lengths) - first - visual
        return next((row for row in range(self.rows) if after[row] < 1), None)


class Prompter:
    """The checkpoint's own processor and tokenizer, held to a profile. ``kind`` is the processor's class where the files name another.

    Raises:
        BundleError: the processor's files are missing, damaged, or would run code of their own.
    """

    def __init__(self, folder: Path, geometry: Geometry, profile: Profile, *, kind: str = "") -> None:
        self.geometry = geometry
        self.profile = profile
        self._processor = load_processor(folder, kind=kind)
        if film := geometry.film:  # templates may ask it how many frames there are
            self._processor.video_processor = FrameProcessor(film, stamp(film.frames, range(film.frames), 1.0))
        self.tokenizer: Any = self._processor.tokenizer
        image_token: str = self.tokenizer.convert_ids_to_tokens(geometry.image_token_id)
        # What marks the place of an image, or of a video, in a prompt.
        self.image_token: str = geometry.film.place if geometry.film else getattr(self._processor, "boi_token", image_token)

    def prepare(self, images: Sequence[Pictures], prompts: Sequence[str], *, template: bool = True) -> PromptBatch:
        """One row per prompt, about the picture (or the pictures) at the same place; a single place serves all prompts.

        With ``template`` a prompt is a user's question, without it is the model's whole input. Either may hold an image token wherever an
        image belongs; where it holds none they are put in front (after the first token, where the prompt writes that).

        Raises:
            ImageError: a picture that cannot be read, or that the processor does not bring to the model's size.
            PromptError: an empty prompt, one longer than the profile's ``max_text``, or one with another number of pictures or image tokens
                than the profile's.
            ProfileError: no prompts, more than the profile's batch, or another number of places.
        """
        if not 1 <= len(prompts) <= self.profile.batch:
            raise ProfileError(f"{len(prompts)} prompts, but this variant takes 1..{self.profile.batch} at a time (its batch)")
        if len(images) not in (1, len(prompts)):
            raise ProfileError(f"{len(images)} images for {len(prompts)} prompts: give one for all, or one for each")
        loaded = [self._load(each) for each in images]
        rows = [
            self._process(pictures, prompt, template)
            for pictures, prompt in zip(loaded * (len(prompts) // len(loaded)), prompts, strict=True)
        ]
        for row in rows:
            if (words := self._count_words(row)) > self.profile.max_text:
                raise PromptError(
                    f"the prompt has {words} text tokens, template included, but this variant takes {self.profile.max_text}: shorten it, "
                    "or make a variant with a larger --max-text"
                )
        return self._pad(rows)

    def count_text(self, pictures: Pictures, prompt: str) -> int:
        """Tokens of a question beside its visual ones, whatever the profile's ``max_text``; in the template, or as the model's whole input
        where the model has none.

        Raises:
            ImageError, PromptError: as :meth:`prepare`.
        """
        return self._count_words(self._process(self._load(pictures), prompt, self._processor.chat_template is not None))

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one row."""
        tokenizer: Tokenizer = self.tokenizer
        return Detokenizer(tokenizer)

    def _load(self, given: Pictures) -> _Seen:
        """What one prompt is about."""
        film, size = self.geometry.film, (self.geometry.image_height, self.geometry.image_width)
        if film is None:
            return _Seen(tuple(load_image(image) for image in self._check_count(given)))
        if isinstance(given, Image.Image):
            raise PromptError(f"one picture for a prompt, but this variant takes a video of {film.frames} frames: give its frames")
        return _Seen(*load_video(given).choose(film, size))

    def _check_count(self, given: Pictures) -> Sequence[Picture]:
        """The pictures of one prompt, as many as the profile says.

        Raises:
            PromptError: a video, or another number.
        """
        if isinstance(given, Video):
            raise PromptError("a video, but this variant takes images: give --image, or export the model with --frames")
        pictures: Sequence[Picture] = [given] if isinstance(given, Path | str | Image.Image) else given
        if len(pictures) != self.profile.images:
            raise PromptError(
                f"{len(pictures)} {'image' if len(pictures) == 1 else 'images'} for a prompt, but this variant takes "
                f"{self.profile.images} per prompt: give {self.profile.images}, or make a variant with --images {max(1, len(pictures))}"
            )
        return pictures

    def _text(self, prompt: str, template: bool) -> str:
        """The model's input as text, with an image token for each image."""
        images = self.profile.images
        if not prompt.strip():
            raise PromptError("the prompt is empty: ask something about the image")
        text = prompt
        if template:
            content = self._content(prompt)
            if self._processor.chat_template is None:
                raise PromptError(_NO_TEMPLATE)
            text = self._processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        elif self.image_token not in prompt:
            start, tokens = self.tokenizer.bos_token or "", self.image_token * images
            text = start + tokens + prompt[len(start) :] if prompt.startswith(start) else tokens + prompt
        if (count := text.count(self.image_token)) != images:
            number, what = ("one", "a variant takes one image") if images == 1 else (str(images), f"this variant takes {images} images")
            raise PromptError(
                f"the prompt has {count} image tokens ({self.image_token}), expected {images}: "
                + (f"leave them out, the template places {number}" if template and count > images else f"{what} per prompt")
            )
        return text

    def _content(self, prompt: str) -> list[dict[str, str]]:
        """A user's message in the parts that templates take: images where the prompt names every one of them, else all in front."""
        images, image = self.profile.images, {"type": "video" if self.geometry.film else "image"}
        if prompt.count(self.image_token) != images:
            return [*[image] * images, {"type": "text", "text": prompt}]
        parts: list[dict[str, str]] = []
        for number, words in enumerate(prompt.split(self.image_token)):
            parts += [image] if number else []
            parts += [{"type": "text", "text": words}] if words.strip() else []
        return parts

    def _process(self, seen: _Seen, prompt: str, template: bool) -> _Row:
        text = self._text(prompt, template)
        # Templates usually write the first token themselves; adding it again would change the model's input.
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        sizes = ", ".join(dict.fromkeys(f"{picture.width}x{picture.height}" for picture in seen.pictures))
        options: dict[str, Any] = {"add_special_tokens": special, "padding": False, "truncation": False}
        images, film = self.profile.images, self.geometry.film
        try:
            if film is None or seen.times is None:
                made = self._processor(text=[text], images=[list(seen.pictures)], return_tensors="np", **options)
                values = {name: np.asarray(made[name]) for name in made}
            else:
                values = process_film(self._processor, film, seen.pictures, seen.times, text, **options)
            split = split_pictures(rename_pixels(values, film), images)
        except ValueError as error:
            raise ImageError(f"the processor refused an image of {sizes} pixels: {error}") from error
        ids, geometry = values["input_ids"][0].astype(np.int64), self.geometry
        visual, expected = int(np.count_nonzero(ids == geometry.image_token_id)), images * geometry.visual_tokens
        if (
            split.pixels.shape[1:] != geometry.picture_shape
            or split.masked
            or not all(same_layout(layout, geometry.layout) for layout in split.layout)
            or (visual != expected and geometry.picture)
        ):
            raise ImageError(
                f"{'an image' if len(seen.pictures) == 1 else 'images'} of {sizes} pixels became {list(split.pixels.shape[1:])} with "
                f"{visual} visual tokens in the model's processor, but this bundle was exported for {list(geometry.picture_shape)} with "
                f"{expected}: resize to {geometry.image_width}x{geometry.image_height}, or export with another --image-size"
            )
        if visual != expected:
            raise PromptError(f"the processor wrote {visual} image tokens, but the model has {expected} visual tokens")
        return _Row(ids, split.pixels[0] if images == 1 else split.pixels, values, seen.pictures)

    def _count_words(self, row: _Row) -> int:
        return len(row.input_ids) - self.profile.images * self.geometry.visual_tokens

    def _pad(self, rows: Sequence[_Row]) -> PromptBatch:
        B = self.profile.batch
        filled = [*rows, *[rows[-1]] * (B - len(rows))]
        lengths = np.array([len(row.input_ids) for row in filled])
        S = max(int(lengths.max()), self.profile.lengths[0])
        input_ids = np.full((B, S), self.geometry.pad_token_id, np.int64)
        for place, row in enumerate(filled):
            input_ids[place, : len(row.input_ids)] = row.input_ids
        places = np.arange(S)
        real = places < lengths[:, None]  # [B, S]; the pad token may be the image token's id in some models
        first = self.geometry.first_position
        position_ids: Array = np.minimum(places, lengths[:, None] - 1) + first
        visual_index = np.stack([np.flatnonzero(row.input_ids == self.geometry.image_token_id) for row in filled])
        following = lengths + first
        if self.geometry.position_axes > 1:
            grids = [self._grids(row.processed, index) for row, index in zip(filled, visual_index, strict=True)]
            position_ids, following = multi_axis_positions(visual_index, lengths.tolist(), S, grids)
        return PromptBatch(
            pixel_values=np.stack([row.pixels for row in filled]),
            input_ids=input_ids,
            attention_mask=real.astype(np.int64),
            position_ids=position_ids,
            visual_index=visual_index,
            lengths=tuple(int(length) for length in lengths),
            rows=len(rows),
            processed=tuple(row.processed for row in filled),
            pictures=tuple(row.pictures for row in filled),
            shifts=tuple((following - lengths).tolist()),
        )

    def _grids(self, processed: Mapping[str, Array], visual_index: Array) -> list[Grid]:
        """Rows and columns of a prompt's pictures, or of the frames of its video."""
        film = self.geometry.film
        if film is None:
            return [Grid(*(self.geometry.grid or (1, self.geometry.visual_tokens)))] * self.profile.images
        times, rows, columns = self.geometry.layout[GRID]
        seconds = float(processed[SECONDS][0]) if SECONDS in processed else 0.0
        interval = float(np.float32(film.ticks) * np.float32(seconds)) if film.ticks else 1.0
        whole = Grid(rows // film.merge, columns // film.merge, times, interval)
        together = int(visual_index[-1] - visual_index[0]) + 1 == len(visual_index)
        return [whole] if together else list(whole.split())


@dataclass(frozen=True)
class _Seen:
    """What one prompt is about: its pictures, or a video's frames and when they are."""

    pictures: tuple[Image.Image, ...]
    times: FrameTimes | None = None


@dataclass(frozen=True)
class _Row:
    """One prompt: ``input_ids[L]``, ``pixels[*picture]`` (``[M, *picture]`` of several images), and all that the processor made of it."""

    input_ids: Array
    pixels: Array
    processed: Mapping[str, Array]
    pictures: tuple[Image.Image, ...]


def load_processor(folder: Path, *, kind: str = "") -> Any:
    """The processor saved in a folder, as :func:`~sievert.bundle.processor.load_pictures` does; ``kind`` is its class, if not the one its
    files name.

    Raises:
        BundleError: its files are missing, damaged, or would run code of their own.
    """
    import transformers

    try:
        processor = load_pictures(folder, transformers, name=kind)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise BundleError(f"the processor in {folder} cannot be loaded: {error}") from error
    if not all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
        raise BundleError(
            f"{folder} holds no processor of images and text, only a {type(processor).__name__}: restore its processor_config.json, or "
            "export the model again"
        )
    return processor
