"""The splice's index arithmetic against a few lines of numpy, over random prompts, cuts and a second cut."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder

from sievert.graph_passes.lengths import Length
from sievert.graph_passes.op import gather_rows
from sievert.graph_passes.rows import cut_rows, describe_rows


def build_cuts(batch: int, length: int, visual: int, keeps: list[int], compact: bool, varies: bool) -> ort.InferenceSession:
    """A graph that describes a sequence, of any length if it ``varies``, and cuts it once per keep, with every value as an output."""
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="cuts"))
    integer, axis = ir.DataType.INT64, "sequence" if varies else length
    mask = build.input("attention_mask", integer, [batch, axis])
    index = build.input("visual_index", integer, [batch, visual])
    positions = build.input("position_ids", integer, [batch, axis])
    stream = build.input("stream", ir.DataType.FLOAT, [batch, axis, 3])
    orders = [build.input(f"order.{stage}", integer, [batch, keep]) for stage, keep in enumerate(keeps)]
    counted = Length(length + 9, build.op.Squeeze(build.op.Shape(mask, start=1), [0])) if varies else Length(length)
    rows = describe_rows(
        build.op, batch=batch, length=counted, visual=visual, attention_mask=mask, visual_index=index, position_ids=positions
    )
    build.add_output(build.op.Identity(rows.text), "text")
    build.add_output(build.op.Identity(rows.all_text), "all_text")
    carried = build.op.Mul(build.op.Cast(positions, to=ir.DataType.FLOAT), 0.5)
    for stage, keep in enumerate(keeps):
        cut = cut_rows(build.op, rows, orders[stage], keep, compact=compact, carried={"half": carried} if stage == 0 else {})
        rows, stream = cut.rows, gather_rows(build.op, stream, cut.source)
        for name, value in {
            "kept_index": cut.kept_index,
            "stream": stream,
            "positions": rows.position_ids,
            "visual_index": rows.visual_index,
            "original_visual": rows.original_visual,
            "original_row": rows.original_row,
            "text": rows.text,
            "half": rows.carried["half"],
        }.items():
            build.add_output(build.op.Identity(value), f"{name}.{stage}")
    model = ir.Model(build.graph, ir_version=11)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, list[int], bool, bool, int]:
    """batch, visual tokens, text, keeps, compact, whether the length varies, seed."""
    visual = draw(st.integers(1, 9))
    keeps = sorted((draw(st.integers(1, visual)) for _ in range(draw(st.integers(1, 2)))), reverse=True)
    return (
        draw(st.integers(1, 3)),
        visual,
        draw(st.integers(2, 7)),
        keeps,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


@settings(max_examples=30, deadline=None)
@given(cases())
def test_cuts_agree_with_numpy(case: tuple[int, int, int, list[int], bool, bool, int]) -> None:
    batch, visual, words, keeps, compact, varies, seed = case
    rng, length = np.random.default_rng(seed), visual + words
    real = rng.integers(1, words + 1, batch) + visual
    index = np.sort(np.stack([rng.permutation(n)[:visual] for n in real]), axis=1)
    feeds = {
        "attention_mask": (np.arange(length) < real[:, None]).astype(np.int64),
        "visual_index": index,
        "position_ids": rng.integers(0, 99, (batch, length)),
        "stream": rng.standard_normal((batch, length, 3)).astype(np.float32),
    }
    for stage, keep in enumerate(keeps):
        entering = visual if stage == 0 else keeps[stage - 1]
        feeds[f"order.{stage}"] = np.stack([rng.permutation(entering)[:keep] for _ in range(batch)])
    session = build_cuts(batch, length, visual, keeps, compact, varies)
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    for row in range(batch):
        rows, is_visual = np.arange(length), np.isin(np.arange(length), index[row])
        positions = feeds["position_ids"][row]
        text = ~is_visual & (rows < real[row])
        np.testing.assert_array_equal(outputs["all_text"][row], text)
        np.testing.assert_array_equal(outputs["text"][row], text & (rows > index[row, 0]))
        for stage in range(len(keeps)):
            left = np.flatnonzero(np.isin(rows, index[row]))  # places of visual tokens in this stage's sequence
            kept = np.sort(left[feeds[f"order.{stage}"][row]])
            stay = ~np.isin(rows, index[row]) | np.isin(np.arange(len(rows)), kept)
            np.testing.assert_array_equal(outputs[f"kept_index.{stage}"][row], rows[kept])
            positions = np.arange(stay.sum()) if compact else positions[stay]
            rows = rows[stay]
            np.testing.assert_array_equal(outputs[f"original_row.{stage}"][row], rows)
            np.testing.assert_array_equal(outputs[f"positions.{stage}"][row], positions)
            np.testing.assert_array_equal(outputs[f"stream.{stage}"][row], feeds["stream"][row][rows])
            np.testing.assert_array_equal(outputs[f"half.{stage}"][row], feeds["position_ids"][row][rows] * np.float32(0.5))
            np.testing.assert_array_equal(outputs[f"text.{stage}"][row], text[rows] & (rows > index[row, 0]))
            survivors = np.flatnonzero(np.isin(rows, index[row]))
            np.testing.assert_array_equal(outputs[f"visual_index.{stage}"][row], survivors)
            np.testing.assert_array_equal(outputs[f"original_visual.{stage}"][row], np.searchsorted(index[row], rows[survivors]))


@pytest.mark.parametrize("keep", [1, 4])
def test_keeping_all_or_one(keep: int) -> None:
    session = build_cuts(1, 6, 4, [keep], False, varies=False)
    feeds = {
        "attention_mask": np.ones((1, 6), np.int64),
        "visual_index": np.array([[1, 2, 3, 4]]),
        "position_ids": np.arange(6)[None],
        "stream": np.zeros((1, 6, 3), np.float32),
        "order.0": np.array([[3, 0, 2, 1][:keep]]),
    }
    (kept,) = session.run(["kept_index.0"], feeds)
    assert kept.tolist() == [[4]] if keep == 1 else kept.tolist() == [[1, 2, 3, 4]]
