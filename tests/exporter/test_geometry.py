"""The numbers the other stages work with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sievert.exporter.export import Examined, examine_checkpoint
from sievert.exporter.load import load_model
from sievert.exporter.modules import decoder, vision_encoder
from tests.tiny_llava import make_tiny_llava


def test_every_number(tmp_path: Path):
    folder = make_tiny_llava(tmp_path, tower="siglip", decoder="qwen3", layers=3, heads=6, kv_heads=3, head_size=8, width=40, image_size=48)
    assert examine_checkpoint(folder).geometry.model_dump() == {
        "depth": 3,
        "width": 40,
        "heads": 6,
        "kv_heads": 3,
        "head_size": 8,
        "vocabulary": 96,
        "attention_scale": 8**-0.5,
        "max_positions": 512,
        "image_token_id": 4,
        "pad_token_id": 0,
        "eos_token_ids": (2, 3),
        "image_height": 48,
        "image_width": 48,
        "channels": 3,
        "grid": (6, 6),
        "visual_tokens": 36,
        "picture": (3, 48, 48),
        "layout": {},
        "vision_layers": 3,
        "class_tokens": 0,
        "position_axes": 1,
        "visual_planes": 0,
        "images": 0,
        "film": None,
        "two_way": "none",
        "first_position": 0,
    }


def test_stop_tokens_come_from_generation_config_then_text_config_then_tokenizer(tmp_path: Path):
    folder = make_tiny_llava(tmp_path, layers=1)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))
    assert examine_checkpoint(folder).geometry.eos_token_ids == (7,)
    path.unlink()
    assert examine_checkpoint(folder).geometry.eos_token_ids == (2,)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert examine_checkpoint(folder).geometry.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_bounds_the_positions_and_leaves_the_model(tmp_path: Path, decoder: Any, text: dict[str, Any]):
    examined = examine_checkpoint(make_tiny_llava(tmp_path, decoder=decoder, layers=2, text=text))
    assert examined.geometry.max_positions == 64
    config = examined.config.get_text_config()
    assert config.sliding_window is None
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_the_trainers_settings_do_not_reach_the_decoder(tmp_path: Path):
    options = {"use_cache": False, "output_hidden_states": True}
    examined = examine_checkpoint(make_tiny_llava(tmp_path, layers=2, text=options))
    module: Any = decoder(load_model(examined.checkpoint, examined.config, torch.float32))
    assert not any(parameter.is_meta for parameter in module.parameters())
    with torch.no_grad():
        made = module(inputs_embeds=torch.zeros(1, 5, 64))
    assert set(made) == {"logits", "past_key_values"}


@pytest.mark.parametrize(
    ("options", "visual"),
    [
        ({"tower": "clip"}, 16),
        ({"tower": "clip", "class_token": "keep", "feature_layer": [-3, -1]}, 17),
        ({"tower": "siglip", "feature_layer": -1}, 16),
        ({"tower": "clip", "feature_layer": 2, "vision": {"hidden_act": "gelu"}}, 16),
    ],
)
def test_the_traced_module_gives_the_models_own_features(tmp_path: Path, options: dict[str, Any], visual: int):
    examined: Examined = examine_checkpoint(make_tiny_llava(tmp_path, layers=1, **options))
    assert examined.geometry.visual_tokens == visual
    assert examined.geometry.grid == (4, 4)
    model: Any = load_model(examined.checkpoint, examined.config, torch.float32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
        assert examined.checkpoint.architecture.tower is not None
        got = vision_encoder(model, examined.checkpoint.architecture.tower)(pixels)["image_features"]
    assert got.shape == (2, visual, 64)
    assert torch.equal(got, expected)
