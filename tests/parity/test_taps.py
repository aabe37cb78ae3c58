"""What the hooks collect, against the same tensors had from transformers by other means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan, Stage
from sievert.parity import reference as reference_module
from sievert.parity.reference import Reference
from sievert.parity.selectors.base import Array, Margin, Tap, TokenInputs, VisionTap
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps
from sievert.parity.taps import list_taps
from sievert.parity.vision import patch_grid
from tests.parity.conftest import Load
from tests.parity.engine import make_inputs
from tests.tiny_llava import SHAPES, make_tiny_llava

WIDE = ("residual", "attention_in", "attention_out", "mlp_in", "mlp_out", "final_normed")
HEADS = ("q", "q_rotary", "k", "k_rotary", "v")


@dataclass(frozen=True)
class Probe(ReferenceSelector):
    """Reads what it is told to, takes the first tokens, and leaves the number of every row to later stages."""

    read: tuple[Tap, ...] = ()
    vision: VisionTap | None = None

    @property
    def vision_tap(self) -> VisionTap | None:
        return self.vision

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:
        return tuple(tap for tap in self.read if since <= tap[1] <= layer)

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        scores = -inputs.visual.astype(np.float64)
        yield Step(keep, Scores(scores, scores, scores))

    def carry(self, inputs: TokenInputs) -> Mapping[str, Array]:
        return {f"rows.{inputs.layer}": np.arange(len(inputs.embeds), dtype=np.float64)}


EVERYTHING = Probe(tuple((kind, layer) for kind in (*HEADS, *WIDE) for layer in range(4)))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Probe], None]:
    def use(selector: Probe) -> None:
        monkeypatch.setattr(reference_module, "reference_selector", lambda _name, _options: selector)

    return use


def plan_at(*layers: int, keep: int = 16) -> Plan:
    return Plan(stages=tuple(Stage(selector="iwp", layer=layer, keep=keep, requested=str(keep)) for layer in layers))


def run_eagerly(model: Any, inputs: Any) -> Any:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids = torch.from_numpy(inputs.input_ids)[None]
    pixels = torch.from_numpy(inputs.pixel_values)
    with torch.inference_mode():
        return eager(input_ids=ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True)


def to_numpy(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_taps_are_what_transformers_shows(load: Load, probe: Any, shape: str) -> None:
    model, inputs = load(shape), make_inputs()
    probe(EVERYTHING)
    _, _, (trace,) = Reference(model).prefill(inputs, plan_at(3))
    tap, seen, text = trace.inputs.tap, run_eagerly(model, inputs), model.model.language_model
    assert set(trace.inputs.taps) == set(EVERYTHING.read)
    for layer in range(4):
        module, hidden = text.layers[layer], seen.hidden_states[layer]
        assert np.abs(tap("residual", layer) - to_numpy(hidden[0])).max() < 1e-4
        with torch.inference_mode():
            assert np.abs(tap("final_normed", layer) - to_numpy(text.norm(hidden)[0])).max() < 1e-4
            assert np.abs(tap("attention_in", layer) - to_numpy(module.input_layernorm(hidden)[0])).max() < 1e-4
            middle = hidden + torch.from_numpy(tap("attention_out", layer)).float()
            assert np.abs(tap("mlp_in", layer) - to_numpy(module.post_attention_layernorm(middle)[0])).max() < 1e-4
        if layer < 3:  # the last of the states is normed
            left = to_numpy(seen.hidden_states[layer + 1][0] - middle[0])
            assert np.abs(tap("mlp_out", layer) - left).max() < 1e-4
        q, k, v = (tap(kind, layer) for kind in ("q_rotary", "k_rotary", "v"))
        shared = len(q) // len(k)
        logits = np.einsum("hqd,hkd->hqk", q, k.repeat(shared, axis=0)) * module.self_attn.scaling
        weights = np.exp(np.where(np.tril(np.ones(logits.shape[1:])) > 0, logits, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        assert np.abs(weights - to_numpy(seen.attentions[layer][0])).max() < 1e-5
        mixed = (weights @ v.repeat(shared, axis=0)).transpose(1, 0, 2).reshape(len(trace.rows), -1)
        assert np.abs(tap("attention_out", layer) - mixed @ to_numpy(module.self_attn.o_proj.weight).T).max() < 1e-4


@pytest.mark.parametrize(("name", "layer", "read"), [("fastv", 2, 1), ("fastv", 3, 2), ("pyramiddrop", 2, 2), ("pyramiddrop", 0, 0)])
@pytest.mark.parametrize("shape", ["clip-llama", "siglip-qwen2"])
def test_attention_scores_are_those_of_the_model(load: Load, shape: str, name: str, layer: int, read: int) -> None:
    model, inputs = load(shape), make_inputs()
    plan = Plan(stages=(Stage(selector=name, layer=layer, keep=5, requested="5"),))
    _, _, (trace,) = Reference(model).prefill(inputs, plan)
    row = to_numpy(run_eagerly(model, inputs).attentions[read][0].mean(dim=0))[-1, 2:18]
    assert np.abs(trace.choice.scores - row).max() < 1e-6
    assert set(trace.choice.order.tolist()) == set(np.argsort(-row)[:5].tolist())


def test_looking_changes_nothing(load: Load, probe: Any) -> None:
    for shape in SHAPES:
        reference, inputs = Reference(load(shape)), make_inputs()
        plain = reference.record(inputs, Plan(), tokens=2)
        probe(EVERYTHING)
        looked = reference.record(inputs, plan_at(0, 1, 3), tokens=2)
        assert all(np.array_equal(array, looked.arrays[name]) for name, array in plain.arrays.items())


def test_after_a_cut_everything_is_of_the_rows_that_are_left(load: Load, probe: Any) -> None:
    """The engine's rows, not the selector's own, are what embeddings, carried values and later layers are about."""
    reference, inputs = Reference(load("clip-qwen3")), make_inputs()
    probe(EVERYTHING)
    kept = [np.array([2, 5, 9, 11, 16, 17]), np.array([5, 11, 16])]
    _, arrays, (first, second) = reference.prefill(inputs, plan_at(1, 3, keep=6), kept)
    assert first.own_kept.tolist() == [2, 3, 4, 5, 6, 7] and first.kept.tolist() == kept[0].tolist()
    rows = np.r_[0, 1, kept[0], 18:25]
    assert second.rows.tolist() == rows.tolist() and second.inputs.visual.tolist() == list(range(2, 8))
    assert second.inputs.carried["rows.1"].tolist() == rows.tolist()
    assert np.array_equal(second.inputs.embeds, arrays["inputs_embeds"][rows])
    assert (second.inputs.layer, second.inputs.depth, second.inputs.since, first.inputs.since) == (3, 4, 1, 0)
    assert second.inputs.grid == patch_grid(reference.model) == (4, 4)
    assert set(first.inputs.taps) == {tap for tap in EVERYTHING.read if tap[1] <= 1}
    assert set(second.inputs.taps) == {tap for tap in EVERYTHING.read if tap[1] >= 1}
    assert all(tensor.shape[-2] == len(rows) for tensor in second.inputs.taps.values())
    assert np.abs(second.inputs.tap("k_rotary", 1) - arrays["present.1.key"]).max() < 1e-5  # which ran on what was left
    assert np.array_equal(second.inputs.tap("residual", 3), arrays["stage.1.residual"])
    assert first.inputs.carried == {} and second.choice.carried["rows.3"].tolist() == list(range(15))


def test_what_is_not_there_yet_or_any_more_is_refused() -> None:
    class Greedy(Probe):
        def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:
            return self.read

    for tap in (("k", 0), ("k", 3)):
        selectors = [Probe(), Greedy((tap,))]
        with pytest.raises(PlanError, match=rf"k of layer {tap[1]} is not to be had at a cut before layer 2 after one at 1"):
            list_taps(plan_at(1, 2), selectors, 4)


# The vision encoder.


def received(model: Any, inputs: Any, layer: int, *, class_token: bool) -> Any:
    """The attention patches get in an encoder layer, from the encoder's own eager maps; all columns."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        seen = eager.model.vision_tower(torch.from_numpy(inputs.pixel_values), output_attentions=True)
    maps = to_numpy(seen.attentions[layer][0])
    return maps[:, 0].mean(axis=0) if class_token else maps.mean(axis=(0, 1))


def scores_of(model: Any, probe: Any, tap: VisionTap) -> Any:
    probe(Probe(vision=tap))
    _, arrays, (trace,) = Reference(model).prefill(make_inputs(visual=patches_of(model)), plan_at(0, keep=4))
    assert trace.inputs.visual_scores is arrays["visual_scores"] and trace.inputs.visual_scores is not None
    return trace.inputs.visual_scores


def patches_of(model: Any) -> int:
    """Placeholders of a picture: one more where the class token is kept."""
    kept = model.config.vision_feature_select_strategy == "full" and hasattr(model.model.vision_tower.embeddings, "class_embedding")
    return 17 if kept else 16


@pytest.mark.parametrize("queries", ["mean", "class_token", "auto"])
def test_vision_scores_of_clip(load: Load, probe: Any, queries: Any) -> None:
    """Its features come from the second-last of three layers, without the class token."""
    model = load("clip-llama")
    expected = received(model, make_inputs(), 1, class_token=queries != "mean")[1:]
    for layer in ("feature", "second_last"):
        assert np.abs(scores_of(model, probe, VisionTap(layer, queries)) - expected).max() < 1e-6


def test_vision_scores_of_siglip(load: Load, probe: Any) -> None:
    model = load("siglip-qwen2")
    expected = received(model, make_inputs(), 1, class_token=False)
    for queries in ("mean", "auto"):
        assert np.abs(scores_of(model, probe, VisionTap("second_last", queries)) - expected).max() < 1e-6
    with pytest.raises(PlanError, match="has no class token: choose queries=mean"):
        scores_of(model, probe, VisionTap("feature", "class_token"))


@pytest.mark.parametrize(
    ("feature_layer", "layer"),
    [(-1, 2), (3, 2), (2, 1), (-3, 0), ([-3, -1], 2), ([3, 1], 2)],
)
def test_the_layer_that_feeds_the_projector(tmp_path: Path, probe: Any, feature_layer: Any, layer: int) -> None:
    """``vision_feature_layer`` counts states, of which the first is what enters layer 0; of several the last that runs counts."""
    architecture: Any = LlavaForConditionalGeneration
    folder = make_tiny_llava(tmp_path / "model", feature_layer=feature_layer, class_token="keep" if layer == 0 else "drop")
    model = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    expected = received(model, make_inputs(), layer, class_token=False)
    found = scores_of(model, probe, VisionTap("feature", "mean"))
    assert np.abs(found - expected[17 - len(found) :]).max() < 1e-6 and len(found) == (17 if layer == 0 else 16)
    second = received(model, make_inputs(), 1, class_token=True)
    assert np.abs(scores_of(model, probe, VisionTap("second_last", "auto")) - second[17 - len(found) :]).max() < 1e-6


def test_no_layer_feeds_the_projector(load: Load, probe: Any) -> None:
    model = copy.copy(load("clip-llama"))
    model.config = copy.deepcopy(model.config)
    model.config.vision_feature_layer = 0
    with pytest.raises(PlanError, match="none of them is the one"):
        scores_of(model, probe, VisionTap("feature", "mean"))
