"""IWP, implicit weight pruning (arXiv 2604.00757), and ``magnitude``, which is IWP without its duplication part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sievert.parity.selectors.base import Array, Margin, Tap, Text, TokenInputs
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps


@dataclass(frozen=True)
class Iwp(ReferenceSelector):
    """The options and defaults of METHODS.

    ``head_norm``: ``global`` keeps the heads' weights against each other, ``softmax`` normalises each head over the visual tokens.
    """

    first_chunk: int = 2
    growth: int = 2
    strength: float = 5.0
    floor: float = 0.01
    head_norm: Literal["global", "softmax"] = "global"
    scaling: Literal["minmax", "max"] = "minmax"
    text: Text = "after_image"
    duplication: Literal["mean_of_squares", "square_of_mean"] = "mean_of_squares"
    magnitude_rotary: bool = False
    duplication_rotary: bool = True

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002
        """Queries, keys and values of the layer itself."""
        return tuple((kind, layer) for kind in ("q", "q_rotary", "k", "k_rotary", "v"))

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """Progressive chunked MMR: ``C`` grows by the ``b`` highest, the newest chunk lowers what resembles it, ``b`` grows."""
        scores, condition = self.magnitude(inputs)
        error = margin.score * condition
        low, high = np.maximum(scores - error, 0.0), scores + error
        similarity: Array | None = None
        for size in self.chunk_sizes(keep):
            new = yield Step(size, Scores(scores, low, high, condition))
            if similarity is None:
                similarity = self.similarity(inputs)
            scores = scores * self._penalty(similarity, new, 0.0)
            low = low * self._penalty(similarity, new, margin.similarity)
            high = high * self._penalty(similarity, new, -margin.similarity)

    def chunk_sizes(self, keep: int) -> list[int]:
        """b0, b0 g, b0 g^2, ... until ``keep`` tokens are taken; the last chunk is what is missing."""
        sizes, b = list[int](), self.first_chunk
        while sum(sizes) < keep:
            sizes.append(min(b, keep - sum(sizes)))
            b *= self.growth
        return sizes

    def magnitude(self, inputs: TokenInputs) -> tuple[Array, float]:
        """P: ``[Nv]``, scaled, and the condition of that scaling."""
        q, k = (inputs.tap(f"{kind}_rotary" if self.magnitude_rotary else kind) for kind in ("q", "k"))
        v, text = inputs.tap("v"), inputs.text_rows(self.text)
        H, G, Nv = len(q), len(k), len(inputs.visual)
        exponent, norm = np.zeros((H, Nv)), np.zeros((H, Nv))
        for h in range(H):
            g = h // (H // G)
            query = q[h][text].mean(axis=0)
            for i, row in enumerate(inputs.visual):
                exponent[h, i] = query @ k[g, row] * inputs.scale
                norm[h, i] = np.sqrt(np.sum(v[g, row] ** 2))
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
        keys, values = inputs.tap("k_rotary" if self.duplication_rotary else "k"), inputs.tap("v")
        G, Nv = len(keys), len(inputs.visual)
        S = np.zeros((G, Nv, Nv))
        for g in range(G):
            k, v = keys[g][inputs.visual], values[g][inputs.visual]
            length = np.sqrt(np.sum(v**2, axis=1))
            for i in range(Nv):
                lengths = length * length[i]
                cosine = np.divide(v @ v[i], lengths, out=np.zeros(Nv), where=lengths > 0)
                distance2 = np.sum((k - k[i]) ** 2, axis=1)
                S[g, i] = cosine * np.exp(-distance2 * inputs.scale / 2)
        mean: Array = (S**2).mean(axis=0) if self.duplication == "mean_of_squares" else S.mean(axis=0) ** 2
        return mean

    def _penalty(self, similarity: Array, new: list[int], shift: float) -> Array:
        """The factor on every score after ``new`` was taken, all similarities being ``shift`` larger than computed."""
        largest = np.clip(similarity[:, new].max(axis=1) + shift, 0, None)
        factor: Array = np.maximum(self.floor, 1 - self.strength * largest)
        return factor


@dataclass(frozen=True)
class Magnitude(Iwp):
    """IWP with strength 0: the scores alone decide."""

    strength: float = 0.0
