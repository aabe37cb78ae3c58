"""Positions of three axes against those of transformers' own models, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sievert.bundle.errors import PromptError
from sievert.engines.run.positions import Grid, multi_axis_positions
from tests.tiny_axes import FAMILIES, IMAGE, MERGE, VIDEO, make_tiny

PICTURES = [Grid(2, 3), Grid(1, 1), Grid(5, 2), Grid(4, 4)]


def make_prompts(rng: np.random.Generator, grids: list[list[Grid]], kinds: list[list[int]]) -> tuple[list[np.ndarray], int]:
    """Ids of prompts with words before, between and after their pictures, and a length that holds the longest."""
    prompts = []
    for pictures, tokens in zip(grids, kinds, strict=True):
        parts = [rng.integers(10, 90, rng.integers(0, 5))]
        for grid, token in zip(pictures, tokens, strict=True):
            parts += [np.full(grid.tokens, token), rng.integers(10, 90, rng.integers(1, 5))]
        prompts.append(np.concatenate(parts))
    return prompts, max(map(len, prompts)) + 3


def ask_transformers(
    family: str, prompts: list[np.ndarray], length: int, pictures: list[Grid], films: list[Grid]
) -> tuple[np.ndarray, np.ndarray]:
    """The model's own positions ``[3, B, S]`` and what it adds to a cache's length ``[B]``."""
    model: Any = make_tiny(family, layers=1).model
    ids, mask = np.zeros((2, len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    kinds = np.where(mask == 0, 0, np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0)))

    def sizes(grids: list[Grid]) -> torch.Tensor | None:
        return torch.tensor([[g.frames, g.rows * MERGE, g.columns * MERGE] for g in grids]) if grids else None

    rate = getattr(model.config.vision_config, "tokens_per_second", 1)
    extra = {"second_per_grid_ts": torch.tensor([g.interval / rate for g in films])} if family == "qwen2_5_vl" and films else {}
    positions, deltas = model.get_rope_index(
        torch.tensor(ids), torch.tensor(kinds), image_grid_thw=sizes(pictures), video_grid_thw=sizes(films),
        attention_mask=torch.tensor(mask), **extra,
    )  # fmt: skip
    return positions.numpy(), deltas.numpy()[:, 0]


def compare(family: str, prompts: list[np.ndarray], length: int, grids: list[list[Grid]], given: tuple[list[Grid], list[Grid]]) -> None:
    found, following = multi_axis_positions(
        np.stack([np.flatnonzero((ids == IMAGE) | (ids == VIDEO)) for ids in prompts]), [len(ids) for ids in prompts], length, grids
    )
    expected, deltas = ask_transformers(family, prompts, length, *given)
    for row, ids in enumerate(prompts):
        np.testing.assert_array_equal(found[:, row, : len(ids)], expected[:, row, : len(ids)])
        assert np.all(found[:, row, len(ids) :] == found[:, row, len(ids) - 1, None])
        assert following[row] == len(ids) + deltas[row]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_pictures_of_several_sizes(family: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = [[PICTURES[place] for place in rng.permutation(len(PICTURES))] for _ in range(3)]
    prompts, length = make_prompts(rng, orders, [[IMAGE] * len(PICTURES)] * 3)
    compare(family, prompts, length, orders, ([grid for order in orders for grid in order], []))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_films_among_pictures(family: str) -> None:
    rng = np.random.default_rng(4)
    films = [Grid(2, 3, frames=4, interval=2.5 if family == "qwen2_5_vl" else 1.0), Grid(3, 2, frames=3)]
    grids, kinds = [[films[0], PICTURES[0], films[1]], [PICTURES[0], films[0], films[1]]], [[VIDEO, IMAGE, VIDEO], [IMAGE, VIDEO, VIDEO]]
    prompts, length = make_prompts(rng, grids, kinds)
    compare(family, prompts, length, grids, ([PICTURES[0]] * 2, films * 2))


def test_film_whose_frames_stand_apart() -> None:
    """A model that writes the time as words gets each frame as a picture."""
    film, picture = Grid(2, 3, frames=4), Grid(3, 3)
    grids = [[*film.split(), picture]]
    assert film.tokens == sum(frame.tokens for frame in film.split())
    prompts, length = make_prompts(np.random.default_rng(5), grids, [[VIDEO] * 4 + [IMAGE]])
    compare("qwen3_vl", prompts, length, grids, ([picture], [film]))


def test_no_picture_counts_on() -> None:
    found, following = multi_axis_positions(np.zeros((1, 0), np.int64), [3], 5, [[]])
    assert found[:, 0].tolist() == [[0, 1, 2, 2, 2]] * 3 and following.tolist() == [3]


def test_pictures_beside_each_other_are_refused() -> None:
    """The models tell two apart by what stands between: without a word there, transformers places the first one only, and fails."""
    with pytest.raises(PromptError, match="prompt 1: picture 2 stands right behind the one before it"):
        multi_axis_positions(np.arange(1, 7)[None], [8], 8, [[Grid(1, 2), Grid(2, 2)]])
    found, following = multi_axis_positions(np.array([[1, 2, 4, 5, 6, 7]]), [9], 9, [[Grid(1, 2), Grid(2, 2)]])
    assert found[:, 0].tolist() == [[0, 1, 1, 3, 4, 4, 4, 4, 6], [0, 1, 1, 3, 4, 4, 5, 5, 6], [0, 1, 2, 3, 4, 5, 4, 5, 6]]
    assert following.tolist() == [7]


@pytest.mark.parametrize(
    ("rows", "grids", "said"),
    [
        ([1, 2, 3], [Grid(2, 2)], "3 visual tokens, but its pictures have 4"),
        ([1, 2, 4, 5], [Grid(2, 2)], "rows 1..5 of 9"),
        ([6, 7, 8, 9], [Grid(2, 2)], "rows 6..9 of 9"),
    ],
)
def test_refused(rows: list[int], grids: list[Grid], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        multi_axis_positions(np.array([rows]), [9], 12, [grids])
