"""The snippet of docs/modelopt.md: what it takes out of a bundle runs, and names the products a quantiser may touch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import sievert
from sievert.bundle.store import Bundle
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime

PAGE = Path(__file__).parents[2] / "docs" / "modelopt.md"


def test_what_the_page_takes_out_of_a_bundle_runs_on_the_data(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle.rename("my-bundle")
    collected = sievert.collect("my-bundle", data, variant="iwp-22", samples=3, decode_steps=1, out="my-data")
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "savez" in block]
    exec(compile(snippet, PAGE, "exec"), {})
    stored = np.load("modelopt/prefill.npz")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession("modelopt/prefill.onnx", options)
    assert sorted(stored.files) == sorted(each.name for each in session.get_inputs())
    own = OnnxRuntime(threads=1).load(ModelFile(Bundle.open("my-bundle").graph_file("prefill", variant="iwp-22"), ""))
    for run, feed in enumerate(collected.feeds("prefill")):
        split = {name: np.array_split(stored[name], 3)[run] for name in stored.files}  # as ModelOpt does
        assert all(np.array_equal(split[name], feed[name]) for name in feed)
        (logits,) = session.run(["logits"], split)
        np.testing.assert_allclose(logits, own.run(feed, ["logits"])["logits"], atol=1e-5)
    nodes = {name: Path(f"modelopt/prefill.{name}").read_text().split() for name in ("keep", "quantise")}
    assert len(nodes["keep"]) == 7  # q, k and v of layer l, for all tokens and for the kept ones, and the head
    assert len(nodes["quantise"]) >= 4 * 7 - 3
    assert not set(nodes["keep"]) & set(nodes["quantise"])
