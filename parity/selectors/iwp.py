"""IWP, implicit weight pruning (arXiv 2604.00757), and ``magnitude``, which is IWP without its duplication part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sievert.parity.selectors.base import Array, Choice, Chunk, Index, Margin, Replay, TokenInputs, invalid_order, judge_chunk, top


@dataclass(frozen=True)
class Iwp:
    """The options and defaults of METHODS.

    ``head_norm``: ``global`` keeps the heads' weights against each other, ``softmax`` normalises each head over the visual tokens.
    """

    first_chunk: int = 2
    growth: int = 2
    strength: float = 5.0
    floor: float = 0.01
    head_norm: Literal["global", "softmax"] = "global"
    scaling: Literal["minmax", "max"] = "minmax"
    text: Literal["after_image", "all"] = "after_image"
    duplication: Literal["mean_of_squares", "square_of_mean"] = "mean_of_squares"
    magnitude_rotary: bool = False
    duplication_rotary: bool = True

    computes: ClassVar[bool] = True

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """Progressive chunked MMR: ``C`` grows by the ``b`` highest, the newest chunk lowers what resembles it, ``b`` grows."""
        scores, condition = self.magnitude(inputs)
        return Choice(self._take(scores, self.similarity(inputs), keep, []), scores, condition)

    def arrange(self, inputs: TokenInputs, places: Sequence[int] | Index) -> Index:
        """The same selection with every other token already out of the race."""
        scores, _ = self.magnitude(inputs)
        others = sorted(set(range(len(scores))) - {int(place) for place in places})
        return self._take(scores, self.similarity(inputs), len(scores) - len(others), others)

    def replay(self, inputs: TokenInputs, keep: int, order: Sequence[int] | Index, margin: Margin) -> Replay:
        """Follow the engine's chunks; each is judged by the scores that its own earlier choices leave."""
        taken_order = np.asarray(order, np.int64)
        reason = invalid_order(taken_order, keep, len(inputs.visual))
        if reason is not None:
            return Replay((), reason)
        scores, condition = self.magnitude(inputs)
        similarity = self.similarity(inputs)
        low = np.maximum(scores - margin.score * condition, 0.0)
        high = scores + margin.score * condition
        chunks, taken = list[Chunk](), set[int]()
        for size in self.chunk_sizes(keep):
            new = [int(place) for place in taken_order[len(taken) : len(taken) + size]]
            taken.update(new)
            left = [place for place in range(len(scores)) if place not in taken]
            chunks.append(judge_chunk(new, left, scores, low, high))
            scores = scores * self._penalty(similarity, new, 0.0)
            low = low * self._penalty(similarity, new, margin.similarity)
            high = high * self._penalty(similarity, new, -margin.similarity)
        return Replay(tuple(chunks))

    def chunk_sizes(self, keep: int) -> list[int]:
        """b0, b0 g, b0 g^2, ... until ``keep`` tokens are taken; the last chunk is what is missing."""
        sizes, b = list[int](), self.first_chunk
        while sum(sizes) < keep:
            sizes.append(min(b, keep - sum(sizes)))
            b *= self.growth
        return sizes

    def magnitude(self, inputs: TokenInputs) -> tuple[Array, float]:
        """P: ``[Nv]``, scaled, and the condition of that scaling."""
        q = inputs.q_rotary if self.magnitude_rotary else inputs.q
        k = inputs.k_rotary if self.magnitude_rotary else inputs.k
        text = inputs.text if self.text == "after_image" else inputs.all_text
        if len(text) == 0:
            raise ValueError("no text row to take the query from")
        H, G, Nv = len(q), len(k), len(inputs.visual)
        exponent, norm = np.zeros((H, Nv)), np.zeros((H, Nv))
        for h in range(H):
            g = h // (H // G)
            query = q[h][text].mean(axis=0)
            for i, row in enumerate(inputs.visual):
                exponent[h, i] = query @ k[g, row] * inputs.scale
                norm[h, i] = np.sqrt(np.sum(inputs.v[g, row] ** 2))
        if self.head_norm == "global":
            weight = np.exp(exponent - exponent.max())
        else:
            weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
            weight = weight / weight.sum(axis=1, keepdims=True)
        mean = (weight * norm).mean(axis=0)
        if not np.isfinite(mean).all():
            raise ValueError("a score is not a finite number")
        largest = mean.max()
        if largest == 0:  # nothing moves the residual: no token is better than another
            return np.zeros(Nv), 1.0
        if self.scaling == "max":
            return mean / largest, 1.0
        span = max(largest - mean.min(), 1e-12 * largest)
        return (mean - mean.min()) / span, float(largest / span)

    def similarity(self, inputs: TokenInputs) -> Array:
        """S2: ``[Nv, Nv]``, how much of one token's update another one repeats."""
        keys = inputs.k_rotary if self.duplication_rotary else inputs.k
        G, Nv = len(keys), len(inputs.visual)
        S = np.zeros((G, Nv, Nv))
        for g in range(G):
            k, v = keys[g][inputs.visual], inputs.v[g][inputs.visual]
            length = np.sqrt(np.sum(v**2, axis=1))
            for i in range(Nv):
                lengths = length * length[i]
                cosine = np.divide(v @ v[i], lengths, out=np.zeros(Nv), where=lengths > 0)
                distance2 = np.sum((k - k[i]) ** 2, axis=1)
                S[g, i] = cosine * np.exp(-distance2 * inputs.scale / 2)
        mean: Array = (S**2).mean(axis=0) if self.duplication == "mean_of_squares" else S.mean(axis=0) ** 2
        return mean

    def _take(self, scores: Array, similarity: Array, keep: int, excluded: list[int]) -> Index:
        """``keep`` places in the order they are taken."""
        left_scores, order = scores.copy(), list[int]()
        for size in self.chunk_sizes(keep):
            left_scores[order + excluded] = -1.0
            new = top(left_scores, size)
            order += new
            left_scores = left_scores * self._penalty(similarity, new, 0.0)
        return np.array(order, np.int64)

    def _penalty(self, similarity: Array, new: list[int], shift: float) -> Array:
        """The factor on every score after ``new`` was taken, all similarities being ``shift`` larger than computed."""
        largest = np.clip(similarity[:, new].max(axis=1) + shift, 0, None)
        factor: Array = np.maximum(self.floor, 1 - self.strength * largest)
        return factor


@dataclass(frozen=True)
class Magnitude(Iwp):
    """IWP with strength 0: the scores alone decide."""

    strength: float = 0.0
