"""The GPU benchmark: its whole way on the CPU with a tiny model, and what it says where there is no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_arms import GROUPS, Case, measure_engine
from sievert.bundle.errors import EngineError, EngineUnavailableError
from sievert.engines.run.alone import Alone
from sievert.engines.run.cuda import Device
from sievert.engines.run.rtx import TensorRT


@pytest.mark.exhaustive
def test_a_trial_on_the_cpu_measures_every_group_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def in_this_process(engine: str, options: gpu.Options, checkpoint: Path, bundle: Path) -> dict[str, Any]:
        return measure_engine(engine, options.device, checkpoint, bundle, rounds=options.rounds, threads=1)

    def load(case: Case, variant: str, graph: str) -> Alone:
        if (variant, graph) == ("full", "decode"):
            raise EngineError("no room for it")
        return real(case, variant, graph)

    real = Case.load
    monkeypatch.setattr(gpu, "run_engine", in_this_process)
    monkeypatch.setattr(Case, "load", load)
    gpu.main(["--device", "cpu", "--shape", "tiny", "--rounds", "6", "--out", str(tmp_path / "gpu.json")])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "cpu" and "says nothing about a GPU" in written["note"]
    assert len(written["code"]) == 12 and written["packages"]["torch"] and written["machine"]["cores"] >= 1
    shape = written["shapes"]["tiny"]
    assert shape["dtype"] == "float32" and shape["decoder"]["layers"] == 2
    found = shape["engines"]["onnxruntime"]
    assert found["groups"].keys() == GROUPS.keys() and found["version"] and found["PyTorch"] == ""
    assert found["groups"]["vision"]["ratios"].keys() == {"engine / PyTorch"}
    for keep in ("35.3%", "22.2%", "11.1%"):
        group = found["groups"][f"prefill, {keep}"]
        assert group["ratios"].keys() == {"pruned / bound", "pruned / full", "full / PyTorch", "pruned / PyTorch pruned by hooks"}
        assert all(ms > 0 for ms in group["ms"].values()) and group["pruned over full by FLOPs"] > 0
        assert all(ratio["pairs"] == 6 and ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in group["ratios"].values())
    assert found["groups"]["decode"] == {"refused": "EngineError: no room for it"}
    assert found["held_mib"].keys() == {"prefill and decode", "PyTorch"}
    assert {"full.vision_encoder", "full.prefill", "iwp-11_1.prefill", "iwp-11_1.bound"} < found["loaded_s"].keys()


def test_an_engine_that_cannot_run_or_dies_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = gpu.Options("cpu", ("tiny",), ("onnxruntime",), 0, 6, 1, None, None)
    monkeypatch.setattr(TensorRT, "unavailable", lambda self: f"{self.name} does not run here")
    assert gpu.run_engine("tensorrt-rtx", options, tmp_path, tmp_path) == {"refused": "tensorrt-rtx does not run here"}
    dying = tmp_path / "python"
    dying.write_text('#!/bin/sh\necho "$@" >"$0.arguments"\necho "out of memory" >&2\nexit 3\n')
    dying.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(dying))
    found = gpu.run_engine("onnxruntime", options, tmp_path / "model", tmp_path / "bundle")
    assert found == {"failed": "the process ended with 3: out of memory"}
    assert f"gpu.py --job onnxruntime cpu {tmp_path / 'model'} {tmp_path / 'bundle'} 6 1" in (tmp_path / "python.arguments").read_text()


def test_without_a_gpu_it_ends_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def nothing() -> Device:
        raise EngineUnavailableError("no NVIDIA driver was found")

    monkeypatch.setattr(gpu, "find_device", nothing)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "nothing was measured: no NVIDIA driver was found. It needs an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--engine", "tensorrt-rtx"])
    assert "--engine tensorrt-rtx does not run on cpu: choose from onnxruntime" in capsys.readouterr().err


def test_the_large_shape_needs_a_large_gpu():
    small = Device("L4", "8.9", 23034)
    assert gpu.choose_shapes([], small) == (("0.5b",), {"3b": "L4 has 23034 MiB, and 40960 are needed: --shape 3b tries all the same"})
    assert gpu.choose_shapes([], Device("H100", "9.0", 81559)) == (("0.5b", "3b"), {})
    assert gpu.choose_shapes(["3b"], small) == (("3b",), {})
