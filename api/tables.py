"""Records as tables and lines for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from sievert.bundle.manifest import Manifest, Variant
from sievert.bundle.plan import Plan

RANDOM_SCALES = "its scales come from random data: they say nothing about the model in use"

if TYPE_CHECKING:
    from sievert.building import Built
    from sievert.checking import Checked, Outcome
    from sievert.diagnosing import Diagnosis, EngineInfo
    from sievert.listing import Family, SelectorInfo
    from sievert.parity.report import Report
    from sievert.pruning import Made

_COLOURS = {"PASS": "green", "AMBIGUOUS": "yellow", "FAIL": "red", "NOT RUN": "dim"}


def make_table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in ``numbers`` are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def describe_bytes(count: int) -> str:
    """A size in the largest unit of which there is at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def describe_size(folder: Path) -> str:
    """How much a folder's files take."""
    return describe_bytes(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))


def describe_cuts(plan: Plan, visual_tokens: int) -> str:
    """What a plan keeps, in words."""
    if not plan.stages:
        return f"all {visual_tokens} visual tokens"
    cuts = []
    for stage in plan.stages:
        options = "".join(f", {key}={value}" for key, value in stage.options.items())
        cuts.append(f"{stage.keep} of {visual_tokens} from layer {stage.layer} on ({stage.selector} {stage.requested}{options})")
    return "; ".join(cuts) + (f", positions {plan.positions}" if plan.positions != "keep" else "")


def variant_row(name: str, variant: Variant) -> tuple[str, ...]:
    """Name, what it keeps, and its sizes."""
    profile = variant.profile
    batches = str(profile.batch) if profile.batch == profile.decode_batch else f"{profile.batch} / {profile.decode_batch}"
    keeps = escape(describe_cuts(variant.plan, profile.visual_tokens)) + (f"; {profile.images} images" if profile.images > 1 else "")
    text = f"{'up to ' if profile.dynamic_text else ''}{profile.max_text}"
    return name, keeps, batches, text, str(profile.max_new_tokens)


VARIANT_COLUMNS = ("variant", "keeps", "batch", "max text", "max new tokens")
_VARIANT_NUMBERS = ("batch", "max text", "max new tokens")


def place_graph(graph: str) -> int:
    """Where a graph stands in the order of the computation."""
    order = ("vision_encoder", "embed_tokens", "decoder", "prefill", "decode")
    return order.index(graph) if graph in order else len(order)


def made_table(made: Sequence[Made], built: Sequence[Built]) -> Table:
    """Variants that a command made, with the engines it built for them."""
    table = make_table("", *VARIANT_COLUMNS, *(["engines built"] if built else []), numbers=_VARIANT_NUMBERS)
    for each in made:
        engines = ", ".join(one.engine for one in built if one.variant == each.name)
        table.add_row(*variant_row(each.name, each.variant), *([engines] if built else []))
    return table


def built_table(built: Sequence[Built]) -> Table:
    """Engines that a command built, graph by graph."""
    table = make_table("", "variant", "engine", "graph", "seconds", "file", "builder", numbers=("seconds",))
    for each in built:
        for graph, made in sorted(each.entry.graphs.items(), key=lambda item: place_graph(item[0])):
            table.add_row(each.variant, each.engine, graph, f"{made.seconds:.1f}", made.file or made.lowered, escape(made.builder))
    return table


def verdict_table(checked: Checked) -> Table:
    """One line per variant and engine; what ran and what was judged without running are two columns."""
    table = make_table(
        "", "variant", "engine", "engine ran", "its ONNX files", "samples", "same kept sets", "logits off by", numbers=("samples",)
    )
    for outcome in checked.outcomes:
        judged = outcome.files if outcome.files is not None and not outcome.ran.samples else outcome.ran
        files = "the same" if outcome.files is None else coloured(outcome.files.verdict.value)
        ran = coloured(outcome.ran.verdict.value)
        table.add_row(outcome.variant, outcome.engine, ran, files, str(len(judged.samples)), _same_kept(judged), _worst_logits(judged))
    return table


def stage_table(report: Report) -> Table:
    """What was compared, stage by stage in the order the model computes."""
    files = f" (files lowered for {report.lowered_for})" if report.lowered_for else ""
    numbers = ("compared", "max abs", "allowed", "cosine")
    table = make_table(f"{report.variant} on {report.engine}{files}", "stage", "verdict", *numbers, "note", numbers=numbers)
    for stage in report.stages:
        worst = stage.worst
        shown = ("", "", "") if worst is None else (f"{worst.max_abs:.1e}", f"{worst.allowed:.1e}", f"{worst.cosine:.6f}")
        table.add_row(stage.stage, coloured(stage.verdict.value), str(stage.comparisons), *shown, escape(stage.note))
    return table


def verdict_lines(checked: Checked) -> list[str]:
    """Why a verdict is not PASS, and the verdict over all, each on its own line."""
    lines = []
    for outcome in checked.outcomes:
        for report in outcome.reports:
            if report.verdict.value != "PASS":
                what = _describe_report(outcome, report)
                lines.append(f"{coloured(report.verdict.value)} {outcome.variant} on {what}: {escape(report.reason)}")
    reports = [report for outcome in checked.outcomes for report in outcome.reports]
    lines += [line for outcome in checked.outcomes for report in outcome.reports[-1:] for line in effect_lines(report)]
    if any(report.synthetic for report in reports):
        lines.append("[dim]The samples were made up: they prove numerics, and say nothing about answers. Give your own with --data[/]")
    counts = [f"{sum(report.verdict.value == verdict for report in reports)} {verdict}" for verdict in _COLOURS]
    lines.append(f"{coloured(checked.verdict.value)} over all that ran: {', '.join(count for count in counts if count[0] != '0')}")
    return lines


def effect_lines(report: Report) -> list[str]:
    """Of a quantised variant: what pruning did, and what quantisation did on top of it."""
    effects = report.effects
    if effects is None:
        return []
    pruning = "no tokens pruned"
    if effects.kept_changed:
        changed = ", ".join(f"{share:.1%}" for share in effects.kept_changed)
        pruning = (
            f"pruning alone (float32) KL {effects.pruning:.2g} nats, {effects.pruning_changed_answers:.0%} of the answers changed; "
            f"kept tokens that quantisation changed: {changed}"
        )
    lines = [
        f"{report.variant}: {report.dtype} on top of it KL {effects.quantisation:.2g} nats, "
        f"{effects.quantisation_changed_answers:.0%} of the answers changed; {pruning} (medians over {effects.samples} samples)"
    ]
    return [*lines, f"[yellow]{report.variant}: {RANDOM_SCALES}[/]"] if report.random_scales else lines


def family_table(families: Sequence[Family]) -> Table:
    """Model families."""
    table = make_table("Model families", "family", "class", "vision towers", "decoders")
    for each in families:
        table.add_row(each.name, each.model_class, ", ".join(each.towers), ", ".join(each.decoders))
    return table


def selector_table(selectors: Sequence[SelectorInfo]) -> Table:
    """Selectors with their options, and where their papers cut in a decoder of 32 layers."""
    table = make_table("Selectors", "selector", "what it keeps", "cuts (of 32 layers)", "options and defaults", "paper")
    for each in selectors:
        options = " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in each.options.items())
        table.add_row(each.name, each.summary, describe_schedule(each), options, each.paper)
    return table


def describe_schedule(selector: SelectorInfo) -> str:
    """Where a selector cuts by default, and what it leaves there."""
    layers = ", ".join(map(str, selector.layers))
    shares = ", ".join(f"{share * 100:.4g}%" for share in selector.shares)
    positions = f", positions {selector.positions}" if selector.positions != "keep" else ""
    return f"before {layers}" + (f": {shares}" if shares else ": your --keep") + positions


def engine_table(engines: Sequence[EngineInfo]) -> Table:
    """Engines: building, running, and what this project has tried are three things."""
    table = make_table("Engines", "engine", "version", "builds here", "runs here", "tried by this project")
    for each in engines:
        tried = "run" if each.tested else "never run"
        table.add_row(each.name, each.version or "-", _yes(not each.build_fault), _yes(not each.run_fault), tried)
    return table


def diagnosis(found: Diagnosis) -> Iterable[Table]:
    """What this machine has and can do."""
    machine = make_table("Machine", "what", "found")
    memory = f", {found.memory_gib:.1f} GiB memory" if found.memory_gib else ""
    machine.add_row("system", f"{found.system}, {found.cores} cores{memory}")
    machine.add_row("NVIDIA GPU", found.gpu or "none (no driver or no device)")
    machine.add_row("Python", found.python)
    machine.add_row("packages", ", ".join(f"{name} {version}" for name, version in found.packages.items()))
    yield machine
    yield engine_table(found.engines)
    dtypes = make_table("Dtypes", "engine", "what to expect")
    for each in found.engines:
        dtypes.add_row(each.name, "; ".join(each.dtypes))
    yield dtypes


def coloured(verdict: str) -> str:
    """A verdict in its colour."""
    return f"[bold {_COLOURS[verdict]}]{verdict}[/]"


def summarise_source(manifest: Manifest) -> str:
    """The model in one line."""
    source, geometry = manifest.source, manifest.geometry
    return (
        f"{escape(source.model)}: {source.architecture} ({source.vision}, {source.text}), {source.dtype}, {geometry.depth} layers of "
        f"width {geometry.width}, {geometry.heads} heads over {geometry.kv_heads}, {geometry.visual_tokens} visual tokens per image of "
        f"{geometry.image_width}x{geometry.image_height} pixels"
    )


def _describe_report(outcome: Outcome, report: Report) -> str:
    return outcome.engine if report is outcome.ran else f"the ONNX files of {outcome.engine}, run in ONNX Runtime"


def _same_kept(report: Report) -> str:
    sets = [same for sample in report.samples for same in sample.same_kept]
    return f"{sum(sets)} of {len(sets)}" if sets else "-"


def _worst_logits(report: Report) -> str:
    found = [stage.worst for stage in report.stages if stage.worst is not None and "logits" in stage.name]
    if not found:
        return "-"
    worst = max(found, key=lambda difference: difference.severity)
    return f"{worst.max_abs:.1e} of {worst.allowed:.1e} allowed"


def _yes(able: bool) -> str:
    return "[green]yes[/]" if able else "[red]no[/]"
