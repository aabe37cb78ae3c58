"""A quantised variant runs, shares its weights, leaves the selector alone, and is refused where its data or format does not fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

import sievert
from sievert.bundle.errors import CalibrationError, EngineError, VariantError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection, load_collection
from sievert.calibration.peaks import Peak, measure_peaks
from sievert.calibration.quantise import make_recipe, quantise_variant
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.quantise import find_linears, selector_weights
from tests.calibration.conftest import edit_weight

FORMATS = ("int8", "fp8", "int4", "int8-weights")


@pytest.fixture(scope="module")
def quantised(made: Path, collected: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with iwp-22 in every format. Not to be changed."""
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("formats") / "bundle"))
    for name in FORMATS:
        sievert.quantise(path, variant="iwp-22", format=name, collection=collected.path)
    return path


def run(bundle: Path, graph: str, variant: str, feed: dict[str, Any]) -> dict[str, Any]:
    opened = Bundle.open(bundle)
    file = opened.graph_file(graph, variant=variant)
    return OnnxRuntime(threads=1).load(ModelFile(file, "", float8=variant.endswith("fp8"))).run(feed)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_variant_says_nearly_the_same(quantised: Path, collected: Collection, name: str):
    """Not the same: rounding is seen, and is of the size the format has."""
    for graph, output in (("vision_encoder", "image_features"), ("decode", "logits")):
        feed = collected.feed(graph, 0)
        before, after = (run(quantised, graph, variant, feed)[output] for variant in ("iwp-22", f"iwp-22-{name}"))
        lost = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert 1e-4 < lost < (0.25 if name == "int4" else 0.1), (graph, lost)


def test_weights_stand_once_and_the_selectors_stay(quantised: Path):
    bundle = Bundle.open(quantised, verify="full")
    for name in FORMATS:
        variant = bundle.variant(f"iwp-22-{name}")
        assert variant.precision is not None
        models = {graph: ir.load(bundle.graph_file(graph, variant=f"iwp-22-{name}")) for graph in ("prefill", "decode")}
        places: dict[str, set[tuple[str, int]]] = {}
        for model in models.values():
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor) and str(value.name).endswith((".q", ".scale")):
                    places.setdefault(str(value.name), set()).add((str(value.const_value.location), value.const_value.offset or 0))
        assert len(places) > 40 and all(len(where) == 1 for where in places.values())
        kept = variant.precision.kept
        read = {f"model.language_model.layers.1.self_attn.{part}_proj.weight.T" for part in "qkv"}
        assert {weight for weight, why in kept.items() if why == "a selector reads what it makes"} == read
        others = {weight: why for weight, why in kept.items() if weight not in read}
        assert others.pop("lm_head.weight") == "it makes the logits"
        assert all(name == "int4" and "inputs are no multiple of the block of 32" in why for why in others.values())
        assert selector_weights(models["prefill"]) == read
        left = {linear.name for model in models.values() for linear in find_linears(model)}
        assert left == read | {"lm_head.weight"}  # and nothing else is multiplied as it was
        quantisers = sum(node.op_type == "QuantizeLinear" for node in models["decode"].graph)
        # Four layers of four activations; what layer 1's projections read stays.
        assert quantisers == (15 if name in ("int8", "fp8") else 0)
    files = {weight.file for name in ("int8", "int8-weights") for weight in bundle.variant(f"iwp-22-{name}").precision.weights}  # type: ignore[union-attr]
    assert len(files) == 1, "the same codes stand on the disk once, whichever variant reads them"


def test_options_reach_the_graphs(made: Path, collected: Collection, bundle: Path):
    made_by: dict[str, Any] = {
        "all": {"quantise_selector": True, "quantise_head": True},
        "kept": {"keep_high": ["mlp"]},
        "percentile": {"calibration": "percentile", "percentile": 99.8},
        "wide": {"format": "int4", "block": 128},
    }
    opened = Bundle.open(bundle)
    data = load_collection(collected.path, opened)
    for name, options in made_by.items():
        form = options.pop("format", "int8")
        keep = dict.fromkeys(options.pop("keep_high", ()), "asked for")
        recipe = make_recipe(
            form,
            selector=options.pop("quantise_selector", False),
            head=options.pop("quantise_head", False),
            keep=keep,
            **options,
        )
        quantise_variant(opened, "iwp-22", name, recipe, data)
    precision = {name: opened.variant(name).precision for name in made_by}
    assert precision["all"] is not None and not precision["all"].kept
    assert precision["kept"] is not None and sum(why == "asked for" for why in precision["kept"].kept.values()) == 4 * 3 + 2 * 2
    assert precision["wide"] is not None and precision["wide"].kept["model.language_model.layers.0.mlp.up_proj.weight.T"] == (
        "its 64 inputs are no multiple of the block of 128"
    )
    assert precision["percentile"] is not None and precision["percentile"].calibration == "percentile 99.8"

    def scales(variant: str) -> dict[str, float]:
        graph = ir.load(opened.graph_file("decode", variant=variant)).graph
        return {str(node.inputs[1].name): float(node.inputs[1].const_value.numpy()) for node in graph if node.op_type == "QuantizeLinear"}  # type: ignore[union-attr]

    largest, within = scales("all"), scales("percentile")
    assert all(0.79 * largest[name] < within[name] <= largest[name] for name in within)
    clipped = sum(within[name] < largest[name] for name in within)
    # Layer 2's and layer 3's q, k and v read an activation with outliers (the weights are random, the seed is not).
    whole = {weight.split(".")[3] for weight in precision["percentile"].unclipped if "q_proj" in weight}
    assert 0 < clipped < len(within) and whole == {"2", "3"}


def test_peaks_are_exact_and_shared(collected: Collection):
    bundle = collected.bundle
    models = {graph: ir.load(bundle.graph_file(graph, variant="iwp-22")) for graph in ("prefill", "decode")}
    names = [f"model.language_model.layers.0.{part}.weight.T" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    peaks = {share: measure_peaks(collected, models, names, percentile=share) for share in (100.0, 99.0)}
    found = {share: {name: peak.percentile for name, peak in each.items()} for share, each in peaks.items()}
    values = []
    for graph, model in models.items():
        linear = next(each for each in find_linears(model) if each.name == names[0])
        exposed = to_bytes(expose(model, [str(linear.activation.name)]))
        session = OnnxRuntime(threads=1).load(ModelFile(bundle.path / "x.onnx", sha256_bytes(exposed), exposed))
        values += [np.abs(session.run(feed)[str(linear.activation.name)]).ravel() for feed in collected.feeds(graph)]
    everything = np.sort(np.concatenate(values))[::-1]
    assert found[100.0][names[0]] == found[100.0][names[1]] == pytest.approx(everything[0], rel=1e-5)
    assert found[99.0][names[0]] == pytest.approx(everything[int(len(everything) * 0.01)], rel=1e-5)
    assert found[100.0][names[2]] != found[100.0][names[0]]
    peak = Peak(3)
    peak.add(np.array([1, -9, 2, 5], np.float32))
    peak.add(np.array([-7], np.float32))
    assert sorted(peak.largest) == [5, 7, 9] and (peak.most, peak.percentile, peak.outliers) == (9, 5, True)


def test_check_judges_codes_and_tells_pruning_from_quantising(quantised: Path, tmp_path: Path):
    checked = sievert.check(quantised, variants=["iwp-22-int8"], samples=2, tokens=2)
    report = checked.outcomes[0].ran
    assert report.verdict.value in ("PASS", "AMBIGUOUS") and report.dtype == "int8", report.reason
    assert report.stages[0].stage == "quantised weights" and report.stages[0].comparisons > 20
    assert report.effects is not None and report.effects.samples == 2
    assert report.effects.pruning > report.effects.quantisation > 0
    assert report.stages[1].stage == "activation scales" and report.stages[1].comparisons > 20
    # A scale on the disk is twice what it was: of one channel, in a bundle whose hashes all agree.
    spoilt = Path(shutil.copytree(quantised, tmp_path / "spoilt"))
    _edit_stored(
        spoilt, "iwp-22-int8", "layers.2.mlp.up_proj.weight.T.scale", lambda scale: scale * np.where(np.arange(len(scale)) == 5, 2, 1)
    )
    spoilt_report = sievert.check(spoilt, variants=["iwp-22-int8"], samples=2, tokens=2).outcomes[0].ran
    assert spoilt_report.verdict.value == "FAIL" and spoilt_report.first_failure == "quantised weights"
    assert "layers.2.mlp.up_proj" in spoilt_report.reason and "[5]" in spoilt_report.reason


@pytest.mark.parametrize("factor", [8.0, 1 / 8])
def test_a_wrong_scale_of_an_activation_fails(quantised: Path, tmp_path: Path, factor: float):
    """Eight times too coarse, or cutting off what is beyond an eighth: in prefill and decode alike, hashes included."""
    spoilt = Path(shutil.copytree(quantised, tmp_path / "spoilt"))
    raw = json.loads((spoilt / "sievert.json").read_text())
    for graph in ("prefill", "decode"):
        file = raw["variants"]["iwp-22-int8"]["graphs"][graph]["file"]
        model = ir.load(spoilt / file)
        (linear,) = [
            node
            for node in model.graph
            if node.op_type == "MatMul" and str(node.inputs[1].name).endswith("layers.2.mlp.down_proj.weight.T.restored")  # type: ignore[union-attr]
        ]
        scale = linear.inputs[0].producer().inputs[1]  # type: ignore[union-attr]
        assert scale is not None and scale.const_value is not None
        scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(factor), name=scale.name)
        content = to_bytes(model)
        (spoilt / file).write_bytes(content)
        raw["files"][file] = {"bytes": len(content), "sha256": sha256_bytes(content)}
    (spoilt / "sievert.json").write_text(json.dumps(raw))
    report = sievert.check(spoilt, variants=["iwp-22-int8"], samples=2, tokens=2).outcomes[0].ran
    assert report.verdict.value == "FAIL" and report.first_failure == "activation scales", report.reason
    assert "layers.2.mlp.down_proj" in report.reason and "codes reach" in report.reason, report.reason


def _edit_stored(bundle: Path, variant: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    raw = json.loads((bundle / "sievert.json").read_text())
    (entry,) = [each for each in raw["variants"][variant]["precision"]["weights"] if each["name"].endswith(name)]
    path = bundle / entry["file"]
    content = bytearray(path.read_bytes())
    place = slice(entry["offset"], entry["offset"] + entry["nbytes"])
    content[place] = change(np.frombuffer(bytes(content[place]), entry["dtype"])).astype(entry["dtype"]).tobytes()
    path.write_bytes(content)
    raw["files"][entry["file"]]["sha256"] = sha256_bytes(bytes(content))
    (bundle / "sievert.json").write_text(json.dumps(raw))


def test_what_does_not_fit_is_refused_and_nothing_is_left(made: Path, collected: Collection, quantised: Path, bundle: Path):
    before = sorted(path.name for path in bundle.iterdir())
    path = collected.path
    for options, error, says in (
        ({"variant": "full"}, CalibrationError, "keeps other tokens than 'full'.*--variant full"),
        ({"variant": "gone"}, VariantError, "no variant 'gone'"),
        ({"variant": "iwp-22", "format": "int3"}, CalibrationError, "'int3'.*int8, fp8, int4"),
        ({"variant": "iwp-22", "calibration": "entropy"}, CalibrationError, "'entropy'.*max or percentile"),
        ({"variant": "iwp-22", "calibration": "percentile", "percentile": 2.0}, CalibrationError, "percentile=2.*50 to 100"),
        ({"variant": "iwp-22", "format": "int4", "block": 48}, CalibrationError, "block=48.*32 and 128"),
        ({"variant": "iwp-22", "name": "pair"}, VariantError, "already has a variant 'pair'"),
        ({"variant": "iwp-22", "name": "a/b"}, VariantError, "cannot name a variant"),
        ({"variant": "iwp-22", "keep_high": ["weight"]}, CalibrationError, "nothing is left to quantise"),
    ):
        with pytest.raises(error, match=says):
            sievert.quantise(bundle, collection=path, **options)
    with pytest.raises(CalibrationError, match="holds no calibration data"):
        sievert.quantise(bundle, variant="iwp-22")
    with pytest.raises(VariantError, match=r"quantised already \(int8\): quantise the one it was made from, 'iwp-22'"):
        sievert.quantise(quantised, variant="iwp-22-int8", format="int4")
    with pytest.raises(CalibrationError, match=r"is quantised \(fp8\)"):
        sievert.ranges(quantised, path, variant="iwp-22-fp8")
    assert sorted(file.name for file in bundle.iterdir() if file.name != ".sievert.lock") == [n for n in before if n != ".sievert.lock"]


def test_other_or_changed_data_is_refused(collected: Collection, bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(collected.path, tmp_path / "copy"))
    file = next(copy.glob("prefill-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CalibrationError, match="changed since it was collected"):
        sievert.quantise(bundle, variant="iwp-22", collection=copy)
    alone = Path(shutil.copytree(collected.path, tmp_path / "alone"))
    edit_weight(bundle, "layers.1.mlp.up_proj", lambda weight: weight * 2)
    with pytest.raises(CalibrationError, match="collected from another model"):
        sievert.quantise(bundle, variant="iwp-22", collection=alone)


def test_random_scales_must_be_asked_for_and_are_remembered(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    sievert.collect(bundle, random=True, variant="iwp-22", samples=2, decode_steps=1, out=tmp_path / "random")
    with pytest.raises(CalibrationError, match="calibration data is random.*say --random"):
        sievert.quantise(bundle, variant="iwp-22", collection=tmp_path / "random")
    found = sievert.quantise(bundle, variant="iwp-22", collection=tmp_path / "random", random=True)
    assert found.variant.precision is not None and found.variant.precision.random
    assert found.bytes < 0.3 * found.bytes_before
    for use in (
        lambda: sievert.run(bundle, tmp_path / "a.png", ["which ?"], variant="iwp-22-int8"),
        lambda: sievert.build(bundle, variants=["iwp-22-int8"], engines=["onnxruntime"]),
    ):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        caplog.clear()
        use()
        assert "its scales come from random data" in caplog.text
    # int4 reads no data, and shares no codes with int8
    four = sievert.quantise(bundle, variant="full", format="int4")
    assert four.variant.precision is not None and not four.variant.precision.data


def test_a_replaced_variant_leaves_what_others_read(quantised: Path, collected: Collection, tmp_path: Path):
    copy = Path(shutil.copytree(quantised, tmp_path / "bundle"))
    files = {path.name for path in copy.glob("weights.*.data")}
    sievert.quantise(copy, variant="iwp-22", format="int4", name="iwp-22-int8", force=True)
    assert {path.name for path in copy.glob("weights.*.data")} == files  # int8-weights reads the codes that int8 wrote
    Bundle.open(copy, verify="full")
    sievert.quantise(copy, variant="iwp-22", format="int4", name="iwp-22-int8-weights", force=True)
    assert not list(copy.glob("weights.int8*.data"))
    Bundle.open(copy, verify="full")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "bfloat16", "kv-bfloat16"])
def test_prefill_and_decode_build_for_rtx(quantised: Path, collected: Collection, tmp_path: Path, name: str):
    from sievert.engines.build.process import build_engine
    from sievert.graph_passes.lint import lint
    from sievert.graph_passes.lower import lower

    if name not in FORMATS:
        quantised = Path(shutil.copytree(quantised, tmp_path / "more"))
        options: dict[str, Any] = {"kv": "bfloat16"} if name.startswith("kv") else {"format": name}
        sievert.quantise(quantised, variant="iwp-22", collection=collected.path, **options)
    bundle = Bundle.open(quantised)
    for graph in ("prefill", "decode"):
        lowered = lower(ir.load(bundle.graph_file(graph, variant=f"iwp-22-{name}")), "tensorrt-rtx")
        assert not [found for found in lint(lowered, "tensorrt-rtx") if found.severity == "error"]
        place = Path(shutil.copytree(quantised, tmp_path / graph)) / "lowered.onnx"
        place.write_bytes(to_bytes(lowered))
        build_engine("tensorrt_rtx", place, tmp_path / f"{graph}.engine")
        assert (tmp_path / f"{graph}.engine").stat().st_size > 10_000


def test_a_gpu_without_the_format_is_named(quantised: Path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed")
    with pytest.raises(EngineError, match=r"'iwp-22-fp8' computes in fp8.*SM89.*not SM80, SM86"):
        sievert.build(quantised, variants=["iwp-22-fp8"], engines=["tensorrt-rtx"], capabilities=["SM80", "SM86", "SM89"])
