"""The command that prunes decoders of other tools: prune-onnx."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from sievert import arguments as a
from sievert.arguments import SIZES
from sievert.console import Screen

if TYPE_CHECKING:
    from rich.table import Table

    from sievert.bundle.pruned import PrunedDecoder


class TargetName(StrEnum):
    """What the graphs are written for."""

    onnxruntime = "onnxruntime"
    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


MaxText = Annotated[int, Option("--max-text", metavar="N", help="Tokens of a prompt beside the image's.", rich_help_panel=SIZES)]
Images = Annotated[int, Option("--images", metavar="N", help="Images in each prompt.", rich_help_panel=SIZES)]
Prefill = Annotated[Path, Argument(metavar="PREFILL", help="A decoder as ONNX, of any length.", show_default=False)]
Decode = Annotated[
    str, Argument(metavar="[DECODE]", help="The tool's own decode graph: only checked to be the same decoder.", show_default=False)
]
OutFolder = Annotated[str, Option("--out", metavar="DIR", help="Folder to make.", show_default=False)]
VisualTokens = Annotated[
    int, Option("--visual-tokens", metavar="N", min=1, help="Visual tokens of one image.", rich_help_panel=SIZES, show_default=False)
]
Grid = Annotated[
    str,
    Option("--grid", metavar="RxC", help="Rows and columns of an image's patches, if you know.", rich_help_panel=SIZES, show_default=False),
]
TargetOption = Annotated[TargetName, Option("--target", help="What the graphs are written for.")]
Check = Annotated[bool, Option("--check", help="Compare with PREFILL in ONNX Runtime, where every token is kept.")]


def prune_onnx(
    prefill: Prefill,
    out: OutFolder,
    visual_tokens: VisualTokens,
    decode: Decode = "",
    layer: a.Layers = None,
    keep: a.Keeps = None,
    selector: a.Selectors = None,
    option: a.SelectorOptions = None,
    positions: a.Positions = None,
    plan: a.PlanFile = "",
    max_text: MaxText = 128,
    max_new_tokens: a.MaxNewTokens = 128,
    batch: a.Batch = 1,
    decode_batch: a.DecodeBatch = None,
    images: Images = 1,
    grid: Grid = "",
    target: TargetOption = TargetName.onnxruntime,
    check: Check = False,
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
            max_text=max_text,
            max_new_tokens=max_new_tokens,
            batch=batch,
            decode_batch="auto" if decode_batch is None else decode_batch,
            images=images,
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
