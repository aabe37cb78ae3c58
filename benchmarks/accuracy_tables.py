"""The tables and pictures of `benchmarks/accuracy.py`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy_arms import EQUAL_TO, FEWEST, KEEPS, METHODS, TUNED_AT, Arm, Options
from benchmarks.stamp import describe_machine, hash_code
from examples.digits_lvlm.questions import ASKED as KINDS


@dataclass(frozen=True)
class Row:
    """One arm, judged; ``*_half`` are half-widths of 95 % intervals, ``difference`` is to the unpruned model, ``divergence`` in nats."""

    arm: Arm
    accuracy: float
    difference: float
    difference_half: float
    share: float
    same: float
    same_half: float
    divergence: float
    divergence_half: float
    by_kind: tuple[float, ...]


@dataclass(frozen=True)
class Tables:
    """All that was measured. ``times`` and ``flops`` are prefill's, over those of the unpruned model, by arm."""

    rows: Mapping[str, Sequence[Row]]
    trials: Sequence[Row]
    tuned: Mapping[str, Options]
    times: Mapping[str, float]
    flops: Mapping[str, float]
    questions: Mapping[str, int]
    visual: int
    depth: int
    measured: Sequence[str]


def write_tables(tables: Tables, docs: Path) -> list[Path]:
    """``accuracy.md``, ``accuracy.csv`` and two pictures; returns their paths."""
    paths = [docs / name for name in ("accuracy.md", "accuracy.csv", "accuracy.png", "accuracy-time.png")]
    sections = [_head(tables), _keep_section(tables), _equal_section(tables), _layer_section(tables), _tuning_section(tables)]
    paths[0].write_text("\n".join(line for section in sections for line in section) + "\n")
    _write_csv(tables, paths[1])
    _plot(tables, paths[2], paths[3])
    return paths


def _head(tables: Tables) -> list[str]:
    return [
        "# What pruning costs the shipped model",
        "",
        "Written by `benchmarks/accuracy.py` (`make accuracy`); do not edit. Greedy answers of the ONNX Runtime engines (fp32) to held-out",
        "questions about canvases of digit images that training never saw. Differences are paired with the unpruned model's answers to the",
        "same questions; every ± is the half-width of a 95 % interval.",
        "",
        f"Code measured: `{hash_code(tables.measured)}`. Machine: {describe_machine()}.",
        "",
    ]


def _keep_section(tables: Tables) -> list[str]:
    layer = next(row.arm.layer for row in tables.rows["keep"] if row.arm.method.startswith("IWP"))
    head = "| method | layer | keep | kept | right | against unpruned, points | share | same answer | KL, nats | FLOPs | time | "
    return [
        f"## Selectors over tokens kept ({tables.questions['keep']} questions, {tables.visual} visual tokens, {tables.depth} layers)",
        "",
        f"One cut, before layer {layer}; before layer 0 for methods that score embeddings or the vision encoder's attention.",
        "*Same answer*: how often the pruned model says what the unpruned one says. *KL*: from the unpruned to the pruned distribution",
        "of the first answer token. *FLOPs* and *time*: prefill's, over the unpruned model's (16 questions a batch; median of",
        "interleaved runs; a shared machine).",
        "",
        "![questions right over tokens kept](accuracy.png)",
        "",
        "![questions right over prefill time](accuracy-time.png)",
        "",
        head + " | ".join(KINDS) + " |",
        "|---" * (11 + len(KINDS)) + "|",
        *(_keep_line(row, tables) for row in tables.rows["keep"]),
        "",
    ]


def _keep_line(row: Row, tables: Tables) -> str:
    arm = row.arm
    if not arm.method:
        cells = ["unpruned", "-", "100%", str(tables.visual), _percent(row.accuracy), "-", "1.000", "-", "-"]
    else:
        same, divergence = f"{row.same * 100:.1f} ± {row.same_half * 100:.1f}", f"{row.divergence:.3f} ± {row.divergence_half:.3f}"
        cells = [arm.method, arm.layer, arm.keep, arm.kept, _percent(row.accuracy), _change(row), f"{row.share:.3f}", same, divergence]
    cells += [f"{tables.flops[arm.name]:.3f}", f"{tables.times[arm.name]:.2f}", *(_percent(value) for value in row.by_kind)]
    return "| " + " | ".join(cells) + " |"


def _equal_section(tables: Tables) -> list[str]:
    rows = tables.rows.get("equal", [])
    if not rows:
        return []
    return [
        f"## Over layers at equal prefill FLOPs ({tables.questions['layer']} questions)",
        "",
        f"Every plan may spend what keeping {EQUAL_TO} at the common layer costs, the selector's own arithmetic left out: an earlier",
        "cut may keep more. Plans of several cuts are the papers' own schedules, layers scaled to this depth, shares to this budget.",
        "",
        "| method | layers | kept | right | against unpruned, points | share |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.arm.method} | {row.arm.layer} | {row.arm.kept} | {_percent(row.accuracy)} | {_change(row)} | {row.share:.3f} |"
            for row in rows
        ),
        "",
    ]


def _layer_section(tables: Tables) -> list[str]:
    rows = tables.rows.get("layer", [])
    if not rows:
        return []
    lines = [
        f"## Over layers at fixed shares ({tables.questions['layer']} questions)",
        "",
        "Questions right in per cent, with the half-width of the paired interval against the unpruned model.",
        "",
        "| method | keep | " + " | ".join(f"l = {layer}" for layer in range(tables.depth)) + " |",
        "|---" * (2 + tables.depth) + "|",
    ]
    for method, keep in dict.fromkeys((row.arm.method, row.arm.keep) for row in rows):
        cells = {row.arm.layer: row for row in rows if (row.arm.method, row.arm.keep) == (method, keep)}
        values = [
            f"{cells[key].accuracy * 100:.1f} ± {cells[key].difference_half * 100:.1f}" if key in cells else "-"
            for key in map(str, range(tables.depth))
        ]
        lines.append(f"| {method} | {keep} | " + " | ".join(values) + " |")
    return [*lines, ""]


def _tuning_section(tables: Tables) -> list[str]:
    lines = [
        f"## What was tuned ({tables.questions['tune']} training questions, {TUNED_AT} kept)",
        "",
        "Up to four settings of each method were tried on questions about training digits; the best (bold, the first of equals) is used.",
        "",
        "| method | setting | right |",
        "|---|---|---|",
    ]
    for method in METHODS:
        for row in (row for row in tables.trials if row.arm.method == method.name):
            options = row.arm.plan.stages[0].options
            text = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
            mark = "**" if dict(tables.tuned[method.name]) == options else ""
            lines.append(f"| {method.name} | {mark}{text}{mark} | {_percent(row.accuracy)} |")
    return lines


def _percent(value: float) -> str:
    return f"{value * 100:.1f}"


def _change(row: Row) -> str:
    return f"{row.difference * 100:+.1f} ± {row.difference_half * 100:.1f}"


def _write_csv(tables: Tables, path: Path) -> None:
    measures = ("accuracy", "difference", "difference_half", "share", "same", "same_half", "divergence", "divergence_half")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "method", "layers", "keep", "kept", *measures, "prefill_flops", "prefill_time", *KINDS])
        for table, row in _all_rows(tables):
            arm = row.arm
            price = [f"{of[arm.name]:.4f}" if table == "keep" else "" for of in (tables.flops, tables.times)]
            numbers = [f"{getattr(row, name):.4f}" for name in measures]
            kinds = [f"{value:.4f}" for value in row.by_kind]
            writer.writerow([table, arm.method or "unpruned", arm.layer, arm.keep, arm.kept, *numbers, *price, *kinds])


def _all_rows(tables: Tables) -> Iterator[tuple[str, Row]]:
    for table, rows in tables.rows.items():
        for row in rows:
            yield table, row
    for row in tables.trials:
        yield "tune", row


def _plot(tables: Tables, over_tokens: Path, over_time: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = tables.rows["keep"]
    markers = "osv^<>DPX*hdp8+"
    for path, label, place in (
        (over_tokens, "visual tokens kept, %", lambda row: sum(stage.keep for stage in row.arm.plan.stages) / tables.visual * 100),
        (over_time, "prefill time over the unpruned model's", lambda row: tables.times[row.arm.name]),
    ):
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        axes.axhline(rows[0].accuracy * 100, color="black", linewidth=1, linestyle="--", label="unpruned")
        for number, method in enumerate(METHODS):
            line = [row for row in rows if row.arm.method == method.name]
            marker, colour = markers[number % len(markers)], plt.get_cmap("tab20")(number % 20)
            heights, halves = [row.accuracy * 100 for row in line], [row.difference_half * 100 for row in line]
            across = [place(row) for row in line]
            axes.errorbar(across, heights, halves, capsize=3, markersize=5, linewidth=1.2, label=method.name, marker=marker, color=colour)
        axes.set(xscale="log", xlabel=label, ylabel="questions right, %")
        if path == over_tokens:
            keeps = (*KEEPS, FEWEST)
            axes.set_xticks([float(keep.rstrip("%")) for keep in keeps], keeps)
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=110)
        plt.close(figure)
