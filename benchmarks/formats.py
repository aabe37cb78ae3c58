"""Every number format of prefill and decode, built for TensorRT for RTX without a GPU: `python benchmarks/formats.py`.

For the shipped model and for a random one of half a billion parameters: sizes of the engines and of the weights that their graphs read,
against float32, and how long each build takes. What is refused is a row that says so. Nothing is run: what the formats cost in accuracy is
measured by `precision.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.memory_checkpoint import SHAPES, make_checkpoint
from benchmarks.stamp import ROOT, describe_machine, hash_code
from benchmarks.tuning import write_data
from examples.digits_lvlm.checkpoint import CHECKPOINT
from sievert.bundle.errors import SievertError
from sievert.bundle.store import Bundle
from sievert.engines.build.builders import describe_builder, find_builder
from sievert.engines.build.process import build_engine
from sievert.engines.build.variant import lower_graph

MEASURED: Final = (
    "bundle",
    "calibration",
    "engines/build",
    "exporter",
    "graph_passes",
    "examples/digits_lvlm/checkpoint",
    "examples/digits_lvlm/data.py",
    "examples/digits_lvlm/questions.py",
    "benchmarks/formats.py",
    "benchmarks/memory_checkpoint.py",
)
BUILDER: Final = find_builder("tensorrt-rtx")
SHAPE: Final = SHAPES["0.5b"]
KEEP: Final = "22.2%"
BASE: Final = "pruned"
GRAPHS: Final = ("prefill", "decode")
SAMPLES: Final = 32
MADE_UP: Final = 2
FLOAT32: Final = "float32"
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    FLOAT32: {},
    "float16": {"format": "float16"},
    "bfloat16": {"format": "bfloat16"},
    "int8": {"format": "int8"},
    "int8, weights": {"format": "int8-weights"},
    "fp8 (E4M3)": {"format": "fp8"},
    "int4, weights, block 32": {"format": "int4", "block": 32},
    "int4, weights, block 128": {"format": "int4", "block": 128},
}
"""By its name in the table, the options of ``sievert.quantise``; the model's own format has none."""


@dataclass(frozen=True)
class Row:
    """One graph in one format. ``weights`` and ``engine`` are bytes on the disk, ``seconds`` those of the build on the clock; ``refused``
    is why there is no engine, empty where there is.
    """

    form: str
    graph: str
    weights: int = 0
    engine: int = 0
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Model:
    """A model of the table: how its bundle and calibration data are made in a folder, and whether that data is made up."""

    title: str
    prepare: Callable[[Path, int], Path]
    random: bool


def prepare_shipped(work: Path, layers: int) -> Path:
    """The shipped model with questions about training digits; it has the layers it has."""
    del layers
    bundle = work / "bundle"
    sievert.export(CHECKPOINT, bundle, cuts=(sievert.Cut(keep=KEEP),), name=BASE, max_text=24, max_new_tokens=16)
    sievert.collect(bundle, write_data(work / "data", SAMPLES, "train"), variant=BASE, decode_steps=2, out=work / "collected")
    return bundle


def prepare_half_billion(work: Path, layers: int) -> Path:
    """A random checkpoint of Qwen2-0.5B's decoder shape, and made-up pictures and words."""
    bundle = work / "bundle"
    make_checkpoint(replace(SHAPE, layers=layers), work / "checkpoint")
    sievert.export(work / "checkpoint", bundle, cuts=(sievert.Cut(keep=KEEP),), name=BASE, max_text=40, max_new_tokens=64)
    sievert.collect(bundle, variant=BASE, samples=MADE_UP, decode_steps=1, random=True, out=work / "collected")
    return bundle


MODELS: Final[Mapping[str, Model]] = {
    "shipped": Model("The shipped model", prepare_shipped, random=False),
    "half-billion": Model("Half a billion random parameters: the decoder of Qwen2-0.5B", prepare_half_billion, random=True),
}


def measure(model: Model, work: Path, layers: int, forms: Iterable[str]) -> list[Row]:
    """All rows of a model, which is made in the empty folder ``work``."""
    _say(f"{model.title}: making the bundle and its calibration data")
    bundle = model.prepare(work, layers)
    rows = []
    for number, form in enumerate(forms):
        _say(f"{model.title}: {form}")
        variant = BASE
        try:
            if options := FORMS[form]:
                variant = f"{BASE}-{number}"
                sievert.quantise(bundle, variant=BASE, name=variant, collection=work / "collected", random=model.random, **options)
        except SievertError as error:
            rows += [Row(form, graph, refused=f"no such variant: {_plain(error, work)}") for graph in GRAPHS]
            continue
        rows += [build(Bundle.open(bundle), variant, graph, form, work) for graph in GRAPHS]
    return rows


def build(bundle: Bundle, variant: str, graph: str, form: str, work: Path) -> Row:
    """One engine, which is removed again."""
    entry = bundle.graph(graph, variant=variant)
    row = Row(form, graph, weights=read_weights(bundle.file(entry.file)))
    source, engine = bundle.path / "lowered.onnx", work / "graph.engine"
    start = time.monotonic()
    try:
        lowered = lower_graph(bundle, BUILDER, graph, entry.file)
        if lowered.content is not None:
            source.write_bytes(lowered.content)
        build_engine(str(BUILDER.module), source if lowered.content is not None else bundle.file(lowered.name), engine)
        return replace(row, engine=engine.stat().st_size, seconds=time.monotonic() - start)
    except SievertError as error:
        return replace(row, seconds=time.monotonic() - start, refused=_plain(error, work))
    finally:
        for path in (source, engine):
            path.unlink(missing_ok=True)


def read_weights(path: Path) -> int:
    """Bytes of the data files that a graph reads, each tensor once."""
    values = (value.const_value for value in ir.load(path).graph.initializers.values())
    return sum({(each.location, each.offset): each.nbytes for each in values if isinstance(each, ir.ExternalTensor)}.values())


def _plain(error: SievertError, work: Path) -> str:
    """On one line of a table, without the machine's folders."""
    return " ".join(str(error).replace(f"{work}/", "").replace("|", "/").split())


def render(tables: Mapping[str, list[Row]], code: str) -> str:
    """The page."""
    lines = [
        "# Engines in every number format",
        "",
        f"Written by `benchmarks/formats.py` (`make formats`); do not edit. Prefill and decode of a variant that IWP prunes to {KEEP},",
        f"built without a GPU ({describe_builder(BUILDER, ())}) and **not run**. *Weights*: what the graph reads",
        "on the disk, the quantised in their new format and the rest as it was: in 8 and 4 bit the product that makes the logits stays",
        "float32. *Build*: lowering included, on a machine that does other things too. Percentages: of the same graph in float32. An",
        "engine also holds several MiB of code, most of it where the model is small. Formats: [quantisation](quantisation.md).",
        "",
        f"Code measured: `{code}`. Machine: {describe_machine()}.",
    ]
    for name, rows in tables.items():
        model = MODELS[name]
        lines += ["", f"## {model.title}", ""]
        lines += [
            f"{SHAPE.layers} layers, tied head. **Scales come from random data** and say nothing about a model in use; sizes and builds do."
            if model.random
            else f"Scales come from {SAMPLES} questions about training digits.",
            "",
            "| format | graph | weights, MiB | | engine, MiB | | build, s | |",
            "|---|---|---|---|---|---|---|---|",
            *_list_rows(rows),
        ]
    return "\n".join(lines) + "\n"


def _list_rows(rows: list[Row]) -> list[str]:
    plain = {row.graph: row for row in rows if row.form == FLOAT32}
    lines = []
    for row in rows:
        sizes = []
        for now, before in ((row.weights, plain[row.graph].weights), (row.engine, plain[row.graph].engine)):
            share = f"{now / before:.0%}" if now and before else ""
            sizes += [f"{now / 2**20:.1f}" if now else "-", share]
        seconds = f"{row.seconds:.1f}" if row.seconds else "-"
        outcome = f"refused: {row.refused}" if row.refused else "built"
        lines.append("| " + " | ".join((row.form, row.graph, *sizes, seconds, outcome)) + " |")
    return lines


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MODELS), help="this model alone, printed and not written")
    parser.add_argument("--layers", type=int, default=SHAPE.layers, help="a shallower random decoder, to try it; writes nothing")
    parser.add_argument("--format", action="append", choices=list(FORMS), help="beside float32, to try it; may be repeated; writes nothing")
    options = parser.parse_args()
    if options.layers < 2:
        parser.error(f"--layers {options.layers}: a cut needs a layer on either side")
    forms = [form for form in FORMS if form in (FLOAT32, *(options.format or FORMS))]
    code, tables = hash_code(MEASURED), dict[str, list[Row]]()
    for name in [options.only] if options.only else MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            tables[name] = measure(MODELS[name], Path(temporary).resolve(), options.layers, forms)
        sys.stdout.write("\n".join(_list_rows(tables[name])) + "\n")
        sys.stdout.flush()
    if options.only or options.format or options.layers != SHAPE.layers:
        return
    if hash_code(MEASURED) != code:
        raise SystemExit("the code was changed while it was measured: nothing was written")
    path = ROOT / "docs" / "formats.md"
    path.write_text(render(tables, code))
    sys.stdout.write(f"made {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
