"""How long plans really take: their prefill beside the unpruned one's, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sievert.bundle.plan import Plan
from sievert.calibration.questions import Question
from sievert.calibration.scores import Estimate, estimate_median
from sievert.calibration.tune_ask import Asker
from sievert.engines.run.dtypes import Array
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch

ROUNDS: Final = 15
"""The fewest whose median has a useful interval."""


@dataclass(frozen=True)
class Timing:
    """Time over the unpruned model's, medians over the rounds: of the prefill alone, and with the vision encoder before it."""

    plan: Plan
    prefill: Estimate
    first_token: Estimate


def time_plans(asker: Asker, plans: Sequence[Plan], questions: Sequence[Question], tell: Callable[[int], None]) -> tuple[Timing, ...]:
    """Each plan against the unpruned model: both run once in each of :data:`ROUNDS` rounds, and change who goes first.

    ``questions`` are one batch. Other work on the machine slows both alike, so the ratio stands. ``tell`` is given the plans done.
    """
    found = []
    with asker.open(Plan()) as unpruned:
        batch = asker.prepare(questions)
        for number, plan in enumerate(plans):
            tell(number)
            with asker.open(plan) as pruned:
                ratios: tuple[list[float], list[float]] = ([], [])
                for turn in range(-1, ROUNDS):  # the first round warms up
                    both = (unpruned, pruned) if turn % 2 else (pruned, unpruned)
                    # Pictures that were seen are remembered: a little noise makes them new.
                    spent = {pipeline: _time(pipeline, batch, batch.pixel_values + 1e-6 * (turn + 2)) for pipeline in both}
                    if turn >= 0:
                        for part, ratio in enumerate(ratios):
                            ratio.append(spent[pruned][part] / spent[unpruned][part])
            found.append(Timing(plan, estimate_median(ratios[0]), estimate_median(ratios[1])))
    return tuple(found)


def _time(pipeline: Pipeline, batch: PromptBatch, pixels: Array) -> tuple[float, float]:
    """Seconds of a prefill, and of looking and prefill together."""
    start = time.perf_counter()
    features = pipeline.encode(pixels.astype(batch.pixel_values.dtype))
    looked = time.perf_counter()
    pipeline.prefill(batch, features)
    end = time.perf_counter()
    return end - looked, end - start
