"""`prune-onnx` from another tool's file to a folder that runs: against transformers, against the source, and with bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import sievert as package
import sievert.parity.source as parity_source
from sievert.bundle.errors import BundleError, GraphError, InputError, IntegrityError, PlanError, ProfileError
from sievert.graph_passes.lint import lint
from tests.api.conftest import sievert
from tests.graph_passes.foreign.compare import compare_with_transformers
from tests.graph_passes.foreign.sources import (
    TINY,
    Compact,
    Form,
    export_directly,
    random_state,
    save,
    sizes_of,
    state_of,
    text_model,
)

CUTS = {
    selector: [package.Cut(keep=keep, layer=layer, selector=selector) for layer, keep in ((1, "9"), (2, "4"))]
    for selector in ("iwp", "fastv")
}
SIZES: dict[str, Any] = {"visual_tokens": 16, "max_text": 8, "max_new_tokens": 6, "batch": 2}
CHOICES = ("--visual-tokens", 16, "--max-text", 8, "--max-new-tokens", 4)


def compact(shape: str) -> Path:
    return save(Compact(sizes_of(shape), state_of(shape)).finish(), f"compact {shape}".replace(" ", "-"))


@pytest.fixture(scope="module")
def source() -> Path:
    return save(Compact(TINY, random_state(TINY)).finish(), "tiny")


# An export takes seconds: one here that has everything spelled out, caches joined, rows counted and a tied head; the others are below.
@pytest.mark.parametrize(
    ("make", "shape", "selector"),
    [
        pytest.param(lambda: export_directly("biases", "past", None), "biases", "iwp", id="exported-iwp"),
        pytest.param(lambda: export_directly("biases", "past", None), "biases", "fastv", id="exported-fastv"),
        pytest.param(lambda: compact("llama"), "llama", "fastv", id="compact-fastv"),
        pytest.param(lambda: compact("biases"), "biases", "iwp", id="compact-with-biases-iwp"),
        pytest.param(lambda: compact("head norms"), "head norms", "iwp", id="compact-with-head-norms-iwp"),
    ],
)
def test_same_kept_sets_caches_and_logits_as_transformers(make: Callable[[], Path], shape: str, selector: str, tmp_path: Path):
    made = package.prune_onnx(make(), tmp_path / "out", cuts=CUTS[selector], **SIZES)
    compare_with_transformers(made.path, shape)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["ids", "embeds", "past"])
@pytest.mark.parametrize("opset", [None, 18, 20, 23])
def test_every_form_that_transformers_exports(form: Form, opset: int | None, tmp_path: Path):
    source = export_directly("head norms", form, opset)
    for selector, cuts in CUTS.items():
        made = package.prune_onnx(source, tmp_path / selector, cuts=cuts, check=True, **SIZES)
        compare_with_transformers(made.path, "head norms")
        assert made.check is not None and made.check.passed


@pytest.mark.skipif(importlib.util.find_spec("mobius") is None, reason="mobius-onnx is not installed (it is no dependency of the project)")
@pytest.mark.parametrize("shape", ["llama", "biases", "head norms"])
@pytest.mark.parametrize("target", ["default", "onnx-standard"])
def test_a_decoder_made_by_mobius(shape: str, target: str, tmp_path: Path):
    text_model(shape).save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "mobius", "build", "--config", tmp_path / "checkpoint", tmp_path / "graphs", "--ep", target]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    for selector, cuts in CUTS.items():
        made = package.prune_onnx(tmp_path / "graphs" / "model.onnx", tmp_path / selector, cuts=cuts, check=True, **SIZES)
        assert made.check is not None and made.check.passed
        print(shape, target, selector, "logits off by", compare_with_transformers(made.path, shape), "check", made.check)


def test_the_command_says_what_it_matched_and_compares_with_the_source(source: Path, tmp_path: Path):
    said = sievert("prune-onnx", source, "--out", tmp_path / "out", *CHOICES, "--layer", 1, "--keep", "25%", "--check", "--grid", "4x4")
    assert said.code == 0, said.all
    assert "4 of 16 from layer 1 on (iwp 25%)" in said.out and "3 layers of attention" in said.out
    assert "differ from the source's by" in said.out and "PASS" in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "embed_tokens.onnx", "prefill.onnx", "decode.onnx", "weights.data", "pruned.json",
    }  # fmt: skip
    record = json.loads((tmp_path / "out" / "pruned.json").read_text())
    assert record["capacities"] == [28, 16, 16] and record["sizes"]["grid"] == [4, 4] and record["reads_question"]
    assert record["sizes"]["max_positions"] == 512
    assert {spec["name"] for spec in record["graphs"]["decode"]["inputs"]} >= {"input_ids", "position_ids", "cache_row"}


def test_weights_stand_once_and_hold_no_more_than_the_source(source: Path, tmp_path: Path):
    made = package.prune_onnx(source, tmp_path / "out", **SIZES)
    large = sum(value.const_value.nbytes for value in ir.load(source).graph.initializers.values() if value.const_value is not None)
    assert len({weight.offset for weight in made.record.weights}) == len({weight.sha256 for weight in made.record.weights})
    assert (made.path / "weights.data").stat().st_size <= large + 4096 * len(made.record.weights)
    for name in ("prefill", "decode", "embed_tokens"):
        inside = [each for each in ir.load(made.path / f"{name}.onnx").graph.initializers.values() if each.const_value is not None]
        for each in inside:
            assert isinstance(each.const_value, ir.ExternalTensor) or each.const_value.nbytes <= 2048, each.name  # type: ignore[union-attr]


def test_a_check_that_fails_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    true = parity_source._Ours.answer
    monkeypatch.setattr(parity_source._Ours, "answer", lambda *given: true(*given) + 1e-3)
    with pytest.raises(GraphError, match="where every token is kept, logits differ"):
        package.prune_onnx(source, tmp_path / "out", check=True, **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_with_the_source_as_reference(tmp_path: Path):
    source = save(halved(Compact(TINY, random_state(TINY)).finish()), "half")
    made = package.prune_onnx(source, tmp_path / "out", check=True, cuts=CUTS["iwp"], **SIZES)
    assert made.record.sizes.dtype == "float16" and made.check is not None and made.check.passed


def halved(model: ir.Model) -> ir.Model:
    """Every floating point value of the graph in 16 bit."""
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float16"), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for value in (*model.graph.inputs, *model.graph.outputs, *(each for node in model.graph for each in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    return model


def test_the_tools_decode_graph_has_to_be_the_same_decoder(source: Path, tmp_path: Path):
    package.prune_onnx(source, tmp_path / "out", decode=source, **SIZES)
    other = save(Compact(TINY, random_state(TINY, seed=1)).finish(), "other")
    with pytest.raises(InputError, match="does not hold the weights of tiny.onnx.*leave the other out"):
        package.prune_onnx(source, tmp_path / "other", decode=other, **SIZES)
    assert not (tmp_path / "other").exists()


def test_force_replaces_a_pruned_decoder_and_nothing_else(source: Path, tmp_path: Path):
    place = tmp_path / "out"
    package.prune_onnx(source, place, **SIZES)
    with pytest.raises(BundleError, match="already holds a pruned decoder"):
        package.prune_onnx(source, place, **SIZES)
    again = package.prune_onnx(source, place, force=True, cuts=CUTS["fastv"], **SIZES)
    assert [stage.selector for stage in again.record.plan.stages] == ["fastv", "fastv"]
    (place / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="notes.txt"):
        package.prune_onnx(source, place, force=True, **SIZES)
    with pytest.raises(BundleError, match="holds other files"):
        package.prune_onnx(source, tmp_path, force=True, **SIZES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_selectors_of_the_vision_encoder_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(PlanError, match="fopru scores in the vision encoder, and a decoder alone has none: choose one of iwp"):
        package.prune_onnx(source, tmp_path / "out", cuts=[package.Cut(selector="fopru")], **SIZES)


def test_more_positions_than_the_tables_have(source: Path, tmp_path: Path):
    with pytest.raises(ProfileError, match="512"):
        package.prune_onnx(source, tmp_path / "out", **{**SIZES, "max_text": 500})
    assert list(tmp_path.iterdir()) == []


def test_a_grid_of_another_size(source: Path, tmp_path: Path):
    said = sievert("prune-onnx", source, "--out", tmp_path / "out", *CHOICES, "--grid", "3x5")
    assert said.code == 2 and "15 patches" in said.err and not (tmp_path / "out").exists()
    assert "rows x columns" in sievert("prune-onnx", source, "--out", tmp_path / "out", *CHOICES, "--grid", "four").err


def test_weights_behind_a_link_are_refused(tmp_path: Path):
    model = Compact(TINY, random_state(TINY)).finish()
    (tmp_path / "source").mkdir()
    ir.save(model, tmp_path / "source" / "model.onnx", external_data="model.data")
    shutil.move(tmp_path / "source" / "model.data", tmp_path / "blob")
    (tmp_path / "source" / "model.data").symlink_to(tmp_path / "blob")
    with pytest.raises(IntegrityError, match="symbolic link"):
        package.prune_onnx(tmp_path / "source" / "model.onnx", tmp_path / "out", **SIZES)


def test_a_file_that_is_not_there(tmp_path: Path):
    said = sievert("prune-onnx", tmp_path / "no.onnx", "--out", tmp_path / "out", *CHOICES)
    assert said.code == 2 and "is no file" in said.err


def test_two_images_and_graphs_as_an_engine_builder_takes_them(source: Path, tmp_path: Path):
    made = package.prune_onnx(source, tmp_path / "out", target="tensorrt-rtx", images=2, check=True, cuts=CUTS["iwp"], **SIZES)
    assert made.check is not None and made.check.passed and made.record.profile.visual_tokens == 32
    for name in ("prefill", "decode", "embed_tokens"):
        assert [finding for finding in lint(ir.load(made.path / f"{name}.onnx"), "tensorrt-rtx") if finding.severity == "error"] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("opset", [None, 23])
def test_half_precision_exported_directly(opset: int | None, tmp_path: Path):
    source = export_directly("llama", "embeds", opset, torch.float16)
    made = package.prune_onnx(source, tmp_path / "out", cuts=CUTS["iwp"], check=True, **SIZES)
    assert made.check is not None and made.check.passed
