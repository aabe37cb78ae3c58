"""`--low-memory`: every command that loads ONNX Runtime's graphs has it, and then no session packs a copy of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sievert import benching
from sievert.bundle.errors import InputError
from sievert.engines.run.base import ModelFile
from sievert.engines.run.footprint import Footprint, load_and_look
from sievert.engines.run.ort import OnnxRuntime, OrtSession
from sievert.engines.run.registry import RUNTIMES, find_runtime
from tests.api.conftest import sievert
from tests.api.test_bad_input import refused

ASK = "what is it ?"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each session that was loaded packs its weights, in the order of loading."""
    loaded: list[bool] = []
    load = OnnxRuntime.load

    def watch(self: OnnxRuntime, model: ModelFile) -> OrtSession:
        loaded.append(self.prepack)
        return load(self, model)

    monkeypatch.setattr(OnnxRuntime, "load", watch)
    return loaded


def _few(command: str, shared: Path, picture: Path, folder: Path) -> list[object]:
    """A command that does as little as it can."""
    if command == "run":
        return ["run", shared, "--image", picture, "--prompt", ASK, "--max-new-tokens", 1]
    if command == "check":
        return ["check", shared, "--variant", "iwp-22", "--samples", 1, "--tokens", 1]
    if command == "bench":
        return ["bench", shared, "--variant", "full", "--rounds", 6, "--tokens", 1, "--profile", "--json", folder / "bench.json"]
    (folder / "data.jsonl").write_text(json.dumps({"image": str(picture), "prompt": ASK}) + "\n")
    return ["eval", shared, "--data", folder / "data.jsonl", "--max-new-tokens", 1, "--out", folder / "answers"]


@pytest.mark.parametrize("command", ["run", "check", "eval", "bench"])
def test_no_session_packs_weights(
    command: str, shared: Path, picture: Path, tmp_path: Path, packed: list[bool], monkeypatch: pytest.MonkeyPatch
):
    measured: list[bool] = []

    def measure(*_: object, low_memory: bool) -> Footprint:
        measured.append(low_memory)
        return Footprint(2, 1)

    monkeypatch.setattr(benching, "measure_footprint", measure)
    said = sievert(*_few(command, shared, picture, tmp_path), "--low-memory")
    assert said.code == 0, said.all
    assert packed and not any(packed)
    if command == "bench":
        assert measured == [True] and json.loads((tmp_path / "bench.json").read_text())["low_memory"]
        assert "With --low-memory" in said.out


def test_answers_given_with_low_memory_are_kept_apart(shared: Path, picture: Path, tmp_path: Path, packed: list[bool]):
    plain = _few("eval", shared, picture, tmp_path)
    for arguments, loads in ((plain, 8), ([*plain, "--low-memory"], 16), (plain, 16)):
        assert sievert(*arguments).code == 0
        assert len(packed) == loads  # four graphs of two variants, and none where all is answered
    report: dict[str, Any] = json.loads((tmp_path / "answers" / "report.json").read_text())
    assert "low_memory" not in report["settings"]


def test_the_process_that_measures_memory_does_as_it_is_told(shared: Path, packed: list[bool]):
    load_and_look(shared, "full", "onnxruntime", low_memory=True)
    load_and_look(shared, "full", "onnxruntime")
    assert packed == [False] * 4 + [True] * 4


def test_other_engines_have_no_low_memory(shared: Path, picture: Path):
    for name in RUNTIMES:
        if name != "onnxruntime":
            with pytest.raises(InputError, match=f"low memory was asked of {name}, but only onnxruntime"):
                find_runtime(name, low_memory=True)
    refused("run", shared, "--image", picture, "--prompt", ASK, "--engine", "tensorrt-rtx", "--low-memory", says="only onnxruntime")
