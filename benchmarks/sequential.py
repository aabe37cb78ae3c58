"""What choosing tokens one by one costs as a graph: `python benchmarks/sequential.py [names] [--rtx]`.

A selector with K sequential steps is unrolled into K copies of its step. Measured on the selectors alone, without a model, at 576 visual
tokens of a small decoder: nodes, seconds to build the graph, seconds ONNX Runtime takes to create a session, and the time of a run as a
ratio to iwp's at the same K, all runs interleaved. With `--rtx` also the build for TensorRT for RTX, which needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stamp import ROOT, describe_machine, hash_code
from sievert.graph_passes.selectors.base import StageGeometry
from sievert.graph_passes.selectors.registry import SELECTORS, make
from sievert.graph_passes.selectors.standalone import build_standalone, make_geometry

MEASURED: Final = ("graph_passes/selectors", "benchmarks/sequential.py")
BASELINE: Final = "iwp"
NAMES: Final = ("divprune", "cdpruner", "dart", "fastv")  # the first two take K steps; the others show what few steps cost
KEEPS: Final = (8, 16, 32, 64, 128, 256)
VISUAL: Final = 576
SEQUENCE: Final = 640
HEADS: Final = (14, 2)
HEAD_SIZE: Final = 64
WIDTH: Final = HEADS[0] * HEAD_SIZE
THREADS: Final = 2
ATTEMPTS: Final = 3
THRESHOLD: Final = 5.0  # times iwp

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Built:
    """One selector at one K: seconds are the best of some attempts, ``rtx_s`` and ``rtx_mib`` None where that was not asked for."""

    name: str
    keep: int
    session: ort.InferenceSession
    feeds: Feeds
    nodes: int
    graph_s: float
    session_s: float
    rtx_s: float | None
    rtx_mib: float | None


@dataclass(frozen=True)
class Row:
    """``ratio`` is the median over the rounds of the time over the baseline's, from ``low`` to ``high`` with 95 % confidence; ``growth``
    that over the selector's own time at the smallest K.
    """

    built: Built
    run_ms: float
    ratio: float
    low: float
    high: float
    growth: float


def prepare(name: str, keep: int, *, rtx: bool) -> Built:
    """Build the selector alone, in float32 and for a batch of 1, and a session for it."""
    heads, kv_heads = HEADS
    geometry = make_geometry(
        visual=VISUAL, keep=keep, sequence=SEQUENCE, heads=heads, kv_heads=kv_heads, head_size=HEAD_SIZE, grid=(24, 24)
    )
    graph_s, model = _time_best(lambda: build_standalone(make(name, {}), geometry, width=WIDTH))
    data = ir.to_proto(model).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Threads that spin after a run would take the processors from the session that runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session_s, session = _time_best(lambda: ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    rtx_s, rtx_mib = build_rtx(data) if rtx else (None, None)
    return Built(name, keep, session, make_feeds(model, geometry), model.graph.num_nodes(), graph_s, session_s, rtx_s, rtx_mib)


def _time_best(make_it: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest time of some attempts, in seconds, and what the last one made."""
    seconds = []
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        made = make_it()
        seconds.append(time.perf_counter() - start)
    return min(seconds), made


def make_feeds(model: ir.Model, geometry: StageGeometry) -> Feeds:
    """A prompt of 4 rows of text, the image, text and padding; normal values for all taps."""
    g, rng, rows = geometry, np.random.default_rng(0), np.arange(geometry.sequence)
    first, end = 4, geometry.sequence - 8
    known = {
        "visual_index": first + np.arange(g.visual)[None],
        "original_index": np.arange(g.visual)[None],
        "text": ((rows >= first + g.visual) & (rows < end))[None],
        "all_text": ((rows < first) | ((rows >= first + g.visual) & (rows < end)))[None],
        "real": (rows < end)[None],
    }
    inputs = {str(value.name): value.shape.numpy() for value in model.graph.inputs if value.shape is not None}
    return {name: known[name] if name in known else rng.normal(size=shape).astype(np.float32) for name, shape in inputs.items()}


def build_rtx(data: bytes) -> tuple[float, float]:
    """Seconds to build an engine of TensorRT for RTX, and its MiB."""
    import tensorrt_rtx as rtx

    start = time.perf_counter()
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    engine = builder.build_serialized_network(network, builder.create_builder_config()) if parser.parse(data) else None
    if engine is None:
        raise RuntimeError(f"no engine: {[parser.get_error(index).desc() for index in range(parser.num_errors)]}")
    return time.perf_counter() - start, engine.nbytes / 2**20


def run_interleaved(arms: Sequence[Built], rounds: int) -> Mapping[tuple[str, int], list[float]]:
    """Seconds of each arm in each round; every round runs all arms once, in another order."""
    seconds: dict[tuple[str, int], list[float]] = {(arm.name, arm.keep): [] for arm in arms}
    shuffled, order = list(arms), random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(shuffled)
        for arm in shuffled:
            start = time.perf_counter()
            arm.session.run(None, arm.feeds)
            if number:  # the first round warms up
                seconds[arm.name, arm.keep].append(time.perf_counter() - start)
    return seconds


def judge(arm: Built, seconds: Mapping[tuple[str, int], list[float]]) -> Row:
    """Paired by rounds; the interval of the median is that of the sign test."""
    own, baseline, smallest = (seconds[key] for key in ((arm.name, arm.keep), (BASELINE, arm.keep), (arm.name, KEEPS[0])))
    ratios = sorted(mine / other for mine, other in zip(own, baseline, strict=True))
    outside = int((len(ratios) - 1.96 * len(ratios) ** 0.5) / 2) - 1
    growth = statistics.median(mine / other for mine, other in zip(own, smallest, strict=True))
    return Row(arm, statistics.median(own) * 1e3, statistics.median(ratios), ratios[outside], ratios[-1 - outside], growth)


def say_where(name: str, rows: Sequence[Row]) -> str:
    """At which of the K measured a selector surely takes more than the threshold, in words."""
    keeps = [row.built.keep for row in rows]
    over = [row.built.keep for row in rows if row.low > THRESHOLD]
    if not over:
        where = "at no K measured"
    elif over == keeps:
        where = "at every K measured"
    elif len(over) > 1 and over == keeps[-len(over) :]:
        where = f"from K = {over[0]} on"
    elif over == keeps[: len(over)]:
        where = f"up to K = {over[-1]}"
    else:
        where = f"at K = {', '.join(map(str, over))}"
    return f"{name} {where}"


def write_table(rows: Sequence[Row], names: Sequence[str], rounds: int) -> None:
    """``docs/sequential.md`` and ``docs/sequential.csv``."""
    docs = ROOT / "docs"
    columns = [
        "selector",
        "keep",
        "nodes",
        "graph_s",
        "session_s",
        "rtx_s",
        "rtx_mib",
        "run_ms",
        "ratio",
        "ratio_low",
        "ratio_high",
        "growth",
    ]
    with (docs / "sequential.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            arm = row.built
            numbers = (arm.graph_s, arm.session_s, arm.rtx_s, arm.rtx_mib, row.run_ms, row.ratio, row.low, row.high, row.growth)
            writer.writerow([arm.name, arm.keep, arm.nodes, *("" if number is None else f"{number:.4f}" for number in numbers)])
    where = [say_where(name, [row for row in rows if row.built.name == name]) for name in names if name != BASELINE]
    growth = [f"{row.built.name} {row.growth:.1f}" for row in rows if row.built.keep == KEEPS[-1]]
    rtx = rows[0].built.rtx_s is not None
    lines = [
        "# What choosing tokens one by one costs",
        "",
        "Written by `benchmarks/sequential.py`; do not edit. Selectors alone, without a model: batch 1, fp32,",
        f"{VISUAL} visual tokens of {SEQUENCE} rows, {HEADS[0]} query and {HEADS[1]} kv heads of {HEAD_SIZE}, width {WIDTH}.",
        f"Runs in ONNX Runtime on {THREADS} threads that do not spin, {rounds} rounds of all rows interleaved; ratios are medians",
        f"over the rounds, with the 95 % interval of the sign test. Seconds are the best of {ATTEMPTS}"
        f"{', of RTX builds the only one' if rtx else ''}.",
        "The machine was shared with other work: read the ratios, and expect those of another run to differ by more than the interval.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        f"Selecting takes more than {THRESHOLD:g} times {BASELINE}'s time (by the whole interval): {'; '.join(where)}.",
        f"Times that a run takes longer at K = {KEEPS[-1]} than at K = {KEEPS[0]}: {', '.join(growth)}.",
        "",
        f"| selector | K | nodes | graph, s | session, s |{' RTX build, s | RTX engine, MiB |' if rtx else ''} run, × {BASELINE} "
        f"| run, × its own at K = {KEEPS[0]} |",
        "|---" * (9 if rtx else 7) + "|",
        *(_line(row) for row in rows),
    ]
    (docs / "sequential.md").write_text("\n".join(lines) + "\n")


def _line(row: Row) -> str:
    arm = row.built
    rtx = "" if arm.rtx_s is None else f" {arm.rtx_s:.1f} | {arm.rtx_mib:.1f} |"
    ratio = "1" if arm.name == BASELINE else f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
    return f"| {arm.name} | {arm.keep} | {arm.nodes} | {arm.graph_s:.2f} | {arm.session_s:.2f} |{rtx} {ratio} | {row.growth:.2f} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in NAMES if name in SELECTORS]
    parser.add_argument("names", nargs="*", default=default, help=f"default: {' '.join(default)}")
    parser.add_argument("--rounds", type=int, default=31, help="runs of each graph, 15 or more")
    parser.add_argument("--rtx", action="store_true", help="also build for TensorRT for RTX (minutes)")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in SELECTORS]:
        parser.error(f"no selector {unknown[0]!r}: choose from {', '.join(SELECTORS)}")
    if options.rounds < 15:
        parser.error(f"--rounds {options.rounds}: 15 or more are needed for the interval of a median")
    names = [BASELINE, *(name for name in options.names if name != BASELINE)]
    arms = []
    for name in names:
        for keep in KEEPS:
            arms.append(prepare(name, keep, rtx=options.rtx))
            sys.stderr.write(f"{name} K={keep}: {arms[-1].nodes} nodes\n")
    seconds = run_interleaved(arms, options.rounds)
    rows = [judge(arm, seconds) for arm in arms]
    write_table(rows, names, options.rounds)
    sys.stdout.write("".join(_line(row) + "\n" for row in rows) + "made docs/sequential.md, docs/sequential.csv\n")


if __name__ == "__main__":
    main()
