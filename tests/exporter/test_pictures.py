"""The vision part of every kind of tower, as a static graph of standard operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sievert.bundle.errors import UnsupportedModelError
from sievert.engines.build.process import build_engine
from sievert.exporter.names import VISION_ENCODER
from sievert.exporter.passes import Float32Islands, KeepScopes, NameInterface, RaiseOpset
from sievert.exporter.pictures import PictureEncoder, _Evaluator, picture_encoder
from sievert.exporter.trace import trace
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.specialise import specialise
from tests.exporter.graphs import assert_equal, run

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
PACKED = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
DYNAMIC = {"NonZero", "Shape", "Size", "If", "Loop", "Scan", "Compress", "Unique", "Where", "Range", "SplitToSequence", "SequenceAt"}


@dataclass(frozen=True)
class Case:
    """A tower: its model, and the shapes that its processor would give for one picture."""

    model: str
    config: Mapping[str, Any]
    pixels: tuple[int, ...]
    layout: Mapping[str, Any]
    planes: int = 0
    attentions: int | None = None
    """Attention operators, where it says something that there are no more."""


def text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **more}


def tower(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TOWER, **more}


def patches(height: int, width: int, size: int = 4) -> tuple[int, int]:
    return height * width, 3 * 2 * size * size


def anyres(kind: str, **more: Any) -> dict[str, Any]:
    pinpoints = [[16, 32], [32, 16], [32, 32], [16, 48]]
    return {"vision_config": tower(kind), "image_grid_pinpoints": pinpoints, "image_token_index": 63, **more}


INTERNVL = {
    "vision_config": tower("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
    "text_config": text("qwen2"),
    "image_token_id": 63,
}
NEXT = anyres("clip_vision_model", text_config=text("llama"))
ONEVISION = anyres("siglip_vision_model", text_config=text("qwen2"), vision_feature_select_strategy="full", vision_feature_layer=-1)
IDEFICS = {"vision_config": tower("idefics3_vision"), "text_config": text("llama"), "scale_factor": 2, "image_token_id": 63}
SMOLVLM = {**IDEFICS, "vision_config": tower("smolvlm_vision")}
PIXTRAL = {
    "vision_config": tower("pixtral", head_dim=16, image_size=64),
    "text_config": text("mistral"),
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "image_token_index": 63,
}
GRID = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
QWEN2 = {
    **GRID,
    "vision_config": {**PACKED, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "text_config": text("qwen2_vl_text", rope_parameters=ROPE),
}
QWEN25 = {
    **GRID,
    "vision_config": {
        **PACKED,
        "hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
    "text_config": text("qwen2_5_vl_text", rope_parameters=ROPE),
}
QWEN3 = {
    **GRID,
    "vision_config": {
        **PACKED,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    },
    "text_config": text("qwen3_vl_text", rope_parameters=ROPE),
}
GEMMA = {
    "vision_config": tower("siglip_vision_model", vision_use_head=False),
    "text_config": text("gemma3_text", sliding_window=8),
    "mm_tokens_per_image": 4,
    "image_token_index": 63,
}
PALIGEMMA = {
    "vision_config": tower("siglip_vision_model", vision_use_head=False, projection_dim=32),
    "text_config": text("gemma"),
    "projection_dim": 32,
    "image_token_index": 63,
}

CASES: dict[str, Case] = {
    "internvl": Case("InternVL", INTERNVL, (3, 3, 16, 16), {}, attentions=2),
    "internvl-single": Case("InternVL", INTERNVL, (1, 3, 16, 16), {}, attentions=2),
    "llava-next": Case("LlavaNext", NEXT, (1, 3, 3, 16, 16), {"image_sizes": [[20, 40]]}, attentions=1),
    "llava-next-square": Case("LlavaNext", NEXT, (1, 5, 3, 16, 16), {"image_sizes": [[30, 32]]}, attentions=1),
    "llava-onevision": Case("LlavaOnevision", ONEVISION, (1, 5, 3, 16, 16), {"image_sizes": [[32, 24]]}, attentions=2),
    "llava-onevision-shrunk": Case(
        "LlavaOnevision", {**ONEVISION, "vision_aspect_ratio": "anyres_max_2"}, (1, 5, 3, 16, 16), {"image_sizes": [[32, 32]]}
    ),
    "idefics3": Case("Idefics3", IDEFICS, (1, 5, 3, 16, 16), {"pixel_attention_mask": np.ones((1, 5, 16, 16))}, attentions=2),
    "smolvlm": Case("SmolVLM", SMOLVLM, (1, 3, 3, 16, 16), {"pixel_attention_mask": np.ones((1, 3, 16, 16))}, attentions=2),
    "mistral3": Case("Mistral3", PIXTRAL, (1, 3, 24, 40), {"image_sizes": [[24, 40]]}, attentions=2),
    "mistral3-padded": Case("Mistral3", PIXTRAL, (1, 3, 24, 40), {"image_sizes": [[24, 32]]}, attentions=2),
    "qwen2-vl": Case("Qwen2VL", QWEN2, patches(4, 6), {"image_grid_thw": [[1, 4, 6]]}, attentions=3),
    "qwen2.5-vl": Case("Qwen2_5_VL", QWEN25, patches(8, 8), {"image_grid_thw": [[1, 8, 8]]}, attentions=3),
    # Windows of 4x4 patches in a grid of 6x10: inner ones, two kinds of edges, a corner.
    "qwen2.5-vl-uneven": Case("Qwen2_5_VL", QWEN25, patches(6, 10), {"image_grid_thw": [[1, 6, 10]]}, attentions=2 * 3 + 1),
    "qwen3-vl": Case("Qwen3VL", QWEN3, patches(4, 6), {"image_grid_thw": [[1, 4, 6]]}, planes=2, attentions=3),
    "gemma3": Case("Gemma3", GEMMA, (1, 3, 16, 16), {}, attentions=2),
    "paligemma": Case("PaliGemma", PALIGEMMA, (1, 3, 16, 16), {}, attentions=2),
}


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """A random model and a processed picture; biases and norms are random too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.model}Config")(**case.config)
    model: Any = getattr(transformers, f"{case.model}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    processed = {"pixel_values": np.random.default_rng(0).standard_normal(case.pixels, dtype=np.float32)}
    return model.to(dtype), processed | {name: np.asarray(value, dtype=np.int64) for name, value in case.layout.items()}


def export(encoder: PictureEncoder) -> ir.Model:
    """The static graph, by the exporter's passes."""
    axes: dict[str, tuple[str, ...]] = {"pixel_values": ()}
    model: ir.Model = trace(encoder, {"pixel_values": encoder.blank()}, axes, what="the vision encoder")
    for each in (NameInterface(axes, encoder.outputs), Float32Islands(), KeepScopes(), RaiseOpset()):
        each(model)
    model.graph.name = VISION_ENCODER
    return specialise(model, {"pixel_values": (1, *encoder.picture)})


def reference(model: PreTrainedModel, processed: Mapping[str, np.ndarray], pixels: np.ndarray) -> dict[str, np.ndarray]:
    layout = {name: torch.as_tensor(value) for name, value in processed.items() if name != "pixel_values"}
    with torch.no_grad():
        base: Any = model.base_model
        result = base.get_image_features(torch.as_tensor(pixels).to(model.dtype), **layout)
    planes = {f"deepstack.{index}": plane for index, plane in enumerate(getattr(result, "deepstack_features", None) or ())}
    return {
        name: np.concatenate([part.float().numpy().reshape(-1, part.shape[-1]) for part in parts])[None]
        for name, parts in {"image_features": result.pooler_output, **planes}.items()
    }


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_graph_says_what_the_model_says(case: Case):
    model, processed = make(case)
    encoder = picture_encoder(model, processed=processed)
    graph = export(encoder)
    other = np.random.default_rng(1).standard_normal(case.pixels, dtype=np.float32)
    expected = reference(model, processed, other)
    got = run(graph, pixel_values=other.reshape(1, *encoder.picture))
    assert list(got) == list(expected) == list(encoder.outputs)
    assert len(got) == 1 + case.planes
    assert got["image_features"].shape[1] == encoder.tokens
    for name, value in expected.items():
        assert_equal(got[name], value)
    operators = [node.op_type for node in graph.graph]
    assert not DYNAMIC & set(operators)
    assert case.attentions in (None, operators.count("Attention"))


@needs_rtx
@pytest.mark.parametrize("name", ["qwen2.5-vl-uneven", "llava-onevision-shrunk"])
def test_windows_and_resized_features_build_for_rtx(name: str, tmp_path: Path):
    model, processed = make(CASES[name], torch.float16)
    graph = lower(export(picture_encoder(model, processed=processed)), "tensorrt-rtx")
    assert lint(graph, "tensorrt-rtx") == []
    (tmp_path / "graph.onnx").write_bytes(to_bytes(graph))
    build_engine("tensorrt_rtx", tmp_path / "graph.onnx", tmp_path / "graph.engine")
    assert (tmp_path / "graph.engine").stat().st_size > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_in_and_out(dtype: torch.dtype):
    model, processed = make(CASES["mistral3"], dtype)
    graph = export(picture_encoder(model, processed=processed)).graph
    kind = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {kind}


def test_parameters_are_shared_and_the_decoder_stays_out():
    model, processed = make(CASES["qwen3-vl"])
    encoder = picture_encoder(model, processed=processed)
    own, whole = dict(encoder.named_parameters()), dict(model.named_parameters())
    assert own
    assert all(whole[name] is parameter for name, parameter in own.items())
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    assert not decoder & {id(parameter) for parameter in own.values()}
    assert any(id(parameter) in decoder for parameter in model.parameters())  # the model keeps it


def state_of_the_library(model: PreTrainedModel) -> list[Any]:
    modules: list[Any] = list(model.modules())
    implementations = [module.config._attn_implementation for module in modules if hasattr(module, "config")]
    return [
        implementations,
        [type(module).forward for module in modules],
        list(ALL_ATTENTION_FUNCTIONS),
        list(ALL_MASK_ATTENTION_FUNCTIONS),
    ]


def test_everything_is_put_back():
    model, processed = make(CASES["qwen2.5-vl-uneven"])
    before = state_of_the_library(model)
    encoder = picture_encoder(model, processed=processed)
    export(encoder)
    assert state_of_the_library(model) == before
    with pytest.raises(RuntimeError):
        encoder(torch.zeros(1, 2, 3))
    assert state_of_the_library(model) == before


def test_tiles_of_zeros_are_padding_if_the_example_has_them():
    model, processed = make(CASES["smolvlm"])
    processed["pixel_values"][:, 1] = 0
    encoder = picture_encoder(model, processed=processed)
    assert encoder.tokens == 2 * 4
    other = np.random.default_rng(1).standard_normal(CASES["smolvlm"].pixels, dtype=np.float32)
    got = run(export(encoder), pixel_values=other)["image_features"]
    other[:, 1] = 0
    assert_equal(got, reference(model, processed, other)["image_features"])


def test_hidden_patches_stay_hidden():
    """The right half of the last tile is padding: there the mask is no mere formality."""
    model, processed = make(CASES["idefics3"])
    processed["pixel_attention_mask"][:, -1, :, 8:] = 0
    encoder = picture_encoder(model, processed=processed)
    other = np.random.default_rng(1).standard_normal(CASES["idefics3"].pixels, dtype=np.float32)
    assert_equal(run(export(encoder), pixel_values=other)["image_features"], reference(model, processed, other)["image_features"])


def test_refused_without_what_the_tower_needs():
    model, processed = make(CASES["llava-next"])
    with pytest.raises(UnsupportedModelError, match="needs image_sizes, but its processor gave pixel_values"):
        picture_encoder(model, processed={"pixel_values": processed["pixel_values"]})
    with pytest.raises(UnsupportedModelError, match="has no get_image_features"):
        picture_encoder(model.get_decoder(), processed=processed)


class Writes(torch.nn.Module):
    """Writes what it sees into a tensor it made itself."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        with _Evaluator():
            made = torch.zeros(2, 3)
            made[0] = pixel_values[0] * 2
            return {"made": made}


def test_content_written_into_a_constant_is_refused():
    with pytest.raises(Exception, match="__setitem__ writes what depends on the picture's content"):
        trace(Writes(), {"pixel_values": torch.ones(2, 3)}, {"pixel_values": ()}, what="a module")
