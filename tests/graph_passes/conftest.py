"""Dynamic graphs of the tiny random LLaVAs, exported once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sievert.exporter.export import Exported
from tests.tiny_llava import export_tiny

Tiny = Callable[[str], tuple[Path, Exported]]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The checkpoint and its exported graphs, by the names of ``tests.tiny_llava.SHAPES``. Not to be changed."""
    return export_tiny
