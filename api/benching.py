"""How fast a bundle's variants are on this machine, and what pruning gains: all of them in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sievert.bench_arms import Arm, Machine, Reference, choose_arms, describe_machine, find_reference, load_bound, time_parts
from sievert.bundle.errors import EngineError, EngineUnavailableError, InputError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.alone import Alone
from sievert.engines.run.base import ModelFile, Runtime
from sievert.engines.run.files import find_model
from sievert.engines.run.footprint import Footprint, measure_footprint
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.timing import FEWEST_ROUNDS, Ratio, compare, take_turns
from sievert.progress import Progress, silent

_PROMPT = ("vision_encoder", "embed_tokens", "prefill")


@dataclass(frozen=True)
class Speed:
    """One variant on one engine. Times are medians over the rounds, in milliseconds, of a whole batch.

    ``bound_ms`` is prefill with the kept tokens given (0 where nothing is cut, of a quantised variant, or the engine reads no ONNX);
    ``decode_ms`` one token of every slot; ``first_token_ms`` vision, embedding and prefill together; ``tokens_per_s`` of all slots
    together. ``ratios``: ``prefill``, ``decode`` and ``first token`` over the variant ``against``, and ``selecting``, prefill over
    its bound. ``parts``: what each part of
    prefill takes by the engine's own profiler, where that was asked for.
    """

    variant: str
    engine: str
    bundle: str
    against: str
    plan: Plan
    profile: Profile
    vision_ms: float
    embed_ms: float
    prefill_ms: float
    bound_ms: float
    decode_ms: float
    first_token_ms: float
    tokens_per_s: float
    ratios: Mapping[str, Ratio]
    weights_bytes: int
    cache_bytes: int
    footprint: Footprint
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """What was measured. ``skipped``: engines of the bundle that cannot run here, with the reason."""

    path: Path
    machine: Machine
    rounds: int
    tokens: int
    low_memory: bool
    speeds: tuple[Speed, ...]
    skipped: Mapping[str, str]


def bench(
    bundle: str | Path,
    *,
    variants: Sequence[str] = (),
    engines: Sequence[str] = (),
    against: str = "",
    rounds: int = 15,
    tokens: int = 8,
    profile: bool = False,
    low_memory: bool = False,
    progress: Progress = silent,
) -> Benchmark:
    """Time ``variants`` (all, if none is named) on ``engines`` (all that the bundle has and that run here), with made-up inputs.

    Ratios are over ``against``: a variant's name (``full`` where there is one and nothing is said), or another bundle of the same model,
    whose variants of the same names are then measured too. Every round runs every graph once, and decode ``tokens`` times, in another
    order; all variants are loaded at once, prefill and decode one after the other. Memory is what a process of its own takes. ``profile``
    also attributes prefill to its parts, with ONNX Runtime's profiler. ``low_memory``: see :func:`find_runtime`; no other engine is taken.

    Raises:
        InputError: too few rounds or tokens, an unknown engine, ``against`` a bundle of another model.
        VariantError: no such variant, or it has no such engine.
        EngineUnavailableError: an engine that was asked for cannot run here, or none of the bundle's can.
        EngineError: the engine failed, or ``profile`` was asked of one that has no profiler here.
        BundleError: a bundle is not what its manifest says.
    """
    if rounds < FEWEST_ROUNDS:
        raise InputError(f"rounds={rounds}: at least {FEWEST_ROUNDS} are needed for an interval of the median; 15 or more are better")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: decode is timed by at least one token a round")
    progress("reading the bundle")
    opened = Bundle.open(bundle)
    reference = find_reference(opened, against)
    chosen, skipped = _choose_engines(opened, variants, engines or (["onnxruntime"] if low_memory else []))
    if profile and (other := [name for name in chosen if name != "onnxruntime"]) and engines:
        raise EngineError(f"no profile of {', '.join(other)}: only onnxruntime's profiler is read; leave --profile or that engine out")
    speeds: list[Speed] = []
    arms = choose_arms(opened, variants, reference)
    for engine in chosen:
        runtime = find_runtime(engine, low_memory=low_memory)
        speeds += _measure(opened, arms, reference, runtime, rounds, tokens, profile and engine == "onnxruntime", low_memory, progress)
    return Benchmark(opened.path, describe_machine(), rounds, tokens, low_memory, tuple(speeds), skipped)


def describe(found: Benchmark) -> dict[str, Any]:
    """All numbers as plain values."""
    return {
        "bundle": found.path.name,
        "machine": asdict(found.machine),
        "rounds": found.rounds,
        "tokens": found.tokens,
        "low_memory": found.low_memory,
        "skipped": dict(found.skipped),
        "variants": [
            {**asdict(speed), "plan": speed.plan.model_dump(mode="json"), "profile": speed.profile.model_dump(mode="json")}
            for speed in found.speeds
        ],
    }


def _choose_engines(bundle: Bundle, variants: Sequence[str], asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The engines to measure, and why others are not."""
    if asked:
        for name in asked:
            if reason := find_runtime(name).unavailable():
                raise EngineUnavailableError(reason)
        return list(dict.fromkeys(asked)), {}
    held = [set(bundle.variant(name).engines) for name in (variants or sorted(bundle.manifest.variants))]
    every = [name for name in set[str]().union(*held) if all(name in each for each in held)]
    faults = {name: find_runtime(name).unavailable() or "" for name in ("onnxruntime", "onnxruntime-cuda", *sorted(every))}
    able = [name for name, fault in faults.items() if not fault]
    if not able:
        raise EngineUnavailableError("; ".join(dict.fromkeys(faults.values())))
    return able, {name: fault for name, fault in faults.items() if fault and name in every}


def _measure(
    bundle: Bundle,
    arms: Sequence[Arm],
    reference: Reference | None,
    runtime: Runtime,
    rounds: int,
    tokens: int,
    profile: bool,
    low_memory: bool,
    progress: Progress,
) -> list[Speed]:
    """Time all arms on one engine."""
    prompt = _time_prompt(arms, runtime, rounds, progress)
    decode = _time_decode(arms, runtime, rounds, tokens, progress)
    speeds = []
    for arm in arms:
        progress(f"memory on {runtime.name}: {arm.name}")
        footprint = measure_footprint(arm.bundle.path, arm.variant, runtime.name, low_memory=low_memory)
        parts = {}
        if profile:
            progress(f"profile on {runtime.name}: {arm.name}")
            parts = time_parts(arm, find_model(arm.bundle, arm.variant, "prefill", runtime, ""), low_memory=low_memory)
        times = {**prompt[arm], "decode": decode[arm]}
        other = arm.against(reference, arms)
        own = other is None or other == arm
        rival = {} if other is None else {**prompt[other], "decode": decode[other]}
        ratios = {} if own else {what: compare(times[what], rival[what]) for what in ("prefill", "decode", "first token")}
        if "bound" in times:
            ratios["selecting"] = compare(times["prefill"], times["bound"])
        speeds.append(_describe_arm(bundle, arm, "" if other is None or own else other.name, runtime.name, times, ratios, footprint, parts))
    return speeds


def _time_prompt(arms: Sequence[Arm], runtime: Runtime, rounds: int, progress: Progress) -> dict[Arm, dict[str, list[float]]]:
    """Seconds of vision, embedding, prefill, its bound, and of the first token, in each round; equal graphs are timed once."""
    graphs: dict[str, Alone] = {}
    keys: dict[Arm, dict[str, str]] = {arm: {} for arm in arms}
    try:
        for arm in arms:
            progress(f"loading for {runtime.name}: {arm.name}")
            files = {graph: find_model(arm.bundle, arm.variant, graph, runtime, "") for graph in _PROMPT}
            bound = load_bound(arm, runtime)
            if bound is not None:
                files["bound"] = bound
            for graph, file in files.items():
                keys[arm][graph] = _load(graphs, arm, file, runtime)
        turns = {key: graph.run for key, graph in graphs.items()}
        seconds = take_turns(turns, rounds, tell=lambda number: progress(f"prefill on {runtime.name}: round {number + 1} of {rounds}"))
    finally:
        for loaded in graphs.values():
            loaded.close()
    times = {}
    for arm in arms:
        mine = {graph: seconds[key] for graph, key in keys[arm].items()}
        mine["vision_encoder"] = [arm.pictures * each for each in mine["vision_encoder"]]
        mine["first token"] = [sum(each) for each in zip(*(mine[graph] for graph in _PROMPT), strict=True)]
        times[arm] = mine
    return times


def _time_decode(arms: Sequence[Arm], runtime: Runtime, rounds: int, tokens: int, progress: Progress) -> dict[Arm, list[float]]:
    """Seconds of one decode step in each round, the mean of ``tokens`` of them."""
    graphs: dict[Arm, Alone] = {}
    try:
        for arm in arms:
            progress(f"loading for {runtime.name}: decode of {arm.name}")
            graphs[arm] = Alone(
                runtime.load(find_model(arm.bundle, arm.variant, "decode", runtime, "")), arm.bundle.manifest.geometry, arm.profile
            )
        turns = {arm.name: _steps(graph, tokens) for arm, graph in graphs.items()}
        seconds = take_turns(turns, rounds, tell=lambda number: progress(f"decode on {runtime.name}: round {number + 1} of {rounds}"))
    finally:
        for graph in graphs.values():
            graph.close()
    return {arm: [each / tokens for each in seconds[arm.name]] for arm in arms}


def _steps(graph: Alone, tokens: int) -> Callable[[], None]:
    def run() -> None:
        for step in range(tokens):
            graph.run(step)

    return run


def _load(graphs: dict[str, Alone], arm: Arm, file: ModelFile, runtime: Runtime) -> str:
    """Load a graph unless an equal one over the same weights is there; its key."""
    weights = arm.bundle.manifest.files[arm.bundle.manifest.weights_file].sha256
    key = f"{file.sha256} {weights}"
    if key not in graphs:
        graphs[key] = Alone(runtime.load(file), arm.bundle.manifest.geometry, arm.profile)
    return key


def _describe_arm(
    bundle: Bundle,
    arm: Arm,
    against: str,
    engine: str,
    times: Mapping[str, Sequence[float]],
    ratios: Mapping[str, Ratio],
    footprint: Footprint,
    parts: Mapping[str, float],
) -> Speed:
    medians = {what: statistics.median(each) * 1e3 for what, each in times.items()}
    return Speed(
        variant=arm.variant,
        engine=engine,
        bundle="" if arm.bundle.path == bundle.path else arm.bundle.path.name,
        against=against,
        plan=arm.bundle.variant(arm.variant).plan,
        profile=arm.profile,
        vision_ms=medians["vision_encoder"],
        embed_ms=medians["embed_tokens"],
        prefill_ms=medians["prefill"],
        bound_ms=medians.get("bound", 0.0),
        decode_ms=medians["decode"],
        first_token_ms=medians["first token"],
        tokens_per_s=1e3 * arm.profile.decode_batch / medians["decode"],
        ratios=ratios,
        weights_bytes=arm.bundle.manifest.files[arm.bundle.manifest.weights_file].bytes,
        cache_bytes=arm.cache_bytes,
        footprint=footprint,
        parts=parts,
    )
