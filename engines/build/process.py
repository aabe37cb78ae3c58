"""Run the builder in a process of its own and follow what it reports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from sievert.bundle.errors import EngineError

_TAIL = 2000


def build_engine(
    module: str,
    graph: Path,
    engine: Path,
    capabilities: tuple[str, ...] = (),
    *,
    lengths: tuple[int, int] = (0, 0),
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Build ``graph`` (an ONNX file, weights beside it) into the file ``engine`` with the library ``module``.

    ``lengths`` are the fewest and the most tokens of a prompt, for a graph with an axis that varies with them; others do not look at it.
    ``progress`` gets the share done, 0 to 1. The process ends with this call, also when it is interrupted.

    Raises:
        EngineError: the parser or builder refused the graph, or the process died; the message holds its words.
    """
    # -P: a file named like a standard module in the user's folder must not be imported.
    command = [
        sys.executable,
        "-P",
        "-m",
        "sievert.engines.build.worker",
        module,
        str(graph),
        str(engine),
        *map(str, lengths),
        *capabilities,
    ]
    outcome: dict[str, object] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=noise, text=True, encoding="utf-8")
        try:
            for line in process.stdout or ():
                outcome = json.loads(line)
                if isinstance(done := outcome.get("done"), float):
                    progress(done)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if "built" in outcome and code == 0:
            return
        noise.seek(0)
        words = noise.read()[-_TAIL:].strip()
    if "failed" in outcome:
        raise EngineError(f"{module}: {graph.name}: {outcome['failed']}")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    advice = "the builder crashed, or the machine ran out of memory; building takes several times the size of the weights"
    raise EngineError(f"{module}: {graph.name}: the building process {how} without a word ({advice}). Its last output: {words or 'none'}")
