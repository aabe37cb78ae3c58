"""Every model family, from a checkpoint to engines: `python benchmarks/families.py`.

Each is a small random-weight checkpoint built from its family's own configuration, processor included. It is exported, pruned by three
selectors at two layers, and run in ONNX Runtime, as are the very files that are handed to the builder of TensorRT for RTX; all are
judged against the PyTorch model. The engines are built without a GPU and not run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.stamp import ROOT, describe_machine, hash_code
from sievert.bundle.store import Bundle
from tests.tiny_families import FAMILIES, PICTURES, make_family
from tests.tiny_processors import offer_processors

MEASURED: Final = ("bundle", "graph_passes", "engines", "exporter", "parity", "tests/tiny_families.py", "benchmarks/families.py")
TARGET: Final = "tensorrt-rtx"
SELECTORS: Final = ("iwp", "fastv", "random")
LAYERS: Final = (2, 4)
KEEP: Final = "40%"
STEPS: Final = 8
CUTS: Final = tuple(itertools.product(SELECTORS, LAYERS))
COLUMNS: Final = ("family", "pixel_values", "visual tokens", "unpruned", *(f"{name}, l = {layer}" for name, layer in CUTS), "RTX engines")


def measure(name: str, work: Path, samples: int) -> list[str]:
    """One line of the table: verdicts are of ONNX Runtime, then of the files for RTX."""
    checkpoint = make_family(name, work / "checkpoint")
    width, height = PICTURES[name]
    sievert.export(
        checkpoint,
        work / "bundle",
        image_size=(height, width),
        cuts=(),
        max_text=64,
        max_new_tokens=STEPS,
        batch=2,
        engines=("onnxruntime",),
    )
    for selector, layer in CUTS:
        cut = sievert.Cut(selector=selector, layer=layer, keep=KEEP)
        sievert.prune(work / "bundle", cuts=(cut,), name=f"{selector}-{layer}")
    built = sievert.build(work / "bundle", engines=[TARGET])
    judged = {
        (outcome.variant, outcome.engine): outcome.files or outcome.ran
        for outcome in sievert.check(work / "bundle", engines=["onnxruntime", TARGET], samples=samples, tokens=STEPS).outcomes
    }
    verdicts = []
    for variant in ("full", *(f"{selector}-{layer}" for selector, layer in CUTS)):
        reports = [judged[variant, engine] for engine in ("onnxruntime", TARGET)]
        verdicts.append(", ".join("not judged" if report is None else report.verdict.value for report in reports))
    geometry = Bundle.open(work / "bundle").manifest.geometry
    engines = sum(len(each.entry.graphs) for each in built)
    return [name, "x".join(map(str, geometry.picture_shape)), str(geometry.visual_tokens), *verdicts, f"{engines} built"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="pictures and prompts that each variant is judged on")
    parser.add_argument("--only", action="append", help="a family, printed and not written; may be repeated")
    options = parser.parse_args()
    offer_processors()
    console, rows = Console(), []
    names = options.only or list(FAMILIES)
    for number, name in enumerate(names):
        console.print(f"{number + 1} of {len(names)}: {name}")
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(measure(name, Path(temporary), options.samples))
        console.print("  " + " | ".join(rows[-1][1:]))
    if options.only:
        return
    lines = [
        "# The model families",
        "",
        "Written by `benchmarks/families.py` (`make families`); do not edit. Random-weight checkpoints of 6 decoder layers built from",
        f"each family's own configuration, batch 2, {options.samples} pictures, fp32, {KEEP} kept before layer l, {STEPS} teacher-forced",
        "tokens. Two verdicts against PyTorch over vision features, prefill, kept sets, caches and decode: of the graphs in ONNX Runtime,",
        "and of the files handed to the builder of TensorRT for RTX, run there too. The engines were built without a GPU and **not run**.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        *("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)),
    ]
    path = ROOT / "docs" / "families.md"
    path.write_text("\n".join(lines) + "\n")
    console.print(f"made {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
