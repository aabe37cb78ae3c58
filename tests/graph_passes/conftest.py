"""Dynamic graphs of the tiny random LLaVAs, exported once for all tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sievert.exporter.export import Exported, export_model
from tests.tiny_llava import SHAPES, make_tiny_llava

Tiny = Callable[[str], tuple[Path, Exported]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The checkpoint and its exported graphs, by the names of ``tests.tiny_llava.SHAPES``."""

    @cache
    def make(shape: str) -> tuple[Path, Exported]:
        folder = make_tiny_llava(tmp_path_factory.mktemp("tiny") / shape, **SHAPES[shape])
        return folder, export_model(folder)

    return make
