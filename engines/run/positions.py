"""Positions of three axes: a word has the same number in all, a picture's token its frame, row and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sievert.bundle.errors import PromptError
from sievert.engines.run.dtypes import Array

AXES: Final = 3
"""Time, height, width."""


@dataclass(frozen=True)
class Grid:
    """The tokens of one picture or film, after merging. Frame t has the time ``t * interval``, cut to an integer."""

    rows: int
    columns: int
    frames: int = 1
    interval: float = 1.0

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.frames * self.rows * self.columns

    @property
    def extent(self) -> int:
        """By how much the next word is moved on; films are no longer than one of their frames."""
        return max(self.rows, self.columns)

    def split(self) -> tuple[Grid, ...]:
        """Each frame as a picture: for models that write the time as words between the frames."""
        return (replace(self, frames=1),) * self.frames

    def places(self) -> Array:
        """``[3, tokens]`` int64, from 0."""
        frame, row, column = np.unravel_index(np.arange(self.tokens), (self.frames, self.rows, self.columns))
        # In float32, as transformers does it: a product just below an integer would be cut to another one.
        time = (frame.astype(np.float32) * np.float32(self.interval)).astype(np.int64)
        return np.stack([time, row, column])


def multi_axis_positions(visual_index: Array, lengths: Sequence[int], length: int, grids: Sequence[Sequence[Grid]]) -> tuple[Array, Array]:
    """Positions ``[3, B, S]`` of right-padded prompts, and the position of the first new token of each ``[B]``, both int64.

    ``visual_index[B, Nv]`` are the rows of the pictures' tokens, ascending; ``lengths[B]`` count real tokens, S is ``length``;
    ``grids[b]`` are the pictures of prompt b in order. Padding repeats the last real position. The t-th new token of a prompt of n real
    ones goes to row ``n + t`` and has the position ``next + t`` in all axes; next is mostly less than n, as a picture is long but not wide.

    Raises:
        PromptError: pictures of other sizes than there are visual tokens, one whose tokens do not stand together, or no token between two.
    """
    batch = len(lengths)
    position_ids, following = np.zeros((AXES, batch, length), np.int64), np.zeros(batch, np.int64)
    for prompt, (rows, real) in enumerate(zip(visual_index, lengths, strict=True)):
        found = _positions(np.asarray(rows), real, grids[prompt], prompt)
        position_ids[:, prompt, :real] = found
        position_ids[:, prompt, real:] = found[:, -1:]
        following[prompt] = found.max() + 1
    return position_ids, following


def _positions(rows: Array, real: int, grids: Sequence[Grid], prompt: int) -> Array:
    """``[3, n]`` of one prompt of n real tokens."""
    if (expected := sum(grid.tokens for grid in grids)) != len(rows):
        raise PromptError(f"prompt {prompt + 1} has {len(rows)} visual tokens, but its pictures have {expected}")
    parts: list[Array] = []
    row = position = used = 0
    for number, grid in enumerate(grids):
        first, last = int(rows[used]), int(rows[used + grid.tokens - 1])
        if first < row or last - first + 1 != grid.tokens or last >= real:
            raise PromptError(
                f"prompt {prompt + 1}: the {grid.tokens} tokens of picture {number + 1} stand in rows {first}..{last} of {real}: "
                "they should stand together, in the order of the pictures"
            )
        if number and first == row:
            raise PromptError(
                f"prompt {prompt + 1}: picture {number + 1} stands right behind the one before it, and this model tells them apart by the "
                "tokens between: write what its template writes around each, or use the template"
            )
        words = first - row
        parts += [_count(position, words), position + words + grid.places()]
        row, used, position = last + 1, used + grid.tokens, position + words + grid.extent
    return np.concatenate([*parts, _count(position, real - row)], axis=1)


def _count(start: int, number: int) -> Array:
    """``number`` words from position ``start`` on: ``[3, number]``."""
    return np.tile(np.arange(start, start + number), (AXES, 1))
