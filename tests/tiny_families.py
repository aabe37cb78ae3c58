"""Tiny random checkpoints of the vision-language families, in transformers' own format, for tests without network or torchvision.

One plan per family turns :class:`Options` into a config and the parts of a processor; :func:`make_family` writes model, generation config,
tokenizer, chat template and processor. Sizes are small, structure is the released models': biases, norms of queries and keys, tied heads,
tiles, windows, newline and row tokens. Weights come from :func:`tests.tiny_llava.randomise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.tiny_llava import randomise
from tests.tiny_processors import FIRST_TOKEN, VOCABULARY, make_template, make_tokenizer, write_processor


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a test may ask of any family. ``text``, ``vision``, ``whole`` override fields of the configs, ``images`` of the image processor.

    ``heads * head_size`` must be ``width`` where the family derives one from the other (Qwen2-VL, Qwen2.5-VL).
    """

    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    width: int = 64
    max_positions: int = 2048
    tied: bool = False
    seed: int = 0
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """A family's config, and its processor as :func:`tests.tiny_processors.write_processor` takes it."""

    config: Any
    kind: str
    tokenizer: Any
    images: Any
    template: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    videos: Mapping[str, Any] = field(default_factory=dict)


Plan = Callable[[Options], Parts]

BASE: Final = 32
"""Side of a tile, in pixels."""
PATCH: Final = 8
PALIGEMMA_VOCABULARY: Final = 1280
"""Its processor adds 1152 tokens for places to any tokenizer."""


def make_family(name: str, folder: Path, **overrides: Any) -> Path:
    """Write the float32 checkpoint of one of :data:`FAMILIES` into ``folder`` (made if missing) and return it.

    ``overrides`` are fields of :class:`Options`. Token ids: pad 0, bos 1, eos 2, unk 3.
    """
    return FAMILIES[name](folder, **overrides)


def _make(plan: Plan, folder: Path, **overrides: Any) -> Path:
    options = Options(**overrides)
    parts = plan(options)
    folder.mkdir(parents=True, exist_ok=True)
    model = getattr(transformers, parts.config.architectures[0])(parts.config)
    randomise(model, seed=options.seed)
    _centre_norms(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, max_new_tokens=16)
    model.save_pretrained(folder)
    write_processor(
        folder,
        parts.kind,
        tokenizer=parts.tokenizer,
        images=parts.images,
        template=parts.template,
        fields=parts.fields,
        videos=parts.videos,
    )
    return folder


def _centre_norms(model: torch.nn.Module) -> None:
    """Gemma's norms multiply by one more than their weight: gains around 1, as everywhere, are weights around 0."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"):
                module.get_parameter("weight").sub_(1)


def _text(options: Options, **fields: Any) -> dict[str, Any]:
    """The fields of a decoder's config that all families share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": options.width,
        "intermediate_size": 2 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_size,
        "max_position_embeddings": options.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "tie_word_embeddings": options.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **fields,
        **options.text,
    }


def _tower(options: Options, **fields: Any) -> dict[str, Any]:
    """The fields of a vision tower's config that most families share."""
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": BASE,
        "patch_size": PATCH,
        **fields,
        **options.vision,
    }


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _internvl(options: Options) -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokens = list(named.values())
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_text(options)),
        vision_config=_tower(options, attention_bias=True, norm_type="layer_norm"),
        tie_word_embeddings=options.tied,
        architectures=["InternVLForConditionalGeneration"],
        **{
            "image_token_id": FIRST_TOKEN + tokens.index("<IMG_CONTEXT>"),
            "image_seq_length": (BASE // PATCH // 2) ** 2,
            "downsample_ratio": 0.5,
            **options.whole,
        },
    )
    return Parts(
        config,
        "InternVLProcessor",
        make_tokenizer(tokens, named=named, bos=False),
        GotOcr2ImageProcessorPil(**{"size": _square(BASE), "crop_to_patches": True, "min_patches": 1, "max_patches": 4, **options.images}),
        make_template("<IMG_CONTEXT>"),
        fields={"image_seq_length": config.image_seq_length},
        videos={"video_processor_type": "InternVLVideoProcessor", "size": _square(BASE)},
    )


_QWEN_TOKENS: Final = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS: Final = {
    field: FIRST_TOKEN + place
    for place, field in enumerate(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"))
}


def _sections(sizes: tuple[int, int, int], **fields: Any) -> dict[str, Any]:
    """Rotary frequencies by axis (time, height, width): the released ones in their proportion, for half of a head of 16."""
    return {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": list(sizes), **fields}


def _qwen(options: Options, config: Any, kind: str, videos: str) -> Parts:
    patches = {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    }
    return Parts(
        config,
        kind,
        make_tokenizer(_QWEN_TOKENS, bos=False),
        Qwen2VLImageProcessorPil(**{**patches, **options.images}),
        make_template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
        videos={"video_processor_type": videos, **patches},
    )


def _qwen2_vl(options: Options) -> Parts:
    vision = {"depth": 3, "embed_dim": 48, "hidden_size": options.width, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH}
    config = transformers.Qwen2VLConfig(
        text_config=_text(options, rope_parameters=_sections((2, 3, 3))),
        vision_config={**vision, **options.vision},
        tie_word_embeddings=options.tied,
        architectures=["Qwen2VLForConditionalGeneration"],
        **{**_QWEN_IDS, **options.whole},
    )
    return _qwen(options, config, "Qwen2VLProcessor", "Qwen2VLVideoProcessor")


def _qwen2_5_vl(options: Options) -> Parts:
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "out_hidden_size": options.width,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,  # 2 x 2 merged patches
        "fullatt_block_indexes": [1, 3],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(options, rope_parameters=_sections((2, 3, 3))),
        vision_config={**vision, **options.vision},
        tie_word_embeddings=options.tied,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **{**_QWEN_IDS, **options.whole},
    )
    return _qwen(options, config, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")


_PINPOINTS: Final = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def _llava_next(options: Options) -> Parts:
    config = transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**_text(options, sliding_window=None)),
        vision_config=AutoConfig.for_model("clip_vision_model", **_tower(options)),
        tie_word_embeddings=options.tied,
        architectures=["LlavaNextForConditionalGeneration"],
        **{
            "image_token_index": FIRST_TOKEN,
            "image_seq_length": (BASE // PATCH) ** 2,
            "image_grid_pinpoints": _PINPOINTS,
            **options.whole,
        },
    )
    images = {"size": {"shortest_edge": BASE}, "crop_size": _square(BASE), "image_grid_pinpoints": config.image_grid_pinpoints}
    return Parts(
        config,
        "LlavaNextProcessor",
        make_tokenizer(["<image>"]),
        LlavaNextImageProcessorPil(**{**images, **options.images}),
        make_template("<image>"),
        fields={
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,  # CLIP's class token, which that strategy drops again
            "image_token": "<image>",
        },
    )


def _llava_onevision(options: Options) -> Parts:
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**_text(options)),
        vision_config=AutoConfig.for_model("siglip_vision_model", **_tower(options, vision_use_head=False)),
        tie_word_embeddings=options.tied,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        **{
            "image_token_index": FIRST_TOKEN,
            "video_token_index": FIRST_TOKEN + 1,
            "image_grid_pinpoints": _PINPOINTS,
            "vision_aspect_ratio": "anyres_max_9",
            **options.whole,
        },
    )
    images = {"size": _square(BASE), "image_grid_pinpoints": config.image_grid_pinpoints}
    return Parts(
        config,
        "LlavaOnevisionProcessor",
        make_tokenizer(["<image>", "<video>"], bos=False),
        LlavaOnevisionImageProcessorPil(**{**images, **options.images}),
        make_template("<image>"),
        fields={
            "num_image_tokens": (BASE // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": config.vision_aspect_ratio,
        },
        videos={"video_processor_type": "LlavaOnevisionVideoProcessor", "size": _square(BASE)},
    )


_TILE_TOKENS: Final = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)


def _idefics3(options: Options) -> Parts:
    scale = int(options.whole.get("scale_factor", 2))
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**_text(options)),
        vision_config=_tower(options),
        tie_word_embeddings=options.tied,
        architectures=["Idefics3ForConditionalGeneration"],
        **{"image_token_id": FIRST_TOKEN, "scale_factor": scale, **options.whole},
    )
    return Parts(
        config,
        "Idefics3Processor",
        make_tokenizer(_TILE_TOKENS, lines=("\n", "\n\n")),
        Idefics3ImageProcessorPil(**{"size": {"longest_edge": 2 * BASE}, "max_image_size": {"longest_edge": BASE}, **options.images}),
        make_template("<image>"),
        fields={"image_seq_len": (BASE // PATCH // scale) ** 2},
    )


def _smolvlm(options: Options) -> Parts:
    scale, patch = int(options.whole.get("scale_factor", 4)), 4
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**_text(options)),
        vision_config=_tower(options, patch_size=patch),
        tie_word_embeddings=options.tied,
        architectures=["SmolVLMForConditionalGeneration"],
        **{"image_token_id": FIRST_TOKEN, "scale_factor": scale, **options.whole},
    )
    return Parts(
        config,
        "SmolVLMProcessor",
        make_tokenizer(_TILE_TOKENS, lines=("\n", "\n\n")),
        SmolVLMImageProcessorPil(**{"size": {"longest_edge": 2 * BASE}, "max_image_size": {"longest_edge": BASE}, **options.images}),
        make_template("<image>"),
        fields={"image_seq_len": (BASE // patch // scale) ** 2},
        videos={"video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": BASE}, "max_image_size": {"longest_edge": BASE}},
    )


_ROW_TOKENS: Final = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _pixtral_parts(options: Options, config: Any, merge: int) -> Parts:
    images = {"size": {"longest_edge": 2 * BASE}, "patch_size": _square(PATCH)}
    return Parts(
        config,
        "PixtralProcessor",
        make_tokenizer(_ROW_TOKENS),
        PixtralImageProcessorPil(**{**images, **options.images}),
        make_template("[IMG]"),
        fields={
            "patch_size": PATCH,
            "spatial_merge_size": merge,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
    )


def _mistral3(options: Options) -> Parts:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_text(options, sliding_window=None)),
        vision_config=AutoConfig.for_model("pixtral", **_tower(options, image_size=2 * BASE)),
        tie_word_embeddings=options.tied,
        architectures=["Mistral3ForConditionalGeneration"],
        **{"image_token_index": FIRST_TOKEN, "spatial_merge_size": 2, "multimodal_projector_bias": False, **options.whole},
    )
    return _pixtral_parts(options, config, config.spatial_merge_size)


def _pixtral(options: Options) -> Parts:
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**_text(options, sliding_window=None)),
        vision_config=AutoConfig.for_model("pixtral", **_tower(options, image_size=2 * BASE)),
        tie_word_embeddings=options.tied,
        architectures=["LlavaForConditionalGeneration"],
        **{
            "image_token_index": FIRST_TOKEN,
            "image_seq_length": 1,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            **options.whole,
        },
    )
    return _pixtral_parts(options, config, 1)


def _qwen3_vl(options: Options) -> Parts:
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "out_hidden_size": options.width,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": PATCH,
        "num_position_embeddings": 8 * 8,
        "deepstack_visual_indexes": [1, 2],
    }
    config = transformers.Qwen3VLConfig(
        text_config=_text(options, rope_parameters=_sections((4, 2, 2), mrope_interleaved=True)),
        vision_config={**vision, **options.vision},
        tie_word_embeddings=options.tied,
        architectures=["Qwen3VLForConditionalGeneration"],
        **{**_QWEN_IDS, **options.whole},
    )
    return _qwen(options, config, "Qwen3VLProcessor", "Qwen3VLVideoProcessor")


def _gemma3(options: Options) -> Parts:
    side, pooled = 2 * BASE, 16
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    text = _text(
        options,
        sliding_window=16,
        layer_types=["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(options.layers)],
        query_pre_attn_scalar=24,  # the 27B model's is not its head size either
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=_tower(options, model_type="siglip_vision_model", image_size=side, vision_use_head=False),
        tie_word_embeddings=options.tied,
        architectures=["Gemma3ForConditionalGeneration"],
        **{
            "mm_tokens_per_image": pooled,
            "boi_token_index": FIRST_TOKEN,
            "eoi_token_index": FIRST_TOKEN + 1,
            "image_token_index": FIRST_TOKEN + 2,
            **options.whole,
        },
    )
    return Parts(
        config,
        "Gemma3Processor",
        make_tokenizer(list(named.values()), named=named, lines=("\n", "\n\n")),
        Gemma3ImageProcessorPil(**{"size": _square(side), **options.images}),
        make_template("<start_of_image>"),
        fields={"image_seq_length": config.mm_tokens_per_image},
    )


_PREFIX_TEMPLATE: Final = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def _paligemma(options: Options) -> Parts:
    return _paligemma_parts(options, transformers.GemmaConfig(**_text(options, vocab_size=PALIGEMMA_VOCABULARY)))


def _paligemma2(options: Options) -> Parts:
    text = _text(
        options,
        vocab_size=PALIGEMMA_VOCABULARY,
        query_pre_attn_scalar=options.head_size,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
    )
    return _paligemma_parts(options, transformers.Gemma2Config(**text))


def _paligemma_parts(options: Options, text: Any) -> Parts:
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=AutoConfig.for_model("siglip_vision_model", **_tower(options, vision_use_head=False)),
        tie_word_embeddings=options.tied,
        architectures=["PaliGemmaForConditionalGeneration"],
        **{
            "image_token_index": FIRST_TOKEN,
            "projection_dim": options.width,
            "hidden_size": options.width,
            "vocab_size": PALIGEMMA_VOCABULARY,
            **options.whole,
        },
    )
    images = SiglipImageProcessorPil(**{"size": _square(BASE), "image_seq_length": (BASE // PATCH) ** 2, **options.images})
    # The processor writes the first token itself, behind the picture, and ends the prompt with a new line.
    return Parts(config, "PaliGemmaProcessor", make_tokenizer(["<image>"], lines=("\n",)), images, _PREFIX_TEMPLATE)


FAMILIES: Final[Mapping[str, Callable[..., Path]]] = {
    "internvl3": partial(_make, _internvl),
    "qwen2-vl": partial(_make, _qwen2_vl, tied=True),
    "qwen2.5-vl": partial(_make, _qwen2_5_vl),
    "llava-next": partial(_make, _llava_next),
    "llava-onevision": partial(_make, _llava_onevision, tied=True),
    "smolvlm": partial(_make, _smolvlm),
    "idefics3": partial(_make, _idefics3),
    # Here heads * head_size is not the width, as in the released models.
    "mistral3": partial(_make, _mistral3, width=96),
    "pixtral": partial(_make, _pixtral, width=96),
    "qwen3-vl": partial(_make, _qwen3_vl, tied=True),
    "gemma3": partial(_make, _gemma3, tied=True, width=96),
    "paligemma": partial(_make, _paligemma, tied=True, width=96),
    "paligemma2": partial(_make, _paligemma2, tied=True, width=96),
}
"""Builders by family, each ``(folder, **fields of Options) -> folder``; heads are tied where the small released model's are."""

PICTURES: Final[Mapping[str, tuple[int, int]]] = {
    "internvl3": (64, 32),
    "qwen2-vl": (96, 64),
    "qwen2.5-vl": (96, 64),
    "llava-next": (64, 48),
    "llava-onevision": (64, 48),
    "smolvlm": (64, 40),
    "idefics3": (64, 40),
    "mistral3": (64, 48),
    "pixtral": (64, 48),
    "qwen3-vl": (96, 64),
    "gemma3": (64, 64),
    "paligemma": (32, 32),
    "paligemma2": (32, 32),
}
"""Width and height of a picture, in pixels, that makes each family show its structure: several tiles, windows or rows."""
