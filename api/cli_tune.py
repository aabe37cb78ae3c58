"""The command that finds the right pruning budget."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from sievert import arguments as a
from sievert import arguments_measure as m
from sievert.console import Screen

MISSED = 1


def tune(
    bundle: a.BundlePath,
    data: a.Questions,
    target: m.Target = "99%",
    metric: m.Metric = m.MetricName.auto,
    selector: m.TunedSelectors = None,
    layer: m.TunedLayers = None,
    keep: m.TunedKeeps = None,
    no_options: m.NoOptions = False,
    budget: m.Budget = "100%",
    split: m.SplitShare = "50%",
    questions: m.TuningQuestions = None,
    confirm_questions: m.ConfirmQuestions = None,
    seed: m.SplitSeed = 0,
    strict: m.StrictTarget = False,
    engine: a.Engine = "onnxruntime",
    max_new_tokens: m.TunedLimit = None,
    raw_prompt: a.RawPrompt = False,
    out: m.TuneOut = "",
    force: m.ForceResults = False,
) -> None:
    """Find the fastest plan that keeps the answers to your own questions, and confirm it on questions that the search never saw.

    The bundle stays as it is. The same command goes on where it was interrupted, with the same result.
    """
    from sievert import tables_tune as tables
    from sievert.calibration.tune_place import working_folder
    from sievert.tuning import tune as search

    screen = Screen()
    try:
        with screen.progress() as progress:
            found = search(
                bundle,
                data,
                target=target,
                metric=metric.value,
                selectors=selector or [],
                layers=layer or [],
                keeps=[part for text in keep or [] for part in text.split(",") if part.strip()],
                options=not no_options,
                budget=budget,
                split=split,
                questions="auto" if questions is None else questions,
                confirm_questions="auto" if confirm_questions is None else confirm_questions,
                seed=seed,
                strict=strict,
                engine=engine,
                max_new_tokens="auto" if max_new_tokens is None else max_new_tokens,
                out=out,
                template=not raw_prompt,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt as stopped:
        place = Path(out) if out else Path(bundle).resolve().with_name(f"{Path(bundle).resolve().name}-tune")
        if (folder := working_folder(place)).exists():
            stopped.add_note(f"Answers and decisions are kept in {folder}: the same command goes on from there")
        raise
    screen.show(tables.front_table(found))
    for line in tables.tuning_lines(found):
        screen.show(line)
    place = Path(out) if out else found.out
    screen.show(f"The front is in {shlex.quote(str(place / 'front.csv'))}, all that was tried in {shlex.quote(str(place / 'tune.json'))}")
    if not (place / "front.png").exists():
        screen.show('No picture was drawn, as matplotlib is missing: pip install "sievert\\[plot]"')
    if found.plan is None:
        raise typer.Exit(MISSED)
    screen.next(f"prune {shlex.quote(str(bundle))} --plan {shlex.quote(str(place / 'plan.yaml'))}")
