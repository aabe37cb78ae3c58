"""What several formulas are made of."""

from __future__ import annotations

import numpy as np

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import Array, Index, TokenInputs


def attention(inputs: TokenInputs, layer: int, rows: Index) -> Array:
    """``[R, S]``: the mean over heads of the attention of ``rows`` of ``layer`` to every row that they see in it."""
    q, k = inputs.tap("q_rotary", layer), inputs.tap("k_rotary", layer)
    H, G, S = len(q), len(k), k.shape[1]
    weights = np.zeros((len(rows), S))
    for h in range(H):
        for place, row in enumerate(rows):
            # Row by row, not as a matrix product: equal keys then have equal sums to the last bit, and so score the same.
            keys = np.flatnonzero(inputs.seen[layer][row]) if layer in inputs.seen else np.arange(row + 1)
            logits = (k[h // (H // G), keys] * q[h, row]).sum(axis=1) * inputs.scale
            if inputs.softcap:
                logits = inputs.softcap * np.tanh(logits / inputs.softcap)
            weights[place, keys] += softmax(logits)
    return weights / H


def softmax(values: Array) -> Array:
    """Over the only axis."""
    weights = np.exp(values - values.max())
    normed: Array = weights / weights.sum()
    return normed


def length(vectors: Array) -> Array:
    """Euclidean, over the last axis."""
    lengths: Array = np.sqrt((vectors**2).sum(axis=-1))
    return lengths


def cosine(one: Array, other: Array) -> Array:
    """Over the last axis of two arrays that broadcast; 0 where one of them is zero."""
    product = length(one) * length(other)
    similarity: Array = np.divide((one * other).sum(axis=-1), product, out=np.zeros(product.shape), where=product > 0)
    return similarity


def cosines(vectors: Array) -> Array:
    """``[N, N]`` between the rows of ``vectors[N, D]``; rows that are equal have equal similarities to the last bit."""
    different, place = np.unique(vectors, axis=0, return_inverse=True)
    lengths = length(different)
    product = np.outer(lengths, lengths)
    matrix = np.divide(different @ different.T, product, out=np.zeros(product.shape), where=product > 0)
    np.fill_diagonal(matrix, np.where(lengths > 0, 1.0, 0.0))
    place = place.reshape(-1)
    similarity: Array = matrix[np.ix_(place, place)]
    return similarity


def vision_scores(inputs: TokenInputs) -> Array:
    """``[Nv]``: what the vision encoder says of the patches.

    Raises:
        PlanError: nothing, or of others than those that are left, as after a cut.
    """
    scores = inputs.visual_scores
    if scores is None or len(scores) != len(inputs.visual) or inputs.layer != 0:
        raise PlanError("the vision encoder's scores are those of all visual tokens: they can choose before layer 0 and as the first cut")
    return scores
