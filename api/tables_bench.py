"""The tables of ``sievert bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sievert.tables import describe_cuts, make_table

if TYPE_CHECKING:
    from sievert.benching import Benchmark, Speed
    from sievert.engines.run.timing import Ratio

_MIB = 2**20


def tables(found: Benchmark) -> list[Table]:
    """For each engine: times, ratios, memory, and, where it was asked for, the parts of prefill."""
    shown = []
    for engine in dict.fromkeys(speed.engine for speed in found.speeds):
        speeds = [speed for speed in found.speeds if speed.engine == engine]
        shown += [_times(engine, speeds), _ratios(engine, speeds), _memory(engine, speeds)]
        if any(speed.parts for speed in speeds):
            shown.append(_parts(engine, speeds))
    return shown


def lines(found: Benchmark) -> list[str]:
    """How the numbers were made, and what to mind."""
    machine = found.machine
    where = f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB" + (f", {machine.gpu}" if machine.gpu else "")
    said = [
        f"[dim]{escape(where)}. Medians of {found.rounds} interleaved rounds, {found.tokens} tokens decoded in each; times are of a whole "
        "batch; ratios with the 95 % interval of the sign test. Bound: prefill with the kept tokens given.[/]"
    ]
    if found.low_memory:
        said.append("With --low-memory: all graphs read the weights of one mapped file")
    said += [f"{engine} was not measured: {escape(reason)}" for engine, reason in found.skipped.items()]
    if found.rounds < 15:
        said.append(f"{found.rounds} rounds are few: the intervals are wide")
    return said


def _times(engine: str, speeds: Sequence[Speed]) -> Table:
    numbers = ("vision", "embed", "prefill", "bound", "first token", "decode", "tokens/s")
    table = make_table(f"{engine}: milliseconds", "variant", "keeps", "prompts", *numbers, numbers=numbers)
    for speed in speeds:
        profile = speed.profile
        sizes = f"{profile.batch} x ({profile.visual_tokens} + {profile.max_text})"
        cuts = escape(describe_cuts(speed.plan, profile.visual_tokens))
        bound = f"{speed.bound_ms:.1f}" if speed.bound_ms else "-"
        times = (f"{ms:.1f}" for ms in (speed.vision_ms, speed.embed_ms, speed.prefill_ms))
        table.add_row(
            _name(speed),
            cuts,
            sizes,
            *times,
            bound,
            f"{speed.first_token_ms:.1f}",
            f"{speed.decode_ms:.2f}",
            f"{speed.tokens_per_s:.1f}",
        )
    return table


def _ratios(engine: str, speeds: Sequence[Speed]) -> Table:
    numbers = ("prefill", "first token", "decode", "price of selecting")
    table = make_table(f"{engine}: time as a share of another's", "variant", "against", *numbers, numbers=numbers)
    for speed in speeds:
        table.add_row(
            _name(speed),
            escape(speed.against) or "-",
            *(_ratio(speed.ratios.get(what)) for what in ("prefill", "first token", "decode", "selecting")),
        )
    return table


def _memory(engine: str, speeds: Sequence[Speed]) -> Table:
    numbers = ("weights on disk", "caches", "process, at most", "of it anonymous")
    table = make_table(f"{engine}: MiB of the host's memory", "variant", *numbers, numbers=numbers)
    for speed in speeds:
        sizes = (speed.weights_bytes, speed.cache_bytes, speed.footprint.peak, speed.footprint.anonymous)
        table.add_row(_name(speed), *(f"{size / _MIB:.1f}" for size in sizes))
    return table


def _parts(engine: str, speeds: Sequence[Speed]) -> Table:
    names = [_name(speed) for speed in speeds]
    table = make_table(f"{engine}: prefill by part, ms", "part", *names, numbers=tuple(names))
    for part in dict.fromkeys(part for speed in speeds for part in speed.parts):
        table.add_row(part, *(f"{speed.parts[part]:.2f}" if part in speed.parts else "-" for speed in speeds))
    table.add_row("all", *(f"{sum(speed.parts.values()):.2f}" for speed in speeds))
    return table


def _name(speed: Speed) -> str:
    return escape(f"{speed.variant} of {speed.bundle}" if speed.bundle else speed.variant)


def _ratio(found: Ratio | None) -> str:
    return "-" if found is None else f"{found.median:.3f} \\[{found.low:.3f}, {found.high:.3f}]"
