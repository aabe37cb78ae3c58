"""Tokens back to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

_UNFINISHED: Final = "\ufffd"  # what a decoder writes for bytes that are not yet a character


class Tokenizer(Protocol):
    """The part of a tokenizer that generation needs; transformers' tokenizers have it."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of these tokens."""


class Detokenizer:
    """Text of a growing list of tokens, in pieces that join to the whole.

    A piece waits while its last character may still change: one character can span several tokens. Tokens are decoded together
    with the ones before, because a decoder treats the first token of a text differently (a leading space, for one).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one no longer touch the text that is to come
        self._said = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often one word, sometimes nothing."""
        self._tokens.append(token)
        before, now = self._decode(self._context, self._said), self._decode(self._context, len(self._tokens))
        if now.endswith(_UNFINISHED) or len(now) <= len(before):
            return ""
        self._context, self._said = self._said, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left, finished or not."""
        before, now = self._decode(self._context, self._said), self._decode(self._context, len(self._tokens))
        self._said = len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
