"""Every selector on the shipped model: does it agree with PyTorch, and does it build? `python benchmarks/agreement.py`.

Each cuts as its paper does, 22 % where the paper leaves the share to the user. Its graphs run in ONNX Runtime, and so do the very files
that are handed to the builder of TensorRT for RTX; both are judged against the PyTorch model on held-out questions. The engines
are built without a GPU and not run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.stamp import ROOT, describe_machine, hash_code
from examples.demo import write_samples
from examples.digits_lvlm.checkpoint import CHECKPOINT
from sievert.bundle.plan import Option
from sievert.checking import Outcome
from sievert.graph_passes.selectors.registry import SELECTORS

MEASURED: Final = ("graph_passes", "engines", "exporter", "parity", "examples/digits_lvlm/checkpoint", "benchmarks/agreement.py")
TARGET: Final = "tensorrt-rtx"
VARIANTS: Final[tuple[tuple[str, dict[str, Option]], ...]] = (
    *((name, {}) for name in SELECTORS),
    ("iwp", {"head_norm": "softmax"}),
    ("transprune", {"weights": "image"}),
    ("dart", {"on": "embeddings"}),
    ("fopru", {"strategy": "row"}),
    ("visionzip", {"queries": "mean"}),
)
COLUMNS: Final = (
    *("selector", "options", "layers", "kept", "in ONNX Runtime", "same kept sets"),
    *("files for RTX", "same kept sets", "RTX prefill, s", "RTX decode, s"),
)


def measure(selector: str, options: dict[str, Option], bundle: Path, data: Path, samples: int) -> list[str]:
    """One line of the table."""
    made = sievert.prune(
        bundle, cuts=(sievert.Cut(selector=selector, options=options),), name="-".join([selector, *map(str, options.values())])
    )
    (built,) = sievert.build(bundle, variants=[made.name], engines=[TARGET])
    (outcome,) = sievert.check(bundle, variants=[made.name], engines=[TARGET], data=data, samples=samples).outcomes
    (plain,) = sievert.check(bundle, variants=[made.name], engines=["onnxruntime"], data=data, samples=samples).outcomes
    stages = made.variant.plan.stages
    seconds = [f"{built.entry.graphs[graph].seconds:.1f}" for graph in ("prefill", "decode")]
    shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
    layers, kept = (", ".join(map(str, numbers)) for numbers in ([s.layer for s in stages], [s.keep for s in stages]))
    return [selector, shown, layers, kept, *_judged(plain, "ran"), *_judged(outcome, "files"), *seconds]


def _judged(outcome: Outcome, which: str) -> tuple[str, str]:
    """The verdict, and of how many samples every kept set was the reference's own."""
    report = outcome.ran if which == "ran" else outcome.files
    if report is None:
        raise SystemExit(f"{outcome.variant} on {outcome.engine}: its files were not judged")
    same = sum(all(sample.same_kept) for sample in report.samples)
    return report.verdict.value, f"{same} of {len(report.samples)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="held-out questions that each variant is judged on")
    parser.add_argument("--only", help="one selector, printed and not written")
    options = parser.parse_args()
    variants = [(selector, chosen) for selector, chosen in VARIANTS if options.only in (None, selector)]
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = write_samples(work, options.samples)
        sievert.export(CHECKPOINT, work / "bundle", cuts=(), max_text=24, max_new_tokens=8, engines=("onnxruntime",))
        for number, (selector, chosen) in enumerate(variants):
            console.print(f"{number + 1} of {len(variants)}: {selector} {chosen or ''}")
            rows.append(measure(selector, chosen, work / "bundle", data, options.samples))
            console.print("  " + ", ".join(rows[-1][2:]))
    if options.only is not None:
        return
    lines = [
        "# Every selector against PyTorch, on the shipped model",
        "",
        "Written by `benchmarks/agreement.py` (`make agreement`); do not edit. Each selector cuts as its paper does, scaled to 10",
        f"layers; 22 % where the paper leaves the share to the user. {options.samples} held-out questions, fp32, 8 teacher-forced tokens.",
        "*Files for RTX*: the ONNX files handed to the builder of TensorRT for RTX, run in ONNX Runtime. The engines were built without a",
        "GPU and **not run**; seconds are of a shared machine.",
        "AMBIGUOUS: nothing differs that a near tie does not explain.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        *("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)),
    ]
    path = ROOT / "docs" / "agreement.md"
    path.write_text("\n".join(lines) + "\n")
    console.print(f"made {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
