"""CDPruner (arXiv 2506.10967) as OpenVINO reads it: the most likely set of a determinantal point process that minds the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sievert.parity.selectors.base import Array, Margin, Text, TokenInputs
from sievert.parity.selectors.shared import cosine, cosines
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps

_LEAST = 1e-6


@dataclass(frozen=True)
class CdPruner(ReferenceSelector):
    """Greedy: the kernel is ``r_i cos(e_i, e_j) r_j``, ``r`` the cosine to the mean text embedding, scaled to 0..1."""

    text: Text = "after_image"

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """One by one the token of the largest variance given those taken."""
        embeds = inputs.embeds[inputs.visual]
        relevance, steepness = self._relevance(inputs, embeds)
        similar = cosines(embeds)
        kernel = relevance[:, None] * similar * relevance
        variance, parts = np.diag(kernel).copy(), np.zeros((0, len(kernel)))
        bound = _Bound(similar, relevance, steepness, margin.similarity)
        for _ in range(keep):
            allowed = bound.allowed()
            (new,) = yield Step(1, Scores(variance, variance - allowed, variance + allowed, 2 * steepness))
            bound.take(new, defined=bool(variance[new] - allowed[new] >= _LEAST))
            part = (kernel[new] - parts[:, new] @ parts) / np.sqrt(max(variance[new], _LEAST))
            # Cauchy and Schwarz: a part is no longer than what is left of its token. Without it rounding explodes once nothing is left.
            left = np.sqrt(np.maximum(variance, 0))
            part = np.clip(part, -left, left)
            parts = np.vstack([parts, part])
            variance = variance - part**2

    def _relevance(self, inputs: TokenInputs, embeds: Array) -> tuple[Array, float]:
        """``r[Nv]``, and its absolute error per error of a cosine: its own, that of the least and that of the largest count."""
        plain = cosine(embeds, inputs.embeds[inputs.text_rows(self.text)].mean(axis=0))
        if not np.isfinite(plain).all():
            raise ValueError("a score is not a finite number")
        span = float(plain.max() - plain.min()) + _LEAST
        return (plain - plain.min()) / span, 2 / span


class _Bound:
    """How far off the variances may be when every cosine and every relevance is.

    A token's variance is ``r^2`` times what remains of its direction u_j beside the taken ones: the squared length of ``U v`` with
    ``v = (1, -y)``, where ``y`` are the coefficients of u_j's projection on them. A similarity is off because directions are, each by
    as much and at a right angle to itself; to first order that moves the length by at most this error times the length of
    ``(sqrt(1 - remains), y)``, the errors of different tokens being independent. Rounding within the recursion acts like an error of
    the kernel itself (Cholesky's is backward stable) and so moves the square by ``|v|^2`` times it. A step whose pivot may be no more
    than the guard of the square root leaves what follows undefined.
    """

    def __init__(self, similar: Array, relevance: Array, steepness: float, error: float) -> None:
        self.similar, self.relevance, self.error = similar, relevance, error
        self.largest = np.minimum(relevance + steepness * error, 1.0)
        self.taken: list[int] = []
        self.coefficients = np.zeros((0, len(similar)))
        self.remains = np.diag(similar).copy()
        self.defined = True

    def allowed(self) -> Array:
        """``[Nv]``: the error of each variance."""
        if self.error == 0:
            return np.zeros(len(self.remains))
        if not self.defined:
            return np.full(len(self.remains), np.inf)
        remains, others2 = np.clip(self.remains, 0, 1), (self.coefficients**2).sum(axis=0)
        moved = self.error * np.sqrt(1 - remains + others2)
        rounded = (len(self.taken) + 4) * float(np.finfo(np.float32).eps) * (1 + others2)  # selectors compute in float32 in any engine
        errors: Array = (self.largest**2 - self.relevance**2) * remains
        errors += self.largest**2 * (2 * np.sqrt(remains) * moved + moved**2 + rounded)
        return errors

    def take(self, new: int, *, defined: bool) -> None:
        """Project on one direction more."""
        self.defined = self.defined and defined and bool(self.remains[new] > 0)
        if self.error == 0 or not self.defined:
            return
        own = self.coefficients[:, new]
        rest = self.similar[new] - own @ self.similar[self.taken]
        factor = rest / self.remains[new]
        self.coefficients = np.vstack([self.coefficients - np.outer(own, factor), factor])
        self.remains = self.remains - factor * rest
        self.taken.append(new)
