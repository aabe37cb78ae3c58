"""Scores of the vision encoder: the probabilities that transformers' own eager attention computes, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import GraphError, PlanError
from sievert.bundle.specs import Geometry
from sievert.exporter.export import examine_checkpoint
from sievert.exporter.load import DType, load_model, torch_dtype
from sievert.exporter.modules import vision_encoder
from sievert.exporter.passes import Float32Islands, KeepScopes, NameInterface, RaiseOpset
from sievert.exporter.trace import trace
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.targets import TARGETS
from sievert.graph_passes.selectors.base import VisionTap
from sievert.graph_passes.specialise import specialise
from sievert.graph_passes.vision_scores import AddVisionScores
from tests.tiny_llava import make_tiny_llava

Array = NDArray[Any]
BATCH = 2
DEPTH = 3
FEATURE, SECOND = VisionTap("feature", "mean"), VisionTap("second_last", "auto")
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"feature_layer": -1},
    "clip-second": {"feature_layer": -2},
    "clip-list": {"feature_layer": [-2, 1], "class_token": "keep"},
    "siglip": {"tower": "siglip", "feature_layer": -1},
}


@dataclass(frozen=True)
class Tower:
    """A checkpoint and its vision encoder as the exporter leaves it: the decoder is left out, for it takes most of an export's time."""

    geometry: Geometry
    specialised: ir.Model
    pixels: Array
    probabilities: list[Array]
    """Transformers' attention ``[B, H, N, N]`` to these pixels in each layer, in float32."""

    def static(self) -> ir.Model:
        """The graph, to be changed."""
        return self.specialised.clone()


Make = Callable[..., Tower]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """One of :data:`TOWERS`, made once; not to be changed."""

    @cache
    def make_tower(name: str, dtype: DType = "float32") -> Tower:
        folder = make_tiny_llava(tmp_path_factory.mktemp(name), layers=1, **TOWERS[name])
        examined = examine_checkpoint(folder)
        loaded = load_model(examined.checkpoint, examined.config, precision := torch_dtype(dtype))
        g = examined.geometry
        pixels = torch.zeros(2, g.channels, g.image_height, g.image_width, dtype=precision)
        axes = {"pixel_values": ("batch",)}
        tower = examined.checkpoint.architecture.tower
        assert tower is not None
        model = trace(vision_encoder(loaded, tower), {"pixel_values": pixels}, axes, what="a vision encoder")
        for step in (NameInterface(axes, ("image_features",)), Float32Islands(), KeepScopes(), RaiseOpset()):
            step(model)
        model.graph.name = "vision_encoder"
        shape = (BATCH, g.channels, g.image_height, g.image_width)
        seen = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        return Tower(g, specialise(model, {"pixel_values": shape}), seen, attend(folder, seen))

    return make_tower


def attend(folder: Path, pixels: Array) -> list[Array]:
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        seen = model.get_submodule("model.vision_tower")(torch.from_numpy(pixels), output_attentions=True)
    return [layer.numpy() for layer in seen.attentions]


def run(model: ir.Model, pixels: Array) -> dict[str, Array]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, {"pixel_values": pixels})
    return dict(zip([value.name for value in session.get_outputs()], values, strict=True))


@pytest.mark.parametrize(
    ("name", "tap", "layer", "class_row"),
    [
        ("clip", VisionTap("feature", "mean"), 2, False),
        ("clip", VisionTap("feature", "class_token"), 2, True),
        ("clip", VisionTap("second_last", "auto"), 1, True),
        ("clip-second", VisionTap("feature", "mean"), 1, False),
        ("clip-second", VisionTap("second_last", "mean"), 1, False),
        ("clip-list", VisionTap("feature", "auto"), 1, True),
        ("clip-list", VisionTap("second_last", "mean"), 1, False),
        ("siglip", VisionTap("feature", "auto"), 2, False),
        ("siglip", VisionTap("second_last", "auto"), 1, False),
    ],
)
@pytest.mark.parametrize("largest_map", [2048**2, 100])
def test_scores_are_transformers_probabilities(
    make: Make, name: str, tap: VisionTap, layer: int, class_row: bool, largest_map: int
) -> None:
    tower = make(name)
    found = run(AddVisionScores(tap, tower.geometry, largest_map)(tower.static()).model, tower.pixels)
    attention = tower.probabilities[layer]  # [B, H, N, N]
    per_key = (attention[:, :, :1] if class_row else attention).mean(axis=(1, 2))
    expected = per_key[:, 1:] if name in ("clip", "clip-second") else per_key  # the class token's column goes where the features drop it
    assert found["visual_scores"].dtype == np.float32
    assert found["visual_scores"].shape == expected.shape == (BATCH, tower.geometry.visual_tokens)
    np.testing.assert_allclose(found["visual_scores"], expected, rtol=2e-5, atol=1e-7)
    # What could pass by accident: another layer, another row, no softmax at all.
    others = [other[:, :, :1] if class_row else other for place, other in enumerate(tower.probabilities) if place != layer]
    for other in others:
        assert np.abs(other.mean(axis=(1, 2))[:, -expected.shape[1] :] - expected).max() > 1e-3
    np.testing.assert_array_equal(found["image_features"], run(tower.specialised, tower.pixels)["image_features"])


def test_large_maps_are_computed_in_blocks(make: Make) -> None:
    """17 rows and columns: at 100 elements 5 rows at once, and never a whole map."""
    tower = make("clip")
    whole, blocks = (AddVisionScores(FEATURE, tower.geometry, size)(tower.static()).model for size in (2048**2, 100))
    rows = [[node.outputs[0].shape.numpy()[2] for node in softmaxes(model)] for model in (whole, blocks)]  # type: ignore[union-attr]
    assert rows == [[17], [5, 5, 5, 2]]
    single = AddVisionScores(FEATURE, tower.geometry, 1)(tower.static()).model
    assert len(softmaxes(single)) == 17


def softmaxes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Softmax"]


def test_sixteen_bit_graphs_score_in_float32(make: Make) -> None:
    tower = make("clip-second", "float16")
    model = FixShapes()(AddVisionScores(FEATURE, tower.geometry)(tower.static())).model
    scores = model.graph.outputs[-1]
    assert (scores.name, scores.dtype) == ("visual_scores", ir.DataType.FLOAT) and scores.shape == [BATCH, 16]
    (softmax,) = softmaxes(model)
    product = softmax.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None and product.op_type == "MatMul"
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for value in (*product.inputs, *softmax.inputs))
    found = run(model, tower.pixels.astype(np.float16))["visual_scores"]
    np.testing.assert_allclose(found, tower.probabilities[1].mean(axis=(1, 2))[:, 1:], rtol=0.02)


def test_the_finished_graph_is_static_and_lowers_for_every_target(make: Make) -> None:
    tower = make("clip")
    model = FixShapes()(AddVisionScores(FEATURE, tower.geometry)(tower.static())).model
    assert [value.name for value in model.graph.outputs] == ["image_features", "visual_scores"]
    assert not FixShapes()(model.clone()).modified
    assert all(value.shape is not None and value.shape.is_static() for node in model.graph for value in node.outputs)
    expected = run(model, tower.pixels)
    for target in TARGETS:
        lowered = lower(model, target)
        assert [finding for finding in lint(lowered, target) if finding.severity == "error"] == []
        for name, value in run(lowered, tower.pixels).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_second_time_is_refused(make: Make) -> None:
    tower = make("clip")
    once = AddVisionScores(FEATURE, tower.geometry)(tower.static())
    assert once.modified
    with pytest.raises(ir.passes.PreconditionError, match="gives visual_scores already"):
        AddVisionScores(SECOND, tower.geometry)(once.model)


def test_a_layer_behind_the_features_is_refused(make: Make) -> None:
    """The graph ends with layer 1, as it would in an encoder of four."""
    tower = make("clip-second")
    deeper = tower.geometry.model_copy(update={"vision_layers": DEPTH + 1})
    with pytest.raises(PlanError, match="reads layer 2, the second-last.*features leave after layer 1.*such as fopru"):
        AddVisionScores(SECOND, deeper)(tower.static())
    AddVisionScores(FEATURE, deeper)(tower.static())


def test_an_encoder_without_attention_is_refused(make: Make) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["": 24]>
        vision_encoder (float[2,16,192] pixel_values) => (float[2,16,192] image_features) { image_features = Relu(pixel_values) }"""
    )
    with pytest.raises(PlanError, match="no Attention operator .* use a selector that reads the embeddings or the decoder"):
        AddVisionScores(FEATURE, make("clip").geometry)(model)


def test_an_operator_that_is_no_layers_is_refused(make: Make) -> None:
    tower = make("clip")
    with pytest.raises(GraphError, match="3 Attention operators but 2 layers"):
        AddVisionScores(FEATURE, tower.geometry.model_copy(update={"vision_layers": 2}))(tower.static())
    model = tower.static()
    last = [node for node in model.graph if node.op_type == "Attention"][-1]
    last.metadata_props["pkg.torch.onnx.name_scopes"] = "['vision_tower.encoder.layers.1.self_attn']"
    with pytest.raises(GraphError, match=r"attention number 2 .* was exported from layer \[1\]"):
        AddVisionScores(FEATURE, tower.geometry)(model)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"grid": (2, 2), "visual_tokens": 4}, "expected the 4 patches of the grid and 1 class tokens"),  # merged 2 x 2
        ({"class_tokens": 0}, "expected the 16 patches of the grid and 0 class tokens"),
        ({"visual_tokens": 9}, "for 9 visual tokens"),
    ],
)
def test_columns_that_are_not_the_patches_are_refused(make: Make, update: dict[str, Any], words: str) -> None:
    tower = make("clip")
    with pytest.raises(GraphError, match=words):
        AddVisionScores(FEATURE, tower.geometry.model_copy(update=update))(tower.static())


def test_attention_of_another_kind_is_refused(make: Make) -> None:
    tower = make("clip")
    for change, words in (({"is_causal": 1}, "has a mask or grouped heads"), ({"softcap": 3.0}, "cannot be read: it caps its scores")):
        model = tower.static()
        for node in model.graph:
            if node.op_type == "Attention":
                for name, value in change.items():
                    node.attributes[name] = ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrFloat32(name, value)
        with pytest.raises(GraphError, match=words):
            AddVisionScores(FEATURE, tower.geometry)(model)


def test_a_bundle_made_before_layers_were_recorded_still_gives_the_mean(make: Make) -> None:
    tower = make("clip")
    old = tower.geometry.model_copy(update={"vision_layers": 0, "class_tokens": 0})
    now, before = (run(AddVisionScores(FEATURE, g)(tower.static()).model, tower.pixels)["visual_scores"] for g in (tower.geometry, old))
    np.testing.assert_array_equal(now, before)
    with pytest.raises(PlanError, match="an unknown number of layers"):
        AddVisionScores(VisionTap("second_last", "mean"), old)(tower.static())
