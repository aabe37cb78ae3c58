"""Run the engine padded and batched, the reference alone and unpadded, and compare them stage by stage."""

from __future__ import annotations

import itertools
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from sievert.bundle.errors import ProfileError
from sievert.bundle.manifest import Variant
from sievert.bundle.pictures import PIXELS
from sievert.bundle.store import Bundle
from sievert.engines.run.generate import generate
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch, Prompter, load_processor
from sievert.engines.run.registry import find_runtime
from sievert.parity.compare import compare, usable_kept
from sievert.parity.effects import separate_effects, summarise_effects
from sievert.parity.load import describe_other_weights, load_reference
from sievert.parity.observe import observe_prefill, observe_tokens, open_pipeline
from sievert.parity.quantised import judge_weights
from sievert.parity.record import ReferenceRecord, kept_name
from sievert.parity.reference import Reference, ReferenceInputs
from sievert.parity.report import Report, SampleReport, explain, summarise
from sievert.parity.samples import Sample, synthetic_samples
from sievert.parity.scales import judge_scales
from sievert.parity.tolerances import Tolerances, tolerances_for
from sievert.parity.verdict import Verdict, combine

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


def check(
    bundle: Bundle,
    variant: str,
    engine: str = "onnxruntime",
    *,
    samples: Sequence[Sample] = (),
    count: int = 8,
    model: str | Path | None = None,
    tokens: int | Literal["auto"] = "auto",
    template: bool = True,
    lowered_for: str = "",
    progress: Progress = lambda _: None,
) -> Report:
    """Judge a variant on an engine against the model it came from.

    Without ``samples``, ``count`` synthetic ones are made. ``model`` is where the checkpoint is now, if not where the manifest says.
    ``tokens`` are fed to both sides after each prompt; ``auto`` is 8, or what the variant has room for. ``lowered_for`` runs, with
    ``engine`` onnxruntime, the ONNX files that were handed to that engine's builder. An engine this machine cannot run is NOT RUN.

    Raises:
        InputError: samples, prompts or the model that cannot be used.
        BundleError: a bundle that is not what its manifest says, or a variant or engine it does not have.
        EngineError: the engine failed while it ran.
    """
    bundle.variant(variant)
    reason = find_runtime(engine).unavailable()
    if reason is not None:
        return _report(bundle, variant, engine, lowered_for, Verdict.NOT_RUN, reason)
    progress("loading the PyTorch model")
    reference = load_reference(bundle.manifest, model=model)
    return check_against(
        reference,
        bundle,
        variant,
        engine,
        samples=samples,
        count=count,
        tokens=tokens,
        template=template,
        lowered_for=lowered_for,
        progress=progress,
    )


def check_against(
    reference: Reference,
    bundle: Bundle,
    variant: str,
    engine: str = "onnxruntime",
    *,
    samples: Sequence[Sample] = (),
    count: int = 8,
    tokens: int | Literal["auto"] = "auto",
    template: bool = True,
    lowered_for: str = "",
    low_memory: bool = False,
    progress: Progress = lambda _: None,
) -> Report:
    """:func:`check` with a reference that is loaded already: several variants or engines of one model share it. Raises as that does.

    ``low_memory``: see :func:`find_runtime`.
    """
    profile = bundle.variant(variant).profile
    steps = min(8, profile.max_new_tokens) if tokens == "auto" else tokens
    if not 1 <= steps <= profile.max_new_tokens:
        raise ProfileError(f"tokens={steps}, but variant {variant!r} has room for 1..{profile.max_new_tokens} new tokens")
    prompter = Prompter(bundle.path, bundle.manifest.geometry, profile)
    synthetic = not samples
    if synthetic:
        if count < 1:
            raise ProfileError(f"count={count}: a check needs at least one sample")
        template = load_processor(bundle.path).chat_template is not None
        samples = synthetic_samples(prompter, count, template=template)
    progress(f"loading {variant} on {engine}")
    pipeline, exposed = open_pipeline(bundle, variant, engine, lowered_for=lowered_for, low_memory=low_memory)
    reports: list[SampleReport] = []
    precision = bundle.variant(variant).precision
    with pipeline:
        for group in _batched(samples, profile.batch):
            progress(f"samples {len(reports) + 1}..{len(reports) + len(group)} of {len(samples)}")
            reports += _check_group(reference, bundle, pipeline, prompter, group, steps, template=template, exposed=exposed)
    if precision is not None:
        progress("reading the quantised weights")
        tolerances = _tolerances(bundle, bundle.variant(variant))
        own = [*judge_weights(bundle, precision, tolerances.weights)]
        if precision.calibration and pipeline.runtime.reads_onnx:
            progress("measuring what is quantised")
            batches = (_prepare(prompter, group, template=template) for group in _batched(samples, profile.batch))
            own += judge_scales(bundle, variant, batches, tolerances.scales, lowered_for=lowered_for)
        reports[0] = replace(reports[0], results=(*own, *reports[0].results))
        reports[0] = replace(reports[0], verdict=combine([result.verdict for result in reports[0].results]))
    verdict, reason, stage = explain([report.results for report in reports])
    if verdict is Verdict.FAIL and (otherwise := describe_other_weights(bundle.manifest, reference.model)):
        reason += f". The checkpoint was changed since the bundle was made, or is another one: {otherwise}"
    logger.info("%s on %s: %s %s", variant, engine, verdict.value, reason)
    return _report(
        bundle,
        variant,
        engine,
        lowered_for,
        verdict,
        reason,
        first_failure=stage,
        samples=tuple(reports),
        synthetic=synthetic,
        forced_tokens=steps,
    )


def _prepare(prompter: Prompter, group: Sequence[Sample], *, template: bool) -> PromptBatch:
    return prompter.prepare([sample.image for sample in group], [sample.prompt for sample in group], template=template)


def _batched(samples: Sequence[Sample], size: int) -> list[tuple[Sample, ...]]:
    return [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]


def _check_group(
    reference: Reference,
    bundle: Bundle,
    pipeline: Pipeline,
    prompter: Prompter,
    group: Sequence[Sample],
    steps: int,
    *,
    template: bool,
    exposed: bool,
) -> list[SampleReport]:
    """One batch: the engine reads it, the reference follows what it kept, and both are fed the reference's tokens."""
    batch = _prepare(prompter, group, template=template)
    variant = pipeline.variant
    plan, tolerances = variant.plan, _tolerances(bundle, variant)
    seen = observe_prefill(pipeline, batch, exposed=exposed)
    references: list[ReferenceRecord] = []
    given: list[ReferenceInputs] = []
    for row, record in enumerate(seen.records()):
        processed, film = batch.processed[row], pipeline.geometry.film
        pixels = PIXELS if film is None else film.pixels
        inputs = ReferenceInputs(batch.unpadded(row), processed[pixels], pipeline.profile.images, processed, pixels)
        kept = usable_kept(record, [stage.keep for stage in plan.stages], np.sort(batch.visual_index[row]))
        references.append(reference.record(inputs, plan, kept=kept, tokens=steps))
        given.append(inputs)
    observe_tokens(pipeline, seen, [record.tokens for record in references])
    records = seen.records()
    results = [compare(ours, theirs, tolerances) for ours, theirs in zip(records, references, strict=True)]
    free = generate(pipeline, prompter.tokenizer, batch, max_new_tokens=steps)
    stops = bundle.manifest.geometry.eos_token_ids
    effects = [
        separate_effects(reference, inputs, plan, record, answer.tokens, steps=steps, stops=stops)
        for inputs, record, answer in zip(given, records, free, strict=True)
        if variant.precision is not None
    ]
    return [
        SampleReport(
            prompt=sample.prompt,
            tokens=batch.lengths[row],
            kept=tuple(stage.keep for stage in plan.stages),
            same_kept=tuple(
                np.array_equal(records[row].arrays[kept_name(stage)], trace.own_kept) for stage, trace in enumerate(references[row].traces)
            ),
            reference_text=_text(prompter, references[row].tokens, bundle.manifest.geometry.eos_token_ids),
            engine_text=free[row].text,
            verdict=combine([result.verdict for result in results[row]]),
            results=results[row],
            effects=effects[row] if effects else None,
        )
        for row, sample in enumerate(group)
    ]


def _tolerances(bundle: Bundle, variant: Variant) -> Tolerances:
    """Of the variant's formats."""
    precision = variant.precision
    return tolerances_for(bundle.manifest.source.dtype) if precision is None else tolerances_for(precision.format, precision.caches)


def _text(prompter: Prompter, tokens: Sequence[int], stops: Sequence[int]) -> str:
    """The answer up to the first stop token."""
    said = list(itertools.takewhile(lambda token: token not in stops, tokens))
    return str(prompter.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _report(
    bundle: Bundle,
    variant: str,
    engine: str,
    lowered_for: str,
    verdict: Verdict,
    reason: str,
    *,
    first_failure: str | None = None,
    samples: tuple[SampleReport, ...] = (),
    synthetic: bool = False,
    forced_tokens: int = 0,
) -> Report:
    packages = ("numpy", "torch", "transformers", "sievert")
    precision = bundle.variant(variant).precision
    return Report(
        bundle=bundle.path.name,
        variant=variant,
        engine=engine,
        lowered_for=lowered_for,
        dtype=bundle.manifest.source.dtype if precision is None else precision.label,
        verdict=verdict,
        reason=reason,
        first_failure=first_failure,
        stages=summarise([sample.results for sample in samples]),
        samples=samples,
        synthetic=synthetic,
        forced_tokens=forced_tokens,
        tolerances=_tolerances(bundle, bundle.variant(variant)),
        effects=summarise_effects([sample.effects for sample in samples if sample.effects], samples[0].kept if samples else ()),
        random_scales=precision is not None and precision.random,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            engine: find_runtime(engine).version() or "not installed",
        },
    )
