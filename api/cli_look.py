"""Commands that only look: inspect, list, doctor."""

from __future__ import annotations

import shlex

from rich.markup import escape

from sievert import arguments as a
from sievert import arguments_make as m
from sievert.console import Screen


def inspect(
    bundle: a.BundlePath,
    verify: a.Verify = False,
    tensors: a.Tensors = False,
    plan: a.PlanOf = "",
    sample_prompt: m.SamplePrompts = None,
) -> None:
    """Show what is in a bundle: variants, graphs, plans, caches, sizes, engines, lint, history."""
    from sievert.inspecting import inspect as look
    from sievert.tables_inspect import inspection

    screen = Screen()
    if plan:
        from sievert.bundle.store import Bundle
        from sievert.plan_file import write_plan

        screen.write(write_plan(Bundle.open(bundle, verify="full" if verify else "size").variant(plan).plan), end="")
        return
    with screen.progress() as progress:
        found = look(bundle, verify=verify, sample_prompts=sample_prompt or [], progress=progress)
    for each in inspection(found, tensors=tensors):
        screen.show(each)
        screen.show()
    if found.verified:
        screen.show("Every file is what the manifest says (SHA-256).")
    else:
        screen.show("Sizes and small files are what the manifest says; to hash every file: --verify")
    screen.next(f"check {shlex.quote(str(bundle))}")


def list_choices() -> None:
    """Show what there is to choose from: model families, selectors, engines."""
    from sievert import tables
    from sievert.listing import list_engines, list_families, list_selectors

    screen = Screen()
    screen.show(tables.family_table(list_families()))
    screen.show()
    screen.show(tables.selector_table(list_selectors()))
    screen.show()
    screen.show(tables.engine_table(list_engines()))
    screen.next("doctor", "export MODEL OUT --selector NAME --option KEY=VALUE --engine NAME")


def doctor() -> None:
    """Say which engines, dtypes and devices this machine can build and run."""
    from sievert import tables
    from sievert.diagnosing import doctor as diagnose

    screen = Screen()
    found = diagnose()
    for each in tables.diagnosis(found):
        screen.show(each)
        screen.show()
    for engine in found.engines:
        for what, fault in (("build", engine.build_fault), ("run", engine.run_fault)):
            if fault:
                screen.show(f"[bold]{engine.name}[/] cannot {what}: {escape(fault)}")
    able = [engine.name for engine in found.engines if not engine.run_fault]
    if able:
        screen.next(f"export MODEL OUT --engine {able[0]}")
    else:
        screen.show("No engine runs here: install one, for example with [bold]pip install 'sievert\\[cpu]'[/]")
