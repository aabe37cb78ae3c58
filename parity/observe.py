"""One batch through an engine, taken down row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sievert.bundle.store import Bundle
from sievert.engines.run.base import Runtime
from sievert.engines.run.files import find_model
from sievert.engines.run.pipeline import GRAPHS, Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.slots import IDLE
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.lowering.widen import EmulateBfloat16
from sievert.parity.record import (
    EMBEDDINGS,
    LOGITS,
    VISION,
    EngineRecord,
    cache_names,
    end_cache_names,
    kept_name,
    order_name,
    residual_name,
    scores_name,
    step_name,
)
from sievert.parity.selectors.registry import reference_selector


@dataclass
class Observation:
    """What each real row of a batch left behind so far. ``exposed``: inner values of the stages are among it."""

    rows: list[dict[str, NDArray[Any]]]
    exposed: bool

    def records(self) -> tuple[EngineRecord, ...]:
        """One record per row."""
        return tuple(EngineRecord(dict(row), self.exposed) for row in self.rows)


def open_pipeline(bundle: Bundle, variant: str, engine: str, *, lowered_for: str = "", low_memory: bool = False) -> tuple[Pipeline, bool]:
    """The variant's graphs on ``engine``, its inner values exposed where the engine reads ONNX; and whether they are."""
    runtime = find_runtime(engine, low_memory=low_memory)
    if not runtime.reads_onnx:
        return Pipeline(bundle, variant, runtime, lowered_for=lowered_for), False
    names = []
    for number, stage in enumerate(bundle.variant(variant).plan.stages):
        names.append(residual_name(number))
        if reference_selector(stage.selector, stage.options).computes:
            names += [scores_name(number), order_name(number)]
    graphs = {}
    for graph in GRAPHS:
        model, emulated = read_graph(bundle, variant, graph, runtime, lowered_for)
        if graph == "prefill" and names:
            model = expose(model, names)
        elif not emulated:
            continue
        graphs[graph] = to_bytes(model)
    return Pipeline(bundle, variant, runtime, lowered_for=lowered_for, graphs=graphs), True


def read_graph(bundle: Bundle, variant: str, graph: str, runtime: Runtime, lowered_for: str) -> tuple[ir.Model, bool]:
    """A graph as ``runtime`` would load it, and whether it was changed: on the CPU, one in bfloat16 that was lowered for another engine,
    or for none, is emulated.
    """
    model = ir.load(find_model(bundle, variant, graph, runtime, lowered_for).path)
    return model, runtime.name == "onnxruntime" and EmulateBfloat16()(model).modified


def observe_prefill(pipeline: Pipeline, batch: PromptBatch, *, exposed: bool) -> Observation:
    """Encode and read the prompts."""
    features = pipeline.encode(batch.pixel_values)
    result = pipeline.prefill(batch, features)
    whole: dict[str, NDArray[Any]] = {
        VISION: features.image_features,
        EMBEDDINGS: result.inputs_embeds,
        LOGITS: result.logits,
        **result.extra,
        **{kept_name(stage): kept for stage, kept in enumerate(result.kept_index)},
        **_named(pipeline.caches("prefill"), cache_names),
    }
    whole |= {name: value for name, value in features.values.items() if name != VISION}
    return Observation([{name: array[row] for name, array in whole.items()} for row in range(batch.rows)], exposed)


def observe_tokens(pipeline: Pipeline, observation: Observation, tokens: Sequence[Sequence[int]]) -> None:
    """Feed ``tokens[row]`` after the prompts that were just read, and add logits and caches to ``observation``.

    Where decode has slots of its own, rows take them from the last to the first, a slotful at a time.
    """
    slots = pipeline.profile.decode_batch
    shared = pipeline.profile.batch == slots
    for start in range(0, len(tokens), slots):
        group = range(start, min(start + slots, len(tokens)))
        slot_of = {row: row if shared else slots - 1 - (row - start) for row in group}
        for row, slot in slot_of.items():
            pipeline.fill(slot, row)
        for step in range(len(tokens[start])):
            fed = np.full(slots, IDLE, np.int64)
            for row, slot in slot_of.items():
                fed[slot] = tokens[row][step]
            logits = pipeline.decode(fed)
            for row, slot in slot_of.items():
                observation.rows[row][step_name(step)] = logits[slot].copy()
        caches = _named(pipeline.caches("decode"), end_cache_names)
        for row, slot in slot_of.items():
            observation.rows[row] |= {name: array[slot] for name, array in caches.items()}


def _named(caches: Sequence[tuple[NDArray[Any], NDArray[Any]]], names: Any) -> Mapping[str, NDArray[Any]]:
    return {name: array for layer, pair in enumerate(caches) for name, array in zip(names(layer), pair, strict=True)}
