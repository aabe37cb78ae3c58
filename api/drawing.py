"""A picture of what was kept: dropped patches dimmed, kept ones as they are, outlined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sievert.bundle.errors import InputError

if TYPE_CHECKING:
    from sievert.comparing import Comparison
    from sievert.running import Answers

_SIDE = 448  # pixels of a panel; small images are enlarged to about this
_MARGIN, _TEXT, _GAP = 16, 15, 4
_PAPER, _INK, _QUIET, _LINE = (24, 26, 31), (236, 238, 242), (150, 156, 168), (255, 214, 92)


@dataclass(frozen=True)
class Panel:
    """One stage: its caption, and the numbers of the kept patches in the grid, row by row, on from image to image (a class token is
    negative).
    """

    caption: str
    kept: frozenset[int]


@dataclass(frozen=True)
class Row:
    """One question: what was asked and answered, and a panel for each stage."""

    question: str
    answer: str
    panels: tuple[Panel, ...]


def draw_kept(pictures: Sequence[Image.Image], grid: tuple[int, int], rows: Sequence[Row]) -> Image.Image:
    """One row for each question: the pictures as the model sees them, then a panel for each stage.

    ``pictures`` are what the vision encoder saw, ``grid`` the rows and columns of patches on each.
    """
    large = [_enlarge(picture) for picture in pictures]
    big = _put_beside(large)
    width, height = big.size
    panels = 1 + max(len(row.panels) for row in rows)
    row_height = 2 * (_TEXT + 8) + height + _MARGIN
    canvas = Image.new("RGB", (panels * (width + _MARGIN) + _MARGIN, len(rows) * row_height + _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_TEXT)
    for number, row in enumerate(rows):
        top = _MARGIN + number * row_height
        question = _shorten(row.question, canvas.width // 2, font)
        pen.text((_MARGIN, top), question, fill=_INK, font=font)
        left = 2 * _MARGIN + round(font.getlength(question))
        pen.text((left, top), _shorten(row.answer, canvas.width - _MARGIN - left, font), fill=_LINE, font=font)
        shown = [("what the model sees", big), *((panel.caption, _dim_all(large, grid, panel.kept)) for panel in row.panels)]
        for place, (caption, image) in enumerate(shown):
            left = _MARGIN + place * (width + _MARGIN)
            pen.text((left, top + _TEXT + 8), _shorten(caption, width, font), fill=_QUIET, font=font)
            canvas.paste(image, (left, top + 2 * (_TEXT + 8)))
    return canvas


def from_pixels(pixels: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture behind normalised ``pixels[C, H, W]``, by the ``mean`` and ``std`` of its channels."""
    shown = pixels.transpose(1, 2, 0) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    if shown.shape[2] == 1:
        shown = shown.repeat(3, axis=2)
    return Image.fromarray((shown.clip(0, 1) * 255).round().astype(np.uint8))


def _enlarge(picture: Image.Image) -> Image.Image:
    factor = max(1, round(_SIDE / max(picture.size)))
    return picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _put_beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height), _PAPER)
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * (width + _GAP), 0))
    return row


def _dim_all(pictures: Sequence[Image.Image], grid: tuple[int, int], kept: frozenset[int]) -> Image.Image:
    """The pictures in a row, each dimmed by its own share of the numbers."""
    patches = grid[0] * grid[1]
    shares = [frozenset(number - place * patches for number in kept if number // patches == place) for place in range(len(pictures))]
    return _put_beside([_dim(picture, grid, share) for picture, share in zip(pictures, shares, strict=True)])


def _dim(picture: Image.Image, grid: tuple[int, int], kept: frozenset[int]) -> Image.Image:
    """The picture with dropped patches grey and dark, and a line where kept and dropped ones meet."""
    rows, columns = grid
    held = np.zeros((rows + 2, columns + 2), bool)  # a border of dropped ones, so that every patch has four neighbours
    for number in kept:
        held[1 + number // columns, 1 + number % columns] = True
    mask = Image.fromarray(held[1:-1, 1:-1].astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    grey = picture.convert("L").point(lambda value: 18 + value // 4).convert("RGB")
    shown = Image.composite(picture, grey, mask)
    pen = ImageDraw.Draw(shown)
    ys = [round(row * picture.height / rows) for row in range(rows + 1)]
    xs = [round(column * picture.width / columns) for column in range(columns + 1)]
    right, below = picture.width - 1, picture.height - 1
    for row in range(rows + 1):
        for column in range(columns + 1):
            x, y = min(xs[column], right), min(ys[row], below)
            if column < columns and held[row, column + 1] != held[row + 1, column + 1]:
                pen.line([(x, y), (min(xs[column + 1], right), y)], fill=_LINE)
            if row < rows and held[row + 1, column] != held[row + 1, column + 1]:
                pen.line([(x, y), (x, min(ys[row + 1], below))], fill=_LINE)
    return shown


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def draw_answers(found: Answers) -> Image.Image:
    """What was kept for each prompt of a :func:`sievert.run`, one row each."""
    total = found.visual_tokens
    captions = [f"from layer {stage.layer} on: {stage.keep} of {total} ({stage.selector} {stage.requested})" for stage in found.plan.stages]
    rows = [
        Row(
            question=answer.prompt,
            answer=answer.text.strip(),
            panels=tuple(Panel(caption, frozenset(kept)) for caption, kept in zip(captions, answer.kept, strict=True)),
        )
        for answer in found.answers
    ]
    return draw_kept(found.pictures, _require_grid(found.grid), rows)


@dataclass(frozen=True)
class Tile:
    """One panel of a comparison: what it shows, what was answered, and the patches left (None: all of them)."""

    title: str
    answer: str
    kept: frozenset[int] | None


def draw_tiles(pictures: Sequence[Image.Image], grid: tuple[int, int], question: str, tiles: Sequence[Tile]) -> Image.Image:
    """The question, and under it a grid of panels that is about as wide as it is high."""
    large = [_enlarge(picture) for picture in pictures]
    big = _put_beside(large)
    width, height = big.size
    columns = min(len(tiles), max(1 if len(pictures) > 1 else 2, math.ceil(math.sqrt(len(tiles) / len(pictures)))))
    rows = math.ceil(len(tiles) / columns)
    line, tile_height = _TEXT + 8, 2 * (_TEXT + 8) + height + _MARGIN
    canvas = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * tile_height + line + 2 * _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_TEXT)
    pen.text((_MARGIN, _MARGIN), _shorten(question, canvas.width - 2 * _MARGIN, font), fill=_INK, font=font)
    for number, tile in enumerate(tiles):
        left = _MARGIN + number % columns * (width + _MARGIN)
        top = 2 * _MARGIN + line + number // columns * tile_height
        pen.text((left, top), _shorten(tile.title, width, font), fill=_QUIET, font=font)
        pen.text((left, top + line), _shorten(tile.answer, width, font), fill=_LINE, font=font)
        canvas.paste(big if tile.kept is None else _dim_all(large, grid, tile.kept), (left, top + 2 * line))
    return canvas


def draw_comparison(found: Comparison) -> Image.Image:
    """The unpruned answer and every selector of a :func:`sievert.compare_selectors`, one panel each."""
    tiles = [Tile(f"unpruned: all {found.visual_tokens}", found.answer, None)]
    for each in found.compared:
        stages = each.plan.stages
        layers = ", ".join(str(stage.layer) for stage in stages)
        title = f"{each.selector}: {stages[-1].keep} of {found.visual_tokens}, layer{'s' if len(stages) > 1 else ''} {layers}"
        tiles.append(Tile(title, each.answer, frozenset(each.kept)))
    return draw_tiles(found.pictures, _require_grid(found.grid), found.prompt, tiles)


def _require_grid(grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        raise InputError(
            "what was kept cannot be drawn: the visual tokens of this model's pictures are no single grid (tiles, line breaks)"
        )
    return grid
