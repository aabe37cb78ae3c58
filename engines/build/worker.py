"""A process that builds one engine: ``python -m sievert.engines.build.worker MODULE GRAPH.onnx OUT.engine FEWEST MOST [CAPABILITY...]``.

A process of its own, because the builder can crash (a segmentation fault was seen on a valid graph), keeps several times the model's size
in memory, and writes to standard error. Standard output carries one JSON object per line: ``{"done": 0.4}`` while building, and last
``{"built": bytes}`` or ``{"failed": message}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, object]], None]


def main(arguments: list[str]) -> int:
    """Build, report on standard output; the exit code is 0 whenever the outcome was reported."""
    module, graph, engine, fewest, most, *capabilities = arguments
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints goes to standard error

    def report(line: dict[str, object]) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    trt = importlib.import_module(module)
    try:
        report({"built": _build(trt, Path(graph), Path(engine), (int(fewest), int(most)), capabilities, report)})
    except _RefusedError as error:
        report({"failed": str(error)})
    return 0


class _RefusedError(Exception):
    """The parser or the builder said no."""


def _build(trt: Any, graph: Path, engine: Path, lengths: tuple[int, int], capabilities: list[str], report: Report) -> int:
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    # TensorRT 11 and RTX are strongly typed whatever this says; TensorRT 10 must be asked.
    flags = (
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else 0
    )
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    # By path, so that the weights beside the graph are found.
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _RefusedError("the parser refused " + ("; ".join(_explain(error) for error in errors) or "the graph without a reason"))
    config = builder.create_builder_config()
    # On by default, and ten bits of mantissa would decide which tokens are kept.
    config.clear_flag(trt.BuilderFlag.TF32)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    _allow_lengths(builder, network, config, *lengths)
    config.progress_monitor = monitor = _make_monitor(trt, report)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise _RefusedError("the builder refused the graph: " + ("; ".join(dict.fromkeys(logger.errors)) or "it gave no reason"))
    with engine.open("wb") as file:
        return file.write(memoryview(plan))


def _allow_lengths(builder: Any, network: Any, config: Any, fewest: int, most: int) -> None:
    """Let the one axis that varies be from ``fewest`` to ``most`` long, and best in the middle; nothing where all sizes are fixed."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    varying = {each.name: tuple(each.shape) for each in inputs if -1 in tuple(each.shape)}
    if not varying:
        return
    profile = builder.create_optimization_profile()
    for name, shape in varying.items():
        profile.set_shape(name, *(tuple(length if size < 0 else size for size in shape) for length in (fewest, (fewest + most) // 2, most)))
    config.add_optimization_profile(profile)


def _explain(error: Any) -> str:
    return f"{error.node_operator()} node {error.node_name()!r}: {error.desc().splitlines()[0]}"


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def _make_monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases are nested: a phase's share of the whole is one step of its parent."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._spans: dict[str, tuple[float, float, int]] = {}
            self._steps: dict[str, int] = {}
            self._done = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            low, high, steps = self._spans.get(parent_phase or "", (0.0, 1.0, 1))
            width = (high - low) / max(steps, 1)
            start = low + width * self._steps.get(parent_phase or "", 0)
            self._spans[phase_name] = (start, min(start + width, 1.0), num_steps)
            self._steps[phase_name] = 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            low, high, steps = self._spans.get(phase_name, (0.0, 1.0, 1))
            self._steps[phase_name] = step + 1
            self._tell(low + (high - low) * (step + 1) / max(steps, 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._tell(self._spans.pop(phase_name, (0.0, 0.0, 1))[1])

        def _tell(self, done: float) -> None:
            # Never backwards, and a line only when it moves a hundredth: the builder calls this from its inner loops.
            if done - self._done >= 0.01:
                self._done = done
                report({"done": round(min(done, 1.0), 3)})

    return Monitor()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
