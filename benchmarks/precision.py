"""What number formats cost the shipped model, unpruned and pruned: `python benchmarks/precision.py`.

Every variant answers the same held-out questions (greedy, to the stop token) in ONNX Runtime's CPU, against the float32 variant that keeps
the same tokens; differences are paired. Scales come from questions about training digits. Where the CPU has no kernels for a format it
computes in float32 with the values that the format rounds to, which the table says. Sizes are of the weights on the disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.accuracy import MAX_TEXT, claim
from benchmarks.accuracy_answers import BATCH, MAX_NEW, answer
from benchmarks.accuracy_arms import Arm
from benchmarks.accuracy_judge import Answers, mean, paired
from benchmarks.stamp import ROOT, describe_machine, hash_code
from examples.digits_lvlm.checkpoint import CHECKPOINT
from examples.digits_lvlm.data import held_out
from sievert.bundle.store import Bundle
from sievert.eval_score import Estimate
from sievert.quantising import measure_weights

MEASURED: Final = (
    "bundle",
    "calibration",
    "graph_passes",
    "engines/run",
    "exporter",
    "examples/digits_lvlm/checkpoint",
    "examples/digits_lvlm/data.py",
    "examples/digits_lvlm/questions.py",
    "benchmarks/accuracy_answers.py",
    "benchmarks/precision.py",
)
KEEP: Final = "22.2%"
SAMPLES: Final = 128


@dataclass(frozen=True)
class Form:
    """One row of the table: the options of ``sievert.quantise``, how the CPU runs it, and how much it may lose, in points."""

    name: str
    options: dict[str, Any]
    runs: str
    allowed: float


FORMS: Final = (
    Form("float16", {"format": "float16"}, "emulated where the CPU has no kernel", 0.5),
    Form("bfloat16", {"format": "bfloat16"}, "emulated", 0.5),
    Form("int8, max", {"format": "int8"}, "integer products where they fuse, else emulated", 1.5),
    Form("int8, percentile 99.99", {"format": "int8", "calibration": "percentile"}, "integer products where they fuse, else emulated", 1.5),
    Form("int8, percentile 99.9", {"format": "int8", "calibration": "percentile", "percentile": 99.9}, "as above", 1.5),
    Form("fp8 (E4M3), max", {"format": "fp8"}, "emulated", 1.5),
    Form("int8 weights", {"format": "int8-weights"}, "runs", 1.5),
    Form("int4 weights, block 32", {"format": "int4"}, "runs", 3.0),
    Form("int4 weights, block 128", {"format": "int4", "block": 128}, "runs", 3.0),
)


@dataclass(frozen=True)
class Row:
    """One format of one plan. ``loss`` is the paired difference to float32 with the same plan, from -1 to 1."""

    form: Form
    kept: str
    accuracy: Estimate
    loss: Estimate
    same: Estimate
    divergence: Estimate
    bytes: int
    bytes_before: int

    @property
    def holds(self) -> bool:
        """Whether the interval of the loss lies above what is allowed."""
        return self.loss.low * 100 > -self.form.allowed


def prepare(work: Path) -> Bundle:
    """The shipped model with a float32 variant of each plan, calibration data of both, and every format of both. What is there stays."""
    place = work / "bundle"
    if not place.exists():
        cuts = (sievert.Cut(keep=KEEP),)
        sievert.export(CHECKPOINT, place, cuts=cuts, max_text=MAX_TEXT, max_new_tokens=MAX_NEW, batch=BATCH, engines=("onnxruntime",))
    bundle = Bundle.open(place)
    for base in plans(bundle):
        data = work / f"data-{base}"
        if not data.exists():
            sievert.collect(place, _write_questions(work), variant=base, samples=SAMPLES, decode_steps=2, out=data)
        for number, form in enumerate(FORMS):
            if f"{base}-{number}" not in bundle.manifest.variants:
                sievert.quantise(place, variant=base, name=f"{base}-{number}", collection=data, **form.options)
                if form.options["format"] == "bfloat16":  # the CPU runs what this writes: float32 with every result rounded
                    sievert.build(place, variants=[f"{base}-{number}"], engines=["onnxruntime"])
    return Bundle.open(place)


def plans(bundle: Bundle) -> list[str]:
    """The float32 variants, the unpruned one first."""
    return sorted((name for name, each in bundle.manifest.variants.items() if each.precision is None), key=lambda name: name != "full")


def _write_questions(work: Path) -> Path:
    """Questions about training digits, one a picture."""
    folder = work / "questions"
    path = folder / "questions.jsonl"
    if not path.exists():
        folder.mkdir()
        lines = []
        for number, item in enumerate(islice(held_out(6 * SAMPLES, split="train"), 0, None, 6)):
            item.image.save(folder / f"{number}.png")
            lines.append(json.dumps({"image": f"{number}.png", "prompt": item.question}))
        path.write_text("\n".join(lines) + "\n")
    return path


def measure(work: Path, questions: int) -> tuple[list[Row], dict[str, Estimate]]:
    """All rows, and the accuracy of each float32 variant by what it keeps."""
    bundle = prepare(work)
    rows, plain = [], {}
    for base in plans(bundle):
        plan = bundle.variant(base).plan
        kept = KEEP if plan.stages else "all"
        names = [base, *(f"{base}-{number}" for number in range(len(FORMS)))]
        found = answer(bundle, [Arm(name, name, "", kept, plan) for name in names], questions, work, f"precision-{base}", "test")
        plain[kept] = mean(found[base].right)
        rows += [_judge(bundle, form, kept, found[name], found[base], name) for form, name in zip(FORMS, names[1:], strict=True)]
    return rows, plain


def _judge(bundle: Bundle, form: Form, kept: str, now: Answers, before: Answers, name: str) -> Row:
    own, model = measure_weights(bundle.manifest, bundle.variant(name))
    loss = paired(now.right, before.right)
    return Row(form, kept, mean(now.right), loss, mean(now.same), mean(now.divergence), own, model)


def render(rows: list[Row], plain: dict[str, Estimate], questions: int, code: str) -> str:
    """The page."""
    lines = [
        "# What number formats cost the shipped model",
        "",
        "Written by `benchmarks/precision.py` (`make precision`); do not edit. Greedy answers to held-out questions about canvases of",
        "digit images that training never saw, in ONNX Runtime's CPU. `loss`: paired difference to float32 that keeps the same tokens, in",
        f"points, with its 95 % interval (Bonett and Price); scales of activations from {SAMPLES} questions about training digits.",
        "",
        f"{questions} questions. Code measured: `{code}`. Machine: {describe_machine()}.",
        "",
        "| format | kept | right, % | loss, points | allowed | holds | same answers, % | KL, nats | weights, MiB | how the CPU runs it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kept, accuracy in plain.items():
        lines.append(f"| float32 | {kept} | {accuracy.value * 100:.1f} | | | | | | | runs |")
        for row in (row for row in rows if row.kept == kept):
            loss, size = row.loss, f"{row.bytes / 2**20:.1f} of {row.bytes_before / 2**20:.1f}"
            lines.append(
                f"| {row.form.name} | {kept} | {row.accuracy.value * 100:.1f} | {loss.value * 100:+.2f} ({loss.low * 100:+.2f} to "
                f"{loss.high * 100:+.2f}) | {-row.form.allowed:+.1f} | {'yes' if row.holds else 'no'} | {row.same.value * 100:.1f} | "
                f"{row.divergence.value:.1e} | {size} | {row.form.runs} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000, help="held-out questions")
    parser.add_argument("--work", type=Path, help="folder for the bundle and the answers (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "precision.md", help="the page to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        code = claim(work, MEASURED)
        rows, plain = measure(work, options.questions)
        if hash_code(MEASURED) != code:
            raise SystemExit("the code was changed while it was measured: nothing was written")
        options.out.write_text(render(rows, plain, options.questions, code))
        sys.stdout.write(f"made {options.out}\n")


if __name__ == "__main__":
    main()
