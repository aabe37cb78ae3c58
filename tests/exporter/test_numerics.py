"""The dynamic graphs in ONNX Runtime say what PyTorch says, at batches and lengths the tracer did not see."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.exporter.graphs import assert_equal, run
from tests.tiny_llava import SHAPES, export_tiny

SIZES = ((1, 21), (3, 30))


@cache
def reference(folder: Path) -> Any:
    loader: Any = LlavaForConditionalGeneration
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def random_pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def random_prompt(batch: int, length: int, visual: int) -> tuple[torch.Tensor, np.ndarray]:
    """Ids[B, S] and visual_index[B, Nv], the image at another place in each row."""
    ids = torch.randint(5, 96, (batch, length), generator=torch.Generator().manual_seed(length))
    index = np.stack([np.arange(visual) + row + 1 for row in range(batch)])
    for row in range(batch):
        ids[row, index[row]] = 4
    return ids, index


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_three_graphs_in_a_row_equal_the_model(shape: str, batch: int, length: int):
    folder, exported = export_tiny(shape)
    model, pixels = reference(folder), random_pixels(batch)
    ids, index = random_prompt(batch, length, exported.geometry.visual_tokens)
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
        expected = model(input_ids=ids, pixel_values=pixels, use_cache=True)

    image_features = run(exported.graphs["vision_encoder"], pixel_values=pixels.numpy())["image_features"]
    assert_equal(image_features, features.numpy())
    embeds = run(exported.graphs["embed_tokens"], input_ids=ids.numpy(), image_features=image_features, visual_index=index)["inputs_embeds"]
    with torch.no_grad():
        words = model.get_input_embeddings()(ids).masked_scatter((ids == 4)[..., None], features)
    assert_equal(embeds, words.numpy())
    positions = np.broadcast_to(np.arange(length), (batch, length))
    outputs = run(exported.graphs["decoder"], inputs_embeds=embeds, attention_mask=np.ones_like(positions), position_ids=positions)
    assert_equal(outputs["logits"], expected.logits.numpy())
    for layer, cached in enumerate(expected.past_key_values.layers):
        assert_equal(outputs[f"present.{layer}.key"], cached.keys.numpy())
        assert_equal(outputs[f"present.{layer}.value"], cached.values.numpy())


@pytest.mark.parametrize("shape", ["clip-llama"])
def test_padding_and_positions_reach_the_decoder(shape: str):
    folder, exported = export_tiny(shape)
    embeds = torch.randn(2, 19, exported.geometry.width, generator=torch.Generator().manual_seed(1))
    mask, positions = torch.ones(2, 19, dtype=torch.int64), torch.arange(19) * torch.tensor([[2], [3]])
    mask[1, 11:] = 0
    with torch.no_grad():
        expected = reference(folder)(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    feeds = {"inputs_embeds": embeds.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    logits = run(exported.graphs["decoder"], **feeds)["logits"]
    assert_equal(logits[mask.numpy() == 1], expected[mask == 1].numpy())


def test_ids_under_the_image_do_not_matter():
    _, exported = export_tiny("clip-llama")
    ids, index = random_prompt(2, 24, 16)
    features = np.ones((2, 16, 64), np.float32)
    first = run(exported.graphs["embed_tokens"], input_ids=ids.numpy(), image_features=features, visual_index=index)["inputs_embeds"]
    ids[ids == 4] = 95
    second = run(exported.graphs["embed_tokens"], input_ids=ids.numpy(), image_features=features, visual_index=index)["inputs_embeds"]
    assert np.array_equal(first, second)
