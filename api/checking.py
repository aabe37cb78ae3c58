"""Judge a bundle's variants and engines against the PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sievert.bundle.errors import InputError
from sievert.bundle.store import Bundle
from sievert.calibration.questions import read_questions
from sievert.engines.run.images import load_image
from sievert.engines.run.registry import find_runtime
from sievert.parity.check import check as check_unavailable
from sievert.parity.check import check_against
from sievert.parity.load import load_reference
from sievert.parity.report import Report
from sievert.parity.samples import Sample
from sievert.parity.verdict import Verdict, combine, exit_code
from sievert.progress import Progress, Size, silent

ONNX = "onnxruntime"
_MADE_UP = 8


@dataclass(frozen=True)
class Outcome:
    """One engine of one variant. ``ran`` is the engine itself, NOT RUN where this machine cannot execute it.

    ``files`` judges the ONNX files the engine was built from, run in ONNX Runtime; None where ``ran`` has run those very files.
    """

    variant: str
    engine: str
    ran: Report
    files: Report | None

    @property
    def reports(self) -> tuple[Report, ...]:
        """Both, as far as there are both."""
        return (self.ran,) if self.files is None else (self.ran, self.files)


@dataclass(frozen=True)
class Checked:
    """All outcomes, and the verdict over them."""

    path: Path
    outcomes: tuple[Outcome, ...]

    @property
    def verdict(self) -> Verdict:
        """FAIL if one fails, then AMBIGUOUS, then PASS; NOT RUN only if nothing ran at all."""
        return combine([report.verdict for outcome in self.outcomes for report in outcome.reports])

    def exit_code(self, *, strict: bool = False) -> int:
        """0; 1 for FAIL; under ``strict`` 3 for AMBIGUOUS, and where nothing ran at all."""
        if strict and self.verdict is Verdict.NOT_RUN:
            return 3
        return exit_code(self.verdict, strict=strict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        outcomes = [
            {
                "variant": outcome.variant,
                "engine": outcome.engine,
                "ran": outcome.ran.to_json(),
                "files": None if outcome.files is None else outcome.files.to_json(),
            }
            for outcome in self.outcomes
        ]
        return {"bundle": self.path.name, "verdict": self.verdict.value, "outcomes": outcomes}


def check(
    bundle: str | Path,
    *,
    variants: Sequence[str] = (),
    engines: Sequence[str] = (),
    samples: Size = "auto",
    data: str | Path = "",
    model: str | Path = "",
    tokens: Size = "auto",
    template: bool = True,
    low_memory: bool = False,
    progress: Progress = silent,
) -> Checked:
    """Compare engines with the model they came from, stage by stage.

    No ``variants`` means all, no ``engines`` all that were built. ``data`` is a file of lines ``{"image": ..., "prompt": ...}``, image
    paths relative to it; without it samples are made up. ``samples`` ``auto`` is all lines of ``data``, or 8 made-up ones. ``model``
    is where the checkpoint is now, if not where the bundle says. ``tokens`` are fed to both sides after each prompt. ``low_memory`` is how
    ONNX Runtime runs: see :func:`find_runtime`.

    Raises:
        InputError: an engine that does not exist, data or a model that cannot be used.
        VariantError: no such variant, or it has no such engine.
        BundleError: the bundle is not what its manifest says.
        EngineError: an engine failed while it ran.
    """
    for engine in engines:
        find_runtime(engine)
    count = _MADE_UP if samples == "auto" else samples
    if count < 1:
        raise InputError(f"samples={count}: a check needs at least one")
    given = read_samples(Path(data), limit=0 if samples == "auto" else samples) if str(data) else ()
    progress("checking the bundle's files")
    opened = Bundle.open(bundle, verify="full")
    pairs = [
        (name, engine)
        for name in tuple(variants) or tuple(sorted(opened.manifest.variants))
        for engine in tuple(engines) or tuple(sorted(opened.variant(name).engines)) or (ONNX,)
    ]
    if not pairs:
        raise InputError(f"{opened.path.name} has no variants to check: make one with `sievert prune`")
    options: dict[str, Any] = {"samples": given, "count": count, "tokens": tokens, "template": template}
    progress("loading the PyTorch model")
    reference = load_reference(opened.manifest, model=model or None)

    def judge(variant: str, engine: str, lowered_for: str = "") -> Report:
        if find_runtime(engine).unavailable() is not None:
            return check_unavailable(opened, variant, engine, lowered_for=lowered_for)
        what = f"checking {variant} on {engine}" + (f", files for {lowered_for}" if lowered_for else "")
        return check_against(
            reference,
            opened,
            variant,
            engine,
            lowered_for=lowered_for,
            low_memory=low_memory and engine == ONNX,
            progress=lambda part: progress(f"{what}: {part}"),
            **options,
        )

    outcomes = []
    for variant, engine in pairs:
        built = opened.variant(variant).engines.get(engine)
        if built is None and engine != ONNX:
            opened.engine_entry(variant, engine, "prefill")  # says what there is instead
        ran = judge(variant, engine)
        files = judge(variant, ONNX, engine) if built is not None and engine != ONNX else None
        outcomes.append(Outcome(variant, engine, ran, files))
    return Checked(opened.path, tuple(outcomes))


def read_samples(path: Path, *, limit: int = 0) -> tuple[Sample, ...]:
    """The pictures and prompts of a JSON lines file, the first ``limit`` of them (0: all).

    Raises:
        InputError: no such file, a line that is not like :data:`sievert.calibration.questions.LINE`, or no lines at all.
        ImageError: an image that cannot be read.
    """
    asked = read_questions(path, limit=limit).questions
    return tuple(Sample(tuple(load_image(image) for image in each.images), each.prompt) for each in asked)
