"""Exposed values are outputs, everything else is as it was, and ONNX Runtime reads the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sievert.bundle.errors import GraphError
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.lower import lower
from tests.graph_passes.static_graphs import MAKERS, NV, B, D, K, S, Weights, make_feeds
from tests.graph_passes.test_lower import interface, parse, run

STAGE = ["stage.0.residual", "stage.0.scores", "stage.0.order"]


def test_stage_values_become_outputs_of_the_graph_and_of_every_lowered_one(tmp_path: Path):
    prefill = MAKERS["prefill"](Weights(tmp_path, "float32"))
    feeds = make_feeds("prefill", "float32")
    expected = run(prefill, feeds, tmp_path)
    for model in (prefill, lower(prefill, "tensorrt-rtx"), lower(prefill, "tensorrt")):
        exposed = expose(model, STAGE)
        assert interface(exposed)[: len(interface(model))] == interface(model)
        found = run(exposed, feeds, tmp_path)
        assert list(found) == [*expected, *STAGE]
        assert {name: found[name].shape for name in STAGE} == {STAGE[0]: (B, S, D), STAGE[1]: (B, NV), STAGE[2]: (B, K)}
        np.testing.assert_array_equal(found["kept_index.0"], expected["kept_index.0"])
        np.testing.assert_array_equal(found["stage.0.order"], np.argsort(-found["stage.0.scores"], axis=1, kind="stable")[:, :K])


def test_the_original_is_left_alone_and_names_count_once(tmp_path: Path):
    model = MAKERS["prefill"](Weights(tmp_path, "float32"))
    before = to_bytes(model)
    exposed = expose(model, ["stage.0.order", "logits", "stage.0.order"])
    assert to_bytes(model) == before
    assert [value.name for value in exposed.graph.outputs] == [*(value.name for value in model.graph.outputs), "stage.0.order"]
    assert to_bytes(expose(model, [])) == before


def test_an_unknown_name_is_refused_with_those_near_it(tmp_path: Path):
    model = MAKERS["prefill"](Weights(tmp_path, "float32"))
    with pytest.raises(GraphError, match=r"no node computes 'stage.0.score'; near it: stage.0.scores.*stage values: stage.0.residual"):
        expose(model, ["stage.0.score"])
    with pytest.raises(GraphError, match="'visual_index' is an input of the graph"):
        expose(model, ["visual_index"])
    with pytest.raises(GraphError, match="near it: nothing; stage values: none"):
        expose(parse("g (float[2] x) => (float[2] y) { y = Exp(x) }"), ["embeddings"])


def test_a_value_of_unknown_shape_is_refused():
    model = parse("g (float[2] x) => (float[2] y) { h = Exp(x) y = Exp(h) }")
    model.graph[0].outputs[0].shape = None
    with pytest.raises(GraphError, match=r"'h' has dtype FLOAT and shape None"):
        expose(model, ["h"])


def test_bytes_refer_to_the_weights_and_do_not_hold_them(tmp_path: Path):
    model = MAKERS["decode"](Weights(tmp_path, "float32"))
    external = {name for name, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)}
    proto = onnx.ModelProto.FromString(to_bytes(model))
    found = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    assert found.keys() == external
    assert {entry.value for tensor in found.values() for entry in tensor.external_data if entry.key == "location"} == {"weights.data"}
    assert len(to_bytes(model)) < (tmp_path / "weights.data").stat().st_size / 4
