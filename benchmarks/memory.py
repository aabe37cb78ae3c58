"""Memory from a checkpoint to engines: `python benchmarks/memory.py [--shape 0.5b] [--shape 3b] [--layers N] [--only ROW]`.

Random checkpoints of real shapes are exported, pruned, linted, loaded and built in processes of their own, whose memory is sampled from
outside: pages of the process itself (anonymous) apart from those of mapped files, which the system can drop and read again. Rows that are
not measured again stay in the table, with the code they measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stamp import ROOT, describe_machine, hash_code

MEASURED: Final = (
    "bundle",
    "exporter",
    "graph_passes",
    "engines/build",
    "engines/run/ort.py",
    "benchmarks/memory.py",
    "benchmarks/memory_checkpoint.py",
)
GIB: Final = 2**30
INTERVAL_S: Final = 0.02
LAYER: Final = 4
KEEP: Final = "11.1%"
TEXT: Final = 40
PRUNED: Final = "pruned"
PAIRS: Final = 15
ROWS: Final = ("export", "pair", "rtx")
PSS: Final = ("Pss_Anon", "Pss_File")


@dataclass(frozen=True)
class Row:
    """A line of the table. Memory in GiB: peaks of a process, or what is held of a loaded pair. ``code`` is what was measured."""

    shape: str
    layers: int
    what: str
    weights: float
    wall_s: float
    cpu_s: float
    anonymous: float
    resident: float
    target: str
    met: str
    code: str


@dataclass(frozen=True)
class Watched:
    """What a process took: seconds, peaks in GiB, and its last line of output."""

    wall_s: float
    cpu_s: float
    anonymous: float
    resident: float
    said: str


def watch(arguments: Sequence[str]) -> Watched:
    """Run a Python process to its end and sample it.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peaks = time.perf_counter(), dict.fromkeys(("RssAnon", "VmHWM"), 0)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, cwd=ROOT)
        while process.poll() is None:
            for name, kib in _read_kib(Path(f"/proc/{process.pid}/status")).items():
                if name in peaks:
                    peaks[name] = max(peaks[name], kib)
            time.sleep(INTERVAL_S)
        wall_s = time.perf_counter() - start
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exited with {process.returncode}: {lines[-1:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Watched(wall_s, cpu_s, peaks["RssAnon"] / 2**20, peaks["VmHWM"] / 2**20, lines[-1] if lines else "")


def _read_kib(path: Path) -> dict[str, int]:
    """Lines such as ``RssAnon:  12 kB`` of a file of the kernel; nothing where the process has ended."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1:] == ["kB"]}


# What the processes do.


def do_make(shape: str, layers: str, checkpoint: str) -> str:
    """Write a random checkpoint."""
    from benchmarks.memory_checkpoint import SHAPES, make_checkpoint

    make_checkpoint(replace(SHAPES[shape], layers=int(layers)), Path(checkpoint))
    return ""


def do_export(checkpoint: str, bundle: str, dtype: str) -> str:
    """Export, prune and lint; says how many findings are errors."""
    import sievert

    cut = sievert.Cut(layer=LAYER, keep=KEEP)
    chosen: Any = dtype
    sievert.export(checkpoint, bundle, dtype=chosen, cuts=(cut,), name=PRUNED, max_text=TEXT, engines=("onnxruntime",))
    return str(sum(line.severity == "error" for line in sievert.inspect(bundle).lint))


def do_pair(bundle: str, packed: str) -> str:
    """Load prefill and decode as the pipeline does, run each; says what the process holds then, and milliseconds of one decode."""
    from sievert.bundle.store import Bundle
    from sievert.engines.run.base import ModelFile
    from sievert.engines.run.ort import OnnxRuntime

    opened, runtime = Bundle.open(bundle), OnnxRuntime(threads=len(os.sched_getaffinity(0)), prepack=packed == "packed")
    sessions = [runtime.load(ModelFile(opened.graph_file(graph, variant=PRUNED), "")) for graph in ("prefill", "decode")]
    for session in sessions:
        feeds = _make_feeds(session.inputs)
        session.run(feeds, ["logits"])
    return json.dumps({name: kib / 2**20 for name, kib in _read_kib(Path("/proc/self/smaps_rollup")).items() if name in PSS})


def do_torch(checkpoint: str, dtype: str) -> str:
    """A prompt of the same length through the PyTorch model, loaded as transformers does by default; says what the process holds then."""
    import torch
    from transformers import LlavaForConditionalGeneration

    loader: Any = LlavaForConditionalGeneration
    model = loader.from_pretrained(checkpoint, dtype=getattr(torch, dtype), local_files_only=True)
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 576 + TEXT, dtype=torch.int64), use_cache=True, logits_to_keep=1)
    return json.dumps({name: kib / 2**20 for name, kib in _read_kib(Path("/proc/self/smaps_rollup")).items() if name in PSS})


def do_speed(bundle: str) -> str:
    """Time with packed weights over time without, of prefill and of decode: medians of interleaved pairs."""
    from sievert.bundle.store import Bundle
    from sievert.engines.run.base import ModelFile
    from sievert.engines.run.ort import OnnxRuntime

    opened, ratios = Bundle.open(bundle), dict[str, float]()
    for graph in ("prefill", "decode"):
        file = ModelFile(opened.graph_file(graph, variant=PRUNED), "")
        arms = [OnnxRuntime(threads=len(os.sched_getaffinity(0)), prepack=packed).load(file) for packed in (True, False)]
        feeds = _make_feeds(arms[0].inputs)
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(PAIRS + 1):
            for place in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                arms[place].run(feeds, ["logits"])
                if number:  # the first round warms up
                    seconds[place].append(time.perf_counter() - start)
        ratios[graph] = statistics.median(one / other for one, other in zip(*seconds, strict=True))
    return json.dumps(ratios)


def _make_feeds(inputs: Sequence[Any]) -> dict[str, Any]:
    """A full prompt of noise, or the token behind it."""
    import numpy as np

    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in inputs}
    for name, array in feeds.items():
        if name in ("visual_index", "position_ids"):
            array += np.arange(array.shape[-1])
        elif name == "attention_mask":
            array += 1
        elif name == "cache_row":
            array += 576 + TEXT
        elif name == "inputs_embeds":
            array += (random.standard_normal(array.shape) * 0.02).astype(array.dtype)
    return feeds


def do_lower(bundle: str) -> str:
    """Write the pruned prefill as it is handed to the builder of TensorRT for RTX; says where."""
    import onnx_ir as ir

    from sievert.bundle.store import Bundle
    from sievert.graph_passes.expose import to_bytes
    from sievert.graph_passes.lower import lower

    opened = Bundle.open(bundle)
    path = opened.path / "rtx.onnx"  # beside its weights
    path.write_bytes(to_bytes(lower(ir.load(opened.graph_file("prefill", variant=PRUNED)), "tensorrt-rtx")))
    return str(path)


JOBS: Final[Mapping[str, Callable[..., str]]] = {
    "make": do_make,
    "export": do_export,
    "pair": do_pair,
    "torch": do_torch,
    "speed": do_speed,
    "lower": do_lower,
}


def run_job(name: str, *arguments: str) -> Watched:
    """One of :data:`JOBS` in a process of its own."""
    return watch([str(Path(__file__)), "--job", name, *arguments])


# The rows.


def measure(shape: str, layers: int, work: Path, only: Sequence[str]) -> list[Row]:
    """All rows of one shape; ``work`` gets its checkpoint and its bundle."""
    from benchmarks.memory_checkpoint import SHAPES

    chosen, code = SHAPES[shape], hash_code(MEASURED)
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    run_job("make", shape, str(layers), str(checkpoint))
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / GIB
    exported = run_job("export", str(checkpoint), str(bundle), chosen.exported)
    files = [path.stat().st_size / GIB for path in bundle.iterdir()]
    weights = max(files)
    whole = layers == chosen.layers
    base = Row(shape, layers, "", weights, 0, 0, 0, 0, "", "", code)
    rows = []
    if "export" in only:
        if exported.said != "0":
            raise RuntimeError(f"lint found {exported.said} errors")
        once = sum(files) < 1.02 * weights and weights < 1.02 * stored
        if shape == "0.5b":
            limit = 1.3 * weights + 1
            target, met = f"45 s; {limit:.1f} GiB resident", exported.wall_s <= 45 and exported.resident <= limit
        else:
            target, met = "9 GiB anonymous; weights on disk once", exported.anonymous <= 9 and once
        told = ("yes" if met else "no") if whole else "-"
        name = f"checkpoint ({chosen.stored}) to pruned prefill and decode ({chosen.exported}), lint"
        rows.append(_row(base, name, exported, target if whole else "-", told))
        if not once:
            raise RuntimeError(f"the bundle's files take {sum(files):.2f} GiB for {stored:.2f} GiB of checkpoint")
    if "pair" in only and chosen.exported == "float32":  # the CPU computes 16 bit in float32, beside wider copies of the weights
        rows += _measure_pair(base, str(checkpoint), str(bundle), chosen.exported)
    if "rtx" in only:
        path = run_job("lower", str(bundle)).said
        engine = work / "prefill.engine"
        lengths = ("1", "1")  # not read: all sizes are fixed
        built = watch(["-m", "sievert.engines.build.worker", "tensorrt_rtx", path, str(engine), *lengths])
        outcome = json.loads(built.said)
        size = f"{engine.stat().st_size / GIB:.2f} GiB" if "built" in outcome else outcome["failed"]
        Path(path).unlink()
        rows.append(_row(base, f"prefill to a TensorRT for RTX engine ({size})", built, "24 GiB", "yes" if built.resident <= 24 else "no"))
    return rows


def _row(base: Row, what: str, watched: Watched, target: str, met: str) -> Row:
    seen = {name: getattr(watched, name) for name in ("wall_s", "cpu_s", "anonymous", "resident")}
    return replace(base, what=what, target=target, met=met, **seen)


def _measure_pair(base: Row, checkpoint: str, bundle: str, dtype: str) -> list[Row]:
    """What the loaded pair holds, with and without packed weights, over what one PyTorch model holds."""
    model = run_job("torch", checkpoint, dtype)
    held = json.loads(model.said)
    one = sum(held.values())
    rows = [replace(base, what="held by the PyTorch model, mapped", anonymous=held["Pss_Anon"], resident=one, target="-", met="-")]
    ratios = json.loads(run_job("speed", bundle).said) if dtype == "float32" else {}
    speed = "; ".join(f"{graph} takes {1 / ratio:.2f} x the time" for graph, ratio in ratios.items())
    for packed in ("packed", "mapped"):
        loaded = run_job("pair", bundle, packed)
        held = json.loads(loaded.said)
        total = sum(held.values())
        what = f"held by prefill + decode in ONNX Runtime, weights {packed}" + (f" ({speed})" if speed and packed == "mapped" else "")
        rows.append(
            replace(
                base, what=what, anonymous=held["Pss_Anon"], resident=total, target="near 1", met=f"{total / one:.2f} x the PyTorch model"
            )
        )
    return rows


# The table.


def write_table(rows: Sequence[Row]) -> None:
    """``docs/memory.csv`` and ``docs/memory.md``: these rows in the place of those of the same shape, layers and name."""
    path = ROOT / "docs" / "memory.csv"
    kept = _read_rows(path) if path.exists() else []
    fresh = {(row.shape, row.layers, row.what.split(" (")[0]) for row in rows}
    table = [row for row in kept if (row.shape, row.layers, row.what.split(" (")[0]) not in fresh] + list(rows)
    table.sort(key=lambda row: (row.shape, row.layers))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    now = hash_code(MEASURED)
    code = next((row.code for row in table if row.code != now), now)  # one older row makes the table stale
    lines = [
        "# Memory, from a checkpoint to engines",
        "",
        "Written by `benchmarks/memory.py` (`make memory`); do not edit. Random weights of real shapes, tied heads, a narrow vision tower,",
        f"576 visual tokens, {TEXT} of text, IWP before layer {LAYER} at {KEEP}. Every line is one process, sampled from outside every",
        f"{INTERVAL_S * 1000:.0f} ms. *Anonymous* pages are the process's own; *resident* adds those of mapped files, which the system can",
        'drop and read again. Lines that say "held" are not peaks: they are taken after a run, and count a page that is mapped twice once.',
        "Pairs are held in float32 alone: ONNX Runtime's CPU widens 16-bit weights, which says nothing about other engines.",
        "Seconds depend on what else the machine does: processor seconds less than those on the clock. What is not here was not measured.",
        "",
        f"Code measured: `{code}`. Machine: {describe_machine()}; {_describe_memory()}.",
        "",
        "| shape | layers | what | weights, GiB | wall, s | processor, s | anonymous, GiB | resident, GiB | target | met |",
        "|---" * 10 + "|",
        *(_line(row, now) for row in table),
    ]
    (ROOT / "docs" / "memory.md").write_text("\n".join(lines) + "\n")


def _read_rows(path: Path) -> list[Row]:
    numbers = {"weights", "wall_s", "cpu_s", "anonymous", "resident"}
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    for line in lines:
        line |= {name: float(line[name]) for name in numbers} | {"layers": int(line["layers"])}
    return [Row(**line) for line in lines]


def _line(row: Row, code: str) -> str:
    seconds = (f"{row.wall_s:.0f}", f"{row.cpu_s:.0f}") if row.wall_s else ("-", "-")
    older = "" if row.code == code else f" (code `{row.code}`)"
    sizes = (f"{row.anonymous:.2f}", f"{row.resident:.2f}")
    cells = (row.shape, str(row.layers), row.what + older, f"{row.weights:.2f}", *seconds, *sizes, row.target, row.met)
    return "| " + " | ".join(cells) + " |"


def _describe_memory() -> str:
    total = _read_kib(Path("/proc/meminfo"))["MemTotal"] / 2**20
    return f"{total:.0f} GiB of memory, {platform.system()} {platform.release().split('-')[0]}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=("0.5b", "3b"), help="may be repeated; default: both")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers, where not those of the shape")
    parser.add_argument("--only", action="append", choices=ROWS, help="may be repeated; default: all rows")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with room for three times the weights")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, *arguments = options.job
        sys.stdout.write(JOBS[name](*arguments) + "\n")
        return
    from benchmarks.memory_checkpoint import SHAPES

    for shape in options.shape or list(SHAPES):
        work = Path(tempfile.mkdtemp(prefix="sievert-memory-", dir=options.work))
        try:
            rows = measure(shape, options.layers or SHAPES[shape].layers, work, options.only or ROWS)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        write_table(rows)
        sys.stdout.write("".join(_line(row, row.code) + "\n" for row in rows))


if __name__ == "__main__":
    main()
