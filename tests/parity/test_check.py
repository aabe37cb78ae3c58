"""The whole check on a tiny bundle in ONNX Runtime: a true engine passes, and faults planted in its graphs fail where they are."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console

from sievert.bundle.errors import CheckpointError, InputError, ProfileError, VariantError
from sievert.bundle.manifest import EngineEntry, EngineFile, Variant
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import Prompter
from sievert.exporter.write import write_bundle
from sievert.graph_passes.lower import lower
from sievert.graph_passes.prune import add_variant
from sievert.parity import check as check_module
from sievert.parity.check import check, check_against
from sievert.parity.load import describe_other_weights, load_reference
from sievert.parity.observe import open_pipeline
from sievert.parity.reference import Reference
from sievert.parity.report import Report
from sievert.parity.samples import Sample, synthetic_samples
from sievert.parity.verdict import Verdict
from tests.tiny_llava import export_tiny, make_tiny_llava

PROFILE = Profile(batch=3, decode_batch=2, visual_tokens=16, max_text=20, max_new_tokens=6)
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = write_bundle(export_tiny("clip-llama")[1], tmp_path_factory.mktemp("check") / "bundle")
    two = (Stage(selector="iwp", layer=1, keep=5, requested="5"), Stage(selector="random", layer=3, keep=4, requested="4"))
    add_variant(made, name="full", plan=Plan(), profile=PROFILE)
    add_variant(made, name="iwp", plan=Plan(stages=two[:1]), profile=PROFILE)
    add_variant(made, name="two", plan=Plan(stages=two, positions="compact"), profile=PROFILE)
    return made


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Reference:
    return load_reference(bundle.manifest)


@pytest.mark.parametrize("variant", ["full", "iwp", "two"])
def test_a_true_engine_passes(bundle: Bundle, reference: Reference, variant: str) -> None:
    said: list[str] = []
    report = check_against(reference, bundle, variant, count=7, progress=said.append)
    assert (report.verdict, report.reason, report.first_failure, report.synthetic) == (Verdict.PASS, "", None, True)
    assert said == [f"loading {variant} on onnxruntime", *(f"samples {span} of 7" for span in ("1..3", "4..6", "7..7"))]
    assert len(report.samples) == 7 and report.forced_tokens == 6
    assert len({sample.tokens for sample in report.samples[:3]}) > 1  # of several lengths in one batch
    for sample in report.samples:
        assert sample.engine_text == sample.reference_text and all(sample.same_kept)
        assert sample.kept == tuple(stage.keep for stage in bundle.variant(variant).plan.stages)
    inner = {"full": [], "iwp": ["layer 1 input", "selector scores", "selection order", "kept index"]}
    two = [f"{what} (cut {cut})" for cut, whats in enumerate((inner["iwp"][1:], inner["iwp"][2:])) for what in whats]
    inner["two"] = ["layer 1 input", *two[:3], "layer 3 input", *two[3:]]
    assert [stage.stage for stage in report.stages] == [
        *("vision features", "merged embeddings"),
        *inner[variant],
        *("caches after prefill", "last logits", "teacher-forced logits", "greedy tokens", "caches at the end"),
    ]
    counts = {stage.stage: stage.comparisons for stage in report.stages}
    assert counts["caches after prefill"] == counts["caches at the end"] == 7 * 8 and counts["teacher-forced logits"] == 7 * 6
    assert all(stage.worst is None or stage.worst.severity < 0.3 for stage in report.stages)


def find(model: onnx.ModelProto, kind: str, *, reads: str = "") -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind and (not reads or reads in node.input)]


def corrupt_weight(model: onnx.ModelProto) -> None:
    """One number of layer 2's mlp, in prefill."""
    name = next(tensor.name for tensor in model.graph.initializer if "layers.2.mlp.down_proj" in tensor.name)
    (place,) = [number for number, tensor in enumerate(model.graph.initializer) if tensor.name == name]
    shape = list(model.graph.initializer[place].dims)
    change = np.zeros(shape, np.float32)
    change[3, 5] = 0.5
    model.graph.initializer.append(numpy_helper.from_array(change, "planted"))
    for node in model.graph.node:
        node.input[:] = ["corrupted" if value == name else value for value in node.input]
    model.graph.node.insert(0, helper.make_node("Add", [name, "planted"], ["corrupted"]))


def swap_rotary_axes(model: onnx.ModelProto) -> None:
    for node in find(model, "RotaryEmbedding"):
        node.input[1], node.input[2] = node.input[2], node.input[1]


def shift_cache_rows(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, [], [1]))
    model.graph.node.insert(0, helper.make_node("Add", ["cache_row", "one"], ["shifted_row"]))
    for node in find(model, "TensorScatter", reads="cache_row"):
        node.input[2] = "shifted_row"


def ignore_padding(model: onnx.ModelProto) -> None:
    """Every row is real to the selector: attention_mask >= 0."""
    (real,) = find(model, "Greater", reads="attention_mask")
    real.op_type = "GreaterOrEqual"


def keep_the_worst(model: onnx.ModelProto) -> None:
    """After the selector has said what it takes, its last token is exchanged for the one of the lowest score."""
    worst = helper.make_node("ArgMin", ["stage.0.scores"], ["worst"], axis=1, keepdims=1)
    order = helper.make_node("ScatterElements", ["stage.0.order", "last_place", "worst"], ["changed"], axis=1)
    model.graph.initializer.append(helper.make_tensor("last_place", TensorProto.INT64, [3, 1], [4, 4, 4]))
    readers = [number for number, node in enumerate(model.graph.node) if "stage.0.order" in node.input]
    for number in readers:
        node = model.graph.node[number]
        node.input[:] = ["changed" if value == "stage.0.order" else value for value in node.input]
    for node in (order, worst):
        model.graph.node.insert(readers[0], node)


def plant(bundle: Bundle, graph: str, edit: Edit) -> str:
    """The variant ``iwp`` with one graph changed, under another name."""
    variant = bundle.variant("iwp")
    model = onnx.load(str(bundle.graph_file(graph, variant="iwp")), load_external_data=False)
    edit(model)
    name = f"faulty-{edit.__name__.replace('_', '-')}"
    with bundle.step("plant") as step:
        entry = variant.graphs[graph].model_copy(update={"file": step.add_bytes(f"{name}.{graph}", ".onnx", model.SerializeToString())})
        faulty = Variant(plan=variant.plan, profile=variant.profile, capacities=variant.capacities, graphs={**variant.graphs, graph: entry})
        step.put_variant(name, faulty, force=True)
    return name


@pytest.mark.parametrize(
    ("graph", "edit", "stage"),
    [
        ("prefill", corrupt_weight, "caches after prefill"),
        ("prefill", swap_rotary_axes, "layer 1 input"),
        ("decode", swap_rotary_axes, "teacher-forced logits"),
        ("decode", shift_cache_rows, "teacher-forced logits"),
        ("prefill", ignore_padding, "selector scores"),
        ("prefill", keep_the_worst, "kept index"),
    ],
)
def test_a_planted_fault_fails_where_it_is(bundle: Bundle, reference: Reference, graph: str, edit: Edit, stage: str) -> None:
    report = check_against(reference, bundle, plant(bundle, graph, edit), count=3, tokens=3)
    assert (report.verdict, report.first_failure) == (Verdict.FAIL, stage), report.reason
    assert stage in report.reason and report.exit_code() == 1
    (found,) = [summary for summary in report.stages if summary.stage == stage]
    assert found.verdict is Verdict.FAIL
    if edit is keep_the_worst:  # the rest is consistent with what it kept, and is compared with the reference on just that
        assert [summary.stage for summary in report.stages if summary.verdict is Verdict.FAIL] == ["kept index"]
        assert not any(sample.same_kept[0] for sample in report.samples)


def test_the_lowered_files_are_judged_too(bundle: Bundle, reference: Reference) -> None:
    variant, graphs = bundle.variant("iwp"), {}
    with bundle.step("build") as step:
        for graph in variant.graphs:
            lowered = ir.to_proto(lower(ir.load(bundle.graph_file(graph, variant="iwp")), "tensorrt-rtx")).SerializeToString()
            name = step.add_bytes(f"iwp.{graph}.lowered", ".onnx", lowered)
            digest = hashlib.sha256(lowered).hexdigest()
            graphs[graph] = EngineFile(lowered=name, built_from=digest, file=None, builder="none", seconds=0.0)
        step.put_engine("iwp", "tensorrt-rtx", EngineEntry(target="none", graphs=graphs))
    report = check_against(reference, bundle, "iwp", count=3, tokens=2, lowered_for="tensorrt-rtx")
    assert (report.verdict, report.lowered_for) == (Verdict.PASS, "tensorrt-rtx")
    assert "files lowered for tensorrt-rtx" in str(report.table().title)


def test_an_engine_that_shows_nothing_inside_is_judged_by_what_it_keeps(
    bundle: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sievert.engines.run.pipeline import Pipeline

    def unexposed(bundle: Bundle, variant: str, engine: str, *, lowered_for: str, low_memory: bool) -> Any:
        return Pipeline(bundle, variant, engine, lowered_for=lowered_for), False

    monkeypatch.setattr(check_module, "open_pipeline", unexposed)
    report = check_against(reference, bundle, "iwp", count=3, tokens=1)
    assert report.verdict is Verdict.PASS
    assert [stage.stage for stage in report.stages if stage.verdict is Verdict.NOT_RUN] == ["layer 1 input", "selector scores"]
    report = check_against(reference, bundle, plant(bundle, "prefill", keep_the_worst), count=3, tokens=1)
    assert (report.verdict, report.first_failure) == (Verdict.FAIL, "selection order")


def test_an_engine_that_cannot_run_is_not_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def unavailable(self) -> str:
            return "there is no GPU here"

        def version(self) -> None:
            return None

    monkeypatch.setattr(check_module, "find_runtime", lambda name: Absent())
    report = check(bundle, "iwp", "tensorrt-rtx")
    assert (report.verdict, report.reason, report.stages, report.samples) == (Verdict.NOT_RUN, "there is no GPU here", (), ())
    assert report.exit_code(strict=True) == 0 and report.versions["tensorrt-rtx"] == "not installed"
    assert report.to_json()["verdict"] == "NOT RUN"


def test_own_pictures_and_questions(bundle: Bundle, reference: Reference) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8))
    samples = [Sample(picture, "what is the digit ?"), Sample(picture.rotate(90), "which colour")]
    report = check_against(reference, bundle, "iwp", samples=samples, tokens=2)
    assert report.verdict is Verdict.PASS and not report.synthetic
    assert [sample.prompt for sample in report.samples] == [sample.prompt for sample in samples]


def test_the_report_is_plain_json_and_a_table(bundle: Bundle, reference: Reference) -> None:
    report = check_against(reference, bundle, "two", count=2, tokens=2)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["verdict"] == "PASS" and plain["tolerances"]["logits"] == 1e-4 and plain["synthetic"] is True
    assert {"python", "numpy", "torch", "transformers", "sievert", "onnxruntime"} == set(plain["versions"])
    assert {result["name"] for result in plain["samples"][1]["results"]} >= {"image_features", "end.3.value", "step.1.logits"}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    drawn = console.export_text()
    assert "two on onnxruntime: PASS" in drawn and all(stage.stage in drawn for stage in report.stages)


def test_synthetic_samples_are_the_same_every_time(bundle: Bundle) -> None:
    prompter = Prompter(bundle.path, bundle.manifest.geometry, PROFILE)
    one, other = (synthetic_samples(prompter, 5, template=True) for _ in range(2))
    assert [sample.prompt for sample in one] == [sample.prompt for sample in other]
    pixels, same = ([sample.images[0].tobytes() for sample in samples] for samples in (one, other))
    assert pixels == same and len(set(pixels)) == len({sample.prompt for sample in one}) == 5
    small = PROFILE.model_copy(update={"max_text": 2})
    with pytest.raises(InputError, match="no question fits max_text=2"):
        synthetic_samples(Prompter(bundle.path, bundle.manifest.geometry, small), 1, template=True)


def test_what_cannot_be_checked_is_refused(bundle: Bundle, reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="no variant 'none'"):
        check(bundle, "none")
    with pytest.raises(InputError, match="engine 'other' does not exist"):
        check(bundle, "iwp", "other")
    with pytest.raises(ProfileError, match="tokens=7.*1..6"):
        check_against(reference, bundle, "iwp", tokens=7)
    with pytest.raises(ProfileError, match="count=0"):
        check_against(reference, bundle, "iwp", count=0)
    with pytest.raises(InputError, match="pass --model"):
        check(bundle, "iwp", model=tmp_path / "gone")
    with pytest.raises(CheckpointError, match="pass --model"):
        check(bundle, "iwp", model=tmp_path)  # a folder, but no checkpoint
    other = make_tiny_llava(tmp_path / "other", layers=3)
    with pytest.raises(CheckpointError, match="has 3 layers.*the bundle's model 4"):
        check(bundle, "iwp", model=other)
    moved = bundle.manifest.model_copy(update={"source": bundle.manifest.source.model_copy(update={"model": "/no/such/folder"})})
    with pytest.raises(InputError, match="not at '/no/such/folder' any more: pass --model"):
        load_reference(moved)


def test_a_hub_model_is_read_from_where_export_downloaded_it(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(bundle.manifest.source.model)
    monkeypatch.setattr("sievert.parity.load.DOWNLOADS", tmp_path)
    hub = bundle.manifest.model_copy(update={"source": bundle.manifest.source.model_copy(update={"model": "owner/name"})})
    assert describe_other_weights(hub, load_reference(hub).model) == ""


def test_a_model_of_other_weights_fails_at_once(bundle: Bundle, tmp_path: Path) -> None:
    report: Report = check(bundle, "full", count=1, tokens=1, model=make_tiny_llava(tmp_path / "other", seed=1))
    assert (report.verdict, report.first_failure) == (Verdict.FAIL, "vision features")
    found = re.search(r"(\d+) of the (\d+) weights compared are not those that were exported, such as model\.", report.reason)
    assert found and 0 < int(found[1]) <= int(found[2])


def test_the_model_itself_has_no_other_weights(bundle: Bundle, reference: Reference) -> None:
    assert describe_other_weights(bundle.manifest, reference.model) == ""
    head = reference.model.lm_head.weight
    with torch.no_grad():
        before, head[3, 5] = head[3, 5].clone(), head[3, 5] + 1
        assert "1 of the" in describe_other_weights(bundle.manifest, reference.model)
        head[3, 5] = before


def test_the_pipeline_shows_the_stages_it_has(bundle: Bundle) -> None:
    for variant, names in (("full", []), ("iwp", ["residual", "scores", "order"])):
        pipeline, exposed = open_pipeline(bundle, variant, "onnxruntime")
        with pipeline:
            shown = [spec.name for spec in pipeline._sessions["prefill"].outputs if spec.name.startswith("stage.")]
        assert exposed and shown == [f"stage.0.{name}" for name in names]
