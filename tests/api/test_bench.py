"""`sievert bench`: its tables and its JSON. What the times are is not for a test to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sievert as package
from sievert.bench_arms import Arm, load_bound
from sievert.bundle.errors import EngineError
from sievert.bundle.manifest import Precision
from sievert.bundle.names import MANIFEST
from sievert.bundle.store import Bundle
from sievert.engines.run.footprint import measure_footprint
from sievert.engines.run.ort import OnnxRuntime
from tests.api.conftest import content, sievert
from tests.api.test_bad_input import refused

FEW = ("--rounds", 6, "--tokens", 2)
TIMES = ("vision_ms", "embed_ms", "prefill_ms", "decode_ms", "first_token_ms", "tokens_per_s")


@pytest.fixture(scope="module")
def measured(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command said and wrote of a bundle with one pruned variant."""
    report = tmp_path_factory.mktemp("bench") / "bench.json"
    before = content(shared)
    said = sievert("bench", shared, *FEW, "--profile", "--json", report)
    assert said.code == 0, said.all
    assert content(shared) == before
    return said.out, json.loads(report.read_text())


def test_every_variant_has_a_line_in_every_table(measured: tuple[str, dict[str, Any]]):
    out, _ = measured
    for table in ("milliseconds", "time as a share of another's", "MiB of the host's memory", "prefill by part, ms"):
        assert f"onnxruntime: {table}" in out
    for name in ("full", "iwp-22"):
        assert len([line for line in out.splitlines() if line.split()[:1] == [name]]) == 3
    assert "6 rounds are few" in out


def test_the_report_holds_every_number(measured: tuple[str, dict[str, Any]], shared: Path):
    _, found = measured
    full, pruned = found["variants"]
    assert (full["variant"], pruned["variant"], found["rounds"], found["tokens"]) == ("full", "iwp-22", 6, 2)
    for line in (full, pruned):
        assert all(line[name] > 0 for name in TIMES)
        assert line["first_token_ms"] >= line["prefill_ms"]
        assert line["footprint"]["peak"] > line["footprint"]["anonymous"] > 0
        assert line["weights_bytes"] == Bundle.open(shared).manifest.files[Bundle.open(shared).manifest.weights_file].bytes
    assert (full["bound_ms"], full["ratios"], full["against"]) == (0.0, {}, "")
    assert pruned["bound_ms"] > 0 and pruned["against"] == "full" and pruned["plan"]["stages"][0]["keep"] == 4
    assert set(pruned["ratios"]) == {"prefill", "decode", "first token", "selecting"}
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["pairs"] == 6 for ratio in pruned["ratios"].values())
    assert pruned["cache_bytes"] < full["cache_bytes"]


def test_the_profile_names_every_layer_and_the_selector(measured: tuple[str, dict[str, Any]]):
    full, pruned = measured[1]["variants"]
    layers = {f"layer {layer}" for layer in range(4)}
    assert set(full["parts"]) == {"rows and positions", "head", *layers}
    assert set(pruned["parts"]) == {"rows and positions", "head", "selector 0", *layers}
    assert all(ms > 0 for line in (full, pruned) for ms in line["parts"].values())


def test_another_variant_or_bundle_to_compare_with(bundle: Path, shared: Path):
    package.prune(bundle, cuts=[package.Cut(keep="4", layer=2, selector="uniform")], name="other")
    (reference, own) = package.bench(bundle, variants=["iwp-22"], against="other", rounds=6, tokens=1).speeds
    assert (reference.variant, own.variant, own.against, own.bundle) == ("other", "iwp-22", "other", "")
    (theirs, ours) = package.bench(bundle, variants=["iwp-22"], against=str(shared), rounds=6, tokens=1).speeds
    assert (theirs.variant, ours.variant) == ("iwp-22", "iwp-22")
    assert (theirs.bundle, ours.bundle) == ("bundle", "") and ours.against == "iwp-22 of bundle"
    assert set(ours.ratios) == {"prefill", "decode", "first token", "selecting"} and set(theirs.ratios) == {"selecting"}


def test_bad_input_says_what_to_do(shared: Path, bundle: Path, tmp_path: Path):
    refused("bench", shared, "--rounds", 5, says="rounds=5: at least 6")
    refused("bench", shared, "--tokens", 0, says="tokens=0")
    refused("bench", shared, *FEW, "--variant", "none", says="no variant 'none'")
    refused("bench", shared, *FEW, "--engine", "none", says="engine 'none' does not exist")
    refused("bench", shared, *FEW, "--engine", "tensorrt", says="TensorRT")
    refused("bench", shared, *FEW, "--against", tmp_path, says="no variant of this bundle (full, iwp-22) and no bundle's folder")
    refused("bench", shared, *FEW, "--json", tmp_path / "no" / "b.json", says="there is no folder")
    package.prune(bundle, cuts=[package.Cut(keep="4")], batch=2, name="two")
    refused("bench", bundle, *FEW, "--variant", "two", says="two has batch=2, but full, which it is compared with, 1")
    refused("bench", bundle, *FEW, "--variant", "two", "--against", shared, says="has no variant 'two' (it has full, iwp-22)")


def test_a_bundle_of_another_model_is_refused(shared: Path, bundle: Path):
    manifest = bundle / MANIFEST
    text = manifest.read_text()
    assert '"max_positions": 512' in text
    manifest.write_text(text.replace('"max_positions": 512', '"max_positions": 1024'))
    refused("bench", shared, *FEW, "--against", bundle, says="is a bundle of another model (max_positions 512 and 1024)")


def test_a_quantised_variant_has_no_bound(shared: Path):
    opened = Bundle.open(shared)
    runtime = OnnxRuntime()
    assert load_bound(Arm(opened, "iwp-22", "iwp-22"), runtime) is not None and load_bound(Arm(opened, "full", "full"), runtime) is None
    quantised = opened.variant("iwp-22").model_copy(update={"precision": Precision(base="iwp-22", format="int8")})
    listed = opened.manifest.model_copy(update={"variants": {"iwp-22": quantised}})
    assert load_bound(Arm(Bundle(opened.path, listed), "iwp-22", "iwp-22"), runtime) is None


def test_a_process_that_fails_is_heard(shared: Path):
    with pytest.raises(EngineError, match="no variant 'none'"):
        measure_footprint(shared, "none", "onnxruntime")
