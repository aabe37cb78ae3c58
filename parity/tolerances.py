"""Every tolerance of the comparison, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sievert.bundle.errors import InputError
from sievert.parity.selectors.base import Margin


@dataclass(frozen=True)
class Tolerances:
    """Largest absolute error allowed to each kind of tensor, in units of ``max(1, max |reference|)``.

    ``scores`` is in units of ``Choice.condition``, the error of a score per relative error of what it is computed from; of the vision
    encoder's scores in units of the largest. ``selection`` says what is a near tie between tokens to keep. Two logits are a near tie
    where twice the allowed error could swap them. ``weights``, of quantised variants: how far an output channel of a weight may be from the
    model's, as the norm of the error over the norm of the channel. ``scales``, of quantised activations: the ratio, or its inverse, of the
    largest value their codes reach to that of the samples. ``rounding`` is the largest relative error of a value that is stored in caches
    of a narrower type than the graphs compute in.
    """

    vision: float
    embeddings: float
    residual: float
    scores: float
    cache: float
    logits: float
    selection: Margin
    weights: float = 0.0
    scales: float = 0.0
    rounding: float = 0.0

    @property
    def stored(self) -> float:
        """Of caches that prefill wrote."""
        return self.cache + self.rounding

    @property
    def stored_later(self) -> float:
        """Of caches that decode, which reads them, wrote to."""
        return self.cache + _GROWTH * self.rounding

    @property
    def decoded(self) -> float:
        """Of logits that were computed from caches."""
        return self.logits + _GROWTH * self.rounding


# How much larger the rounding of caches may be in what is computed from them, relative to the largest value of each. On 16 samples of the
# shipped model it was as large, on small random ones up to five times.
_GROWTH: Final = 16.0
_CACHES: Final = {"": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}

TOLERANCES: Mapping[str, Tolerances] = {
    # Logits: what the project accepts. Measured on small random models, a tenth of it or less at every stage.
    "float32": Tolerances(
        vision=1e-4, embeddings=1e-4, residual=1e-4, scores=1e-4, cache=1e-4, logits=1e-4, selection=Margin(score=1e-4, similarity=1e-4)
    ),
    # Measured on small random models, half of it or less: 16 bit errors grow with depth, and the margins leave room for that.
    "float16": Tolerances(
        vision=2e-2,
        embeddings=2e-2,
        residual=2e-2,
        scores=5e-2,
        cache=2e-2,
        logits=2e-2,
        selection=Margin(score=5e-2, similarity=2e-2),
        weights=2**-10,
    ),
    # (Weights that a 16-bit variant narrows: a unit in the last place, of which rounding takes half.)
    # Eight times float16, as its rounding is. Emulated on 16 samples of the shipped model, a third of it or less at every stage.
    "bfloat16": Tolerances(
        vision=1.6e-1,
        embeddings=1.6e-1,
        residual=1.6e-1,
        scores=4e-1,
        cache=1.6e-1,
        logits=1.6e-1,
        selection=Margin(4e-1, 1.6e-1),
        weights=2**-7,
    ),
    **{
        # About twice the largest error seen on a few samples of the shipped model and of small random ones; int4's on small ones only.
        # Weights: a channel's largest value is up to 12 times its root mean square, so half a step of 127 is 2 % of it, and a step that is
        # wrong by a tenth is seen; of 8-bit floats the rounding is at most a sixteenth of each value. Scales: on 8 samples of the shipped
        # model, calibrated with 16 others, 2.4 at most, 3.8 with a percentile of 99.9, and 1.3 in the middle.
        form: Tolerances(
            vision=0.15,
            embeddings=0.15,
            residual=0.15,
            scores=0.15,
            cache=0.3,
            logits=0.4,
            selection=Margin(0.1, 0.1),
            weights=weights,
            scales=5.0,
        )
        for form, weights in (("int8", 0.05), ("int8-weights", 0.05), ("fp8", 0.0625))
    },
    # As above, and scores and caches as 16 samples of the shipped model need. Fifteen codes: rounding alone is a tenth of a channel.
    "int4": Tolerances(
        vision=0.2, embeddings=0.2, residual=0.2, scores=0.3, cache=0.5, logits=0.6, selection=Margin(0.15, 0.15), weights=0.2
    ),
}


def tolerances_for(dtype: str, caches: str = "") -> Tolerances:
    """The tolerances of a model of ``dtype``, or of a variant quantised to that format; with ``caches`` of that type, where it is another.

    Raises:
        InputError: no tolerances are stated for it.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"no tolerances are stated for {dtype!r}: a model is checked in one of {', '.join(TOLERANCES)}")
    return replace(TOLERANCES[dtype], rounding=_CACHES[caches])
