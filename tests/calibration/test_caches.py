"""Variants whose caches alone are in 16 bit: the same answers, half the memory, and a check that sees a cache that is not what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

import sievert
from sievert.bundle.errors import CalibrationError, VariantError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection
from sievert.graph_passes.expose import to_bytes
from sievert.inspecting import measure_caches
from tests.calibration.conftest import PROMPTS, edit_weight


@pytest.fixture
def narrowed(bundle: Path, collected: Collection) -> Path:
    """A copy of the bundle with iwp-22 and float16 caches."""
    sievert.quantise(bundle, variant="iwp-22", kv="float16", collection=collected.path)
    return bundle


def test_answers_stay_and_caches_take_half(narrowed: Path, collected: Collection):
    name = "iwp-22-kv-float16"
    manifest = Bundle.open(narrowed, verify="full").manifest
    variant, base = manifest.variants[name], manifest.variants["iwp-22"]
    assert variant.precision is not None and variant.precision.label == "float32, caches in float16" and not variant.precision.weights
    for graph in ("prefill", "decode"):
        now, before = (
            {spec.name: spec.dtype for spec in (*one.graphs[graph].inputs, *one.graphs[graph].outputs)} for one in (variant, base)
        )
        narrow = {each for each, dtype in now.items() if dtype != before[each]}
        assert narrow == {each for each in now if each.startswith(("past_key_values.", "present."))}
        assert {now[each] for each in narrow} == {"float16"}
    assert {graph: variant.graphs[graph].file for graph in ("vision_encoder", "embed_tokens")} == {
        graph: base.graphs[graph].file for graph in ("vision_encoder", "embed_tokens")
    }
    sizes = [measure_caches(manifest, each).decode_bytes for each in ("iwp-22", name)]
    assert sizes[0] == 2 * sizes[1]
    picture = collected.path.parent / "a.png"
    said = [[answer.tokens for answer in sievert.run(narrowed, picture, PROMPTS[:2], variant=each).answers] for each in ("iwp-22", name)]
    assert said[0] == said[1] and all(said[0])
    report = sievert.check(narrowed, variants=[name], samples=2, tokens=3).outcomes[0].ran
    assert report.verdict.value == "PASS" and report.dtype == "float32, caches in float16", report.reason
    worst = {stage.stage: stage.worst for stage in report.stages if stage.worst is not None}
    assert worst["caches after prefill"].max_abs > 1e-5 > worst["last logits"].max_abs  # rounding is seen where it is, and only there
    assert worst["teacher-forced logits"].max_abs > worst["last logits"].max_abs


@pytest.mark.parametrize(
    ("graph", "stages"), [("prefill", ("caches after prefill",)), ("decode", ("teacher-forced logits", "caches at the end"))]
)
def test_a_cache_that_is_rounded_more_coarsely_fails(narrowed: Path, graph: str, stages: tuple[str, ...]):
    def coarse(model: ir.Model) -> None:
        (cast,) = [node for node in model.graph if node.outputs[0].name == "present.2.value.new"]
        brief = ir.node("Cast", [cast.inputs[0]], {"to": ir.DataType.FLOAT8E4M3FN})
        model.graph.insert_before(cast, brief)
        cast.replace_input_with(0, brief.outputs[0])

    _edit_graph(narrowed, "iwp-22-kv-float16", graph, coarse)
    report = sievert.check(narrowed, variants=["iwp-22-kv-float16"], samples=2, tokens=3).outcomes[0].ran
    assert report.verdict.value == "FAIL" and report.first_failure in stages, (report.first_failure, report.reason)
    assert "present.2.value" in report.reason or graph == "decode"


def _edit_graph(bundle: Path, variant: str, graph: str, change: Callable[[ir.Model], None]) -> None:
    """Change a graph of a variant, hashes included."""
    raw = json.loads((bundle / "sievert.json").read_text())
    file = raw["variants"][variant]["graphs"][graph]["file"]
    model = ir.load(bundle / file)
    change(model)
    content = to_bytes(model)
    (bundle / file).write_bytes(content)
    raw["files"][file] = {"bytes": len(content), "sha256": sha256_bytes(content)}
    (bundle / "sievert.json").write_text(json.dumps(raw))


def test_beside_quantised_weights_and_without_data(bundle: Path):
    found = sievert.quantise(bundle, variant="iwp-22", format="int8-weights", kv="bfloat16")  # neither reads data
    assert found.name == "iwp-22-int8-weights-kv-bfloat16" and found.variant.precision is not None
    assert found.variant.precision.label == "int8-weights, caches in bfloat16" and found.variant.precision.weights
    assert 2 * found.cache_bytes == found.cache_bytes_before
    report = sievert.check(bundle, variants=[found.name], samples=1, tokens=2).outcomes[0].ran
    assert report.verdict.value in ("PASS", "AMBIGUOUS"), report.reason
    with pytest.raises(
        VariantError, match=r"quantised already \(int8-weights, caches in bfloat16\): quantise the one it was made from, 'iwp-22'"
    ):
        sievert.quantise(bundle, variant=found.name, kv="float16")


def test_a_cache_that_overflows_stays(bundle: Path, data: Path, tmp_path: Path):
    edit_weight(bundle, "layers.2.self_attn.v_proj", lambda weight: weight * 1e7)
    edit_weight(bundle, "layers.2.self_attn.o_proj", lambda weight: weight * 1e-7)
    sievert.collect(bundle, data, samples=2, decode_steps=1, out=tmp_path / "collected")
    found = sievert.quantise(bundle, kv="float16", collection=tmp_path / "collected")
    assert found.variant.precision is not None
    assert set(found.variant.precision.kept) == {"prefill/present.2.value", "decode/present.2.value"}
    assert all("float16 ends at 65504" in reason for reason in found.variant.precision.kept.values())
    for graph in ("prefill", "decode"):
        specs = {spec.name: spec.dtype for spec in found.variant.graphs[graph].inputs if spec.name.startswith("past_key_values.")}
        assert {name for name, dtype in specs.items() if dtype == "float32"} == {"past_key_values.2.value"}
    assert sievert.run(bundle, tmp_path / "data" / "a.png", PROMPTS[:1], variant="full-kv-float16").answers[0].tokens


def test_types_and_combinations_that_there_are_not(bundle: Path, collected: Collection, tmp_path: Path):
    before = sorted(path.name for path in bundle.iterdir())
    for options, error, says in (
        ({"kv": "int8"}, CalibrationError, "kv='int8': TensorRT for RTX refuses.*choose float16 or bfloat16"),
        ({"kv": "fp8"}, CalibrationError, "kv='fp8': TensorRT for RTX refuses"),
        ({"kv": "half"}, CalibrationError, "kv='half' is no type for caches: choose float16 or bfloat16"),
        ({"kv": "float16", "format": "bfloat16"}, CalibrationError, "caches of bfloat16 graphs are bfloat16: leave kv out"),
        ({"format": "float32"}, CalibrationError, "'float32' changes nothing by itself.*give kv"),
        ({"kv": "float16", "variant": "full"}, CalibrationError, "keeps other tokens than 'full'"),
        ({"kv": "bfloat16", "name": "full"}, VariantError, "already has a variant 'full'"),
        ({"kv": "bfloat16", "variant": "gone"}, VariantError, "no variant 'gone'"),
        ({"kv": "bfloat16", "block": 128}, CalibrationError, "block=128 says nothing to format float32.*int4"),
    ):
        with pytest.raises(error, match=says):
            sievert.quantise(bundle, **{"variant": "iwp-22", "collection": collected.path} | options)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="holds no calibration data"):
        sievert.quantise(bundle, variant="iwp-22", kv="float16", collection=tmp_path)
    assert sorted(path.name for path in bundle.iterdir() if path.name != ".sievert.lock") == [n for n in before if n != ".sievert.lock"]
    half = Path(shutil.copytree(bundle, tmp_path / "half"))
    raw = json.loads((half / "sievert.json").read_text())
    raw["source"]["dtype"] = "float16"
    (half / "sievert.json").write_text(json.dumps(raw))
    with pytest.raises(VariantError, match="the bundle is float16, and so are its caches"):
        sievert.quantise(half, variant="iwp-22", kv="bfloat16")
