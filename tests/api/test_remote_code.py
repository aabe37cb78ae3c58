"""Code that a checkpoint brings along: not run unless the user says so, by any command, each time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

import sievert as package
from sievert.bundle.errors import BundleError
from sievert.bundle.remote_code import is_trusted, list_classes
from sievert.bundle.store import Bundle
from sievert.sampling import count_text
from tests.api.conftest import sievert
from tests.tiny_llava import make_tiny_llava

TRUST = "--trust-remote-code"
ASK = "which digit is red ?"
CODE = """
from transformers import {base}

class Own{base}({base}):
    def __new__(cls, *given, **named):
        with open({ran!r}, "a") as file:
            file.write("{base} ")
        return super().__new__(cls)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint whose configuration and processor are classes of its own, which write into the file ``ran`` beside it."""
    folder = tmp_path_factory.mktemp("own")
    checkpoint = make_tiny_llava(folder / "checkpoint", layers=2)
    for file, auto, base in (("config.json", "AutoConfig", "LlavaConfig"), ("processor_config.json", "AutoProcessor", "LlavaProcessor")):
        (checkpoint / f"own_{base.lower()}.py").write_text(CODE.format(base=base, ran=str(folder / "ran")))
        content = json.loads((checkpoint / file).read_text())
        (checkpoint / file).write_text(json.dumps(content | {"auto_map": {auto: f"own_{base.lower()}.Own{base}"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        yield checkpoint


def ran(model: Path) -> set[str]:
    """What has run since this was last asked."""
    file = model.parent / "ran"
    said = set(file.read_text().split()) if file.exists() else set()
    file.unlink(missing_ok=True)
    return said


@pytest.fixture(scope="module")
def own(model: Path) -> Path:
    """The bundle of it. Tests only add variants."""
    sizes = ("--max-text", 16, "--max-new-tokens", 2, "--selector", "random")
    refused = sievert("export", model, model.parent / "bundle", *sizes)
    assert refused.code == 2 and "own_llavaconfig.OwnLlavaConfig in auto_map" in " ".join(refused.err.split()), refused.all
    assert ran(model) == set() and not (model.parent / "bundle").exists()
    made = sievert("export", model, model.parent / "bundle", *sizes, TRUST)
    assert made.code == 0, made.all
    assert ran(model) == {"LlavaConfig", "LlavaProcessor"} and not is_trusted()
    return model.parent / "bundle"


def test_the_bundle_carries_the_code_and_says_so(own: Path, model: Path):
    manifest = Bundle.open(own).manifest
    assert manifest.source.remote_code == ("own_llavaconfig.py", "own_llavaprocessor.py")
    assert set(manifest.source.remote_code) <= set(manifest.files)
    said = sievert("inspect", own)
    assert said.code == 0 and "with --trust-remote-code only: own_llavaconfig.py, own_llavaprocessor.py" in said.out, said.all
    assert ran(model) == set()


def test_no_command_runs_it_unasked(own: Path, model: Path, picture: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": str(picture), "prompt": ASK}))
    one, data = ("--image", picture, "--prompt", ASK), ("--data", tmp_path / "data.jsonl")
    commands: list[tuple[object, ...]] = [
        ("run", own, *one),
        ("check", own, "--samples", 1),
        ("eval", own, *data, "--out", tmp_path / "eval"),
        ("compare-selectors", own, *one, "--selectors", "random,uniform", "--out", tmp_path / "compared.png"),
        ("collect", own, *data, "--out", tmp_path / "collected"),
        ("prune", own, "--sample-prompt", ASK, "--selector", "uniform"),
        ("inspect", own, "--sample-prompt", ASK),
    ]
    for command in commands:
        said = sievert(*command)
        assert said.code == 2 and "would run code of its own" in " ".join(said.err.split()), (command, said.all)
    assert ran(model) == set()


def test_each_command_runs_it_when_it_is_told_to(own: Path, model: Path, picture: Path):
    asked = sievert("run", own, "--image", picture, "--prompt", ASK, TRUST)
    assert asked.code == 0 and "LlavaProcessor" in ran(model), asked.all
    checked = sievert("check", own, "--variant", "random-22", "--samples", 1, "--tokens", 1, TRUST)
    assert checked.code == 0 and ran(model) == {"LlavaConfig", "LlavaProcessor"}, checked.all
    geometry = Bundle.open(own).manifest.geometry
    with package.trust_remote_code():
        assert count_text(own, geometry, [ASK]) == 8
    with pytest.raises(BundleError, match="would run code of its own"):
        count_text(own, geometry, [ASK])


def test_every_way_to_name_a_class_is_seen():
    parts = {"image_processor": {"auto_map": {"AutoImageProcessor": ["a.Slow", None]}}, "auto_map": {"AutoProcessor": "b.B"}}
    assert list_classes(parts) == ["b.B", "a.Slow"]
    assert list_classes({"auto_map": ["c.C", None], "x": [{"auto_map": "d.D"}], "auto": 1}) == ["c.C", "d.D"]
    assert list_classes({"model_type": "llava"}) == []
