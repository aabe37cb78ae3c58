"""Tiny random LLaVAs as references, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.tiny_llava import SHAPES, make_tiny_llava

Load = Callable[[str], Any]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint, by the names of ``tests.tiny_llava.SHAPES``."""

    @cache
    def make(shape: str) -> Path:
        return make_tiny_llava(tmp_path_factory.mktemp("parity") / shape, **SHAPES[shape])

    return make


@pytest.fixture(scope="session")
def load(checkpoint: Callable[[str], Path]) -> Load:
    """The transformers model of a checkpoint, in float32. Tests that change one must copy it."""

    @cache
    def make(shape: str) -> Any:
        model: Any = LlavaForConditionalGeneration
        return model.from_pretrained(checkpoint(shape), dtype=torch.float32, attn_implementation="sdpa").eval()

    return make
