"""A planted outlier channel breaks naive int8, is found by sensitivity, and is left alone with --keep-worst."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sievert
from sievert.bundle.errors import CalibrationError
from sievert.bundle.store import Bundle
from sievert.calibration.collection import load_collection
from sievert.calibration.sensitivity import name_unit
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.parity.effects import divergence
from tests.calibration.conftest import edit_weight

UNIT = "model.language_model.layers.2"


def plant_outlier(bundle: Path) -> None:
    """One channel of what layer 2's mlp multiplies down is 1000 times larger, and its weights 1000 times smaller: the same function."""
    manifest = Bundle.open(bundle).manifest
    up, down = ([each for each in manifest.weights if f"layers.2.mlp.{name}_proj" in each.name] for name in ("up", "down"))
    assert up[0].name.endswith(".T") and down[0].name.endswith(".T")  # [K, N]
    columns = np.ones(up[0].shape, np.float32)
    columns[:, 7] = 1000
    rows = np.ones(down[0].shape, np.float32)
    rows[7] = 1 / 1000
    edit_weight(bundle, "layers.2.mlp.up_proj", lambda weight: weight * columns.ravel())
    edit_weight(bundle, "layers.2.mlp.down_proj", lambda weight: weight * rows.ravel())


def test_a_planted_outlier_breaks_int8_is_found_and_kept(bundle: Path, data: Path, tmp_path: Path):
    def lost(variant: str) -> float:
        opened = Bundle.open(bundle)
        feed = load_collection(tmp_path / "collected", opened).feed("prefill", 0)
        logits = [
            OnnxRuntime(threads=1).load(ModelFile(opened.graph_file("prefill", variant=name), "")).run(feed, ["logits"])["logits"][0]
            for name in ("full", variant)
        ]
        return divergence(*logits)

    def quantise(name: str, **options: Any) -> float:
        sievert.quantise(bundle, variant="full", name=name, collection=tmp_path / "collected", **options)
        return lost(name)

    sievert.collect(bundle, data, samples=3, decode_steps=1, out=tmp_path / "collected")
    healthy = quantise("healthy")
    plant_outlier(bundle)
    sievert.collect(bundle, data, samples=3, decode_steps=1, out=tmp_path / "collected", force=True)
    naive = quantise("naive")
    assert naive > 5 * healthy
    found = sievert.sensitivity(bundle, tmp_path / "collected", samples=2)
    assert (found.units[0].name, found.samples, found.variant) == (UNIT, 2, "full")
    assert found.units[0].divergence > 3 * found.units[1].divergence
    assert {unit.name for unit in found.graphs} == {"vision_encoder", "prefill"} and found.everything.divergence > found.units[
        -1
    ].divergence
    report = tmp_path / "worst.json"
    report.write_text(json.dumps(found.to_json()))
    kept = quantise("kept", keep_worst=1, sensitivity=report)
    assert kept < naive / 3
    precision = Bundle.open(bundle).variant("kept").precision
    assert precision is not None
    high = {name for name, why in precision.kept.items() if "among the 1 that lose most" in why}
    assert len(high) == 7 and {name_unit(name) for name in high} == {UNIT}
    for options, says in (
        ({"keep_worst": 1}, "belong together"),
        ({"keep_worst": 99, "sensitivity": report}, "choose 1.."),
        ({"keep_worst": 1, "sensitivity": report, "format": "int4"}, "measured int8, not int4"),
        ({"keep_worst": 1, "sensitivity": data}, "no report of"),
    ):
        with pytest.raises(CalibrationError, match=says):
            sievert.quantise(bundle, collection=tmp_path / "collected", name="no", **options)


def test_units_are_layers_or_modules():
    assert name_unit("model.language_model.layers.11.mlp.up_proj.weight.T") == "model.language_model.layers.11"
    assert name_unit("model.multi_modal_projector.linear_1.weight.T") == "model.multi_modal_projector.linear_1"
