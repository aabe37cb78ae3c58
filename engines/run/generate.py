"""The generation loop: prompts in, text out, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sievert.bundle.errors import EngineError, ProfileError
from sievert.engines.run.dtypes import Array
from sievert.engines.run.pipeline import Features, Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.sampling import Sampling
from sievert.engines.run.slots import IDLE
from sievert.engines.run.text import Detokenizer, Tokenizer

Finish = Literal["stop", "length"]
GREEDY = Sampling()


@dataclass(frozen=True)
class Piece:
    """One token of one prompt. ``text`` is what became certain with it (maybe nothing); ``finish`` is set on the row's last piece."""

    row: int
    token: int
    text: str
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """All of one prompt's answer. ``tokens`` include the stop token, ``text`` does not."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish


@dataclass
class _Row:
    """A prompt that is being answered."""

    row: int
    detokenizer: Detokenizer
    generator: np.random.Generator
    left: int
    token: int = IDLE
    finish: Finish | None = field(default=None)


def stream(
    pipeline: Pipeline,
    tokenizer: Tokenizer,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    features: Features | None = None,
    sampling: Sampling = GREEDY,
) -> Iterator[Piece]:
    """Answer the real rows of a batch. Rows finish independently, at a stop token of the generation config or at the maximum.

    ``features`` spares the vision encoder where the caller has them; the pipeline also remembers the pictures it saw last.
    More rows than decode slots are answered one slotful after the other.

    Raises:
        ProfileError: ``max_new_tokens`` is below 1 or above what the variant's caches hold. Raised at once, not at the first piece.
    """
    limit = pipeline.profile.max_new_tokens
    if not 1 <= max_new_tokens <= limit:
        raise ProfileError(
            f"max_new_tokens={max_new_tokens}, but this variant's caches hold 1..{limit}: ask for fewer, "
            "or make a variant with a larger --max-new-tokens"
        )
    rows = [_Row(row, Detokenizer(tokenizer), sampling.generator(row), max_new_tokens) for row in range(batch.rows)]
    return _answer(pipeline, batch, features, sampling, rows)


def generate(
    pipeline: Pipeline,
    tokenizer: Tokenizer,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    features: Features | None = None,
    sampling: Sampling = GREEDY,
) -> tuple[Completion, ...]:
    """:func:`stream`, collected: one completion per real row. Raises as that does."""
    texts, tokens = [""] * batch.rows, [list[int]() for _ in range(batch.rows)]
    finishes: list[Finish] = ["length"] * batch.rows
    pieces = stream(pipeline, tokenizer, batch, max_new_tokens=max_new_tokens, features=features, sampling=sampling)
    for piece in pieces:
        texts[piece.row] += piece.text
        tokens[piece.row].append(piece.token)
        finishes[piece.row] = piece.finish or finishes[piece.row]
    return tuple(Completion(text, tuple(ids), finish) for text, ids, finish in zip(texts, tokens, finishes, strict=True))


def _answer(pipeline: Pipeline, batch: PromptBatch, features: Features | None, sampling: Sampling, rows: list[_Row]) -> Iterator[Piece]:
    first = pipeline.prefill(batch, features or pipeline.encode(batch.pixel_values))
    slots, mine = pipeline.profile.decode_batch, pipeline.prefills
    for start in range(0, len(rows), slots):
        active = dict(enumerate(rows[start : start + slots]))  # by slot
        for slot, row in active.items():
            pipeline.fill(slot, row.row)
            yield _take(pipeline, sampling, row, first.logits[row.row])
        while any(row.finish is None for row in active.values()):
            tokens = np.full(slots, IDLE, np.int64)
            for slot, row in active.items():
                if row.finish is None:
                    tokens[slot] = row.token
            if pipeline.prefills != mine:
                raise EngineError(
                    "another prompt was read while this answer was written: finish one stream before the next, or use two pipelines"
                )
            logits = pipeline.decode(tokens)
            for slot, row in active.items():
                if row.finish is None:
                    yield _take(pipeline, sampling, row, logits[slot])


def _take(pipeline: Pipeline, sampling: Sampling, row: _Row, logits: Array) -> Piece:
    """Choose a row's next token and say what became certain."""
    row.token = sampling.choose(logits, row.generator)
    row.left -= 1
    if row.token in pipeline.geometry.eos_token_ids:
        row.finish = "stop"
        return Piece(row.row, row.token, row.detokenizer.flush(), row.finish)
    text = row.detokenizer.push(row.token)
    if row.left == 0:
        row.finish = "length"
        text += row.detokenizer.flush()
    return Piece(row.row, row.token, text, row.finish)
