"""Selectors that read attention and transitions, in whole variants of a random LLaVA of eight layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan, PositionPolicy, Stage
from sievert.exporter.export import Exported, export_model
from sievert.graph_passes.expose import expose
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.variant import make_variant
from sievert.parity.reference import Reference
from tests.graph_passes.llavas import Prompts, pad
from tests.graph_passes.test_random_llavas import compare, make_prompts, profile_of
from tests.tiny_llava import make_tiny_llava

NAMES = ("fastv", "pyramiddrop", "sparsevlm", "transprune")
THREE_CUTS = ((2, 12), (4, 7), (6, 2))


@dataclass(frozen=True)
class Deep:
    """A model, its export, and three prompts of different lengths about random images."""

    exported: Exported
    model: LlavaForConditionalGeneration
    prompts: Prompts


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    folder = make_tiny_llava(tmp_path_factory.mktemp("deep"), layers=8)
    exported = export_model(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return Deep(exported, model, make_prompts(exported, 3))


def plan_of(name: str, cuts: Sequence[tuple[int, int]], positions: PositionPolicy = "keep", **options: Any) -> Plan:
    stages = (Stage(selector=name, layer=layer, keep=keep, requested=str(keep), options=options) for layer, keep in cuts)
    return Plan(stages=tuple(stages), positions=positions)


def run_prefill(deep: Deep, plan: Plan) -> dict[str, np.ndarray]:
    """Embeddings, and every output of prefill but caches, with ``stage.{s}.scores``."""
    profile = profile_of(deep.exported, 3)
    graphs = make_variant(deep.exported.graphs, deep.exported.geometry, plan, profile)
    graphs["prefill"] = expose(graphs["prefill"], [f"stage.{number}.scores" for number in range(len(plan.stages))])
    feeds = pad(deep.prompts, profile)
    for name in ("vision_encoder", "embed_tokens", "prefill"):
        session = ort.InferenceSession(ir.to_proto(graphs[name]).SerializeToString())
        taken = {value.name: feeds.get(value.name, np.zeros(value.shape, np.float32)) for value in session.get_inputs()}
        feeds |= dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))
    return {name: value for name, value in feeds.items() if not name.startswith("present")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_three_cuts_agree_with_the_model_on_the_same_tokens(deep: Deep, name: str, positions: PositionPolicy) -> None:
    compare(deep.exported, Reference(deep.model), plan_of(name, THREE_CUTS, positions), 3)


@pytest.mark.parametrize("name", NAMES)
def test_three_cuts_are_static_and_no_target_refuses_them(deep: Deep, name: str) -> None:
    prefill = make_variant(deep.exported.graphs, deep.exported.geometry, plan_of(name, THREE_CUTS), profile_of(deep.exported, 3))["prefill"]
    for node in prefill.graph:
        assert node.op_type not in {"NonZero", "Compress", "Loop", "If", "Shape", "Range"}
        assert all(value.shape is not None and value.shape.is_static() for value in node.outputs)
    for target in ("tensorrt-rtx", "tensorrt"):
        assert [str(finding) for finding in lint(lower(prefill, target), target) if finding.severity == "error"] == []


@pytest.mark.parametrize(
    ("name", "options"), [("sparsevlm", {}), ("transprune", {"first": 0}), ("transprune", {"first": 0, "weights": "image"})]
)
def test_what_is_carried_over_cuts_is_what_one_cut_finds(deep: Deep, name: str, options: dict[str, Any]) -> None:
    visual = deep.exported.geometry.visual_tokens
    once = run_prefill(deep, plan_of(name, [(6, 5)], **options))
    thrice = run_prefill(deep, plan_of(name, [(2, visual), (4, visual), (6, 5)], **options))
    np.testing.assert_allclose(thrice["stage.2.scores"], once["stage.0.scores"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(thrice["kept_index.2"], once["kept_index.0"])


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_scores_are_the_models_own_attention(deep: Deep, name: str) -> None:
    found = run_prefill(deep, plan_of(name, [(3, 5)]))
    for sample, ids in enumerate(deep.prompts.ids):
        with torch.no_grad():
            given = torch.from_numpy(ids)[None], torch.from_numpy(deep.prompts.pixels[sample])[None]
            output = deep.model(input_ids=given[0], pixel_values=given[1], output_attentions=True)
        attention = output.attentions[2 if name == "fastv" else 3][0].mean(0).numpy()  # [S, S]
        visual = np.flatnonzero(ids == 4)
        rows = np.array([len(ids) - 1])
        if name == "sparsevlm":
            embeds, text = found["inputs_embeds"][sample], np.arange(visual[-1] + 1, len(ids))
            powers = np.exp(embeds[visual] @ embeds[text].T)
            share = (powers / powers.sum(1, keepdims=True)).mean(0)
            rows = text[share > share.mean()]
        np.testing.assert_allclose(found["stage.0.scores"][sample], attention[rows].mean(0)[visual], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["fastv", "transprune"])
def test_layer_0_is_refused_in_a_plan(deep: Deep, name: str) -> None:
    with pytest.raises(PlanError, match=r"layer=0, but .*: choose 1..7"):
        make_variant(deep.exported.graphs, deep.exported.geometry, plan_of(name, [(0, 4)]), profile_of(deep.exported, 1))
