"""Variants of dynamic text: the same numbers and kept tokens as static ones, at every length, and all else fixed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError
from sievert.bundle.plan import Option, Plan, Stage
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.variant import make_variant
from tests.graph_passes.conftest import Tiny
from tests.graph_passes.llavas import IMAGE, Array, Prompts, Static, assert_close

MAX_TEXT, BATCH = 9, 2


def stage(selector: str, layer: int, keep: int, **options: Option) -> Stage:
    return Stage(selector=selector, layer=layer, keep=keep, requested=str(keep), options=options)


# Between them, every way in which a selector reads the sequence: the last row, text rows, all rows, what earlier cuts carried along.
PLANS = {
    "unpruned": Plan(),
    "one": Plan(stages=(stage("dart", 1, 12), stage("iwp", 2, 8), stage("fastv", 3, 4))),
    "other": Plan(stages=(stage("cdpruner", 0, 14), stage("sparsevlm", 1, 11), stage("transprune", 2, 8), stage("sparsevlm", 3, 3))),
    "compact": Plan(stages=(stage("transprune", 1, 9, weights="image"), stage("pyramiddrop", 3, 5)), positions="compact"),
}


@pytest.fixture(scope="module")
def exported(tiny: Tiny) -> Exported:
    return tiny("clip-llama")[1]


def profile_of(exported: Exported, *, dynamic: bool) -> Profile:
    visual = exported.geometry.visual_tokens
    return Profile(batch=BATCH, decode_batch=BATCH, visual_tokens=visual, max_text=MAX_TEXT, max_new_tokens=4, dynamic_text=dynamic)


def make_prompts(exported: Exported, words: tuple[int, ...]) -> Prompts:
    """One prompt of each number of words, one of which stands before the image where there are two."""
    rng, g = np.random.default_rng(0), exported.geometry
    texts = [rng.integers(5, 60, count) for count in words]
    ids = tuple(np.concatenate([text[: len(text) > 1], np.full(g.visual_tokens, IMAGE), text[len(text) > 1 :]]) for text in texts)
    return Prompts(ids, rng.standard_normal((len(words), g.channels, g.image_height, g.image_width)).astype(np.float32))


@pytest.mark.parametrize("name", PLANS)
def test_static_and_dynamic_text_answer_alike(exported: Exported, name: str) -> None:
    static, dynamic = (Static(exported, PLANS[name], profile_of(exported, dynamic=each)) for each in (False, True))
    tokens = np.random.default_rng(1).integers(5, 60, (BATCH, 3))
    for words in ((1, 1), (4, 2), (MAX_TEXT, 3)):
        prompts = make_prompts(exported, words)
        (first, logits), (expected, expected_logits) = dynamic.answer(prompts, tokens), static.answer(prompts, tokens)
        assert_close(np.stack(logits), np.stack(expected_logits), f"logits of {words} words")
        for number in range(len(PLANS[name].stages)):
            np.testing.assert_array_equal(first[f"kept_index.{number}"], expected[f"kept_index.{number}"])


def test_only_the_prompts_length_varies(exported: Exported) -> None:
    static, dynamic = (
        make_variant(exported.graphs, exported.geometry, PLANS["one"], profile_of(exported, dynamic=each)) for each in (False, True)
    )
    for graph in ("vision_encoder", "decode"):
        assert ir.to_proto(dynamic[graph]) == ir.to_proto(static[graph])
    prefill, length = dynamic["prefill"], MAX_TEXT + exported.geometry.visual_tokens
    named = {str(value.name) for value in prefill.graph.inputs if value.shape is None or not value.shape.is_static()}
    assert named == {"inputs_embeds", "position_ids", "attention_mask"}
    assert [str(value.shape) for value in prefill.graph.outputs] == [str(value.shape) for value in static["prefill"].graph.outputs]
    assert str(dynamic["embed_tokens"].graph.outputs[0].shape) == f"[{BATCH},sequence,{exported.geometry.width}]"
    assert count_flops(prefill, length) == count_flops(static["prefill"]) > count_flops(prefill, length - 5)
    with pytest.raises(GraphError, match="FLOPs"):
        count_flops(prefill)


def test_tensorrt_is_given_the_same_numbers(exported: Exported) -> None:
    """Attention is written out with the length read off its operands, in all the forms a prefill has; lint has nothing to say."""
    profile = profile_of(exported, dynamic=True)
    prefill = make_variant(exported.graphs, exported.geometry, PLANS["one"], profile)["prefill"]
    lowered = lower(prefill, "tensorrt-rtx")
    assert [finding for finding in lint(lowered, "tensorrt-rtx") if finding.severity == "error"] == []
    assert not any(node.op_type == "Attention" for node in lowered.graph)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    ours, theirs = (ort.InferenceSession(ir.to_proto(model).SerializeToString(), options) for model in (lowered, prefill))
    rng, visual = np.random.default_rng(0), exported.geometry.visual_tokens
    for length in (visual + 1, visual + 6):
        shapes = {value.name: [length if axis == "sequence" else axis for axis in value.shape] for value in ours.get_inputs()}
        feeds: dict[str, Array] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        rows = np.broadcast_to(np.arange(length), (BATCH, length))
        feeds |= {"position_ids": rows, "attention_mask": np.ones_like(rows), "visual_index": rows[:, :visual]}
        for found, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            assert_close(found, expected, f"an output at {length} tokens")


def test_a_size_that_follows_from_data_is_refused_also_where_the_length_varies() -> None:
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="found"))
    build.add_output(build.op.NonZero(build.input("x", ir.DataType.FLOAT, ["sequence"])), "places")
    with pytest.raises(ir.passes.PostconditionError) as caught:
        FixShapes()(ir.Model(build.graph, ir_version=11))
    assert isinstance(caught.value.__cause__, GraphError) and "of NonZero node" in str(caught.value.__cause__)
