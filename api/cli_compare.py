"""Commands that say what pruning costs: eval on many questions, compare-selectors on one."""

from __future__ import annotations

import shlex
from io import BytesIO
from pathlib import Path

from sievert import arguments as a
from sievert.cli_ask import require_png, write_file
from sievert.console import Screen
from sievert.progress import Size


def evaluate(
    bundle: a.BundlePath,
    data: a.Questions,
    variant: a.OtherVariants = None,
    engine: a.Engine = "onnxruntime",
    low_memory: a.LowMemory = False,
    max_new_tokens: a.SharedLimit = None,
    limit: a.FirstLines = None,
    raw_prompt: a.RawPrompt = False,
    out: a.AnswersFolder = "",
) -> None:
    """Let every variant answer your own questions, and compare it with the unpruned one.

    Answers are kept as they come: the same command goes on where it was interrupted.
    """
    from sievert import tables_compare
    from sievert.eval_report import ANSWERS, REPORT
    from sievert.evaluating import evaluate as ask_all

    screen = Screen()
    with screen.progress() as progress, screen.counter("answers") as count:
        found = ask_all(
            bundle,
            data,
            variants=variant or [],
            engine=engine,
            low_memory=low_memory,
            max_new_tokens="auto" if max_new_tokens is None else max_new_tokens,
            out=out,
            samples="auto" if limit is None else limit,
            template=not raw_prompt,
            progress=progress,
            on_count=count,
        )
    screen.show(tables_compare.evaluation_table(found))
    for line in tables_compare.evaluation_lines(found):
        screen.show(line)
    place = Path(out) if out else found.out
    screen.show(f"Every answer is in {shlex.quote(str(place / ANSWERS))}, every number in {shlex.quote(str(place / REPORT))}")
    screen.next(f'compare-selectors {shlex.quote(str(bundle))} --image IMAGE --prompt "QUESTION"')


def compare_selectors(
    bundle: a.BundlePath,
    image: a.ImageFiles,
    prompt: a.OnePrompt,
    selectors: a.SomeSelectors = "",
    keep: a.OneKeep = "auto",
    layer: a.OneLayer = "auto",
    max_new_tokens: a.Limit = None,
    raw_prompt: a.RawPrompt = False,
    out: a.PictureFile = Path("compare.png"),
) -> None:
    """Ask one question with every selector, and draw what each of them keeps. The bundle stays as it is."""
    from sievert.comparing import compare_selectors as compare
    from sievert.drawing import draw_comparison
    from sievert.tables_compare import comparison_table

    require_png("--out", out)
    screen = Screen()
    with screen.progress() as progress:
        found = compare(
            bundle,
            image,
            prompt,
            selectors=_names(selectors),
            keep=keep,
            layer=_layer(layer),
            max_new_tokens="auto" if max_new_tokens is None else max_new_tokens,
            template=not raw_prompt,
            progress=progress,
        )
    drawn = BytesIO()
    draw_comparison(found).save(drawn, "PNG")
    write_file(out, drawn.getvalue())
    screen.show(comparison_table(found))
    screen.show(f"What each one kept is drawn in {shlex.quote(str(out))}. One question says little: to judge, use many")
    screen.next(f"eval {shlex.quote(str(bundle))} --data FILE", f"prune {shlex.quote(str(bundle))} --selector NAME")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _layer(text: str) -> Size:
    from sievert.bundle.errors import PlanError

    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise PlanError(f"--layer {text!r} must be a whole number or auto") from None
