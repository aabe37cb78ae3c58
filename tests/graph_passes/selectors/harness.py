"""A selector on its own, run by ONNX Runtime: see :mod:`sievert.graph_passes.selectors.standalone` for the names of its inputs.

Used by the selectors' own tests and by the property tests that compare them with the float64 transcriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from sievert.graph_passes.selectors.base import Selector, StageGeometry, Tap
from sievert.graph_passes.selectors.standalone import WIDE, build_standalone, make_geometry, tap_name

__all__ = ["WIDE", "StandaloneResult", "build_standalone", "make_geometry", "random_feeds", "run_model", "run_standalone", "tap_name"]


@dataclass(frozen=True)
class StandaloneResult:
    """``order[B, K]`` int64, ``scores[B, Nv]`` float32 and what is carried on, ``[B, S]`` float32, as the graph gave them."""

    order: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    carried: Mapping[str, np.ndarray[Any, Any]]


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray[Any, Any]]) -> StandaloneResult:
    """Check the model, run it in ONNX Runtime on the CPU; feeds it has no input for are left out."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in session.get_outputs()]
    found = dict(zip(names, session.run(names, {spec.name: feeds[spec.name] for spec in session.get_inputs()}), strict=True))
    order, scores = found.pop("order"), found.pop("scores")
    return StandaloneResult(order, scores, {name.removeprefix("onward."): value for name, value in found.items()})


def run_standalone(selector: Selector, geometry: StageGeometry, feeds: Mapping[str, np.ndarray[Any, Any]]) -> StandaloneResult:
    """Build and run; the taps' dtype and D are those of the feeds, and feeds named ``carried.name`` are what an earlier stage left.

    Feeds beyond the selector's inputs are ignored.
    """
    carried = [name.removeprefix("carried.") for name in feeds if name.startswith("carried.")]
    taps = selector.taps(geometry.layer, geometry.depth, geometry.since)
    read = [feeds[name] for name in ("inputs_embeds", *(tap_name(tap, taps) for tap in taps)) if name in feeds]
    dtypes = {feed.dtype for feed in read}
    if len(dtypes) > 1:
        raise ValueError(f"taps of one dtype wanted, got {sorted(map(str, dtypes))}")
    dtype = ir.DataType.from_numpy(dtypes.pop()) if dtypes else ir.DataType.FLOAT
    width = next((feed.shape[-1] for feed in read if feed.ndim == 3), 16)
    return run_model(build_standalone(selector, geometry, dtype=dtype, width=width, carried=carried), feeds)


def random_feeds(
    geometry: StageGeometry,
    seed: int,
    *,
    dtype: type[np.floating[Any]] = np.float32,
    spread: float = 1.0,
    taps: tuple[Tap, ...] = (),
) -> dict[str, np.ndarray[Any, Any]]:
    """Normal taps of standard deviation ``spread`` for one stage, for right-padded prompts of several lengths.

    Visual tokens stand at random rows among real text, so there is text before, between and after them (or none); rows of padding
    hold values like any other, which no selector may read. ``taps`` are what the selector under test reads, for kinds in several layers.
    """
    g, rng = geometry, np.random.default_rng(seed)
    visual_index = np.empty((g.batch, g.visual), np.int64)
    real_rows, all_text, text = np.zeros((3, g.batch, g.sequence), bool)
    for sample in range(g.batch):
        real = int(rng.integers(g.visual, g.sequence + 1))
        visual_index[sample] = np.sort(rng.permutation(real)[: g.visual])
        real_rows[sample, :real] = all_text[sample, :real] = True
        all_text[sample, visual_index[sample]] = False
        text[sample] = all_text[sample] & (np.arange(g.sequence) > visual_index[sample, 0])
    heads = {"q": g.heads, "q_rotary": g.heads, "k": g.kv_heads, "k_rotary": g.kv_heads, "v": g.kv_heads}
    wide = {"inputs_embeds", *WIDE, *(tap_name(tap, taps) for tap in taps if tap.kind in WIDE)}
    narrow = heads | {tap_name(tap, taps): heads[tap.kind] for tap in taps if tap.kind in heads}
    original = [np.sort(rng.permutation(g.original_visual)[: g.visual]) for _ in range(g.batch)]
    return {
        "visual_index": visual_index,
        "original_index": np.stack(original).astype(np.int64),
        "text": text,
        "all_text": all_text,
        "real": real_rows,
        "visual_scores": rng.random((g.batch, g.visual), np.float32),
        **{name: rng.normal(0, spread, (g.batch, g.sequence, 16)).astype(dtype) for name in sorted(wide)},
        **{name: rng.normal(0, spread, (g.batch, count, g.sequence, g.head_size)).astype(dtype) for name, count in narrow.items()},
    }
