"""Exports shared by the exporter's tests; whoever changes a graph makes his own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sievert.exporter.export import Exported, export_model
from tests.tiny_llava import make_tiny_llava


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint of its own for the test to spoil."""
    return make_tiny_llava(tmp_path / "checkpoint", layers=1)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """CLIP + Qwen3 (q/k norms) with scaled YaRN tables in float16."""
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    folder = make_tiny_llava(tmp_path_factory.mktemp("half"), decoder="qwen3", layers=2, head_size=24, text={"rope_parameters": rope})
    return folder, export_model(folder, dtype="float16")


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """SigLIP + Llama with Llama 3's tables in bfloat16, embedding and head tied."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    folder = make_tiny_llava(tmp_path_factory.mktemp("brain"), tower="siglip", layers=1, tied=True, text={"rope_parameters": rope})
    return folder, export_model(folder, dtype="bfloat16")


@pytest.fixture(params=["half", "brain"])
def sixteen(request: pytest.FixtureRequest) -> Exported:
    exported: Exported = request.getfixturevalue(request.param)[1]
    return exported
