"""An engine made of the reference itself: the same numbers, padded and batched as an engine leaves them, with rounding noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from sievert.bundle.plan import Plan, Stage
from sievert.parity.record import EngineRecord, kept_name, order_name
from sievert.parity.reference import Reference, ReferenceInputs

PADDING = 5
TOKENS = 3
PLAN = Plan(stages=(Stage(selector="iwp", layer=2, keep=6, requested="6"),))
TWO_CUTS = Plan(
    stages=(
        Stage(selector="iwp", layer=1, keep=9, requested="9"),
        Stage(selector="magnitude", layer=3, keep=4, requested="4", options={"head_norm": "softmax"}),
    )
)


def make_inputs(seed: int = 0, *, before: int = 2, after: int = 7, visual: int = 16) -> ReferenceInputs:
    """Words around the placeholders of one picture of 32x32 pixels."""
    rng = np.random.default_rng(seed)
    words = rng.integers(5, 90, before + after)
    ids = np.concatenate([words[:before], np.full(visual, 4), words[before:]])
    return ReferenceInputs(ids, rng.normal(size=(1, 3, 32, 32)).astype(np.float32))


def pad(array: Any, axis: int, rows: int, rng: np.random.Generator) -> Any:
    """``rows`` more rows of what nobody may read."""
    shape = list(array.shape)
    shape[axis] = rows
    return np.concatenate([array, rng.normal(0, 100, shape)], axis=axis)


def run_as_engine(
    model: Reference,
    inputs: ReferenceInputs,
    plan: Plan = PLAN,
    *,
    tokens: tuple[int, ...] | None = None,
    kept: Any = None,
    noise: float = 1e-7,
    exposed: bool = True,
) -> EngineRecord:
    """A record of ``model``: what it chose, and its logits when fed ``tokens`` (its own greedy ones, if None)."""
    rng = np.random.default_rng(7)
    record = model.record(inputs, plan, kept=kept, tokens=TOKENS)
    arrays: dict[str, Any] = dict(record.arrays)
    if tokens is not None:
        state, _, _ = model.prefill(inputs, plan, kept)
        for step, token in enumerate(tokens):
            arrays[f"step.{step}.logits"] = model.decode(state, token)
        for layer, cache in enumerate(state.cache.layers):
            arrays[f"end.{layer}.key"], arrays[f"end.{layer}.value"] = cache.keys[0].numpy(), cache.values[0].numpy()
    for name, array in arrays.items():
        array = array + rng.normal(0, noise, array.shape) * max(1.0, np.abs(array).max())
        if name.endswith("residual") or name == "inputs_embeds":
            array = pad(array, 0, PADDING, rng)
        elif name.startswith("present."):
            array = pad(array, 1, PADDING + TOKENS, rng)
        elif name.startswith("end."):
            array = pad(array, 1, PADDING, rng)
        if exposed or not name.startswith("stage."):
            arrays[name] = array.astype(np.float32)
    if not exposed:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("stage.")}
    for stage, trace in enumerate(record.traces):
        arrays[kept_name(stage)] = trace.kept
        if exposed:
            arrays[order_name(stage)] = trace.choice.order
    return EngineRecord(arrays, exposed)
