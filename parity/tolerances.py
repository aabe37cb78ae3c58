"""Every tolerance of the comparison, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sievert.bundle.errors import InputError
from sievert.parity.selectors.base import Margin


@dataclass(frozen=True)
class Tolerances:
    """Largest absolute error allowed to each kind of tensor, in units of ``max(1, max |reference|)``.

    ``scores`` is in units of ``Choice.condition``, the error of a score per relative error of what it is computed from; of the vision
    encoder's scores in units of the largest. ``selection`` says what is a near tie between tokens to keep. Two logits are a near tie
    where twice the allowed error could swap them.
    """

    vision: float
    embeddings: float
    residual: float
    scores: float
    cache: float
    logits: float
    selection: Margin


TOLERANCES: Mapping[str, Tolerances] = {
    # Logits: what the project accepts. Measured on small random models, a tenth of it or less at every stage.
    "float32": Tolerances(
        vision=1e-4, embeddings=1e-4, residual=1e-4, scores=1e-4, cache=1e-4, logits=1e-4, selection=Margin(score=1e-4, similarity=1e-4)
    ),
    # Measured on small random models, half of it or less: 16 bit errors grow with depth, and the margins leave room for that.
    "float16": Tolerances(
        vision=2e-2, embeddings=2e-2, residual=2e-2, scores=5e-2, cache=2e-2, logits=2e-2, selection=Margin(score=5e-2, similarity=2e-2)
    ),
    # Not measured: eight times float16, as its rounding is.
    "bfloat16": Tolerances(
        vision=1.6e-1, embeddings=1.6e-1, residual=1.6e-1, scores=4e-1, cache=1.6e-1, logits=1.6e-1, selection=Margin(4e-1, 1.6e-1)
    ),
}


def tolerances_for(dtype: str) -> Tolerances:
    """The tolerances of a model of ``dtype``.

    Raises:
        InputError: no tolerances are stated for it.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"no tolerances are stated for {dtype!r}: a model is checked in one of {', '.join(TOLERANCES)}")
    return TOLERANCES[dtype]
