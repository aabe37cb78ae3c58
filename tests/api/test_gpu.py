"""Whole variants on a GPU, judged against PyTorch: what `sievert build` and `sievert check` do there with each engine that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

import sievert as package
from sievert.engines.build.builders import unavailable_to_build
from sievert.engines.run.registry import find_runtime
from sievert.parity.verdict import Verdict


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "tensorrt-rtx", "tensorrt"])
def test_prefill_and_decode_agree_with_pytorch(engine: str, dtype: Literal["float32", "float16"], checkpoint: Path, tmp_path: Path):
    if reason := find_runtime(engine).unavailable() or unavailable_to_build(engine):
        pytest.skip(reason)
    bundle, cut = tmp_path / "bundle", package.Cut(layer=1, keep="22%")
    package.export(checkpoint, bundle, dtype=dtype, cuts=(cut,), max_text=24, max_new_tokens=8, engines=(engine,))
    passing = {Verdict.PASS} if dtype == "float32" else {Verdict.PASS, Verdict.AMBIGUOUS}  # random logits are near ties in 16 bit
    checked = package.check(bundle, engines=[engine], samples=4, tokens=4)
    assert {outcome.variant for outcome in checked.outcomes} == {"full", "iwp-22"}
    for outcome in checked.outcomes:
        assert outcome.ran.verdict in passing, (outcome.variant, outcome.ran.reason)
        assert len(outcome.ran.samples) == 4 and outcome.ran.forced_tokens == 4
