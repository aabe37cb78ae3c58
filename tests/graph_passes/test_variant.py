"""The static graphs of a variant: interface, static shapes, operators, weights, and determinism."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from sievert.bundle.errors import PlanError, ProfileError
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.specialise import specialise
from sievert.graph_passes.variant import GRAPHS, make_variant
from tests.graph_passes.conftest import Tiny

FORBIDDEN = {"NonZero", "Compress", "Loop", "If", "Shape", "Scan", "Unique"}
PLAN = Plan(
    stages=(
        Stage(selector="iwp", layer=1, keep=9, requested="9"),
        Stage(selector="uniform", layer=3, keep=4, requested="4"),
    )
)


@pytest.fixture(scope="module")
def exported(tiny: Tiny) -> Exported:
    return tiny("clip-llama")[1]


def profile_of(exported: Exported, **sizes: int) -> Profile:
    lengths: dict[str, Any] = {"batch": 2, "decode_batch": 3, "max_text": 8, "max_new_tokens": 4, **sizes}
    return Profile(visual_tokens=exported.geometry.visual_tokens, **lengths)


@pytest.fixture(scope="module")
def graphs(exported: Exported) -> dict[str, ir.Model]:
    return make_variant(exported.graphs, exported.geometry, PLAN, profile_of(exported))


def interface(values: list[ir.Value]) -> dict[str, tuple[str, list[int]]]:
    return {str(value.name): (str(value.dtype), [axis if isinstance(axis, int) else -1 for axis in value.shape or ()]) for value in values}


def test_interface(graphs: dict[str, ir.Model], exported: Exported) -> None:
    g, S, C = exported.geometry, 24, [28, 21, 21, 16]
    assert tuple(graphs) == GRAPHS
    prefill, decode = graphs["prefill"].graph, graphs["decode"].graph
    G, d, V = g.kv_heads, g.head_size, g.vocabulary
    assert interface(list(prefill.inputs)) == {
        "inputs_embeds": ("FLOAT", [2, S, g.width]),
        "position_ids": ("INT64", [2, S]),
        "attention_mask": ("INT64", [2, S]),
        "visual_index": ("INT64", [2, 16]),
        **{f"past_key_values.{i}.{part}": ("FLOAT", [2, G, C[i], d]) for i in range(4) for part in ("key", "value")},
    }
    assert interface(list(prefill.outputs)) == {
        "logits": ("FLOAT", [2, V]),
        **{f"present.{i}.{part}": ("FLOAT", [2, G, C[i], d]) for i in range(4) for part in ("key", "value")},
        "kept_index.0": ("INT64", [2, 9]),
        "kept_index.1": ("INT64", [2, 4]),
    }
    assert interface(list(decode.inputs)) == {
        "input_ids": ("INT64", [3, 1]),
        "position_ids": ("INT64", [3, 1]),
        "cache_row": ("INT64", [3]),
        **{f"past_key_values.{i}.{part}": ("FLOAT", [3, G, C[i], d]) for i in range(4) for part in ("key", "value")},
    }
    assert set(interface(list(decode.outputs))) == {"logits", *(f"present.{i}.{part}" for i in range(4) for part in ("key", "value"))}


def test_everything_is_static_and_standard(graphs: dict[str, ir.Model]) -> None:
    for name, model in graphs.items():
        assert model.graph.opset_imports == {"": 24}
        for node in model.graph:
            assert node.domain == "" and node.op_type not in FORBIDDEN, f"{name}: {node}"
            for value in node.outputs:
                assert value.shape is not None and value.shape.is_static(), f"{name}: {value}"


def test_of_the_last_layer_only_keys_and_values_are_computed_of_every_row(graphs: dict[str, ir.Model]) -> None:
    rows: dict[str, int] = {}
    for node in graphs["prefill"].graph:
        weight = str(node.inputs[1].name) if node.op_type == "MatMul" and node.inputs[1] is not None else ""
        if ".layers.3." in weight:
            shape = node.outputs[0].shape
            assert shape is not None and weight not in rows
            rows[weight.split(".layers.3.")[1].split(".")[1]] = shape.numpy()[1]
    whole = graphs["prefill"].graph.inputs[0].shape
    assert whole is not None
    kept = whole.numpy()[1] - 12  # four of sixteen visual tokens are left
    assert rows == {"k_proj": kept, "v_proj": kept, "q_proj": 1, "o_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 1}


def test_named_values_are_there(graphs: dict[str, ir.Model], exported: Exported) -> None:
    """Also at layer 0, where the stream is an input; a selector that computes nothing has no scores and order to show."""
    names = {str(value.name) for node in graphs["prefill"].graph for value in node.outputs}
    assert {"stage.0.residual", "stage.0.scores", "stage.0.order", "stage.1.residual"} <= names
    first = Plan(stages=(Stage(selector="magnitude", layer=0, keep=3, requested="3"),))
    at_zero = make_variant(exported.graphs, exported.geometry, first, profile_of(exported))["prefill"]
    assert {"stage.0.residual", "stage.0.order", "stage.0.scores"} <= {str(v.name) for node in at_zero.graph for v in node.outputs}


def test_attention_is_causal_without_a_mask_and_only_where_lengths_are_equal(graphs: dict[str, ir.Model]) -> None:
    for name in ("prefill", "decode"):
        nodes = [node for node in graphs[name].graph if node.op_type == "Attention"]
        assert len(nodes) == 4
        for node in nodes:
            query, key = node.inputs[0], node.inputs[1]
            assert query is not None and key is not None and query.shape is not None and key.shape is not None
            masked = name == "decode" or query.shape[2] == 1  # prefill's last layer runs on one row
            assert (len(node.inputs) > 3 and node.inputs[3] is not None) == masked
            assert node.attributes.get_int("is_causal", 0) == (0 if masked else 1)
            assert masked or query.shape[2] == key.shape[2]
            assert key.shape[1] == 2, "kv heads are not repeated"


def test_weights_are_the_exported_ones(graphs: dict[str, ir.Model], exported: Exported) -> None:
    known = {id(value.const_value) for model in exported.graphs.values() for value in model.graph.initializers.values()}
    for name, model in graphs.items():
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            assert id(value.const_value) in known or value.const_value.nbytes < 2048, f"{name}: {value.name} is a new tensor"


def test_same_input_same_bytes(graphs: dict[str, ir.Model], exported: Exported) -> None:
    again = make_variant(exported.graphs, exported.geometry, PLAN, profile_of(exported))
    for name in GRAPHS:
        assert ir.to_proto(again[name]).SerializeToString() == ir.to_proto(graphs[name]).SerializeToString()


def test_fixing_shapes_twice_changes_nothing(graphs: dict[str, ir.Model]) -> None:
    for model in graphs.values():
        copy = model.clone()
        assert not FixShapes()(copy).modified


def test_dynamic_graphs_stay_as_they_were(exported: Exported) -> None:
    before = ir.to_proto(exported.graphs["decoder"]).SerializeToString()
    make_variant(exported.graphs, exported.geometry, PLAN, profile_of(exported))
    assert ir.to_proto(exported.graphs["decoder"]).SerializeToString() == before
    find_decoder(exported.graphs["decoder"])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"layer": 4}, "layer=4 but the decoder has 4 layers: choose 0..3"),
        ({"keep": 17}, "keep=17 but the model has 16 visual tokens: choose 1..16"),
        ({"selector": "nosuch"}, "nosuch"),
        ({"options": {"strength": -1.0}}, "strength"),
        ({"selector": "fopru"}, "before layer 0"),
        ({"selector": "fopru", "layer": 0, "keep": 6, "options": {"strategy": "row"}}, "choose a multiple of 4"),
    ],
)
def test_plans_that_do_not_fit(exported: Exported, stage: dict[str, object], message: str) -> None:
    values = {"selector": "iwp", "layer": 1, "keep": 4, "requested": "4", **stage}
    plan = Plan(stages=(Stage.model_validate(values),))
    with pytest.raises(PlanError, match=message):
        make_variant(exported.graphs, exported.geometry, plan, profile_of(exported))


def test_profiles_that_do_not_fit(exported: Exported) -> None:
    with pytest.raises(ProfileError, match="lower --max-text"):
        make_variant(exported.graphs, exported.geometry, Plan(), profile_of(exported, max_text=600))


def test_specialise_refuses_a_wrong_fixed_axis(exported: Exported) -> None:
    from sievert.bundle.errors import GraphError

    with pytest.raises(GraphError, match="axis 2 of input 'pixel_values'"):
        specialise(exported.graphs["vision_encoder"], {"pixel_values": (1, 3, 64, 32)})
    with pytest.raises(GraphError, match="no shape given for input 'pixel_values'"):
        specialise(exported.graphs["vision_encoder"], {})
