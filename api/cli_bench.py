"""The command that times: bench."""

from __future__ import annotations

import json
import shlex

from sievert import arguments as a
from sievert import arguments_measure as m
from sievert.cli_ask import require_folder, write_file
from sievert.console import Screen


def bench(
    bundle: a.BundlePath,
    variant: a.SomeVariants = None,
    engine: m.BenchEngines = None,
    against: m.Against = "",
    rounds: m.Rounds = 15,
    tokens: m.BenchTokens = 8,
    profile: m.Profiled = False,
    low_memory: a.LowMemory = False,
    report: a.JsonFile = None,
) -> None:
    """Time a bundle's variants on this machine: vision, prefill, decode, memory, with ratios from interleaved rounds.

    All variants named are loaded at once. Inputs are made up: times do not depend on them.
    """
    from sievert import tables_bench
    from sievert.benching import bench as measure
    from sievert.benching import describe

    if report is not None:
        require_folder(report)
    screen = Screen()
    with screen.progress() as progress:
        found = measure(
            bundle,
            variants=variant or [],
            engines=engine or [],
            against=against,
            rounds=rounds,
            tokens=tokens,
            profile=profile,
            low_memory=low_memory,
            progress=progress,
        )
    if report is not None:
        write_file(report, (json.dumps(describe(found), indent=1) + "\n").encode())
    for table in tables_bench.tables(found):
        screen.show(table)
        screen.show()
    for line in tables_bench.lines(found):
        screen.show(line)
    screen.next(f"eval {shlex.quote(str(bundle))} --data FILE")
