"""What pruning costs the shipped model, through the ONNX Runtime engines: `python benchmarks/accuracy.py`.

Every variant answers the same held-out questions (greedy, to the stop token). Two tables: selectors over tokens kept at one layer, and
selectors over layers at fixed keeps. Intervals are paired: each variant against the unpruned model on the same questions. Answers
are kept beside the bundle, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stamp import ROOT, describe_machine, hash_code
from examples.digits_lvlm.data import Item, Split, held_out
from examples.digits_lvlm.questions import ASKED as KINDS
from sievert.bundle.plan import Option, Plan, Stage, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.generate import generate
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import Prompter
from sievert.exporter.export import export_model
from sievert.exporter.write import write_bundle
from sievert.graph_passes.prune import add_variant

CHECKPOINT: Final = ROOT / "examples" / "digits_lvlm" / "checkpoint"
MEASURED: Final = (
    "graph_passes",
    "engines/run",
    "exporter",
    "examples/digits_lvlm/checkpoint",
    "examples/digits_lvlm/data.py",
    "examples/digits_lvlm/questions.py",
    "benchmarks/accuracy.py",
)
KEEPS: Final = ("35.3%", "22.2%", "11.1%", "5%", "2.5%")
METHODS: Final[dict[str, tuple[str, dict[str, Option]]]] = {
    "IWP, one maximum": ("iwp", {"head_norm": "global"}),
    "IWP, softmax per head": ("iwp", {"head_norm": "softmax"}),
    "magnitude only": ("magnitude", {}),
    "random": ("random", {}),
    "uniform stride": ("uniform", {}),
}
LAYER_METHODS: Final = ("IWP, one maximum", "IWP, softmax per head", "magnitude only", "random")
LAYER_KEEPS: Final = ("11.1%", "2.5%")
BATCH: Final = 16
MAX_TEXT: Final = 40
MAX_NEW: Final = 4


@dataclass(frozen=True)
class Arm:
    """One variant under test; the unpruned model has no method."""

    name: str
    method: str
    keep: str
    layer: int

    def plan(self, visual_tokens: int) -> Plan:
        """Its pruning plan."""
        if not self.method:
            return Plan()
        selector, options = METHODS[self.method]
        stage = Stage(
            selector=selector, layer=self.layer, keep=resolve_keep(self.keep, visual_tokens), requested=self.keep, options=options
        )
        return Plan(stages=(stage,))


def list_arms(depth: int) -> tuple[list[Arm], list[Arm]]:
    """The arms of the two tables; the unpruned model leads the first."""
    layer = max(1, round(4 / 28 * depth))
    by_keep = [Arm("full", "", "100%", 0)]
    by_keep += [Arm(f"k{i}-{j}", method, keep, layer) for i, method in enumerate(METHODS) for j, keep in enumerate(KEEPS)]
    by_layer = [
        Arm(f"l{at}-{i}-{j}", method, keep, at)
        for at in range(depth)
        for i, method in enumerate(LAYER_METHODS)
        for j, keep in enumerate(LAYER_KEEPS)
    ]
    return by_keep, by_layer


def prepare(folder: Path, arms: Sequence[Arm], checkpoint: Path) -> Bundle:
    """The checkpoint as a bundle with one variant per arm."""
    if not folder.exists():
        write_bundle(export_model(checkpoint), folder)
    bundle = Bundle.open(folder)
    visual = bundle.manifest.geometry.visual_tokens
    profile = Profile(batch=BATCH, decode_batch=BATCH, visual_tokens=visual, max_text=MAX_TEXT, max_new_tokens=MAX_NEW)
    for arm in arms:
        if arm.name not in bundle.manifest.variants:
            add_variant(bundle, name=arm.name, plan=arm.plan(visual), profile=profile, command=f"accuracy {arm.name}")
    return bundle


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, BATCH)):
        yield chunk


def answer(bundle: Bundle, arms: Sequence[Arm], questions: int, folder: Path, label: str, split: Split) -> dict[str, NDArray[np.bool_]]:
    """Which questions each arm answers right, ``[questions]`` bool; a pass over the questions for all arms together.

    Prompts and vision features are computed once a batch and shared: the variants differ only in what they do with them.
    """
    saved = folder / f"answers-{label}-{split}-{questions}.npz"
    right: dict[str, list[bool]] = {arm.name: [] for arm in arms}
    done = 0
    if saved.exists():
        with np.load(saved) as file:
            if set(file.files) == set(right):
                right = {name: file[name].tolist() for name in file.files}
                done = len(next(iter(right.values())))
    pipelines = {arm.name: Pipeline(bundle, arm.name) for arm in arms} if done < questions else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{label}: {len(arms)} variants", total=questions, completed=done)
        first = bundle.variant(arms[0].name).profile
        prompter = Prompter(bundle.path, bundle.manifest.geometry, first)
        for number, items in enumerate(_chunks(islice(held_out(questions, split=split), done, None))):
            batch = prompter.prepare([item.image for item in items], [item.question for item in items])
            features = pipelines[arms[0].name].encode(batch.pixel_values)
            for name, pipeline in pipelines.items():
                said = generate(pipeline, prompter.tokenizer, batch, max_new_tokens=MAX_NEW, features=features)
                right[name] += [one.text.strip() == item.answer for one, item in zip(said, items, strict=True)]
            progress.advance(bar, len(items))
            if number % 20 == 19:
                _save(saved, right)
    _save(saved, right)
    return {name: np.asarray(values, np.bool_) for name, values in right.items()}


def _save(path: Path, right: dict[str, list[bool]]) -> None:
    temporary = path.with_suffix(".part.npz")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in right.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, np.asarray(values, np.bool_))
    temporary.replace(path)


@dataclass(frozen=True)
class Row:
    """One line of a table: accuracy, and the paired difference to the unpruned model with its 95 % interval, in points."""

    arm: Arm
    kept: int
    accuracy: float
    difference: float
    half_width: float
    share: float
    by_kind: tuple[float, ...]


def judge(arm: Arm, kept: int, right: NDArray[np.bool_], full: NDArray[np.bool_], kinds: NDArray[np.int64]) -> Row:
    """A paired comparison; the interval is the normal one for the mean of the per-question differences."""
    change = right.astype(np.float64) - full.astype(np.float64)
    half = 1.96 * change.std(ddof=1) / np.sqrt(len(change))
    by_kind = tuple(float(right[kinds == kind].mean()) for kind in range(len(KINDS)))
    return Row(arm, kept, float(right.mean()), float(change.mean()), float(half), float(right.mean() / full.mean()), by_kind)


def write_tables(rows: Sequence[Row], layers: Sequence[Row], questions: tuple[int, int], visual: int) -> None:
    """``docs/accuracy.md``, ``docs/accuracy.csv`` and ``docs/accuracy.png``."""
    docs = ROOT / "docs"
    with (docs / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "method", "layer", "keep", "kept", "accuracy", "difference", "half_width_95", "share", *KINDS])
        for table, group in (("keep", rows), ("layer", layers)):
            for row in group:
                numbers = [row.accuracy, row.difference, row.half_width, row.share, *row.by_kind]
                arm = row.arm
                writer.writerow([table, arm.method or "unpruned", arm.layer, arm.keep, row.kept, *(f"{n:.4f}" for n in numbers)])
    head = "| method | keep | kept | accuracy | against unpruned, points | share | " + " | ".join(KINDS) + " |"
    lines = [
        "# What pruning costs the shipped model",
        "",
        "Written by `benchmarks/accuracy.py` (`make accuracy`); do not edit. Greedy answers of the ONNX Runtime engines (fp32) to held-out",
        "questions about canvases of digit images that training never saw; differences are paired, with 95 % intervals.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        f"## Selectors over tokens kept, before layer {rows[1].arm.layer} ({questions[0]} questions, {visual} visual tokens)",
        "",
        "![accuracy over tokens kept](accuracy.png)",
        "",
        head,
        "|---" * (6 + len(KINDS)) + "|",
        *(_line(row) for row in rows),
        "",
    ]
    if layers:
        lines += [
            f"## Selectors over layers ({questions[1]} questions)",
            "",
            "Accuracy in per cent, with the half-width of the paired interval against the unpruned model.",
            "",
            *_layer_table(layers),
        ]
    (docs / "accuracy.md").write_text("\n".join(lines) + "\n")
    _plot(rows, visual, docs / "accuracy.png")


def _line(row: Row) -> str:
    kinds = " | ".join(f"{value * 100:.1f}" for value in row.by_kind)
    change = f"{row.difference * 100:+.1f} ± {row.half_width * 100:.1f}" if row.arm.method else "-"
    name = row.arm.method or "unpruned"
    return f"| {name} | {row.arm.keep} | {row.kept} | {row.accuracy * 100:.1f} % | {change} | {row.share:.3f} | {kinds} |"


def _layer_table(rows: Sequence[Row]) -> list[str]:
    depth = max(row.arm.layer for row in rows) + 1
    lines = ["| method | keep | " + " | ".join(f"l = {layer}" for layer in range(depth)) + " |", "|---" * (2 + depth) + "|"]
    for method in LAYER_METHODS:
        for keep in LAYER_KEEPS:
            cells = [row for row in rows if row.arm.method == method and row.arm.keep == keep]
            values = " | ".join(
                f"{row.accuracy * 100:.1f} ± {row.half_width * 100:.1f}" for row in sorted(cells, key=lambda row: row.arm.layer)
            )
            lines.append(f"| {method} | {keep} | {values} |")
    return lines


def _plot(rows: Sequence[Row], visual: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(rows[0].accuracy * 100, color="black", linewidth=1, linestyle="--", label="unpruned")
    for method in METHODS:
        line = [row for row in rows if row.arm.method == method]
        kept = [row.kept / visual * 100 for row in line]
        axes.errorbar(kept, [r.accuracy * 100 for r in line], [r.half_width * 100 for r in line], marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="visual tokens kept, %", ylabel="questions right, %")
    axes.set_xticks([float(keep.rstrip("%")) for keep in KEEPS], KEEPS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000, help="held-out questions of the first table")
    parser.add_argument("--layer-questions", type=int, default=2000, help="held-out questions of the table over layers; 0: no such table")
    parser.add_argument("--work", type=Path, help="folder for the bundle and the answers (default: a temporary one)")
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="train: to choose defaults by; only the first table, printed"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bundle = prepare(work / "bundle", [], options.checkpoint)
        geometry = bundle.manifest.geometry
        by_keep, by_layer = list_arms(geometry.depth)
        if options.split == "train" or options.layer_questions == 0:
            by_layer = []
        bundle = prepare(work / "bundle", by_keep + by_layer, options.checkpoint)
        right = answer(bundle, by_keep, options.questions, work, "keep", options.split)
        right |= answer(bundle, by_layer, options.layer_questions, work, "layer", options.split) if by_layer else {}
        kinds = np.asarray([KINDS.index(item.kind) for item in held_out(options.questions, split=options.split)])
        rows: list[Row] = []
        layers: list[Row] = []
        for arms, table, count in ((by_keep, rows, options.questions), (by_layer, layers, options.layer_questions)):
            for arm in arms:
                stages = bundle.variant(arm.name).plan.stages
                kept = stages[0].keep if stages else geometry.visual_tokens
                table.append(judge(arm, kept, right[arm.name][:count], right["full"][:count], kinds[:count]))
    for row in rows:
        sys.stdout.write(_line(row) + "\n")
    if options.split == "test":
        write_tables(rows, layers, (options.questions, options.layer_questions), geometry.visual_tokens)
        sys.stdout.write("made docs/accuracy.md, docs/accuracy.csv, docs/accuracy.png\n")


if __name__ == "__main__":
    main()
