"""Tiny random LLaVA checkpoints in transformers' own format: model, generation config, tokenizer, chat template, processor.

No network and no torchvision. Weights are random but not degenerate: norm scales differ from 1 and biases from 0, so that a
dropped or swapped parameter changes the output.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

if TYPE_CHECKING:
    from sievert.exporter.export import Exported

Tower = Literal["clip", "siglip"]
Decoder = Literal["llama", "mistral", "qwen2", "qwen3"]

PAD, BOS, EOS, UNK, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS: Final = (*SPECIAL, "user:", "assistant:", "?", ".", "which", "what", "is", "the", "digit", "colour", "red", "green", "blue")
TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "clip-llama": {"tower": "clip", "decoder": "llama"},
    "siglip-qwen2": {"tower": "siglip", "decoder": "qwen2", "heads": 14, "kv_heads": 2, "head_size": 8, "width": 112},
    "clip-mistral": {"tower": "clip", "decoder": "mistral"},
    "clip-qwen3": {"tower": "clip", "decoder": "qwen3", "head_size": 24},
}
"""The four families of the acceptance list, as options of :func:`make_tiny_llava`."""


def make_tiny_llava(
    folder: Path,
    *,
    tower: Tower = "clip",
    decoder: Decoder = "llama",
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    width: int = 64,
    image_size: int = 32,
    patch: int = 8,
    vocabulary: int = 96,
    max_positions: int = 512,
    feature_layer: int | list[int] = -2,
    class_token: Literal["drop", "keep"] = "drop",
    tied: bool = False,
    seed: int = 0,
    text: Mapping[str, Any] = {},
    vision: Mapping[str, Any] = {},
) -> Path:
    """Write a float32 checkpoint into ``folder`` (made if missing) and return it.

    ``text`` and ``vision`` override fields of the decoder's and the tower's config. Visual tokens: ``(image_size // patch) ** 2``
    (one more where CLIP's class token is kept; SigLIP has none). Token ids: pad 0, bos 1, eos 2, unk 3, image 4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LlavaConfig(
        vision_config=_vision_config(tower, image_size, patch, vision),
        text_config=AutoConfig.for_model(
            decoder,
            **{
                "vocab_size": vocabulary,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_size,
                "max_position_embeddings": max_positions,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
                "tie_word_embeddings": tied,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                **({"sliding_window": None} if decoder != "llama" else {}),
                **text,
            },
        ),
        image_token_index=4,
        image_seq_length=(image_size // patch) ** 2,
        vision_feature_select_strategy=_select(tower, class_token),
        vision_feature_layer=feature_layer,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, seed=seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, max_new_tokens=16)
    model.save_pretrained(folder)
    _processor(tower, image_size, patch, vocabulary, _select(tower, class_token)).save_pretrained(folder)
    return folder


@cache
def export_tiny(shape: str) -> tuple[Path, Exported]:
    """Checkpoint folder and float32 export of one of :data:`SHAPES`, made once per test session: an export takes seconds. Do not change."""
    from sievert.exporter.export import export_model

    folder = make_tiny_llava(Path(tempfile.mkdtemp(prefix="tiny-llava-")), **SHAPES[shape])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, export_model(folder)


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Overwrite every parameter: matrices ~ N(0, 1/fan_in), one-dimensional weights ~ N(1, 0.2), biases ~ N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                sharper = 1.5 if "q_proj" in name or "k_proj" in name else 1.0  # attention far from uniform
                parameter.copy_(noise * sharper / (parameter[0].numel() ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + noise * 0.2)


def _select(tower: Tower, class_token: Literal["drop", "keep"]) -> Literal["default", "full"]:
    return "default" if tower == "clip" and class_token == "drop" else "full"


def _vision_config(tower: Tower, image_size: int, patch: int, overrides: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(
        f"{tower}_vision_model",
        **{
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": patch,
            **overrides,
        },
    )


def _processor(tower: Tower, image_size: int, patch: int, vocabulary: int, select: str) -> LlavaProcessor:
    words = (*WORDS, *(f"w{number}" for number in range(max(0, vocabulary - len(WORDS)))))
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words[:vocabulary])}, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, additional_special_tokens=[IMAGE]
    )
    side = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size=side, crop_size=side) if tower == "clip" else SiglipImageProcessorPil(size=side)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if tower == "clip" else 0,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
