"""Every model family, from a checkpoint to engines: `python benchmarks/families.py`.

Each is a small random-weight checkpoint built from its family's own configuration, processor included. It is exported, pruned by three
selectors at two layers, and run in ONNX Runtime, as are the very files that are handed to the builder of TensorRT for RTX; all are
judged against the PyTorch model. The engines are built without a GPU and not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.stamp import ROOT, describe_machine, hash_code
from sievert.bundle.errors import UnsupportedModelError
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import Prompter
from tests.tiny_families import FAMILIES, PICTURES, make_family
from tests.tiny_processors import offer_processors

MEASURED: Final = ("bundle", "graph_passes", "engines", "exporter", "parity", "tests/tiny_families.py", "benchmarks/families.py")
TARGET: Final = "tensorrt-rtx"
SELECTORS: Final = ("iwp", "fastv", "random")
LAYERS: Final = (2, 4)
KEEP: Final = "40%"
STEPS: Final = 8
CUTS: Final = tuple(itertools.product(SELECTORS, LAYERS))
COLUMNS: Final = (
    "family",
    "a prompt has",
    "pixel_values",
    "visual tokens",
    "unpruned",
    *(f"{name}, l = {layer}" for name, layer in CUTS),
    "RTX engines",
)


@dataclass(frozen=True)
class Case:
    """A family and what its prompts are about: ``images`` with words between them, or a video of ``frames`` of ``size`` (height, width)."""

    family: str
    images: int = 1
    frames: int = 0
    size: tuple[int, int] = (0, 0)

    @property
    def inputs(self) -> str:
        """In words."""
        if self.frames:
            return f"a video of {self.frames} frames"
        return "1 image" if self.images == 1 else f"{self.images} images, words between"

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of a picture or frame."""
        width, height = PICTURES[self.family]
        return self.size if self.frames else (height, width)


SEVERAL: Final = ("llava-onevision", "qwen2.5-vl", "qwen3-vl", "smolvlm")
CASES: Final = (
    *(Case(name) for name in FAMILIES),
    *(Case(name, images=2) for name in SEVERAL),
    *(Case(name, frames=4, size=(32, 64) if "qwen" in name else (32, 32)) for name in SEVERAL),
)


def measure(case: Case, work: Path, samples: int) -> list[str]:
    """One line of the table: verdicts are of ONNX Runtime, then of the files for RTX.

    Raises:
        UnsupportedModelError: the family is not exported.
    """
    checkpoint = make_family(case.family, work / "checkpoint")
    several = case.images > 1 or case.frames > 0
    sievert.export(
        checkpoint,
        work / "bundle",
        image_size=case.picture,
        cuts=(),
        max_text=96,
        max_new_tokens=STEPS,
        batch=3 if several else 2,
        images=case.images,
        frames=case.frames,
        engines=("onnxruntime",),
    )
    for selector, layer in CUTS:
        cut = sievert.Cut(selector=selector, layer=layer, keep=KEEP)
        sievert.prune(work / "bundle", cuts=(cut,), name=f"{selector}-{layer}")
    built = sievert.build(work / "bundle", engines=[TARGET])
    data = write_questions(case, work) if case.images > 1 else ""
    checked = sievert.check(work / "bundle", engines=["onnxruntime", TARGET], samples=samples, tokens=STEPS, data=data)
    judged = {(outcome.variant, outcome.engine): outcome.files or outcome.ran for outcome in checked.outcomes}
    verdicts = []
    for variant in ("full", *(f"{selector}-{layer}" for selector, layer in CUTS)):
        verdicts.append(", ".join(judged[variant, engine].verdict.value for engine in ("onnxruntime", TARGET)))
    geometry = Bundle.open(work / "bundle").manifest.geometry
    engines = sum(len(each.entry.graphs) for each in built)
    shape = "x".join(map(str, geometry.picture_shape))
    return [case.family, case.inputs, shape, str(case.images * geometry.visual_tokens), *verdicts, f"{engines} built"]


def write_questions(case: Case, work: Path) -> Path:
    """Prompts with an image at either end or in the middle, and one that leaves their places to the template."""
    bundle = Bundle.open(work / "bundle")
    place = Prompter(bundle.path, bundle.manifest.geometry, bundle.variant("full").profile).image_token
    rng, (height, width) = np.random.default_rng(0), case.picture
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(work / f"{number}.png")
    prompts = (f"which {place} is red {place} the digit ?", f"{place} what colour is the {place}", "which digit", f"is {place} red {place}")
    lines = [
        {"images": [f"{(number + image) % 3}.png" for image in range(case.images)], "prompt": prompt}
        for number, prompt in enumerate(prompts)
    ]
    (work / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return work / "questions.jsonl"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="pictures and prompts that each variant is judged on")
    parser.add_argument("--only", action="append", help="a family, printed and not written; may be repeated")
    options = parser.parse_args()
    offer_processors()
    console, rows, refused = Console(), list[list[str]](), dict[str, str]()
    cases = [case for case in CASES if case.family in (options.only or FAMILIES)]
    for number, case in enumerate(cases):
        console.print(f"{number + 1} of {len(cases)}: {case.family}, {case.inputs}")
        if case.family in refused:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            try:
                rows.append(measure(case, Path(temporary), options.samples))
            except UnsupportedModelError as error:
                reason = str(error).removeprefix(f"{temporary}/checkpoint").lstrip(": ")
                refused[case.family] = reason.partition("; Sievert exports")[0]
                console.print(f"  refused: {refused[case.family]}")
                continue
        console.print("  " + " | ".join(rows[-1][2:]))
    if options.only:
        return
    lines = [
        "# The model families",
        "",
        "Written by `benchmarks/families.py` (`make families`); do not edit. Random-weight checkpoints of 6 decoder layers built from",
        f"each family's own configuration, batch 2 (3 of several images and of videos), {options.samples} prompts, fp32, {KEEP} kept",
        f"before layer l, {STEPS} teacher-forced tokens. Two verdicts against PyTorch over vision features, prefill, kept sets, caches and",
        "decode: of the graphs in ONNX Runtime, and of the files handed to the builder of TensorRT for RTX, run there too. The engines",
        "were built without a GPU and **not run**. What each family is: [models](models.md).",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        *("| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)),
    ]
    if refused:
        lines += ["", "Refused:", "", *(f"- {name}: {reason}" for name, reason in refused.items())]
    path = ROOT / "docs" / "families.md"
    path.write_text("\n".join(lines) + "\n")
    console.print(f"made {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
