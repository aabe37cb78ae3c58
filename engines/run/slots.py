"""How far each row of the decode batch has come."""

from __future__ import annotations

from typing import Final

import numpy as np

from sievert.bundle.errors import EngineError, ProfileError
from sievert.bundle.profile import Profile
from sievert.engines.run.dtypes import Array

IDLE: Final = -1
"""The token of a slot that rests."""


class Slots:
    """Lengths of the decode batch's rows, in tokens without pruning.

    A resting slot is computed like the others, because the graph's batch is fixed: it reads the pad token and writes to the row
    its next token would take, which that token then overwrites (a full one loses its last row, and cannot go on anyway).
    """

    def __init__(self, profile: Profile, pad_token_id: int) -> None:
        self._profile = profile
        self._pad = pad_token_id
        self._lengths = np.zeros(profile.decode_batch, np.int64)
        self._shifts = np.zeros(profile.decode_batch, np.int64)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each slot holds; 0 where nothing was prefilled."""
        return tuple(int(length) for length in self._lengths)

    def start(self, slot: int, length: int, shift: int = 0) -> None:
        """Slot ``slot`` now holds a prompt of ``length`` real tokens; the next one's position is its row and ``shift``."""
        if not 0 <= slot < len(self._lengths):
            raise EngineError(f"slot {slot} does not exist: choose 0..{len(self._lengths) - 1}")
        self._lengths[slot], self._shifts[slot] = length, shift

    def step(self, tokens: Array, vocabulary: int) -> tuple[Array, Array, Array]:
        """What to feed, the row each token goes to, and its position, each ``[Bd]`` int64.

        Raises:
            ProfileError: another number of tokens, one outside the vocabulary, or a full cache.
            EngineError: a slot that nothing was prefilled for.
        """
        if tokens.shape != self._lengths.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise ProfileError(f"decode takes {len(self._lengths)} integer tokens, one per slot, got {tokens.dtype}{tokens.shape}")
        capacity = self._profile.capacity()
        for slot, (token, length) in enumerate(zip(tokens.tolist(), self._lengths.tolist(), strict=True)):
            if token == IDLE:
                continue
            if not 0 <= token < vocabulary:
                raise ProfileError(f"slot {slot}: token {token} is outside the vocabulary 0..{vocabulary - 1}")
            if length == 0:
                raise EngineError(f"slot {slot} is empty: prefill a prompt and fill the slot before decoding")
            if length >= capacity:
                raise ProfileError(
                    f"slot {slot}: the cache is full at {length} tokens ({self._profile.sequence} for the prompt, "
                    f"max_new_tokens={self._profile.max_new_tokens}): ask for fewer new tokens, or make a variant with a larger "
                    "--max-new-tokens"
                )
        # An empty slot writes where no stage's row is negative: every stage drops fewer than S tokens.
        rows = np.where(self._lengths > 0, np.minimum(self._lengths, capacity - 1), self._profile.sequence - 1)
        return np.where(tokens == IDLE, self._pad, tokens).astype(np.int64), rows, np.maximum(rows + self._shifts, 0)

    def advance(self, tokens: Array) -> None:
        """The slots that were fed hold one token more."""
        self._lengths += tokens != IDLE
