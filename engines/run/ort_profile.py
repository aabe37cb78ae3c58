"""What each operator of a graph takes, from ONNX Runtime's own profiler.

Source of the format: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.engines.run.alone import Alone
from sievert.engines.run.base import ModelFile
from sievert.engines.run.ort import OnnxRuntime

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """An operator as it was executed, fused ones as one, and what it took in each run."""

    node: str
    op_type: str
    runs_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median over the runs."""
        return statistics.median(self.runs_ms)


def profile_graph(runtime: OnnxRuntime, model: ModelFile, geometry: Geometry, profile: Profile, *, runs: int) -> tuple[NodeTime, ...]:
    """Run a graph ``runs`` times after one that warms up, in the order in which it executes its operators.

    Raises:
        EngineUnavailableError, EngineError: the runtime cannot run here, or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = replace(runtime, profile=str(Path(folder) / "profile")).load(model)
        graph = Alone(session, geometry, profile)
        try:
            for _ in range(runs + 1):
                graph.run()
        finally:
            graph.close()
            path = session.end_profile()
        return read_profile(path)


def read_profile(path: Path) -> tuple[NodeTime, ...]:
    """The operators of a profile file; of every one the first run, which warms up, does not count."""
    times, kinds = defaultdict[str, list[float]](list), dict[str, str]()
    for event in json.loads(path.read_text()):
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            times[name.removesuffix(_KERNEL)].append(event["dur"] / 1e3)  # microseconds
            kinds[name.removesuffix(_KERNEL)] = event["args"].get("op_name", "")
    return tuple(NodeTime(name, kinds[name], tuple(each[1:] or each)) for name, each in times.items())
