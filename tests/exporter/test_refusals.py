"""What is no checkpoint, or not one Sievert can export, is refused in words that end the problem, before anything is traced."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sievert.bundle.errors import CheckpointError, InputError, UnsupportedModelError
from sievert.bundle.remote_code import trust_remote_code
from sievert.exporter.export import examine_checkpoint, export_model
from tests.tiny_llava import make_tiny_llava

WEIGHTS = "model.safetensors"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refused(folder: Path, kind: type[InputError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        examine_checkpoint(folder)
    assert type(caught.value) is kind
    return str(caught.value)


def refused_by_export(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export_model(folder)
    return str(caught.value)


def test_a_sound_checkpoint_passes(tiny: Path):
    assert examine_checkpoint(tiny).geometry.visual_tokens == 16
    assert examine_checkpoint(str(tiny)).checkpoint.architecture.name == "llava"


def test_no_such_folder(tmp_path: Path):
    assert "does not exist: give a checkpoint folder, or a hub id" in refused(tmp_path / "nothing")


def test_a_file(tiny: Path):
    assert "is a file" in refused(tiny / "config.json")


def test_a_folder_without_config(tiny: Path):
    (tiny / "config.json").unlink()
    assert "holds no config.json" in refused(tiny)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[1]", "holds a JSON list"), ("\xff", "cannot be read")])
def test_a_damaged_config(tiny: Path, text: str, message: str):
    (tiny / "config.json").write_bytes(text.encode("latin-1"))
    assert message in refused(tiny)


def test_a_bundle(tiny: Path):
    (tiny / "sievert.json").write_text("{}")
    assert "is a Sievert bundle, not a checkpoint" in refused(tiny)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_remote_code(tiny: Path, name: str):
    edit(tiny / name, lambda content: content.update(auto_map={"AutoModel": "modeling.Evil"}))
    message = refused(tiny)
    assert name in message
    assert "not run unasked" in message
    with trust_remote_code():
        edit(tiny / name, lambda content: content.update(auto_map={"AutoModel": "owner/name--modeling.Evil"}))
        assert "code of another repository (owner/name--modeling.Evil)" in refused(tiny)


def test_a_text_only_model(tiny: Path):
    def change(content: dict[str, Any]) -> None:
        content.update(content.pop("text_config"), architectures=["LlamaForCausalLM"], model_type="llama")
        del content["vision_config"]

    edit(tiny / "config.json", change)
    message = refused(tiny, UnsupportedModelError)
    assert "LlamaForCausalLM, which has no vision tower" in message
    assert "LlavaForConditionalGeneration" in message
    assert "qwen3" in message


def test_another_vision_language_model(tiny: Path):
    edit(tiny / "config.json", lambda content: content.update(architectures=["Idefics3ForConditionalGeneration"]))
    assert "Sievert exports LlavaForConditionalGeneration (towers: clip_vision_model" in refused(tiny, UnsupportedModelError)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantised_checkpoint(tiny: Path, part: str | None):
    def change(content: dict[str, Any]) -> None:
        (content if part is None else content[part])["quantization_config"] = {"quant_method": "awq"}

    edit(tiny / "config.json", change)
    assert "quantised already (awq" in refused(tiny, UnsupportedModelError)


def test_pickled_weights(tiny: Path):
    (tiny / WEIGHTS).rename(tiny / "pytorch_model.bin")
    message = refused(tiny)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_no_weights(tiny: Path):
    (tiny / WEIGHTS).unlink()
    assert "holds no .safetensors file" in refused(tiny)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00002.safetensors"}}, "names model-00002.safetensors, which is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the folder"),
        ({}, "no weight_map"),
    ],
)
def test_a_bad_index(tiny: Path, index: dict[str, Any], message: str):
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused(tiny)


@pytest.mark.parametrize(("name", "message"), [("processor_config.json", "no image processor"), ("tokenizer.json", "no tokenizer")])
def test_missing_processor_files(tiny: Path, name: str, message: str):
    (tiny / name).unlink()
    assert message in refused(tiny)


def test_a_processor_of_another_image_size(tiny: Path):
    def change(content: dict[str, Any]) -> None:
        content["image_processor"].update(size={"height": 48, "width": 48}, crop_size={"height": 48, "width": 48})

    edit(tiny / "processor_config.json", change)
    assert "makes images of shape [1, 3, 48, 48], the vision tower takes [1, 3, 32, 32]" in refused(tiny)


def test_a_processor_that_counts_otherwise(tiny: Path):
    edit(tiny / "processor_config.json", lambda content: content.update(vision_feature_select_strategy="full"))
    assert "writes 17 image tokens, the vision tower gives 16" in refused(tiny)


def test_a_processor_without_patch_size(tiny: Path):
    edit(tiny / "processor_config.json", lambda content: content.pop("patch_size"))
    assert "must hold patch_size" in refused(tiny)


def test_a_tokenizer_of_another_model(tiny: Path):
    edit(tiny / "config.json", lambda content: content["text_config"].update(vocab_size=64))
    assert "the tokenizer has 96 tokens but the embedding table 64 rows" in refused(tiny)


def test_an_image_token_outside_the_table(tiny: Path):
    edit(tiny / "config.json", lambda content: content.update(image_token_index=96))
    assert "resize the embeddings" in refused(tiny)


def test_an_image_token_that_is_not_the_processors(tiny: Path):
    edit(tiny / "config.json", lambda content: content.update(image_token_index=9))
    assert "the processor's '<image>'" in refused(tiny)


def test_no_stop_token(tiny: Path):
    edit(tiny / "generation_config.json", lambda content: content.pop("eos_token_id"))
    edit(tiny / "config.json", lambda content: content["text_config"].update(eos_token_id=None))
    edit(tiny / "tokenizer_config.json", lambda content: content.pop("eos_token"))
    assert "names no stop token" in refused(tiny)


def test_an_unsupported_tower(tiny: Path):
    vision = AutoConfig.for_model("dinov2", hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    edit(tiny / "config.json", lambda content: content.update(vision_config=vision.to_dict()))
    assert "the vision tower 'dinov2' is not supported" in refused(tiny, UnsupportedModelError)


def test_a_type_nobody_knows(tiny: Path):
    edit(tiny / "config.json", lambda content: content["text_config"].update(model_type="llama9000"))
    assert "of the type 'llama9000', which transformers" in refused(tiny, UnsupportedModelError)


SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("decoder", "options", "reason"),
    [
        ("phi", {}, "partial rotary embedding"),
        ("phi3", {"pad_token_id": 0}, "fused q, k and v projection (qkv_proj)"),
        ("gpt_neox", {}, "fused q, k and v projection (query_key_value)"),
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 64}, "no list of decoder layers"),
        ("mamba", {}, "state-space, recurrent or hybrid layer"),
        ("mixtral", {"num_key_value_heads": 2}, "mixture of experts"),
        ("qwen3_moe", {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}, "mixture of experts"),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 16}, "nothing has been proven on it"),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "rotary type 'dynamic'"),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "not plain attention (linear_attention)"),
    ],
)
def test_decoders_of_another_structure(tiny: Path, decoder: str, options: dict[str, Any], reason: str):
    text = {**SMALL, **options, "model_type": decoder}
    edit(tiny / "config.json", lambda content: content.update(text_config=text))
    message = refused(tiny, UnsupportedModelError)
    assert f"the decoder {decoder!r} is not supported" in message
    assert reason in message
    assert "llama, mistral, qwen2, qwen3" in message


def test_missing_weights_are_no_random_numbers(tiny: Path):
    edit_weights(tiny, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("mlp.down_proj.weight"))))
    message = refused_by_export(tiny)
    assert "the weights lack 1 of the model's tensors, such as model.language_model.layers.0.mlp.down_proj.weight" in message


def test_weights_cut_short(tiny: Path):
    (tiny / WEIGHTS).write_bytes((tiny / WEIGHTS).read_bytes()[:-1000])
    assert "cannot be loaded" in refused_by_export(tiny)


def test_weights_that_are_not_finite(tiny: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if name.endswith("lm_head.weight"))[0, 0] = torch.nan

    edit_weights(tiny, change)
    assert "lm_head.weight holds numbers that are not finite in float32" in refused_by_export(tiny)


def test_float16_overflow_is_named(tiny: Path):
    edit_weights(tiny, lambda tensors: next(value for name, value in tensors.items() if name.endswith("lm_head.weight")).fill_(1e6))
    with pytest.raises(CheckpointError, match="not finite in float16"):
        export_model(tiny, dtype="float16")


def test_weights_nobody_needs_are_named(tiny: Path, caplog: pytest.LogCaptureFixture):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["adapter.weight"] = torch.ones(3)
        next(value for name, value in tensors.items() if name.endswith("lm_head.weight"))[0, 0] = torch.nan  # ends the export early

    edit_weights(tiny, change)
    with caplog.at_level(logging.WARNING, logger="sievert.exporter"):
        refused_by_export(tiny)
    assert "no place for adapter.weight" in caplog.text


def test_a_window_with_no_room_for_a_prompt(tmp_path: Path):
    folder = make_tiny_llava(tmp_path, decoder="mistral", layers=1, text={"sliding_window": 17})
    assert "an image takes 16 tokens but the decoder's sliding window ends at 17" in refused(folder, UnsupportedModelError)
