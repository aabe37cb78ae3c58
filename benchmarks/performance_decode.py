"""Rows of the performance table about decode: against PyTorch and transformers' own export, and against what memory gives."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Final

import onnx_ir as ir

from benchmarks import performance_peers as peers
from benchmarks.performance_model import KEEPS, NEW, TEXT, Reference, plan_for
from benchmarks.performance_rows import Case, Row, judge
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.engines.run.alone import Alone
from sievert.graph_passes.decode import build_decode
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.finish import FixShapes

TOKENS: Final = 8
VISUALS: Final = (576, 4096, 16384)


def decode_rows(case: Case) -> list[Row]:
    """Milliseconds a token after the same prompt."""
    reference = case.reference()
    length = reference.profile.sequence
    model = peers.load_torch(reference.checkpoint, case.threads)
    stream, streamed = peers.measure_stream(case.threads)
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "ours": run_steps(reference.load("full", "decode")),
            "torch": peers.run_torch_decode(model, length, NEW, TOKENS),
            "export": peers.export_own_decode(model, length, NEW, Path(folder), case.threads, TOKENS),
            "stream": stream,
        }
        seconds = case.take_turns(arms)
    moved = count_bytes(reference.graph("full", "decode"))
    ours = [TOKENS * moved / each for each in seconds["ours"]]
    memory = [streamed / each for each in seconds["stream"]]
    note = f"{statistics.median(seconds['ours']) / TOKENS * 1e3:.1f} ms a token"
    bandwidth = f"{statistics.median(ours) / 1e9:.1f} of {statistics.median(memory) / 1e9:.1f} GB/s"
    return [
        judge("decode over PyTorch with a static cache", seconds["ours"], seconds["torch"], at_most=0.85, note=note),
        judge("decode over transformers' own ONNX decode", seconds["ours"], seconds["export"], at_most=1.0),
        judge("bytes moved by decode over the streaming bandwidth", ours, memory, at_least=0.8, note=bandwidth),
    ]


def cache_rows(case: Case) -> list[Row]:
    """Decode pruned over unpruned for larger pictures, beside the ratio of the bytes each has to read."""
    reference = case.reference()
    rows = []
    for visual in VISUALS:
        profile = Profile(visual_tokens=visual, max_text=TEXT, max_new_tokens=NEW)
        plan = plan_for(visual, KEEPS[-1], reference.layer)
        graphs = {
            "full": make_decode(reference, Plan(), profile),
            "pruned": make_decode(reference, plan, profile),
        }
        arms = {name: run_steps(reference.load_model(graph, f"{name}.decode", profile)) for name, graph in graphs.items()}
        seconds = case.take_turns(arms)
        roofline = count_bytes(graphs["pruned"]) / count_bytes(graphs["full"])
        what = f"decode pruned to {KEEPS[-1]} over unpruned, {visual} visual tokens"
        rows.append(judge(what, seconds["pruned"], seconds["full"], note=f"by bytes moved {roofline:.3f}"))
    return rows


def make_decode(reference: Reference, plan: Plan, profile: Profile) -> ir.Model:
    """Static decode for any number of visual tokens: the pictures that would give them are not needed."""
    decoder = find_decoder(reference.dynamic("decoder"))
    return FixShapes()(build_decode(decoder, reference.dynamic("embed_tokens"), profile, plan)).model


def count_bytes(decode: ir.Model) -> int:
    """Bytes a step has to read: every weight once (of a gathered one a row), and the caches as far as they are allocated."""
    graph, moved = decode.graph, 0
    for value in graph.initializers.values():
        if any(node.op_type != "Gather" for node, _ in value.uses()) and value.const_value is not None:
            moved += value.const_value.nbytes
    for value in graph.inputs:
        if str(value.name).startswith("past_key_values") and value.shape is not None and value.dtype is not None:
            moved += int(prod(value.shape.numpy()) * value.dtype.itemsize)
    return moved


def run_steps(graph: Alone) -> Callable[[], None]:
    """``TOKENS`` steps of decode after a full prompt."""

    def run() -> None:
        for step in range(TOKENS):
            graph.run(step)

    return run
