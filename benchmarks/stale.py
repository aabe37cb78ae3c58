"""Say whether the committed tables still measure the code that stands here: `python benchmarks/stale.py`. It never fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.accuracy import MEASURED
from benchmarks.agreement import MEASURED as AGREEMENT
from benchmarks.families import MEASURED as FAMILIES
from benchmarks.formats import MEASURED as FORMATS
from benchmarks.memory import MEASURED as MEMORY
from benchmarks.performance import MEASURED as PERFORMANCE
from benchmarks.precision import MEASURED as PRECISION
from benchmarks.sequential import MEASURED as SEQUENTIAL
from benchmarks.stamp import ROOT, hash_code
from benchmarks.tuning import MEASURED as TUNING

TABLES = {
    "docs/accuracy.md": (MEASURED, "make accuracy"),
    "docs/agreement.md": (AGREEMENT, "make agreement"),
    "docs/families.md": (FAMILIES, "make families"),
    "docs/formats.md": (FORMATS, "make formats"),
    "docs/memory.md": (MEMORY, "make memory"),
    "docs/performance.md": (PERFORMANCE, "make performance"),
    "docs/precision.md": (PRECISION, "make precision"),
    "docs/sequential.md": (SEQUENTIAL, "make sequential"),
    "docs/tuning.md": (TUNING, "make tuning"),
}


def main() -> None:
    """One line per table."""
    for table, (measured, command) in TABLES.items():
        path = ROOT / table
        found = re.search(r"Code measured: `([0-9a-f]+)`", path.read_text()) if path.exists() else None
        now = hash_code(measured)
        if found is None:
            sys.stdout.write(f"MISSING {table}: run `{command}`\n")
        elif found[1] != now:
            sys.stdout.write(f"STALE {table}: measured {found[1]}, the code is {now} now; run `{command}`\n")
        else:
            sys.stdout.write(f"current {table}: {now}\n")


if __name__ == "__main__":
    main()
