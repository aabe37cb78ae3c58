"""The tables of ``sievert eval`` and ``sievert compare-selectors``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sievert.bundle.names import FULL
from sievert.tables import describe_cuts, make_table

if TYPE_CHECKING:
    from sievert.comparing import Comparison
    from sievert.eval_score import Estimate
    from sievert.evaluating import Evaluation


def evaluation_table(found: Evaluation) -> Table:
    """One line per variant: right answers, the paired difference to the unpruned one, and agreement with it."""
    numbers = ("right", "accuracy", "against full, points", "answers as full")
    table = make_table(f"{found.questions} questions on {found.engine}", "variant", "keeps", *numbers, numbers=numbers)
    for score in found.scores:
        right = f"{score.right} of {score.answerable}" if score.answerable else "-"
        accuracy = f"{score.right / score.answerable * 100:.1f} %" if score.answerable else "-"
        keeps = escape(describe_cuts(found.plans[score.variant], found.visual_tokens))
        table.add_row(score.variant, keeps, right, accuracy, _change(score.change), _share(score.agreement))
    return table


def evaluation_lines(found: Evaluation) -> list[str]:
    """How the numbers were made, and what to mind."""
    from sievert.eval_report import COMPARED
    from sievert.eval_score import INTERVALS

    lines = [f"[dim]{COMPARED.capitalize()}. {INTERVALS}.[/]"]
    if found.questions < 100:
        lines.append(
            f"{found.questions} questions are few: the intervals are wide, so do not choose between variants by these numbers alone"
        )
    if without := found.questions - found.scores[0].answerable:
        lines.append(f"{without} of {found.questions} questions have no accepted answer: they count for agreement only")
    if cut := [f"{score.cut_short} of {score.variant}" for score in found.scores if score.cut_short]:
        lines.append(f"Answers that reached {found.max_new_tokens} tokens and stop there: {', '.join(cut)}")
    if all(score.variant == FULL for score in found.scores):
        lines.append("There is no pruned variant to compare: make one with [cyan]sievert prune[/]")
    return lines


def comparison_table(found: Comparison) -> Table:
    """One line per selector, the unpruned model first, and those that could not be tried last with the reason."""
    table = make_table("", "selector", "keeps", "answer", "as unpruned")
    table.add_row("(unpruned)", f"all {found.visual_tokens} visual tokens", escape(found.answer), "")
    for each in found.compared:
        keeps = escape(describe_cuts(each.plan, found.visual_tokens))
        table.add_row(each.selector, keeps, escape(each.answer), "yes" if each.answer == found.answer else "no")
    for name, reason in found.refused.items():
        table.add_row(name, f"[yellow]not tried:[/] {escape(reason)}", "", "")
    return table


def _change(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value * 100:+.1f} \\[{found.low * 100:+.1f}, {found.high * 100:+.1f}]"


def _share(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value * 100:.1f} % \\[{found.low * 100:.1f}, {found.high * 100:.1f}]"
