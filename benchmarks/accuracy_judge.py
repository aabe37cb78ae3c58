"""From answers to rows of a table: shares, paired differences, and their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy_arms import Arm
from sievert.eval_score import Estimate, estimate_change, estimate_share

Values = NDArray[np.float64]
_Z = 1.959964


@dataclass(frozen=True)
class Answers:
    """One arm's answers to all questions: right, the same as the unpruned model's, and KL(unpruned || arm) of the first token, nats."""

    right: Values
    same: Values
    divergence: Values


@dataclass(frozen=True)
class Row:
    """One arm, or several draws of one, judged. ``change``: to the unpruned model; ``against_iwp``: to IWP at the same share.

    ``spread`` are the lowest and highest accuracy of the draws, equal where there is one; ``share`` is of the unpruned accuracy.
    """

    arm: Arm
    accuracy: Estimate
    change: Estimate
    against_iwp: Estimate | None
    share: Estimate
    same: Estimate
    divergence: Estimate
    by_kind: tuple[Estimate, ...]
    spread: tuple[float, float]


def judge(arm: Arm, draws: Sequence[Answers], full: Answers, iwp: Answers | None, kinds: NDArray[np.int64], kind_count: int) -> Row:
    """Of several draws, each question counts with the mean of its answers."""
    right = np.mean([answers.right for answers in draws], axis=0)
    change = paired(right, full.right)
    of = float(full.right.mean())
    accuracies = [float(answers.right.mean()) for answers in draws]
    return Row(
        arm=arm,
        accuracy=mean(right),
        change=change,
        against_iwp=None if iwp is None else paired(right, iwp.right),
        share=Estimate(1 + change.value / of, 1 + change.low / of, 1 + change.high / of, change.count),
        same=mean(np.mean([answers.same for answers in draws], axis=0)),
        divergence=mean(np.mean([answers.divergence for answers in draws], axis=0)),
        by_kind=tuple(mean(right[kinds == kind]) for kind in range(kind_count)),
        spread=(min(accuracies), max(accuracies)),
    )


def mean(values: Values) -> Estimate:
    """A mean over questions: Wilson's interval where each is 0 or 1, else the normal one."""
    if _is_binary(values):
        return estimate_share(values.astype(bool).tolist())
    return _normal(values)


def paired(now: Values, before: Values) -> Estimate:
    """The mean difference on the same questions: Bonett and Price's interval where each answer is 0 or 1, else the normal one."""
    if _is_binary(now) and _is_binary(before):
        return estimate_change(now.astype(bool).tolist(), before.astype(bool).tolist())
    return _normal(now - before)


def median(values: Values) -> Estimate:
    """The median with the interval of the sign test, for at least 6 values."""
    ordered, count = np.sort(values), len(values)
    skipped = int(np.floor(count / 2 - _Z * np.sqrt(count) / 2))  # of 15: the 4th lowest to the 4th highest
    return Estimate(float(np.median(ordered)), float(ordered[skipped]), float(ordered[count - 1 - skipped]), count)


def _is_binary(values: Values) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _normal(values: Values) -> Estimate:
    value, half = float(values.mean()), float(_Z * values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(value, value - half, value + half, len(values))
