"""The bound of a pruned prefill computes what the variant does where it is given what that kept; and which part a node belongs to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.bound import build_bound
from sievert.graph_passes.expose import expose
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.parts import HEAD, REST, find_part, name_parts
from sievert.graph_passes.variant import make_variant
from tests.graph_passes.conftest import Tiny
from tests.graph_passes.llavas import Array, plan_of

PLAN = plan_of([(1, 9), (3, 4)])


@pytest.fixture(scope="module")
def exported(tiny: Tiny) -> Exported:
    return tiny("siglip-qwen2")[1]


@pytest.fixture(scope="module")
def profile(exported: Exported) -> Profile:
    return Profile(batch=2, visual_tokens=exported.geometry.visual_tokens, max_text=8, max_new_tokens=4)


@pytest.fixture(scope="module")
def prefill(exported: Exported, profile: Profile) -> ir.Model:
    return make_variant(exported.graphs, exported.geometry, PLAN, profile)["prefill"]


@pytest.fixture(scope="module")
def bound(exported: Exported, profile: Profile) -> ir.Model:
    return build_bound(exported.graphs["decoder"], exported.geometry, PLAN, profile)


def run(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))


def make_feeds(model: ir.Model, profile: Profile) -> dict[str, Array]:
    rng, rows = np.random.default_rng(0), np.arange(profile.sequence)
    mask = (rows < [[profile.sequence], [profile.sequence - 3]]).astype(np.int64)
    feeds: dict[str, Array] = {
        "position_ids": np.broadcast_to(rows, (2, len(rows))).copy(),
        "attention_mask": mask,
        "visual_index": np.stack([2 + np.arange(profile.visual_tokens), 1 + np.arange(profile.visual_tokens)]),
    }
    for value in model.graph.inputs:
        if value.shape is not None and value.dtype == ir.DataType.FLOAT:
            feeds[str(value.name)] = rng.standard_normal(value.shape.numpy()).astype(np.float32)
    return feeds


def test_given_what_the_variant_kept_it_computes_the_same(prefill: ir.Model, bound: ir.Model, profile: Profile):
    feeds = make_feeds(prefill, profile)
    found = run(expose(prefill, ["stage.0.order", "stage.1.order"]), feeds)
    orders = {f"given_index.{stage}": found.pop(f"stage.{stage}.order") for stage in range(2)}
    given = run(bound, {**feeds, **orders})
    assert given.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(given[name], value, err_msg=name)
    other = run(bound, {**feeds, **orders, "given_index.1": (orders["given_index.1"] + 1) % 9})
    assert not np.array_equal(other["kept_index.1"], found["kept_index.1"])


def test_it_selects_nothing(prefill: ir.Model, bound: ir.Model):
    assert {"TopK", "Exp"} & {node.op_type for node in prefill.graph} == {"TopK", "Exp"}
    assert not {"TopK", "Exp"} & {node.op_type for node in bound.graph}
    added = {str(value.name) for value in bound.graph.inputs} - {str(value.name) for value in prefill.graph.inputs}
    assert added == {"given_index.0", "given_index.1"}
    assert count_flops(bound) < count_flops(prefill)


def test_every_node_of_prefill_belongs_to_a_part(prefill: ir.Model, exported: Exported):
    parts = name_parts(prefill, PLAN)
    depth = exported.geometry.depth
    assert set(parts.values()) == {REST, HEAD, "selector 0", "selector 1", *(f"layer {layer}" for layer in range(depth))}
    by_part = {part: [node for node in prefill.graph if parts[str(node.name)] == part] for part in set(parts.values())}
    for layer in range(depth):
        kinds = [node.op_type for node in by_part[f"layer {layer}"]]
        # The seven projections of a layer, each once: those that a selector has of all rows are the selector's.
        assert (kinds.count("MatMul"), kinds.count("Attention"), kinds.count("TensorScatter")) == (7, 1, 2), f"layer {layer}"
    assert {"TopK", "GatherND"} <= {node.op_type for node in by_part["selector 0"]}
    assert "Gemm" in {node.op_type for node in by_part[HEAD]}
    assert not {"MatMul", "Gemm", "Attention", "TopK"} & {node.op_type for node in by_part[REST]}


def test_fused_nodes_belong_to_the_node_they_are_named_after():
    parts = {"select.0/round.1/MatMul_1": "selector 0", "front.node_silu": "layer 0"}
    assert find_part(parts, "select.0/round.1/MatMul_1") == "selector 0"
    assert find_part(parts, "select.0/round.1/MatMul_1/MatMulAddFusion") == "selector 0"
    assert find_part(parts, "front.node_silu/QuickGeluFusion/") == "layer 0"
    assert find_part(parts, "gemm_input_reshape_token_3") == REST
