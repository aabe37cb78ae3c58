"""What pruning changed and what quantisation changed on top of it, told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sievert.bundle.plan import Plan
from sievert.parity.record import LOGITS, EngineRecord, kept_name
from sievert.parity.reference import Reference, ReferenceInputs


@dataclass(frozen=True)
class Effects:
    """One sample three times: unpruned in float32, pruned in float32, pruned and quantised on the engine.

    ``pruning`` and ``quantisation`` are the divergences KL(before || after) of the first token's probabilities, in nats. ``kept_changed``
    counts, per cut, the tokens that the engine kept and the float32 model, pruned alike, would not have.
    """

    pruning: float
    quantisation: float
    kept_changed: tuple[int, ...]
    unpruned_tokens: tuple[int, ...]
    pruned_tokens: tuple[int, ...]
    engine_tokens: tuple[int, ...]

    @property
    def pruning_changed_answer(self) -> bool:
        """Whether the greedy answer is another one, pruned in float32."""
        return self.unpruned_tokens != self.pruned_tokens

    @property
    def quantisation_changed_answer(self) -> bool:
        """Whether the engine's greedy answer is another one than the float32 model's, pruned alike."""
        return self.pruned_tokens != self.engine_tokens


@dataclass(frozen=True)
class EffectsSummary:
    """Over all samples: median divergences in nats, and shares from 0 to 1. ``kept_changed`` is per cut, of the tokens kept."""

    samples: int
    pruning: float
    quantisation: float
    pruning_changed_answers: float
    quantisation_changed_answers: float
    kept_changed: tuple[float, ...]


def separate_effects(
    reference: Reference,
    inputs: ReferenceInputs,
    plan: Plan,
    engine: EngineRecord,
    answer: Sequence[int],
    *,
    steps: int,
    stops: Sequence[int],
) -> Effects:
    """Run the float32 model unpruned and pruned, on its own choice of tokens. ``answer`` are the engine's greedy tokens, ``steps`` at most;
    ``stops`` end an answer.
    """
    unpruned = reference.record(inputs, Plan(), tokens=steps)
    pruned = reference.record(inputs, plan, tokens=steps) if plan.stages else unpruned
    kept = [np.setdiff1d(engine.arrays[kept_name(stage)], trace.own_kept) for stage, trace in enumerate(pruned.traces)]
    return Effects(
        pruning=divergence(unpruned.arrays[LOGITS], pruned.arrays[LOGITS]),
        quantisation=divergence(pruned.arrays[LOGITS], engine.arrays[LOGITS]),
        kept_changed=tuple(len(rows) for rows in kept),
        unpruned_tokens=_until(unpruned.tokens, stops),
        pruned_tokens=_until(pruned.tokens, stops),
        engine_tokens=_until(answer, stops),
    )


def summarise_effects(samples: Sequence[Effects], keeps: Sequence[int]) -> EffectsSummary | None:
    """All samples of a variant; None of none."""
    if not samples:
        return None
    return EffectsSummary(
        samples=len(samples),
        pruning=float(np.median([each.pruning for each in samples])),
        quantisation=float(np.median([each.quantisation for each in samples])),
        pruning_changed_answers=float(np.mean([each.pruning_changed_answer for each in samples])),
        quantisation_changed_answers=float(np.mean([each.quantisation_changed_answer for each in samples])),
        kept_changed=tuple(float(np.mean([each.kept_changed[stage] for each in samples])) / keep for stage, keep in enumerate(keeps)),
    )


def divergence(before: NDArray[Any], after: NDArray[Any]) -> float:
    """KL(before || after) in nats of the probabilities that two rows of logits give; infinite where ``after`` is not finite."""
    if not np.isfinite(after).all():
        return float("inf")
    one, other = (_log_softmax(np.asarray(logits, np.float64)) for logits in (before, after))
    return max(0.0, float((np.exp(one) * (one - other)).sum()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _until(tokens: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """The answer up to its first stop token."""
    said = []
    for token in tokens:
        if token in stops:
            break
        said.append(int(token))
    return tuple(said)
