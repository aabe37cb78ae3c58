"""What pruning costs the shipped model, through the ONNX Runtime engines: `python benchmarks/accuracy.py`.

Every variant answers the same held-out questions (greedy, to the stop token). First each selector's options are tried on questions about
training digits; the paper's stay unless others are surely better. Then three tables: selectors over tokens kept at one layer, with prefill
FLOPs and time; selectors over layers at equal prefill FLOPs; and some over all layers at fixed shares. Differences are paired: each
variant against the unpruned model on the same questions. Answers are kept in `--work`, so an interrupted run goes on where it was,
as long as the code it measures is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.accuracy_answers import BATCH, MAX_NEW, answer
from benchmarks.accuracy_arms import FULL, METHODS, Arm, Budget, Options, keep_arms, layer_arms, tuning_arms
from benchmarks.accuracy_judge import Answers, Row, judge, median, paired
from benchmarks.accuracy_tables import Tables, write_tables
from benchmarks.stamp import ROOT, hash_code
from examples.digits_lvlm.data import Split, held_out
from examples.digits_lvlm.questions import ASKED as KINDS
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import Prompter
from sievert.eval_score import Estimate
from sievert.exporter.export import export_model
from sievert.exporter.write import write_bundle
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.prune import add_variant

CHECKPOINT: Final = ROOT / "examples" / "digits_lvlm" / "checkpoint"
MEASURED: Final = (
    "bundle",
    "graph_passes",
    "engines/run",
    "exporter",
    "examples/digits_lvlm/checkpoint",
    "examples/digits_lvlm/data.py",
    "examples/digits_lvlm/questions.py",
    "benchmarks/accuracy.py",
    "benchmarks/accuracy_answers.py",
    "benchmarks/accuracy_arms.py",
    "benchmarks/accuracy_judge.py",
    "benchmarks/accuracy_tables.py",
)
MAX_TEXT: Final = 24
TIMED_ROUNDS: Final = 15


def prepare(folder: Path, checkpoint: Path) -> tuple[Bundle, Profile]:
    """The checkpoint as a bundle, made once."""
    if not folder.exists():
        write_bundle(export_model(checkpoint), folder)
    bundle = Bundle.open(folder)
    visual = bundle.manifest.geometry.visual_tokens
    return bundle, Profile(batch=BATCH, decode_batch=BATCH, visual_tokens=visual, max_text=MAX_TEXT, max_new_tokens=MAX_NEW)


def add_arms(bundle: Bundle, arms: Sequence[Arm], profile: Profile) -> None:
    """A variant per arm; one of the same name and another plan is made anew."""
    for arm in arms:
        made = bundle.manifest.variants.get(arm.name)
        if made is None or made.plan != arm.plan:
            add_variant(bundle, name=arm.name, plan=arm.plan, profile=profile, force=made is not None, command=f"accuracy {arm.name}")


def measure_times(bundle: Bundle, arms: Sequence[Arm], folder: Path) -> dict[str, Estimate]:
    """Each plan's prefill time over the unpruned one's: medians over rounds in which a method's plans and the unpruned one take turns."""
    saved = folder / "times.json"
    found: dict[str, list[float]] = json.loads(saved.read_text()) if saved.exists() else {}
    items = list(held_out(BATCH))
    prompter = Prompter(bundle.path, bundle.manifest.geometry, bundle.variant(FULL.name).profile)
    batch = prompter.prepare([item.image for item in items], [item.question for item in items])
    plans = {arm.group: arm for arm in reversed(arms) if arm.method}  # of several draws, the first
    for method in METHODS:
        group = [arm for arm in plans.values() if arm.method == method.name]
        if all(arm.group in found for arm in group):
            continue
        pipelines = {arm.group: Pipeline(bundle, arm.name) for arm in (FULL, *group)}
        features = {name: pipeline.encode(batch.pixel_values) for name, pipeline in pipelines.items()}
        spent: dict[str, list[float]] = {name: [] for name in pipelines}
        order = np.random.default_rng(0)
        for number in range(TIMED_ROUNDS + 1):
            for name in order.permutation(sorted(pipelines)).tolist():
                start = time.perf_counter()
                pipelines[name].prefill(batch, features[name])
                if number:  # the first round warms up
                    spent[name].append(time.perf_counter() - start)
        found |= {arm.group: (np.asarray(spent[arm.group]) / np.asarray(spent[FULL.group])).tolist() for arm in group}
        saved.write_text(json.dumps(found))
    return {name: median(np.asarray(found[name])) for name in plans}


def judge_arms(arms: Sequence[Arm], found: Mapping[str, Answers], split: Split) -> list[Row]:
    """A row for each group of arms, against the unpruned model and against IWP at the same share."""
    full, groups = found[FULL.name], dict.fromkeys(arm.group for arm in arms)
    kinds = np.asarray([KINDS.index(item.kind) for item in held_out(len(full.right), split=split)])
    rivals = {(arm.keep, arm.layer): found[arm.name] for arm in arms if arm.method == METHODS[0].name}
    common = {arm.keep: found[arm.name] for arm in reversed(arms) if arm.method == METHODS[0].name}
    rows = []
    for group in groups:
        draws = [arm for arm in arms if arm.group == group]
        iwp = rivals.get((draws[0].keep, draws[0].layer), common.get(draws[0].keep))
        rival = None if draws[0].method in ("", METHODS[0].name) else iwp
        rows.append(judge(draws[0], [found[arm.name] for arm in draws], full, rival, kinds, len(KINDS)))
    return rows


def tune(bundle: Bundle, profile: Profile, questions: int, work: Path) -> tuple[dict[str, Options], list[Row]]:
    """The paper's setting of each method, or the best one whose paired interval against it lies above 0; and what every setting reached."""
    arms = tuning_arms(bundle.manifest.geometry)
    add_arms(bundle, arms, profile)
    found = answer(bundle, arms, questions, work, "tune", "train")
    tuned: dict[str, Options] = {method.name: method.candidates[0] for method in METHODS}
    for method in METHODS:
        tried = [found[arm.name].right for arm in arms if arm.method == method.name]
        better = [place for place, right in enumerate(tried) if paired(right, tried[0]).low > 0]
        if better:
            tuned[method.name] = method.candidates[max(better, key=lambda place: float(tried[place].mean()))]
    return tuned, judge_arms(arms, found, "train")


def measure(options: argparse.Namespace, work: Path) -> None:
    """The whole benchmark."""
    code = claim(work)
    bundle, profile = prepare(work / "bundle", options.checkpoint)
    geometry = bundle.manifest.geometry
    tuned, trials = tune(bundle, profile, options.tune_questions, work)
    tables = {"keep": keep_arms(geometry, tuned)}
    if options.layer_questions:
        dynamic = {name: ir.load(bundle.graph_file(name)) for name in bundle.manifest.graphs}
        tables |= {"equal": Budget(dynamic, geometry, profile).arms(tuned), "layer": layer_arms(geometry, tuned)}
    rows = {}
    for label, arms in tables.items():
        add_arms(bundle, arms, profile)
        questions = options.questions if label == "keep" else options.layer_questions
        rows[label] = judge_arms(arms, answer(bundle, arms, questions, work, label, "test"), "test")
    ratios = measure_times(bundle, tables["keep"], work)
    flops = {arm.group: count_flops(ir.load(bundle.graph_file("prefill", variant=arm.name))) for arm in tables["keep"]}
    if hash_code(MEASURED) != code:
        raise SystemExit("the code was changed while it was measured: nothing was written")
    made = Tables(
        rows=rows,
        trials=trials,
        tuned=tuned,
        times=ratios,
        flops={name: count / flops[FULL.group] for name, count in flops.items()},
        visual=geometry.visual_tokens,
        depth=geometry.depth,
        code=code,
    )
    for path in write_tables(made, ROOT / "docs"):
        sys.stdout.write(f"made {path.relative_to(ROOT)}\n")


def claim(work: Path, measured: Sequence[str] = MEASURED) -> str:
    """The hash of the code to measure; refuses a folder that holds answers of other code."""
    code, mark = hash_code(measured), work / "code"
    if mark.exists() and mark.read_text() != code:
        raise SystemExit(f"{work} holds answers of other code ({mark.read_text()}, this is {code}): remove it, or give another --work")
    mark.write_text(code)
    return code


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000, help="held-out questions of the first table")
    parser.add_argument("--layer-questions", type=int, default=500, help="held-out questions of the tables over layers; 0: no such tables")
    parser.add_argument("--tune-questions", type=int, default=500, help="training questions that options are tuned on")
    parser.add_argument("--work", type=Path, help="folder for the bundle and the answers (default: a temporary one)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        measure(options, work)


if __name__ == "__main__":
    main()
