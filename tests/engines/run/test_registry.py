import sys

import pytest

from sievert.bundle.errors import EngineUnavailableError, InputError
from sievert.engines.run import registry
from sievert.engines.run.cuda import Device
from sievert.engines.run.registry import RUNTIMES, find_gpu, find_runtime, report_runtimes


def test_runtimes_are_found_by_their_own_names():
    assert list(RUNTIMES) == ["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
    for name in RUNTIMES:
        assert find_runtime(name).name == name
    with pytest.raises(InputError, match="choose one of onnxruntime, onnxruntime-cuda, tensorrt-rtx, tensorrt"):
        find_runtime("cuda")


def test_the_report_tells_tested_from_untested():
    report = {entry.name: entry for entry in report_runtimes()}
    assert {name for name, entry in report.items() if entry.tested} == {"onnxruntime"}
    assert report["onnxruntime"].unavailable is None
    assert report["onnxruntime"].version
    assert all(entry.unavailable or entry.version for entry in report.values())


def test_a_gpu_is_reported_where_there_is_one(monkeypatch):
    class Memory:
        def device(self) -> Device:
            return Device("GPU", "8.9", 1)

    def nothing() -> None:
        raise EngineUnavailableError("no NVIDIA driver was found")

    monkeypatch.setattr(registry, "cuda_memory", Memory)
    assert find_gpu() == Device("GPU", "8.9", 1)
    monkeypatch.setattr(registry, "cuda_memory", nothing)
    assert find_gpu() is None


def test_importing_it_loads_no_library():
    import subprocess

    code = (
        "import sys, sievert.engines.run.generate, sievert.engines.run.registry\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'transformers', 'sievert.graph_passes'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
