"""What a check found, for machines (JSON) and for people (a table). Nothing here prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sievert.parity.effects import Effects, EffectsSummary
from sievert.parity.tolerances import Tolerances
from sievert.parity.verdict import Difference, StageResult, Verdict, combine, exit_code, first_failure


@dataclass(frozen=True)
class SampleReport:
    """One prompt. ``kept`` counts visual tokens per cut; ``same_kept``: the engine kept what the reference would have.

    ``reference_text`` and ``engine_text`` are both free-running greedy answers, shown and not judged. ``effects``: of quantised variants.
    """

    prompt: str
    tokens: int
    kept: tuple[int, ...]
    same_kept: tuple[bool, ...]
    reference_text: str
    engine_text: str
    verdict: Verdict
    results: tuple[StageResult, ...]
    effects: Effects | None = None


@dataclass(frozen=True)
class StageSummary:
    """A stage over all samples. ``worst`` is the difference closest to, or furthest beyond, what is allowed, in sample ``sample``."""

    stage: str
    verdict: Verdict
    comparisons: int
    worst: Difference | None
    name: str
    sample: int
    note: str


@dataclass(frozen=True)
class Report:
    """The verdict on one variant on one engine, and everything it was computed from.

    ``reason`` says in one sentence why the verdict is not PASS; ``lowered_for`` names the engine whose lowered ONNX files were run.
    ``dtype`` is what the tolerances are of: the model's, or a quantised variant's format. ``random_scales``: from random data.
    """

    bundle: str
    variant: str
    engine: str
    lowered_for: str
    dtype: str
    verdict: Verdict
    reason: str
    first_failure: str | None
    stages: tuple[StageSummary, ...]
    samples: tuple[SampleReport, ...]
    synthetic: bool
    forced_tokens: int
    tolerances: Tolerances
    versions: Mapping[str, str]
    effects: EffectsSummary | None = None
    random_scales: bool = False

    def exit_code(self, *, strict: bool = False) -> int:
        """0 for PASS and NOT RUN, 1 for FAIL; AMBIGUOUS is 0, or 3 under ``strict``."""
        return exit_code(self.verdict, strict=strict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; what is not a finite number becomes a string."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def table(self) -> Table:
        """One line per stage, for rich to draw."""
        files = f" (files lowered for {self.lowered_for})" if self.lowered_for else ""
        table = Table(title=f"{self.variant} on {self.engine}{files}: {self.verdict.value}", title_justify="left")
        for column in ("stage", "verdict", "compared", "max abs", "allowed", "cosine", "note"):
            numeric = column in {"compared", "max abs", "allowed", "cosine"}
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column != "note")
        for stage in self.stages:
            worst = stage.worst
            numbers = ("", "", "") if worst is None else (f"{worst.max_abs:.2e}", f"{worst.allowed:.2e}", f"{worst.cosine:.6f}")
            table.add_row(stage.stage, _coloured(stage.verdict), str(stage.comparisons), *numbers, stage.note)
        return table


def summarise(samples: Sequence[Sequence[StageResult]]) -> tuple[StageSummary, ...]:
    """Results of several samples by stage, in the order the model computes."""
    labels = list(dict.fromkeys(result.stage for results in samples for result in results))
    return tuple(
        _summarise_stage(label, [(number, r) for number, results in enumerate(samples) for r in results if r.stage == label])
        for label in labels
    )


def explain(samples: Sequence[Sequence[StageResult]]) -> tuple[Verdict, str, str | None]:
    """The verdict over all samples, why it is not PASS, and the first failing stage in the order the model computes."""
    verdict = combine([result.verdict for results in samples for result in results])
    if not samples or not all(samples):
        return Verdict.FAIL, "nothing was compared", None
    order = {stage.stage: place for place, stage in enumerate(summarise(samples))}
    failures = [(order[found.stage], number, found) for number, results in enumerate(samples) if (found := first_failure(results))]
    if failures:
        _, number, found = min(failures, key=lambda failure: failure[:2])
        return verdict, f"first failing stage: {found.stage} ({found.name}, sample {number}): {describe(found)}", found.stage
    ties = [(number, r) for number, results in enumerate(samples) for r in results if r.verdict is Verdict.AMBIGUOUS]
    if ties:
        return verdict, f"{len(ties)} near ties, the first at {ties[0][1].stage} (sample {ties[0][0]}): {ties[0][1].note}", None
    return verdict, "", None


def describe(result: StageResult) -> str:
    """What one comparison found, in a few words."""
    if result.difference is None or result.note:
        return result.note
    found = result.difference
    return f"max abs {found.max_abs:.3g} > {found.allowed:.3g} allowed, at {list(found.worst)}, cosine {found.cosine:.6f}"


def _summarise_stage(label: str, results: Sequence[tuple[int, StageResult]]) -> StageSummary:
    verdict = combine([result.verdict for _, result in results])

    def badness(numbered: tuple[int, StageResult]) -> tuple[bool, float]:
        result = numbered[1]
        return result.verdict is verdict, math.inf if result.difference is None else result.difference.severity

    number, worst = max(results, key=badness)
    measured = [(n, r) for n, r in results if r.difference is not None]
    shown = max(measured, key=lambda item: item[1].difference.severity if item[1].difference else 0)[1] if measured else worst
    several = "" if verdict is Verdict.PASS else f" (sample {number})"
    note = worst.note or (shown.name if len({result.name for _, result in results}) > 1 else "")
    return StageSummary(label, verdict, len(results), shown.difference, worst.name, number, note + several)


def _coloured(verdict: Verdict) -> str:
    colour = {Verdict.PASS: "green", Verdict.AMBIGUOUS: "yellow", Verdict.FAIL: "red", Verdict.NOT_RUN: "dim"}[verdict]
    return f"[{colour}]{verdict.value}[/]"


def _plain(value: Any) -> Any:
    """Dataclasses, verdicts and tuples as JSON has them."""
    if isinstance(value, Verdict):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
