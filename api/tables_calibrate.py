"""Calibration data and ranges as tables and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from rich.markup import escape
from rich.table import Table

from sievert.tables import describe_bytes, make_table

if TYPE_CHECKING:
    from sievert.calibration.collection import Collection
    from sievert.calibration.judging import TensorRange
    from sievert.calibration.ranges import Ranges
    from sievert.calibration.sensitivity import Sensitivity
    from sievert.quantising import QuantisedVariant

_COLOURS: Final = {"nan": "bold red", "overflow": "bold red", "close": "yellow", "fits": "green", "float32": "dim"}
_SHOWN: Final = 12
_BAR: Final = 24


def collection_table(collection: Collection) -> Table:
    """What is stored of each graph."""
    table = make_table("", "graph", "runs", "inputs", "stored", numbers=("runs", "stored"))
    for graph in collection.graphs:
        data = collection.info.graphs[graph]
        names = [spec.name for spec in data.inputs if spec.name not in data.zeros and not spec.name.startswith("past_key_values.")]
        caches = sum(spec.name.startswith("past_key_values.") for spec in data.inputs if spec.name not in data.zeros)
        shown = ", ".join(names) + (f", {caches} caches" if caches else "") + (", no caches (they are zero)" if data.zeros else "")
        table.add_row(graph, str(collection.count(graph)), shown, describe_bytes(collection.info.feeds_bytes(graph)))
    return table


def collection_lines(collection: Collection, place: str) -> list[str]:
    """Where it is, how much, how far the answers went, and whether it is random."""
    from sievert.calibration.collect import count_steps
    from sievert.calibration.collection import RANDOM

    info = collection.info
    count = len(info.samples)
    what = f"{count} {'random samples' if info.random else f'samples of {escape(info.data.file)}'}"
    lines = [f"Collected {what} through {info.variant}: {info.stored_bytes / 2**20:.1f} MiB in [bold]{escape(place)}[/]"]
    steps = count_steps(info)
    lines.append("decode was fed " + ", ".join(f"token {step} of {reached} answers" for step, reached in steps.items()))
    if unreached := [step for step, reached in steps.items() if not reached]:
        lines.append(f"[yellow]no answer is long enough for decode step {', '.join(map(str, unreached))}[/]")
    if info.random:
        lines.append(f"[yellow]{RANDOM}[/]")
    return lines


def ranges_table(found: Ranges, count: int) -> Table:
    """The tensors with the least headroom."""
    numbers = ("largest", "headroom", "below normal")
    table = make_table("", "graph", "tensor", "computed by", "module", *numbers, "verdict", numbers=numbers)
    for each in found.worst(count):
        headroom = "-" if each.headroom is None else f"{each.headroom:.3g} ×"
        verdict = f"[{_COLOURS[each.verdict]}]{each.verdict}[/]"
        by = escape(each.op) or each.kind
        table.add_row(
            each.graph, escape(each.name), by, escape(each.module), f"{each.magnitude:.4g}", headroom, f"{each.tiny * 100:.2g} %", verdict
        )
    return table


def ranges_lines(found: Ranges) -> list[str]:
    """What would overflow and why, and what the numbers do not say."""
    lines = [
        f"[bold]keep float32[/] {each.graph} {escape(each.name)} ({escape(_where(each))}): {escape(each.reason)}"
        for each in found.keep_float32
        if each.starts
    ]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more, all in --json"]
    if follow := sum(not each.starts for each in found.keep_float32):
        lines.append(f"{follow} more overflow further on, computed from these: all in --json")
    if nans := sum(each.verdict == "nan" for each in found.tensors):
        lines.append(f"[red]{nans} tensors hold NaN already: run `sievert check` first[/]")
    counts = {verdict: sum(each.verdict == verdict for each in found.tensors) for verdict in ("overflow", "close", "fits", "float32")}
    runs = ", ".join(f"{count} of {graph}" for graph, count in found.runs.items())
    lines.append(
        f"{found.variant} in {found.dtype}: {counts['overflow']} tensors overflow, {counts['close']} come close, {counts['fits']} fit, "
        f"{counts['float32']} stay float32 (over {found.samples} samples; runs: {runs})"
    )
    if found.emulated:
        lines.append("[dim]These graphs are 16-bit ones, emulated on the CPU: a float32 bundle shows how far beyond the limit values go[/]")
    return lines


def quantised_lines(made: QuantisedVariant) -> list[str]:
    """What was narrowed, what was not and why, and what that saves."""
    from sievert.calibration.collection import RANDOM

    precision = made.variant.precision
    if precision is None:
        return []
    sixteen = precision.format in ("float16", "bfloat16")
    count = len(precision.weights) if sixteen else sum(weight.name.endswith(".q") for weight in precision.weights)
    block = "" if sixteen else f", a scale per block of {precision.block}" if precision.block else ", a scale per output channel"
    lines = []
    if precision.weights:
        lines = [f"{count} weights in {precision.format}{block}: {describe_bytes(made.bytes)}, before {describe_bytes(made.bytes_before)}"]
    if precision.caches:
        sizes = describe_bytes(made.cache_bytes), describe_bytes(made.cache_bytes_before)
        lines.append(f"caches in {precision.caches}: {sizes[0]}, before {sizes[1]}")
    if precision.calibration:
        lines.append(f"scales of activations: {precision.calibration} over {precision.samples} samples, one per tensor")
    if precision.unclipped:
        share = f"in front of {len(precision.unclipped)} of {count} weights"
        lines.append(f"{share} there are outliers that a percentile would cut off: the scale there is of the largest value")
    if (sixteen or precision.caches == "float16") and not any("/" in name for name in precision.kept):
        lines.append(f"no tensor overflows over {precision.samples} samples")
    for reason, names in group_kept(precision.kept).items():
        shown = ", ".join(map(escape, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        lines.append(f"kept as they are, {escape(reason)}: {shown}")
    if precision.random:
        lines.append(f"[yellow]{RANDOM}[/]")
    return lines


def sensitivity_table(found: Sensitivity) -> Table:
    """Layers by what they lose, then whole graphs, then all of it; a bar for each, of the largest."""
    numbers = ("weights", "KL, nats", "largest", "kept tokens that stay", "first tokens changed")
    table = make_table("", f"{found.format} alone", *numbers, "", numbers=numbers)
    most = max((unit.divergence for unit in (*found.units, *found.graphs, found.everything)), default=0.0) or 1.0
    for unit in (*found.units, *found.graphs, found.everything):
        bar = "█" * round(_BAR * unit.divergence / most)
        values = (f"{unit.divergence:.2g}", f"{unit.worst:.2g}", f"{unit.kept_overlap:.1%}", f"{unit.changed:.1%}")
        table.add_row(escape(unit.name), str(unit.weights), *values, bar)
    return table


def sensitivity_lines(found: Sensitivity) -> list[str]:
    """What was measured, and on what."""
    from sievert.calibration.collection import RANDOM

    how = f", scales of activations: {found.calibration}" if found.calibration else ""
    lines = [
        f"{found.variant} in {found.format}{how}; prefill of {found.samples} samples for each line, against the same without quantisation"
    ]
    return [*lines, f"[yellow]{RANDOM}[/]"] if found.random else lines


def group_kept(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """The weights that were kept, by reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in kept.items():
        groups.setdefault(reason, []).append(name)
    return groups


def _where(each: TensorRange) -> str:
    if each.kind != "computed":
        return each.kind
    return f"{each.op} in {each.module}" if each.module else each.op
