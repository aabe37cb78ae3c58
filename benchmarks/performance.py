"""How close to the limit: `python benchmarks/performance.py [--only ROW] [--layers N] [--rounds N] [--seconds N]`.

The reference work is Qwen2-0.5B's decoder shape with random weights, 576 visual and 40 text tokens, float32, one cut by IWP before layer
4, in ONNX Runtime on the CPU. Every ratio is taken in interleaved pairs; a row is met where the whole 95 % interval of its median ratio
lies on the right side of the target. ``docs/performance.md`` is written by a run of all rows at full size, and by no other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import performance_peers as peers
from benchmarks.performance_decode import cache_rows, decode_rows
from benchmarks.performance_model import KEEPS, LAYER, TEXT, VISUAL, Reference, make_reference, name_of
from benchmarks.performance_rows import Case, Row, judge
from benchmarks.performance_select import share_rows
from benchmarks.performance_text import text_rows
from benchmarks.stamp import ROOT, describe_machine, hash_code
from sievert.graph_passes.bound import build_bound
from sievert.graph_passes.flops import count_flops

MEASURED: Final = (
    "engines",
    "exporter",
    "graph_passes",
    *(f"benchmarks/performance{part}.py" for part in ("", "_decode", "_model", "_peers", "_rows", "_select", "_text")),
)
LAYERS: Final = 24
VOCABULARY: Final = 151936
FEWEST: Final = 15
SECONDS: Final = 120.0


def select_rows(case: Case) -> list[Row]:
    """The price of selecting, and the speed-up over what the FLOPs promise."""
    return _select(case, case.reference(), "grouped heads (14/2)", ideal=True)


def multi_head_rows(case: Case) -> list[Row]:
    """The price of selecting where every query head has a key head of its own."""
    return _select(case, case.reference(kv_heads=14), "multi-head (14/14)", ideal=False)


def _select(case: Case, reference: Reference, shape: str, *, ideal: bool) -> list[Row]:
    rows = []
    flops = count_flops(reference.graph("full", "prefill"))
    for keep in KEEPS:
        variant = reference.bundle.variant(name_of(keep))
        decoder = reference.dynamic("decoder")
        bound = build_bound(decoder, reference.bundle.manifest.geometry, variant.plan, variant.profile)
        arms: dict[str, Callable[[], object]] = {
            "pruned": reference.load(name_of(keep), "prefill").run,
            "bound": reference.load_model(bound, "bound", variant.profile).run,
        }
        if ideal:
            arms["full"] = reference.load("full", "prefill").run
        seconds = case.take_turns(arms)
        gain = flops / count_flops(reference.graph(name_of(keep), "prefill"))
        rows.append(judge(f"pruned prefill over its bound, {keep}, {shape}", seconds["pruned"], seconds["bound"], at_most=1.02))
        if ideal:
            speed_up = [whole / part / gain for whole, part in zip(seconds["full"], seconds["pruned"], strict=True)]
            note = f"{statistics.median(speed_up) * gain:.2f} x measured, {gain:.2f} x by FLOPs"
            rows.append(
                judge(f"speed-up of pruned prefill over its FLOPs', {keep}", speed_up, [1.0] * len(speed_up), at_least=0.95, note=note)
            )
    return rows


def torch_rows(case: Case) -> list[Row]:
    """Prefill against transformers in PyTorch, unpruned, and pruned by hooks."""
    reference = case.reference()
    model = peers.load_torch(reference.checkpoint, case.threads)
    length, keep = reference.profile.sequence, reference.bundle.variant(name_of(KEEPS[-1])).plan.stages[0].keep
    whole = case.take_turns({"ours": reference.load("full", "prefill").run, "theirs": peers.run_torch(model, length)})
    pruned = case.take_turns(
        {
            "ours": reference.load(name_of(KEEPS[-1]), "prefill").run,
            "theirs": peers.run_torch_pruned(model, length, reference.layer, VISUAL, keep),
        }
    )
    note = "the hooks are given what to keep"
    return [
        judge("unpruned prefill over transformers in PyTorch (sdpa)", whole["ours"], whole["theirs"], at_most=0.70),
        judge(f"pruned prefill, {KEEPS[-1]}, over PyTorch pruned by hooks", pruned["ours"], pruned["theirs"], at_most=0.70, note=note),
    ]


def flops_rows(case: Case) -> list[Row]:
    """Achieved FLOP/s of unpruned prefill against products of the same shapes and nothing else."""
    reference = case.reference()
    products = [node for node in reference.graph("full", "prefill").graph if node.op_type == "MatMul" and _is_weight(node.inputs[1])]
    length = reference.profile.sequence
    shapes = [_shape(node.inputs[1]) for node in products if _shape(node.inputs[0])[-2] == length]  # the last layer has but one row
    run, bare = peers.run_products([(inner, outer) for inner, outer in shapes], length, case.threads)
    seconds = case.take_turns({"ours": reference.load("full", "prefill").run, "bare": run})
    flops = count_flops(reference.graph("full", "prefill"))
    ours, theirs = ([count / each for each in times] for count, times in ((flops, seconds["ours"]), (bare, seconds["bare"])))
    only = [bare_time / time for bare_time, time in zip(seconds["bare"], seconds["ours"], strict=True)]
    note = f"{statistics.median(ours) / 1e9:.0f} GFLOP/s; the chain alone takes {statistics.median(only):.3f} of prefill"
    return [judge("achieved FLOP/s of unpruned prefill over a bare chain of its products", ours, theirs, at_least=0.92, note=note)]


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return () if value is None or value.shape is None else tuple(value.shape.numpy())


def export_rows(case: Case) -> list[Row]:
    """Unpruned prefill against transformers' own export with its fusions."""
    reference = case.reference()
    model = peers.load_torch(reference.checkpoint, case.threads)
    with tempfile.TemporaryDirectory() as folder:
        theirs = peers.export_own(model, reference.profile.sequence, Path(folder), case.threads)
        del model
        seconds = case.take_turns({"ours": reference.load("full", "prefill").run, "theirs": theirs})
    return [
        judge('unpruned prefill over transformers\' own ONNX export, ort_fusions="cpu"', seconds["ours"], seconds["theirs"], at_most=0.95)
    ]


ROWS: Final[Mapping[str, Callable[[Case], list[Row]]]] = {
    "selecting": select_rows,
    "multi-head": multi_head_rows,
    "torch": torch_rows,
    "flops": flops_rows,
    "export": export_rows,
    "decode": decode_rows,
    "caches": cache_rows,
    "visual": share_rows,
    "text": text_rows,
}


def write_table(rows: Sequence[Row], case: Case) -> None:
    """``docs/performance.md``."""
    lines = [
        "# How close to the limit",
        "",
        "Written by `make performance`; do not edit. Random weights in Qwen2-0.5B's decoder shape (24 layers, width 896, 14/2 heads,",
        f"MLP 4864, vocabulary {VOCABULARY}), {VISUAL} visual and {TEXT} text tokens, one cut by IWP before layer {LAYER}, float32,",
        f"batch 1, ONNX Runtime, {case.threads} threads. Each ratio is the median of interleaved pairs, with the 95 %",
        "interval of the sign test; a row is met where the whole interval lies on the right side of the target. PyTorch computes one",
        "row of logits. Bound: the same front and tail with the kept tokens given. Memory, builds and larger models: elsewhere.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        "| what | ratio | 95 % interval | pairs | target | met | |",
        "|---|---|---|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    (ROOT / "docs" / "performance.md").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Options:
    """The command line."""

    only: tuple[str, ...]
    layers: int
    vocabulary: int
    rounds: int
    seconds: float
    threads: int
    processor_time: bool
    work: str


def read_options() -> Options:
    """Parse the command line, or end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(ROWS), help="measure these rows and write nothing; may be repeated")
    parser.add_argument("--layers", type=int, default=LAYERS, help="a shallower decoder, to try it; writes nothing")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="a smaller one, to try it; writes nothing")
    parser.add_argument("--rounds", type=int, default=FEWEST, help=f"interleaved pairs; fewer than {FEWEST} write nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="more pairs are taken until a comparison took so long")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine, best with --threads 1; writes nothing")
    parser.add_argument("--work", default="", help="folder of the models, which stay there; default: one that is removed")
    found = parser.parse_args()
    if found.layers < 2:
        parser.error(f"--layers {found.layers}: a cut needs a layer on either side")
    sizes = (found.layers, found.vocabulary, found.rounds, found.seconds, found.threads)
    return Options(tuple(found.only or ROWS), *sizes, found.processor_time, found.work)


def main() -> None:
    """Measure the rows and say them."""
    options = read_options()
    with tempfile.TemporaryDirectory() as temporary:
        clock = time.process_time if options.processor_time else time.perf_counter
        sizes = (options.layers, options.vocabulary, options.rounds, options.seconds, options.threads)
        case = Case(Path(options.work or temporary), *sizes, clock, make_reference)
        rows = []
        for name in options.only:
            sys.stderr.write(f"{name} ...\n")
            for row in ROWS[name](case):
                rows.append(row)
                sys.stdout.write(row.line() + "\n")
                sys.stdout.flush()
    if (
        set(options.only) == set(ROWS)
        and (options.layers, options.vocabulary) == (LAYERS, VOCABULARY)
        and options.rounds >= FEWEST
        and not options.processor_time
    ):
        write_table(rows, case)
        sys.stdout.write("made docs/performance.md\n")


if __name__ == "__main__":
    main()
