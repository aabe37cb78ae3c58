"""The command that prunes decoders of other tools: prune-onnx."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.markup import escape

from sievert import arguments as a
from sievert import arguments_make as m
from sievert.console import Screen

if TYPE_CHECKING:
    from rich.table import Table

    from sievert.bundle.pruned import PrunedDecoder


def prune_onnx(
    prefill: m.Prefill,
    out: m.OutFolder,
    visual_tokens: m.VisualTokens,
    decode: m.Decode = "",
    layer: a.Layers = None,
    keep: a.Keeps = None,
    selector: a.Selectors = None,
    option: a.SelectorOptions = None,
    positions: a.Positions = None,
    plan: a.PlanFile = "",
    max_text: m.MaxText = None,
    max_new_tokens: a.MaxNewTokens = 128,
    batch: a.Batch = 1,
    decode_batch: a.DecodeBatch = None,
    images: m.Images = None,
    grid: m.Grid = "",
    target: m.TargetOption = m.TargetName.onnxruntime,
    check: m.Check = False,
    force: a.Force = False,
) -> None:
    """Prune a decoder that another tool exported: standard ONNX operators, any length.

    --layer and --keep may be repeated together, for several cuts. Decode is made from PREFILL.
    """
    from sievert import tables
    from sievert.cli_make import read_cuts
    from sievert.pruning_onnx import parse_grid
    from sievert.pruning_onnx import prune_onnx as prune

    cuts = read_cuts(plan, layer, keep, selector, option, positions)
    screen = Screen()
    with screen.progress() as progress:
        made = prune(
            prefill,
            out,
            visual_tokens=visual_tokens,
            decode=decode,
            cuts=cuts,
            positions=positions.value if positions else "auto",
            plan=plan,
            max_text=128 if max_text is None else max_text,
            max_new_tokens=max_new_tokens,
            batch=batch,
            decode_batch="auto" if decode_batch is None else decode_batch,
            images=1 if images is None else images,
            grid=parse_grid(grid) if grid else None,
            target=target.value,
            check=check,
            force=force,
            progress=progress,
        )
    screen.show(f"Made [bold]{escape(shlex.quote(out))}[/]: {tables.describe_size(made.path)}")
    screen.show(_table(made.record))
    screen.show(f"Matched: {escape('; '.join(made.record.source.matched))}")
    if made.check is None:
        screen.show("Not compared with the source: --check does so, where every token is kept.")
    else:
        screen.show(
            f"Where every token is kept, {made.check.rows} rows of logits differ from the source's by {made.check.worst:.2g} at most "
            f"({made.check.allowed:.2g} allowed): PASS"
        )


def _table(record: PrunedDecoder) -> Table:
    """The graphs, what they take and give beside caches, and what is kept."""
    from sievert import tables

    table = tables.make_table(tables.describe_cuts(record.plan, record.profile.visual_tokens), "graph", "file", "takes", "gives")
    for name, entry in record.graphs.items():
        takes, gives = (
            ", ".join(f"{spec.name}{list(spec.shape)}" for spec in specs if not spec.name.startswith(("past_key_values.", "present.")))
            for specs in (entry.inputs, entry.outputs)
        )
        table.add_row(name, entry.file, escape(takes), escape(gives))
    return table
