"""What is compared: named arrays of one sample, as the engine left them and as the reference has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sievert.bundle.plan import Plan
from sievert.parity.selectors.base import Choice, Index, TokenInputs
from sievert.parity.selectors.steps import ReferenceSelector

Arrays = Mapping[str, NDArray[Any]]

VISION = "image_features"
VISUAL_SCORES = "visual_scores"
EMBEDDINGS = "inputs_embeds"
LOGITS = "logits"


def plane_name(layer: int) -> str:
    """What layer ``layer`` adds to its output at the visual tokens, ``[Nv, D]``; only some models have such."""
    return f"deepstack.{layer}"


def residual_name(stage: int) -> str:
    """The stream entering the stage's layer, ``[S_s, D]``."""
    return f"stage.{stage}.residual"


def scores_name(stage: int) -> str:
    """The scores the stage's first choice was made by, ``[Nv_s]``."""
    return f"stage.{stage}.scores"


def order_name(stage: int) -> str:
    """Places among the stage's visual tokens in the order they were taken, ``[K_s]``."""
    return f"stage.{stage}.order"


def kept_name(stage: int) -> str:
    """Kept rows of the original sequence, ascending, ``[K_s]``."""
    return f"kept_index.{stage}"


def cache_names(layer: int) -> tuple[str, str]:
    """Key and value caches of a layer after prefill, ``[G, C, d]``."""
    return f"present.{layer}.key", f"present.{layer}.value"


def end_cache_names(layer: int) -> tuple[str, str]:
    """Key and value caches of a layer after the last teacher-forced token, ``[G, C, d]``."""
    return f"end.{layer}.key", f"end.{layer}.value"


def step_name(step: int) -> str:
    """Logits after the ``step``-th teacher-forced token, ``[V]``."""
    return f"step.{step}.logits"


@dataclass(frozen=True)
class EngineRecord:
    """One row of an engine's batch: arrays by name, still padded (see the functions above for names and shapes).

    ``exposed``: the inner values of the stages are among them. A built engine has none; its order is inferred from what it kept.
    """

    arrays: Arrays
    exposed: bool = True


@dataclass(frozen=True)
class StageTrace:
    """One cut as the reference sees it, given the engine's earlier cuts.

    ``rows``: the original row of each token that enters the stage. ``inputs``: what the selector reads. ``choice``: what it would
    take; ``own_kept``: that choice as original rows, ascending. ``kept``: the rows the run went on with.
    """

    selector: ReferenceSelector
    keep: int
    rows: Index
    inputs: TokenInputs
    choice: Choice
    own_kept: Index
    kept: Index

    @property
    def visual_rows(self) -> Index:
        """``[Nv]``: the original rows of the stage's visual tokens."""
        rows: Index = self.rows[self.inputs.visual]
        return rows


@dataclass(frozen=True)
class ReferenceRecord:
    """The same sample alone and unpadded. ``arrays`` has every name but orders and kept indices, which the traces judge.

    ``tokens[T]``: the reference's greedy tokens, each fed to both sides; ``length``: prompt tokens.
    """

    arrays: Arrays
    traces: tuple[StageTrace, ...]
    tokens: tuple[int, ...]
    length: int
    plan: Plan


def expected_names(reference: ReferenceRecord) -> set[str]:
    """Everything an engine's record must hold, no more and no less."""
    kept = {kept_name(stage) for stage in range(len(reference.traces))}
    orders = {order_name(stage) for stage, trace in enumerate(reference.traces) if trace.selector.computes}
    return set(reference.arrays) | kept | orders


def as_index(values: Any) -> Index:
    """``values`` as int64."""
    return np.asarray(values, np.int64)
