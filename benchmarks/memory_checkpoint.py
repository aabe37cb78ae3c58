"""Random checkpoints of the size of real ones, written shard by shard without a model in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.tiny_llava import make_tiny_llava

SHARD: Final = 2 << 30  # bytes
NOISE: Final = 1 << 23  # elements made once; every tensor takes them from another place on
DTYPES: Final = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """A decoder, and the dtype it is stored in and exported as."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    stored: Literal["float32", "bfloat16"]
    exported: Literal["float32", "float16"]


SHAPES: Final = {
    "0.5b": Shape(24, 896, 14, 2, 4864, 151936, "float32", "float32"),
    "3b": Shape(36, 2048, 16, 2, 11008, 151936, "bfloat16", "float16"),
}


def make_checkpoint(shape: Shape, folder: Path, *, vision: Mapping[str, Any] = {}) -> None:
    """A LLaVA of 576 visual tokens with a Qwen2 decoder of this shape, tied head, behind a narrow tower of three layers.

    ``vision`` overrides fields of the tower's config.
    """
    make_tiny_llava(folder, decoder="qwen2", layers=1, image_size=336, patch=14, tied=True, vision=vision)
    (folder / "model.safetensors").unlink()
    config: Any = LlavaConfig.from_pretrained(folder)
    config.text_config = AutoConfig.for_model(
        "qwen2",
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards = list(_shards(sizes, 4 if shape.stored == "float32" else 2))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: sizes[name] for name in names}, shape.stored, seed=number)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _shards(sizes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names, filled = list[str](), 0
    for name, size in sizes.items():
        nbytes = math.prod(size) * itemsize
        if names and filled + nbytes > SHARD:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += nbytes
    yield names


def _write_shard(path: Path, sizes: dict[str, tuple[int, ...]], dtype: str, *, seed: int) -> None:
    """A safetensors file: the header's length, the header in JSON, the tensors."""
    itemsize, end, header = (4 if dtype == "float32" else 2), 0, dict[str, Any](__metadata__={"format": "pt"})
    for name, size in sizes.items():
        header[name] = {"dtype": DTYPES[dtype], "shape": list(size), "data_offsets": [end, end + math.prod(size) * itemsize]}
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    noise = random.standard_normal(NOISE, np.float32) * 0.02
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in sizes.items():
            centre = 1.0 if len(size) == 1 and not name.endswith("bias") else 0.0
            left = math.prod(size)
            while left:
                start = int(random.integers(0, NOISE // 2))
                part = noise[start : start + left] + np.float32(centre)
                file.write(_rounded(part, dtype))
                left -= part.size


def _rounded(numbers: np.ndarray[Any, Any], dtype: str) -> bytes:
    """As bytes of the dtype; bfloat16 is the upper half of float32."""
    return numbers.tobytes() if dtype == "float32" else (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
