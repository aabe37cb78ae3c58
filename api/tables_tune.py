"""What ``sievert tune`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sievert.calibration.scores import INTERVALS
from sievert.tables import describe_cuts, make_table

if TYPE_CHECKING:
    from sievert.calibration.scores import Estimate
    from sievert.tuning import Tuned


def front_table(tuned: Tuned) -> Table:
    """The front by cost, with the measured times of the finalists; the chosen plan is marked."""
    task, result = tuned.task, tuned.result
    numbers = ("FLOPs", "prefill time", "first token", f"{task.split.metric} of unpruned")
    table = make_table(f"{len(task.split.tuning)} questions on {task.settings.runtime.name}", "", "keeps", *numbers, numbers=numbers)
    times = {timing.plan.model_dump_json(): timing for timing in result.timings}
    chosen = result.found.chosen
    rows = {trial.plan.model_dump_json(): trial for trial in (*result.found.front, *([chosen] if chosen else []))}
    for key, trial in sorted(rows.items(), key=lambda row: row[1].cost):
        timing = times.get(key)
        spent = ("", "") if timing is None else (_ratio(timing.prefill), _ratio(timing.first_token))
        mark = "chosen" if chosen is not None and trial.plan == chosen.plan else ""
        keeps = escape(describe_cuts(trial.plan, task.profile.visual_tokens))
        table.add_row(mark, keeps, f"{trial.cost * 100:.1f} %", *spent, _share(trial.score))
    return table


def tuning_lines(tuned: Tuned) -> list[str]:
    """The verdict, and what to mind."""
    task, result = tuned.task, tuned.result
    target, metric = f"{task.goal.target * 100:g} %", task.split.metric
    chosen, confirmed = result.found.chosen, result.confirmed
    lines = []
    if chosen is None or confirmed is None:
        best = max((trial.score.value for trial in result.found.front), default=0.0)
        budget = "" if task.goal.budget >= 1 else f" within {task.goal.budget * 100:g} % of the FLOPs"
        lines.append(
            f"[bold red]No plan{budget} reaches {target}:[/] the best of the front has {best * 100:.1f} %. Allow more selectors, layers, "
            "keeps or FLOPs, or a lower target"
        )
    else:
        kept = "[bold green]Confirmed[/]" if confirmed.low >= task.goal.target else "[bold yellow]Not confirmed[/]"
        lines.append(f"{kept} on {confirmed.count} questions that the search never saw: {metric} {_share(confirmed)}, target {target}")
        if confirmed.low < task.goal.target:
            lines.append(_explain(confirmed, target, task.goal.target, strict=task.goal.strict))
        timing = next((timing for timing in result.timings if timing.plan == chosen.plan), None)
        if timing is not None and timing.prefill.high >= 1:
            lines.append("[yellow]Its prefill is not surely faster than the unpruned one on this machine[/]")
    if task.split.left_out:
        lines.append(f"{task.split.left_out} lines were left out: like another one, or without an answer that {metric} needs")
    lines.append(
        f"[dim]FLOPs and times are shares of the unpruned model's. {INTERVALS}. The table's scores flatter: they chose the plan.[/]"
    )
    return lines


def _explain(confirmed: Estimate, target: str, aim: float, *, strict: bool) -> str:
    ends = f"the interval goes down to {confirmed.low * 100:.1f} %"
    if confirmed.value < aim:
        said = f"On these questions the plan is below {target}, and {ends}: do not count on the target"
    else:
        said = f"The plan reached {target} there too, but {ends}: these questions do not show that it keeps the target; more would"
    return said + (". Under --strict it is not accepted" if strict else "")


def _share(found: Estimate) -> str:
    return f"{found.value * 100:.1f} % \\[{found.low * 100:.1f}, {found.high * 100:.1f}]"


def _ratio(found: Estimate) -> str:
    return f"{found.value:.2f} \\[{found.low:.2f}, {found.high:.2f}]"
