"""Canvases composed of real handwritten digits, and questions about them.

The digits are scikit-learn's `load_digits`, 1,797 images of 8x8 pixels, from "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998, CC BY 4.0; scikit-learn ships its test part under BSD-3-Clause).
The last 397 images are the test set and never appear on a training canvas.

A canvas is a grid of 8x8-pixel cells, the vision tower's patches. Digits of distinct colours lie on the grid, over noise and among
grey and coloured strokes. Everything follows from the random generator passed in: the same seed gives the same pixels anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates, spline_filter
from sklearn.datasets import load_digits

from examples.digits_lvlm.questions import ASKED, Digit, Kind, ask
from examples.digits_lvlm.words import COLOURS

Split = Literal["train", "test"]
CELL_PX = 8
TEST_IMAGES = 397
_SEED_OF_SPLIT = {"train": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a canvas may hold: a square of `grid` cells a side, `fewest`..`most` digits, each `sizes` cells wide."""

    grid: int = 16
    sizes: tuple[int, ...] = (1, 2)
    fewest: int = 3
    most: int = 6


@dataclass(frozen=True)
class Canvas:
    """An RGB image, uint8 [H, W, 3], and the digits on it in reading order."""

    image: npt.NDArray[np.uint8]
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Item:
    """One question about one canvas, with its right answer (a single word)."""

    image: Image.Image
    question: str
    answer: str
    kind: Kind


@cache
def _handwriting() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Cubic spline coefficients [1797, 8, 8] of the digit images (ink 0..1), and their labels."""
    bunch = load_digits()
    ink = np.asarray(bunch.images, dtype=np.float64) / 16.0
    return np.stack([spline_filter(image, order=3, mode="constant") for image in ink]), np.asarray(bunch.target, dtype=np.int64)


def image_indices(split: Split) -> range:
    """The digit images of a split, as rows of `load_digits().images`."""
    total = len(_handwriting()[1])
    return range(total - TEST_IMAGES) if split == "train" else range(total - TEST_IMAGES, total)


def _ink(source: int, cells: int, warp: np.random.Generator | None) -> npt.NDArray[np.float64]:
    """The ink 0..1 of digit image `source`, [cells * 8, cells * 8]; with `warp`, as another hand might have written it."""
    side = cells * CELL_PX
    centred = (np.arange(side) + 0.5) / cells - 4.0
    y, x = np.meshgrid(centred, centred, indexing="ij")
    if warp is not None:
        angle, shear = warp.normal(0, 0.16), warp.normal(0, 0.15)
        zoom_y, zoom_x = np.exp(warp.normal(0.02, 0.10, size=2))
        waves = warp.normal(0, 0.22, size=2)
        phases = warp.uniform(0, 2 * np.pi, size=2)
        shift_y, shift_x = warp.normal(0, 0.35, size=2)
        bent_x = x + shear * y + waves[0] * np.sin(y * 0.9 + phases[0])
        bent_y = y + waves[1] * np.sin(x * 0.9 + phases[1])
        y = zoom_y * (np.cos(angle) * bent_y - np.sin(angle) * bent_x) + shift_y
        x = zoom_x * (np.sin(angle) * bent_y + np.cos(angle) * bent_x) + shift_x
    spline = _handwriting()[0][source]
    ink = np.clip(map_coordinates(spline, [y + 3.5, x + 3.5], order=3, mode="constant", prefilter=False), 0.0, 1.0)
    if warp is not None:
        ink **= np.exp(warp.normal(0, 0.25))
    return np.asarray(ink, dtype=np.float64)


def _place(rng: np.random.Generator, scene: Scene) -> list[tuple[int, int, int]]:
    """(row, column, cells) of each digit: on the grid, with at least one free cell between any two."""
    wanted = int(rng.integers(scene.fewest, scene.most + 1))
    while True:
        taken = np.zeros((scene.grid, scene.grid), dtype=bool)
        boxes: list[tuple[int, int, int]] = []
        for _ in range(wanted * 12):
            cells = int(rng.choice(scene.sizes))
            row, column = (int(v) for v in rng.integers(0, scene.grid - cells + 1, size=2))
            if not taken[row : row + cells, column : column + cells].any():
                taken[max(row - 1, 0) : row + cells + 1, max(column - 1, 0) : column + cells + 1] = True
                boxes.append((row, column, cells))
            if len(boxes) == wanted:
                return boxes


def _scribble(rng: np.random.Generator, noise: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The noise with clutter over it: grey strokes, and thin strokes in the digits' own colours."""
    picture = Image.fromarray(noise)
    pen = ImageDraw.Draw(picture)
    side = noise.shape[0]
    greys, coloured = rng.integers(side // 20, side // 8), rng.integers(0, side // 26)
    palette = list(COLOURS.values())
    for stroke in range(int(greys + coloured)):
        start, length, turn = rng.uniform(0, side, size=2), rng.uniform(8, 20), rng.uniform(0, 2 * np.pi, size=2)
        middle = start + length * np.array([np.cos(turn[0]), np.sin(turn[0])])
        end = middle + length * np.array([np.cos(turn[1]), np.sin(turn[1])])
        points = [tuple(point) for point in np.stack([start, middle, end]).round().astype(int).tolist()]
        if stroke < greys:
            pen.line(points, fill=(int(rng.integers(80, 190)),) * 3, width=int(rng.integers(1, 3)))
        else:
            pen.line(points, fill=palette[int(rng.integers(len(palette)))], width=1)
    return np.array(picture)


def compose(rng: np.random.Generator, *, split: Split, scene: Scene = Scene(), warped: bool = False) -> Canvas:
    """One canvas of digits from `split`; `warped` redraws each digit slightly differently (for training)."""
    side = scene.grid * CELL_PX
    noise = rng.normal(rng.uniform(25, 65), rng.uniform(5, 13), size=(side, side, 3)).clip(0, 255).astype(np.uint8)
    image = _scribble(rng, noise)
    boxes = sorted(_place(rng, scene))
    colours = rng.permutation(list(COLOURS))[: len(boxes)]
    sources = rng.choice(np.asarray(image_indices(split)), size=len(boxes), replace=False)
    labels = _handwriting()[1]
    digits = []
    for (row, column, cells), colour, source in zip(boxes, colours, sources, strict=True):
        area = slice(row * CELL_PX, (row + cells) * CELL_PX), slice(column * CELL_PX, (column + cells) * CELL_PX)
        ink = _ink(int(source), cells, rng if warped and rng.random() < 0.85 else None)[..., None] * rng.uniform(0.8, 1.0)
        paint = np.asarray(COLOURS[str(colour)]) + rng.normal(0, 8, size=3)
        # Clean noise under a digit: strokes lie between digits, they never turn a 3 into an 8.
        image[area] = (noise[area] * (1 - ink) + paint * ink).clip(0, 255).astype(np.uint8)
        digits.append(Digit(int(labels[source]), str(colour), row, column, cells, int(source)))
    return Canvas(image, tuple(digits))


def held_out(n: int, seed: int = 0, *, split: Split = "test", scene: Scene = Scene()) -> Iterator[Item]:
    """`n` questions about unwarped canvases, all kinds in turn, one of each per canvas.

    With `split="train"` the canvases are composed of training digits: use those to tune anything, so that the test digits stay unseen.
    """
    produced = 0
    for index in range(n):
        rng = np.random.default_rng([seed, _SEED_OF_SPLIT[split], index])
        canvas = compose(rng, split=split, scene=scene)
        for kind in ASKED:
            asked = ask(kind, canvas.digits, rng)
            if asked is None:
                continue
            if produced == n:
                return
            produced += 1
            yield Item(Image.fromarray(canvas.image), asked.text, asked.answer, kind)
