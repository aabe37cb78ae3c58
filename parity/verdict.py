"""What a comparison says: a verdict computed from recorded numbers, never a number alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """``AMBIGUOUS``: a difference that a near tie explains. ``NOT_RUN``: the engine was not executed, so nothing is known."""

    PASS = "PASS"  # noqa: S105
    AMBIGUOUS = "AMBIGUOUS"
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True)
class Difference:
    """One tensor against its reference.

    ``max_abs`` is compared with ``allowed``; ``relative`` is it over the largest reference value; ``worst`` is where it stands.
    ``cosine`` is of the flattened tensors (1 where both are zero). ``elements`` were compared.
    """

    max_abs: float
    allowed: float
    relative: float
    cosine: float
    worst: tuple[int, ...]
    elements: int

    @property
    def severity(self) -> float:
        """``max_abs`` in units of what is allowed."""
        if self.allowed == 0:  # every score is zero, as where a layer's window hides all of them
            return math.inf if self.max_abs else 0.0
        return self.max_abs / self.allowed


@dataclass(frozen=True)
class StageResult:
    """One comparison of one sample. ``stage`` is the label a reader knows, ``name`` the tensor; ``note`` says what a number cannot."""

    stage: str
    name: str
    verdict: Verdict
    difference: Difference | None = None
    note: str = ""


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over several: one FAIL fails, one AMBIGUOUS is ambiguous; of nothing at all it is FAIL, since nothing was shown.

    A comparison that could not be made (``NOT_RUN``, downstream of a failure) does not count, unless there is no other.
    """
    made = [verdict for verdict in verdicts if verdict is not Verdict.NOT_RUN]
    if not made:
        return Verdict.NOT_RUN if verdicts else Verdict.FAIL
    for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS):
        if verdict in made:
            return verdict
    return Verdict.PASS


def exit_code(verdict: Verdict, *, strict: bool = False) -> int:
    """0 for PASS and NOT RUN, 1 for FAIL; AMBIGUOUS is 0, or 3 under ``strict``."""
    if verdict is Verdict.FAIL:
        return 1
    return 3 if strict and verdict is Verdict.AMBIGUOUS else 0


def first_failure(results: Sequence[StageResult]) -> StageResult | None:
    """The first comparison that failed, in the order the model computes."""
    return next((result for result in results if result.verdict is Verdict.FAIL), None)
