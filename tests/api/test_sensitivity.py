"""`sievert sensitivity`: the picture shows what was measured, and what cannot be drawn is refused before anything is measured."""

from __future__ import annotations

import dataclasses
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sievert.calibration.sensitivity import Sensitivity, Unit
from sievert.plotting import draw_sensitivity
from tests.api.conftest import sievert
from tests.api.test_bad_input import refused

UNITS = (Unit("layers.2", 7, 0.5, 0.9, 0.8, 0.25), Unit("layers.0", 7, 0.01, 0.02, 1.0, 0.0))
FOUND = Sensitivity(
    "iwp-22", "int8", "max", 4, False, UNITS, (Unit("prefill", 14, 0.6, 1.0, 0.7, 0.25),), Unit("everything", 20, 0.7, 1.1, 0.7, 0.5)
)


def test_the_picture_is_written_and_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sievert.sensing.sensitivity", lambda *_, **__: FOUND)
    said = sievert("sensitivity", tmp_path, "--plot", tmp_path / "worst.png")
    assert said.code == 0 and "worst.png" in said.out, said.all
    assert (tmp_path / "worst.png").read_bytes() == draw_sensitivity(FOUND)
    worse = dataclasses.replace(UNITS[0], divergence=0.4, kept_overlap=0.9, changed=0.5)
    differs = (pixels(dataclasses.replace(FOUND, units=(worse, UNITS[1]))) != pixels(FOUND)).any(axis=(0, 2))
    assert all(third.any() for third in np.array_split(differs, 3))  # each number has a panel


def pixels(found: Sensitivity) -> Any:
    return np.asarray(Image.open(BytesIO(draw_sensitivity(found))).convert("RGB"))


def test_nothing_is_measured_for_a_picture_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refused("sensitivity", tmp_path, "--plot", tmp_path / "worst.pdf", says=("--plot", "ends in .png"))
    refused("sensitivity", tmp_path, "--plot", tmp_path / "gone" / "worst.png", says="there is no folder")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("sensitivity", tmp_path, "--plot", tmp_path / "worst.png", says=("matplotlib", "sievert[plot]"))
