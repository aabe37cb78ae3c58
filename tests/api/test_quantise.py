"""`sievert quantise`: what it says, what later commands say of what it made, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import content, sievert
from tests.api.test_bad_input import refused


def test_quantise_says_what_it_did_and_later_commands_say_what_it_is(bundle: Path, tmp_path: Path):
    data = tmp_path / "data"
    collected = sievert("collect", bundle, "--random", "--variant", "iwp-22", "--samples", 2, "--decode-steps", 1, "--out", data)
    assert collected.code == 0, collected.all
    asked = ("quantise", bundle, "--variant", "iwp-22", "--collection", data)
    refused(*asked, says=("calibration data is random", "--random"), keeps=bundle)
    said = sievert(*asked, "--random")
    assert said.code == 0, said.all
    for part in (
        "Made the variant iwp-22-int8",
        "weights in int8, a scale per output channel",
        "max over 2 samples, one per tensor",
        "a selector reads what it makes: model.language_model.layers.1.self_attn.k_proj.weight.T",
        "it makes the logits: lm_head.weight",
        "this calibration data is random",
        f"Next: sievert check {bundle} --variant iwp-22-int8 --data QUESTIONS.jsonl",
    ):
        assert part in " ".join(said.out.split()), said.out
    four = sievert("quantise", bundle, "--format", "int4", "--name", "four")
    assert four.code == 0 and "a scale per block of 32" in four.out, four.all
    narrow = sievert("quantise", bundle, "--kv", "bfloat16")
    assert narrow.code == 0 and "Made the variant full-kv-bfloat16" in narrow.out, narrow.all
    assert "caches in bfloat16: " in narrow.out and "weights in" not in narrow.out, narrow.out
    inspected = sievert("inspect", bundle)
    table = " ".join(inspected.out.split())
    assert "quantised weights" in table and "max over 2 samples, RANDOM data" in table and "int4, block 32" in table, inspected.all
    assert "float32, caches in bfloat16" in table, inspected.all
    checked = sievert("check", bundle, "--variant", "iwp-22-int8", "--samples", 1, "--tokens", 1)
    shown = " ".join(checked.out.split())
    assert "quantised weights" in shown and "pruning alone (float32) KL" in shown and "its scales come from random data" in shown, (
        checked.all
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--variant", "gone"), ("no variant 'gone'", "full, iwp-22")),
        ((), ("holds no calibration data", "sievert collect")),
        (("--format", "int4", "--block", 64), ("block=64", "32 and 128")),
        (("--format", "int4", "--name", "full"), "already has a variant 'full'"),
        (("--calibration", "percentile", "--percentile", 3), ("percentile=3", "50 to 100")),
        (("--percentile", 99.9), ("percentile=99.9, but calibration is 'max'", "give calibration 'percentile' too")),
        (
            ("--format", "float16", "--calibration", "percentile"),
            ("calibration='percentile' says nothing to format float16", "int8 or fp8"),
        ),
        (("--format", "bfloat16", "--block", 128), ("block=128 says nothing to format bfloat16", "int4")),
        (("--format", "float16", "--keep-high", "mlp"), ("keep_high=('mlp',) says nothing to format float16", "int8 or fp8 or int4")),
        (("--format", "float16", "--quantise-head"), "quantise_head=True says nothing to format float16"),
        (("--format", "float16", "--quantise-selector"), "quantise_selector=True says nothing to format float16"),
        (("--format", "float16", "--keep-worst", 1, "--sensitivity", "x.json"), "keep_worst=1 says nothing to format float16"),
        (("--format", "int8", "--block", 128), ("block=128 says nothing to format int8", "choose int4")),
        (("--format", "int4", "--calibration", "percentile"), ("calibration='percentile' says nothing to format int4", "int8 or fp8")),
        (("--format", "float32"), ("format 'float32' changes nothing by itself", "give kv")),
        (("--kv", "int8"), ("kv='int8': TensorRT for RTX refuses", "float16 or bfloat16")),
        (("--kv", "float16", "--format", "float16"), "caches of float16 graphs are float16: leave kv out"),
    ],
)
def test_quantise_refuses_what_it_cannot_do(shared: Path, options: tuple[object, ...], says: Any):
    before = content(shared)
    refused("quantise", shared, *options, says=says)
    assert content(shared) == before
