"""Silence lasts for the block and not longer."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from sievert.exporter.export import examine_checkpoint
from sievert.exporter.load import load_model
from sievert.exporter.modules import vision_encoder
from sievert.exporter.quiet import quiet
from sievert.exporter.trace import trace
from tests.tiny_llava import make_tiny_llava


def settings() -> tuple[object, ...]:
    torch_onnx = logging.getLogger("torch.onnx")
    return (
        sys.stdout,
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        torch_onnx.level,
        warnings.filters[:],
    )


def test_prints_and_warnings_become_debug_lines(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    before = settings()
    with caplog.at_level(logging.DEBUG, logger="sievert.exporter"), quiet("work"):
        print("a printed line")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("torch.onnx._internal.exporter").warning("a logged line")
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    assert "work: a printed line" in caplog.text
    assert "work: a warning" in caplog.text
    assert "a logged line" not in caplog.text


def test_settings_come_back_after_an_error():
    before = settings()
    with pytest.raises(ZeroDivisionError), quiet("work"):
        1 / 0  # noqa: B018
    assert settings() == before


def test_an_export_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = make_tiny_llava(tmp_path, layers=1)
    capfd.readouterr()
    before = settings()
    examined = examine_checkpoint(folder)
    tower = examined.checkpoint.architecture.tower
    assert tower is not None
    module = vision_encoder(load_model(examined.checkpoint, examined.config, torch.float32), tower)
    trace(module, {"pixel_values": torch.zeros(2, 3, 32, 32)}, {"pixel_values": ("batch",)}, what="the vision encoder")
    assert capfd.readouterr() == ("", "")
    assert settings() == before
