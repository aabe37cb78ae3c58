"""Every command on a tiny model: what it makes, what it says, and what to run next."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sievert as package
from sievert.bundle.errors import ProfileError
from sievert.bundle.store import Bundle
from sievert.engines.run.pipeline import Features, Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.parity.verdict import Verdict
from tests.api.conftest import Outcome, sievert
from tests.tiny_llava import make_tiny_llava

COMMANDS = (
    "export",
    "prune",
    "prune-onnx",
    "build",
    "check",
    "run",
    "eval",
    "compare-selectors",
    "collect",
    "ranges",
    "inspect",
    "list",
    "doctor",
)
ASK = "which digit is red ?"


def test_export_does_the_whole_chain(exported: tuple[Path, Outcome]):
    path, said = exported
    manifest = Bundle.open(path, verify="full").manifest
    assert set(manifest.variants) == {"full", "iwp-22"}
    (stage,) = manifest.variants["iwp-22"].plan.stages
    assert (stage.selector, stage.layer, stage.keep, stage.requested, stage.options) == ("iwp", 1, 4, "22%", {})
    assert manifest.variants["full"].plan.stages == ()
    for variant in manifest.variants.values():
        assert (variant.profile.max_text, variant.profile.max_new_tokens, variant.profile.batch) == (24, 8, 1)
        assert set(variant.engines) == {"onnxruntime"}
    assert "Made the bundle" in said.out and "4 of 16 from layer 1 on" in said.out
    assert f"Next: sievert check {path}" in said.out
    for stage_name in ("reading the configuration", "tracing the model", "writing the weights", "making the variant iwp-22"):
        assert stage_name in said.err


def test_a_log_has_no_colours_no_animation_and_no_noise_of_libraries(exported: tuple[Path, Outcome]):
    for text in (exported[1].out, exported[1].err):
        assert "\x1b" not in text and "\r" not in text
    lines = exported[1].err.splitlines()
    assert lines and all(line.startswith("  ") and line.endswith(" s") for line in lines), lines


def test_check_passes_and_writes_every_number(shared: Path, tmp_path: Path):
    said = sievert("check", shared, "--samples", 2, "--tokens", 3, "--json", tmp_path / "report.json")
    assert said.code == 0, said.all
    assert "PASS over all that ran: 2 PASS" in said.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "PASS"
    assert [(one["variant"], one["engine"], one["ran"]["verdict"]) for one in report["outcomes"]] == [
        ("full", "onnxruntime", "PASS"),
        ("iwp-22", "onnxruntime", "PASS"),
    ]
    assert all(len(one["ran"]["samples"]) == 2 and one["ran"]["forced_tokens"] == 3 for one in report["outcomes"])
    assert "\x1b" not in said.all


def test_check_takes_pictures_and_prompts_of_the_users(shared: Path, picture: Path, tmp_path: Path):
    lines = [json.dumps({"image": str(picture), "prompt": text, "answer": "unused"}) for text in (ASK, "what is the colour ?", "which ?")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    said = sievert("check", shared, "--variant", "iwp-22", "--data", tmp_path / "data.jsonl", "--tokens", 1)
    assert said.code == 0, said.all
    assert "3 of 3" in said.out and "made up" not in said.out


def test_check_fails_against_another_model(shared: Path, tmp_path: Path):
    other = make_tiny_llava(tmp_path / "other", seed=1)
    said = sievert("check", shared, "--variant", "full", "--samples", 1, "--tokens", 1, "--model", other)
    assert said.code == 1, said.all
    assert "FAIL full on onnxruntime: first failing stage: vision features" in said.out


@pytest.mark.parametrize(("verdict", "strict", "code"), [("AMBIGUOUS", False, 0), ("AMBIGUOUS", True, 3), ("NOT_RUN", True, 3)])
def test_an_ambiguous_verdict_has_its_own_line_and_code(
    shared: Path, monkeypatch: pytest.MonkeyPatch, verdict: str, strict: bool, code: int
):
    from sievert import checking

    def judge(*_: object, **__: object) -> checking.Checked:
        found = real(shared, variants=["full"], samples=1, tokens=1)
        (one,) = found.outcomes
        report = replace(one.ran, verdict=Verdict[verdict], reason="1 near ties, the first at selection order (sample 0)")
        return replace(found, outcomes=(replace(one, ran=report),))

    real = checking.check
    monkeypatch.setattr(checking, "check", judge)
    said = sievert("check", shared, *(["--strict"] if strict else []))
    assert said.code == code, said.all
    assert f"{Verdict[verdict].value} full on onnxruntime: 1 near ties" in said.out
    assert "PASS over" not in said.out


def test_run_answers_each_prompt_on_the_standard_output(shared: Path, picture: Path, tmp_path: Path):
    arguments = ("--image", picture, "--prompt", ASK, "--prompt", "what is the colour ?", "--max-new-tokens", 4)
    said = sievert("run", shared, *arguments, "--show-kept", tmp_path / "kept.png")
    assert said.code == 0, said.all
    first, one, second, two = said.out.splitlines()
    assert (first, second) == (ASK, "what is the colour ?")
    found = package.run(shared, picture, [ASK, "what is the colour ?"], max_new_tokens=4)
    assert (one, two) == tuple(answer.text.strip() for answer in found.answers)
    assert "iwp-22 on onnxruntime: 4 of 16 visual tokens from layer 1 on" in said.err
    assert all(len(answer.kept) == 1 and len(answer.kept[0]) == 4 for answer in found.answers)
    drawn = np.asarray(Image.open(tmp_path / "kept.png"))
    assert drawn.shape[0] > 2 * 448 and drawn.shape[1] > 2 * 448  # a row for each prompt; the picture and one stage


def test_one_answer_alone_is_the_whole_standard_output(shared: Path, picture: Path):
    said = sievert("run", shared, "--variant", "full", "--image", picture, "--prompt", ASK, "--max-new-tokens", 2)
    assert said.code == 0, said.all
    assert len(said.out.splitlines()) == 1 and ASK not in said.out
    assert "full on onnxruntime: all 16 visual tokens" in said.err


def test_the_same_seed_draws_the_same_answer(shared: Path, picture: Path):
    draw = ("run", shared, "--image", picture, "--prompt", ASK, "--temperature", 2, "--top-p", 0.9, "--seed")
    answers = {sievert(*draw, seed).out for seed in (1, 1, 2)}
    assert len(answers) == 2


def test_prune_adds_a_variant_with_the_sizes_of_full(bundle: Path, picture: Path):
    options = ("--layer", 1, "--keep", 8, "--layer", 3, "--keep", "12.5%", "--selector", "magnitude", "--option", "text=all")
    said = sievert("prune", bundle, *options, "--max-new-tokens", 5)
    assert said.code == 0, said.all
    assert "Made the variant magnitude-k8-12_5" in said.out and "sievert build" in said.out
    made = Bundle.open(bundle, verify="full").variant("magnitude-k8-12_5")
    assert [(stage.layer, stage.keep, stage.options) for stage in made.plan.stages] == [(1, 8, {"text": "all"}), (3, 2, {"text": "all"})]
    assert (made.profile.max_text, made.profile.max_new_tokens) == (24, 5)
    assert made.capacities == (45, 37, 37, 31)
    found = package.run(bundle, picture, [ASK], variant="magnitude-k8-12_5")
    first, second = map(set, found.answers[0].kept)
    assert (len(first), len(second)) == (8, 2) and second < first


def test_prune_makes_a_variant_whose_prompts_cost_what_they_are_long(bundle: Path, picture: Path, tmp_path: Path):
    said = sievert("prune", bundle, "--keep", "22%", "--dynamic-text")
    assert said.code == 0, said.all
    assert "Made the variant iwp-22-dynamic" in said.out and "up to 24" in said.out
    made = Bundle.open(bundle, verify="full").variant("iwp-22-dynamic")
    assert made.profile.dynamic_text and made.capacities == Bundle.open(bundle).variant("iwp-22").capacities
    report = package.check(bundle, variants=["iwp-22-dynamic"], samples=4, tokens=3).outcomes[0].ran
    assert report.verdict is Verdict.PASS
    assert len({sample.tokens for sample in report.samples}) > 2, "samples of several lengths"
    static, dynamic = (package.run(bundle, picture, [ASK], variant=name).answers[0] for name in ("iwp-22", "iwp-22-dynamic"))
    assert (static.text, static.kept) == (dynamic.text, dynamic.kept)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"image": str(picture), "prompt": prompt}) + "\n" for prompt in (ASK, f"{ASK} red")))
    asked = package.evaluate(bundle, data, variants=["iwp-22", "iwp-22-dynamic"], out=tmp_path / "answers").scores
    assert [score.variant for score in asked] == ["full", "iwp-22", "iwp-22-dynamic"] and asked[1].agreement == asked[2].agreement
    said = sievert("collect", bundle, "--variant", "iwp-22-dynamic", "--data", data, "--out", tmp_path / "collected")
    assert said.code == 2 and "--static-text" in said.err
    ids, image = np.zeros((1, 41), np.int64), np.arange(16)[None]
    wide = PromptBatch(ids, ids, ids, ids, image, lengths=(41,), rows=1)
    with Pipeline(Bundle.open(bundle), "iwp-22-dynamic") as pipeline, pytest.raises(ProfileError, match="this variant takes 17..40"):
        pipeline.prefill(wide, Features({}))


def test_prune_replaces_a_variant_only_with_force(bundle: Path):
    repeated = ("prune", bundle, "--keep", "22%", "--selector", "uniform", "--name", "iwp-22")
    assert sievert(*repeated).code == 2
    said = sievert(*repeated, "--force")
    assert said.code == 0, said.all
    assert Bundle.open(bundle).variant("iwp-22").plan.stages[0].selector == "uniform"


def test_prune_makes_full_where_an_interrupted_export_left_none(bundle: Path):
    opened = Bundle.open(bundle)
    with opened.step("as if interrupted") as step:
        step.replace(step.manifest.model_copy(update={"variants": {}}))
    assert sievert("prune", bundle, "--keep", "50%", "--max-text", 10, "--max-new-tokens", 3).code == 0
    variants = Bundle.open(bundle, verify="full").manifest.variants
    assert set(variants) == {"full", "iwp-50"}
    assert variants["full"].plan.stages == () and variants["full"].profile == variants["iwp-50"].profile


def test_build_records_engines_and_check_says_which_ran(bundle: Path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed")
    said = sievert("build", bundle, "--variant", "iwp-22", "--engine", "tensorrt-rtx")
    assert said.code == 0, said.all
    assert "Built is not run" in said.out
    files = [made.file for made in Bundle.open(bundle, verify="full").variant("iwp-22").engines["tensorrt-rtx"].graphs.values()]
    assert len(files) == 4 and all(file and (bundle / file).stat().st_size > 0 for file in files)
    checked = package.check(bundle, variants=["iwp-22"], engines=["tensorrt-rtx"], samples=1, tokens=1)
    (outcome,) = checked.outcomes
    assert outcome.files is not None and outcome.files.verdict is Verdict.PASS and outcome.files.lowered_for == "tensorrt-rtx"
    if outcome.ran.verdict is Verdict.NOT_RUN:
        said = sievert("run", bundle, "--engine", "tensorrt-rtx", "--image", bundle, "--prompt", ASK)
        assert said.code == 2
    else:
        assert outcome.ran.verdict is Verdict.PASS


def test_inspect_shows_what_is_in_a_bundle(shared: Path):
    said = sievert("inspect", shared, "--verify", "--tensors")
    assert said.code == 0, said.all
    for part in ("LlavaForConditionalGeneration", "Sizes", "Variants", "Engines", "Graphs", "Weights", "Lint", "History"):
        assert part in said.out
    assert "An image of 32x32 pixels (height x width): 16 visual tokens (4 rows, 4 columns)" in said.out
    for fact in ("1 x 48, 3 x 36", "kept_index.0 int64[1, 4]", "model.language_model.layers.0.self_attn.q_proj.weight", "export "):
        assert fact in said.out
    assert "Every file is what the manifest says" in said.out
    found = package.inspect(shared)
    assert sum(found.sizes.values()) == sum(entry.bytes for entry in found.manifest.files.values())
    assert found.caches["iwp-22"].decode_bytes == (48 + 3 * 36) * 2 * 2 * 16 * 4


def test_list_and_doctor_show_the_choices_and_the_machine():
    listed = sievert("list")
    assert listed.code == 0, listed.all
    for name in ("llava", "qwen3", "iwp", "strength=5.0", "uniform", "onnxruntime", "tensorrt-rtx", "builds here", "runs here"):
        assert name in listed.out
    for name, cuts in (
        ("iwp", "before 5: your --keep"),
        ("pyramiddrop", "before 8, 16, 24: 50%, 25%, 12.5%,"),
        ("sparsevlm", "before 3, 7, 16: 52.08%, 34.72%, 19.1%"),
        ("divprune", "arXiv:"),
    ):
        (line,) = [line for line in listed.out.splitlines() if line.split()[:1] == [name]]
        assert cuts in line
    doctored = sievert("doctor")
    assert doctored.code == 0, doctored.all
    for part in ("Machine", "Engines", "Dtypes", "onnxruntime", "tensorrt"):
        assert part in doctored.out
    faults = [engine for engine in package.doctor().engines if engine.run_fault]
    assert all(f"{engine.name} cannot run: {engine.run_fault}" in doctored.out for engine in faults)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str):
    said = sievert(command, "--help")
    assert said.code == 0
    assert "Examples" in said.out and f"sievert {command}" in said.out


def test_version_and_bare_command():
    assert sievert("--version").out == f"sievert {package.__version__}\n"
    assert all(name in sievert().all for name in COMMANDS)


def test_the_functions_stay_functions_when_their_modules_are_imported():
    for name in package.__all__:
        assert getattr(package, name) is not None
    functions = set(package.__all__) - {"Cut", "__version__"}
    for name in {name for name in functions if not name.endswith("Error")}:
        assert callable(getattr(package, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


def test_importing_the_package_and_its_command_loads_no_library():
    script = "import sys, sievert, sievert.cli; print(sorted({'torch', 'transformers', 'onnxruntime', 'onnx', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
