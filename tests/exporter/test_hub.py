"""Hub ids: configuration first, plain folder, safe files only. The network is replaced."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sievert.bundle.errors import CheckpointError, UnsupportedModelError
from sievert.exporter import checkpoint
from sievert.exporter.export import examine_checkpoint


class Hub:
    """Serves the files of a folder as ``owner/name``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.served: list[list[str]] = []

    def __call__(self, repo: str, *, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "owner/name"
        names = [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        wanted = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        wanted = [name for name in wanted if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)]
        for name in wanted:
            Path(local_dir).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, Path(local_dir) / name)
        self.served.append(wanted)
        return str(local_dir)


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in ("modeling_evil.py", "pytorch_model.bin", "onnx/model.safetensors", "README.md"):
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_bytes(b"x")
    served = Hub(tiny)
    monkeypatch.setattr(checkpoint, "snapshot_download", served)
    return served


def test_a_hub_id_becomes_a_plain_folder_of_safe_files(hub: Hub, tmp_path: Path):
    examined = examine_checkpoint("owner/name", downloads=tmp_path / "downloads")
    assert examined.checkpoint.given == "owner/name"
    assert examined.checkpoint.folder == tmp_path / "downloads" / "owner" / "name"
    first, second = hub.served
    assert "config.json" in first
    assert second == ["model.safetensors"]
    names = {path.name for path in examined.checkpoint.folder.iterdir()}
    assert names == {*first, *second}
    assert not any(name.endswith((".py", ".bin", ".md")) for name in names)


def test_an_unsupported_model_costs_no_weights(hub: Hub, tmp_path: Path):
    config = hub.folder / "config.json"
    config.write_text(config.read_text().replace("LlavaForConditionalGeneration", "MllamaForConditionalGeneration"))
    with pytest.raises(UnsupportedModelError, match="owner/name is Mllama"):
        examine_checkpoint("owner/name", downloads=tmp_path / "downloads")
    assert len(hub.served) == 1


def test_only_pickles_on_the_hub(hub: Hub, tmp_path: Path):
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        examine_checkpoint("owner/name", downloads=tmp_path / "downloads")


def test_the_network_failing_is_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"owner/name is no local folder and could not be downloaded from the hub \(no connection\)"):
        examine_checkpoint("owner/name", downloads=tmp_path)


@pytest.mark.parametrize("given", ["./missing", "a/b/c", "missing", "/no/such", "../x/y", "~nobody"])
def test_what_is_no_hub_id_asks_no_network(given: str, hub: Hub, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        examine_checkpoint(given, downloads=tmp_path)
    assert hub.served == []
