"""Engines on a GPU against PyTorch: `python benchmarks/gpu.py [--shape SHAPE] [--engine NAME] [--out FILE]`, or `--device cpu` to try it.

Random weights: a Qwen2 decoder of half a billion or three billion parameters behind a tower of CLIP ViT-L/14-336's shape; 576 visual
and 40 text tokens, one cut by IWP before layer 4. Every engine that reaches the GPU (ONNX Runtime, TensorRT for RTX, TensorRT) is measured
against PyTorch with scaled dot product attention, not compiled, in interleaved rounds. Both sides give their results to the host; the
engines also take their inputs from there. Each engine has a process of its own: where it refuses the GPU, or dies, the result says so,
and the rest is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_arms import PICTURE, measure_engine
from benchmarks.memory_checkpoint import SHAPES, Shape, make_checkpoint
from benchmarks.performance_model import TEXT, VISUAL, make_variants
from benchmarks.stamp import ROOT, hash_code
from sievert import doctor
from sievert.bench_arms import describe_machine
from sievert.bundle.errors import EngineUnavailableError
from sievert.engines.run.cuda import Device, cuda_memory
from sievert.engines.run.registry import RUNTIMES
from sievert.engines.run.timing import FEWEST_ROUNDS

MEASURED: Final = (
    "engines",
    "exporter",
    "graph_passes",
    *(f"benchmarks/{name}.py" for name in ("gpu", "gpu_arms", "memory_checkpoint", "performance_model", "performance_peers")),
)
DECODERS: Final[Mapping[str, Shape]] = {**SHAPES, "tiny": Shape(2, 64, 4, 2, 128, 96, "float32", "float32")}
TOWER: Final = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
TOWER_LAYERS: Final = 24
LARGE_MIB: Final = 40 << 10  # three graphs of 3 billion parameters and the PyTorch model, in 16 bit, with what they compute
NO_GPU: Final = 2
_TAIL: Final = 800


@dataclass(frozen=True)
class Options:
    """The command line. ``layers`` 0: as many as the shape has."""

    device: Literal["cuda", "cpu"]
    shapes: tuple[str, ...]
    engines: tuple[str, ...]
    layers: int
    rounds: int
    threads: int
    out: Path | None
    work: Path | None


def measure_shape(name: str, options: Options, work: Path) -> dict[str, Any]:
    """Everything about one decoder: its sizes, and what each engine was found to do."""
    shape = DECODERS[name]
    shape = replace(shape, layers=options.layers or shape.layers)
    dtype: Literal["float32", "float16"] = "float16" if options.device == "cuda" else "float32"
    tower = {} if name == "tiny" else {**TOWER, "num_hidden_layers": min(TOWER_LAYERS, options.layers or TOWER_LAYERS)}
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    make_checkpoint(shape, checkpoint, vision=tower)
    make_variants(checkpoint, bundle, layers=shape.layers, dtype=dtype)
    found: dict[str, Any] = {"decoder": asdict(shape), "tower": tower, "dtype": dtype, "engines": {}}
    for engine in options.engines:
        sys.stderr.write(f"{name}: {engine} ...\n")
        found["engines"][engine] = run_engine(engine, options, checkpoint, bundle)
    return found


def run_engine(engine: str, options: Options, checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Measure one engine in a process of its own, or say why not."""
    if reason := RUNTIMES[engine].unavailable():
        return {"refused": reason}
    numbers = (str(options.rounds), str(options.threads))
    command = [sys.executable, str(Path(__file__)), "--job", engine, options.device, str(checkpoint), str(bundle), *numbers]
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=noise, text=True, cwd=ROOT, check=False)
        noise.seek(0)
        words = noise.read()[-_TAIL:].strip()
    if done.returncode:
        return {"failed": f"the process ended with {done.returncode}: {words or 'without a word'}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def describe(options: Options, shapes: Mapping[str, Any], left_out: Mapping[str, str]) -> dict[str, Any]:
    """The whole result."""
    return {
        "device": options.device,
        "note": "a trial of the script on the CPU: it says nothing about a GPU" if options.device == "cpu" else "",
        "code": hash_code(MEASURED),
        "machine": asdict(describe_machine()),
        "packages": dict(doctor().packages),
        "rounds": options.rounds,
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "picture": PICTURE,
        "left_out": dict(left_out),
        "shapes": dict(shapes),
    }


def find_device() -> Device:
    """The GPU.

    Raises:
        EngineUnavailableError: there is none.
    """
    return cuda_memory().device()


def choose_shapes(asked: Sequence[str], gpu: Device | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """What to measure, and why something is left out. What is asked for is measured."""
    if asked:
        return tuple(dict.fromkeys(asked)), {}
    if gpu is None:
        return ("0.5b",), {}
    if gpu.memory_mib < LARGE_MIB:
        return ("0.5b",), {"3b": f"{gpu.name} has {gpu.memory_mib} MiB, and {LARGE_MIB} are needed: --shape 3b tries all the same"}
    return ("0.5b", "3b"), {}


def read_options(arguments: Sequence[str]) -> tuple[Options, dict[str, str]]:
    """Parse the command line, or end it. Also what is left out, with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the script, with two layers")
    parser.add_argument("--shape", action="append", choices=list(DECODERS), help="may be repeated; default: 0.5b, and 3b where it fits")
    parser.add_argument("--engine", action="append", choices=list(RUNTIMES), help="may be repeated; default: all of that device")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (and at most so many of the tower), where not the shape's")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of what runs on the CPU")
    parser.add_argument("--out", type=Path, help="file of the result as JSON; default: the standard output")
    parser.add_argument("--work", type=Path, help="a folder with room for five times the weights; default: the system's temporary one")
    found = parser.parse_args(arguments)
    if found.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {found.rounds}: at least {FEWEST_ROUNDS} are needed for an interval of a median")
    if found.layers == 1 or found.layers < 0:
        parser.error(f"--layers {found.layers}: a cut needs a layer on either side")
    gpu = None
    if found.device == "cuda":
        try:
            gpu = find_device()
        except EngineUnavailableError as error:
            parser.exit(NO_GPU, f"nothing was measured: {error}. It needs an NVIDIA GPU; --device cpu tries the script without one\n")
    shapes, left_out = choose_shapes(found.shape or (), gpu)
    able = tuple(name for name in RUNTIMES if (name == "onnxruntime") == (found.device == "cpu"))
    engines = tuple(dict.fromkeys(found.engine or able))
    if wrong := set(engines) - set(able):
        parser.error(f"--engine {', '.join(sorted(wrong))} does not run on {found.device}: choose from {', '.join(able)}")
    layers = found.layers or (2 if found.device == "cpu" and "tiny" not in shapes else 0)
    return Options(found.device, shapes, engines, layers, found.rounds, found.threads, found.out, found.work), left_out


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the result after each shape."""
    if arguments[:1] == ["--job"]:
        engine, device, checkpoint, bundle, rounds, threads = arguments[1:]
        found = measure_engine(engine, device, Path(checkpoint), Path(bundle), rounds=int(rounds), threads=int(threads))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    options, left_out = read_options(arguments)
    shapes: dict[str, Any] = {}
    for name in options.shapes:
        work = Path(tempfile.mkdtemp(prefix="sievert-gpu-", dir=options.work))
        try:
            shapes[name] = measure_shape(name, options, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        text = json.dumps(describe(options, shapes, left_out), indent=1) + "\n"
        if options.out is not None:
            options.out.write_text(text)
    if options.out is None:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
