"""The tables and pictures of `benchmarks/accuracy.py`."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy_arms import EQUAL_TO, FEWEST, KEEPS, METHODS, TUNED_AT, Options
from benchmarks.accuracy_judge import Row
from benchmarks.stamp import describe_machine
from examples.digits_lvlm.questions import ASKED as KINDS
from sievert.eval_score import Estimate
from sievert.graph_passes.selectors import registry


@dataclass(frozen=True)
class Tables:
    """All that was measured. ``times`` and ``flops`` are prefill's, over those of the unpruned model, by group of arms."""

    rows: Mapping[str, Sequence[Row]]
    trials: Sequence[Row]
    tuned: Mapping[str, Options]
    times: Mapping[str, Estimate]
    flops: Mapping[str, float]
    visual: int
    depth: int
    code: str


def write_tables(tables: Tables, docs: Path) -> list[Path]:
    """``accuracy.md``, ``accuracy.csv`` and two pictures; returns their paths."""
    paths = [docs / name for name in ("accuracy.md", "accuracy.csv", "accuracy.png", "accuracy-time.png")]
    sections = [_head(tables), _keep_section(tables), _kind_section(tables), _equal_section(tables), _layer_section(tables)]
    lines = [line for section in (*sections, _tuning_section(tables)) for line in section]
    paths[0].write_text("\n".join(lines) + "\n")
    _write_csv(tables, paths[1])
    rows = tables.rows["keep"]
    _plot(tables, paths[2], "visual tokens kept, %", lambda row: row.arm.plan.stages[0].keep / tables.visual * 100)
    _plot(tables, paths[3], "prefill time over the unpruned model's", lambda row: tables.times[row.arm.group].value)
    return paths if rows else []


def _head(tables: Tables) -> list[str]:
    return [
        "# What pruning costs the shipped model",
        "",
        *_wrap(
            "Written by `benchmarks/accuracy.py` (`make accuracy`); do not edit. Greedy answers of the ONNX Runtime engines (fp32) to "
            "held-out questions about canvases of digit images that training never saw, five questions a canvas. Differences are paired: "
            "the same questions to both. ± and brackets are 95 % intervals over questions: Bonett and Price's for differences, Wilson's "
            "for shares, the sign test's for times. One attention head of this model was trained to look at what a question is about, "
            "which favours selectors that read attention."
        ),
        "",
        f"Code measured: `{tables.code}`. Machine: {describe_machine()}.",
        "",
    ]


def _keep_section(tables: Tables) -> list[str]:
    rows = tables.rows["keep"]
    layer = next(row.arm.layer for row in rows if row.arm.method == METHODS[0].name)
    columns = ("method", "layer", "keep", "kept", "right, %", "against unpruned, points", "against IWP, points", "share of unpruned")
    more = ("same answer, %", "KL, nats", "FLOPs", "time")
    return [
        f"## Selectors over tokens kept ({rows[0].accuracy.count} questions, {tables.visual} visual tokens, {tables.depth} layers)",
        "",
        *_wrap(
            f"One cut, before layer {layer}; before layer 0 for methods that score embeddings or the vision encoder's attention. *Same "
            "answer*: how often the pruned model says what the unpruned one says. *KL*: from the unpruned to the pruned distribution of "
            "the first answer token. *FLOPs* and *time*: prefill's, over the unpruned model's (16 questions a batch; a shared machine); "
            "what VisionZip and FoPru add to the vision encoder is not in them. FoPru's rows keep whole rows, hence other counts. "
            "*random* is the mean of 3 draws, each the same for all pictures; the range of the draws is in brackets."
        ),
        "",
        "![questions right over tokens kept](accuracy.png)",
        "",
        "![questions right over prefill time](accuracy-time.png)",
        "",
        *_table((*columns, *more), [_keep_cells(row, tables) for row in rows]),
        "",
    ]


def _keep_cells(row: Row, tables: Tables) -> list[str]:
    arm = row.arm
    right = _percent(row.accuracy.value) + _range(row)
    if not arm.method:
        return ["unpruned", "-", "100%", str(tables.visual), right, "-", "-", "1", "-", "-", "1", "1"]
    judged = [_change(row.change), _change(row.against_iwp), f"{row.share.value:.3f}", _plus_minus(row.same, 100, 1)]
    time = tables.times[arm.group]
    price = [f"{tables.flops[arm.group]:.3f}", f"{time.value:.2f} [{time.low:.2f}, {time.high:.2f}]"]
    return [arm.method, arm.layer, arm.keep, arm.kept, right, *judged, _plus_minus(row.divergence, 1, 3), *price]


def _kind_section(tables: Tables) -> list[str]:
    rows = tables.rows["keep"]
    cells = [[row.arm.method or "unpruned", row.arm.keep, *(_plus_minus(kind, 100, 1) for kind in row.by_kind)] for row in rows]
    return ["## By type of question, % right", "", *_table(("method", "keep", *KINDS), cells), ""]


def _equal_section(tables: Tables) -> list[str]:
    rows = [row for row in tables.rows.get("equal", []) if row.arm.method]
    if not rows:
        return []
    cells = [
        [
            *(row.arm.method, row.arm.layer, row.arm.kept, row.arm.plan.positions, _percent(row.accuracy.value) + _range(row)),
            *(_change(row.change), f"{row.share.value:.3f}"),
        ]
        for row in rows
    ]
    return [
        f"## Over layers at equal prefill FLOPs ({rows[0].accuracy.count} questions)",
        "",
        *_wrap(
            f"Every plan may spend what keeping {EQUAL_TO} at the common layer costs, the selector's own arithmetic left out: an earlier "
            "cut may keep more. Plans of several cuts are the papers' own schedules with their position policy, layers scaled to this "
            "depth, shares to this budget."
        ),
        "",
        *_table(("method", "layers", "kept", "positions", "right, %", "against unpruned, points", "share of unpruned"), cells),
        "",
    ]


def _layer_section(tables: Tables) -> list[str]:
    rows = [row for row in tables.rows.get("layer", []) if row.arm.method]
    if not rows:
        return []
    lines = []
    for method, keep in dict.fromkeys((row.arm.method, row.arm.keep) for row in rows):
        cells = {row.arm.layer: row for row in rows if (row.arm.method, row.arm.keep) == (method, keep)}
        values = [_percent(cells[key].accuracy.value) if key in cells else "-" for key in map(str, range(tables.depth))]
        half = max((row.change.high - row.change.low) / 2 for row in cells.values()) * 100
        lines.append([method, keep, *values, f"{half:.1f}"])
    return [
        f"## Over layers at fixed shares ({rows[0].accuracy.count} questions)",
        "",
        "Questions right in per cent; the last column is the widest half of an interval of the paired difference to the unpruned model.",
        "",
        *_table(("method", "keep", *(f"l = {layer}" for layer in range(tables.depth)), "±"), lines),
        "",
    ]


def _tuning_section(tables: Tables) -> list[str]:
    lines = []
    for method in METHODS:
        used = _given(method.selector, tables.tuned[method.name])
        for row in (row for row in tables.trials if row.arm.method == method.name):
            options = row.arm.plan.stages[0].options
            text = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
            mark = "**" if options == used else ""
            lines.append([method.name, f"{mark}{text}{mark}", _percent(row.accuracy.value)])
    count = tables.trials[0].accuracy.count
    return [
        f"## What was tuned ({count} training questions, {TUNED_AT} kept)",
        "",
        *_wrap(
            "Settings of each method that choose differently at this layer, up to four, tried on questions about training digits. The "
            "paper's (the first) is used unless the paired interval of another one against it lies above 0; what is used is bold. Methods "
            "not listed have none."
        ),
        "",
        *_table(("method", "setting", "right, %"), lines),
    ]


def _given(selector: str, options: Options) -> dict[str, object]:
    defaults = registry.options(selector)
    return {key: value for key, value in options.items() if value != defaults[key]}


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 138, break_long_words=False, break_on_hyphens=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def _percent(value: float) -> str:
    return f"{value * 100:.1f}"


def _range(row: Row) -> str:
    low, high = row.spread
    return f" ({_percent(low)} to {_percent(high)})" if high > low else ""


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value * 100:+.1f} [{estimate.low * 100:+.1f}, {estimate.high * 100:+.1f}]"


def _plus_minus(estimate: Estimate, unit: float, digits: int) -> str:
    return f"{estimate.value * unit:.{digits}f} ± {(estimate.high - estimate.low) / 2 * unit:.{digits}f}"


def _write_csv(tables: Tables, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "method", "options", "layers", "keep", "kept", "questions", "measure", "value", "low", "high"])
        for table, row in _all_rows(tables):
            arm = row.arm
            options = ";".join(f"{key}={value}" for stage in arm.plan.stages[:1] for key, value in stage.options.items() if key != "seed")
            place = [table, arm.method or "unpruned", options, arm.layer, arm.keep, arm.kept, row.accuracy.count]
            for name, estimate in _measures(table, row, tables):
                writer.writerow([*place, name, f"{estimate.value:.5f}", f"{estimate.low:.5f}", f"{estimate.high:.5f}"])


def _measures(table: str, row: Row, tables: Tables) -> Iterator[tuple[str, Estimate]]:
    yield from (("right", row.accuracy), ("against_unpruned", row.change), ("share", row.share), ("same_answer", row.same))
    yield "kl_nats", row.divergence
    yield "draws", Estimate(row.accuracy.value, *row.spread, row.accuracy.count)
    if row.against_iwp is not None:
        yield "against_iwp", row.against_iwp
    for kind, estimate in zip(KINDS, row.by_kind, strict=True):
        yield f"right_{kind}", estimate
    if table == "keep" and row.arm.method:
        flops = tables.flops[row.arm.group]
        yield "prefill_flops", Estimate(flops, flops, flops, 1)
        yield "prefill_time", tables.times[row.arm.group]


def _all_rows(tables: Tables) -> Iterator[tuple[str, Row]]:
    for table, rows in (*tables.rows.items(), ("tune", tables.trials)):
        for row in rows:
            yield table, row


def _plot(tables: Tables, path: Path, label: str, place: Callable[[Row], float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows, markers = tables.rows["keep"], "osv^<>DPX*hdp8+x"
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.axhline(rows[0].accuracy.value * 100, color="black", linewidth=1, linestyle="--", label="unpruned")
    for number, method in enumerate(METHODS):
        line = [row for row in rows if row.arm.method == method.name]
        heights = [row.accuracy.value * 100 for row in line]
        low, high = ([abs(getattr(row.accuracy, end) - row.accuracy.value) * 100 for row in line] for end in ("low", "high"))
        colour = plt.get_cmap("tab20")(number % 20)
        style = markers[number % len(markers)]
        across = [place(row) for row in line]
        axes.errorbar(across, heights, [low, high], capsize=3, markersize=5, linewidth=1.2, label=method.name, marker=style, color=colour)
    axes.set(xscale="log", xlabel=label, ylabel="questions right, %")
    if path.stem == "accuracy":
        keeps = (*KEEPS, FEWEST)
        axes.set_xticks([float(keep.rstrip("%")) for keep in keeps], keeps)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
