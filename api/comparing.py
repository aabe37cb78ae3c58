"""One question to every selector: what each keeps of the picture, and what the model says then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sievert.bundle.errors import GraphError, PlanError, PromptError
from sievert.bundle.names import FULL
from sievert.bundle.plan import Plan
from sievert.bundle.store import Bundle
from sievert.engines.run.dtypes import Array
from sievert.engines.run.pipeline import Features
from sievert.engines.run.prompt import Pictures, PromptBatch, Prompter
from sievert.engines.run.sampling import Sampling
from sievert.planning import Cut, choose_layer, make_plan
from sievert.progress import Progress, Size, silent
from sievert.running import Answer, Watched, answer_batch, choose_limit, show_pictures

if TYPE_CHECKING:
    from sievert.graph_passes.prune import Preview

_GREEDY = Sampling()


@dataclass(frozen=True)
class Compared:
    """What one selector left and what was answered then. ``kept`` are the numbers of the patches left after the last cut."""

    selector: str
    plan: Plan
    answer: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """All selectors on one question. ``answer`` is the unpruned model's; ``refused`` says why a selector could not be tried."""

    prompt: str
    answer: str
    visual_tokens: int
    grid: tuple[int, int] | None
    pictures: tuple[Image.Image, ...]
    compared: tuple[Compared, ...]
    refused: Mapping[str, str]


def compare_selectors(
    bundle: str | Path,
    image: Pictures,
    prompt: str,
    *,
    selectors: Sequence[str] = (),
    keep: str = "auto",
    layer: Size = "auto",
    max_new_tokens: Size = "auto",
    template: bool = True,
    progress: Progress = silent,
) -> Comparison:
    """Ask one question of the unpruned model and of one variant for each of ``selectors`` (all, if none is named), greedily.

    The variants are made in memory and run in ONNX Runtime; the bundle stays as it is. ``keep`` and ``layer`` mean what they mean in
    :class:`Cut`, except that ``keep`` alone is one cut for every selector, so that all have one budget: those whose papers cut several
    times make it a seventh of the depth down. A selector that cannot be tried is listed with the reason. Lengths are those of the
    variant ``full``, for one prompt at a time; ``image`` is a list where ``full`` takes several.

    Raises:
        PlanError: a selector that does not exist, or none that can be tried; the message says why.
        ImageError, PromptError, ProfileError: what was given cannot be used.
        VariantError: there is no variant ``full``.
        EngineUnavailableError: ONNX Runtime cannot run on this machine.
        BundleError: the bundle is not what its manifest says.
    """
    from sievert.graph_passes.prune import load_dynamic, preview_variant
    from sievert.graph_passes.selectors.registry import SELECTORS, options

    names = tuple(dict.fromkeys(selectors)) or tuple(SELECTORS)
    for name in names:
        options(name)  # refuses what does not exist
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    geometry = opened.manifest.geometry
    profile = opened.variant(FULL).profile.model_copy(update={"batch": 1, "decode_batch": 1})
    prompter = Prompter(opened.path, geometry, profile)
    limit = choose_limit(opened, [FULL], max_new_tokens)
    asked = _Asked(prompter, prompter.prepare([image], [prompt], template=template), prompt, limit)
    plans, refused = _make_plans(opened, names, keep, layer, profile.images)
    dynamic = load_dynamic(opened)

    def try_plan(name: str, plan: Plan) -> Answer:
        progress(f"trying {name}: making its graphs")
        preview = preview_variant(opened, dynamic, name=f"preview-{name}", plan=plan, profile=profile)
        progress(f"trying {name}: answering")
        return asked.answer(preview)

    unpruned = try_plan("no pruning", Plan())
    compared = []
    for name, plan in plans.items():
        try:
            answer = try_plan(name, plan)
        except (PlanError, GraphError, PromptError) as error:
            refused[name] = str(error)
            continue
        compared.append(Compared(name, plan, answer.text.strip(), answer.kept[-1]))
    if not compared:
        raise PlanError(_explain(refused))
    return Comparison(
        prompt=prompt,
        answer=unpruned.text.strip(),
        visual_tokens=profile.visual_tokens,
        grid=geometry.grid,
        pictures=show_pictures(opened.path, geometry, asked.batch),
        compared=tuple(compared),
        refused=refused,
    )


def _make_plans(bundle: Bundle, names: Sequence[str], keep: str, layer: Size, images: int) -> tuple[dict[str, Plan], dict[str, str]]:
    """A plan for each selector that can make one, and why the others cannot.

    Raises:
        PlanError: none can.
    """
    from sievert.graph_passes.selectors.registry import find_schedule

    geometry = bundle.manifest.geometry
    plans: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    for name in names:
        schedule = find_schedule(name, {})
        once = choose_layer(schedule, geometry) if layer == "auto" and keep != "auto" and schedule.shares else layer
        try:
            plans[name] = make_plan(geometry, [Cut(keep=keep, layer=once, selector=name)], images=images)
        except PlanError as error:
            refused[name] = str(error)
    if not plans:
        raise PlanError(_explain(refused))
    return plans, refused


def _explain(refused: Mapping[str, str]) -> str:
    """Why there is nothing to compare; a reason that all share is given once."""
    if len(set(refused.values())) == 1:
        return next(iter(refused.values()))
    return "none of these selectors can be tried: " + "; ".join(f"{name}: {reason}" for name, reason in refused.items())


class _Asked:
    """The question, and the features of its picture by the vision encoder that made them."""

    def __init__(self, prompter: Prompter, batch: PromptBatch, prompt: str, limit: int) -> None:
        self.batch = batch
        self._prompter, self._prompt, self._limit = prompter, prompt, limit
        self._seen: dict[bytes, Features] = {}

    def answer(self, preview: Preview) -> Answer:
        encoder = preview.graphs["vision_encoder"]
        with Watched(preview.bundle, preview.name, graphs=preview.graphs) as pipeline:
            features = self._seen.get(encoder) or self._look(pipeline, encoder, self.batch.pixel_values)
            (answer,) = answer_batch(
                pipeline, self._prompter, self.batch, features, [self._prompt], 0, self._limit, _GREEDY, lambda _, __: None
            )
        return answer

    def _look(self, pipeline: Watched, encoder: bytes, pixels: Array) -> Features:
        self._seen[encoder] = pipeline.encode(pixels)
        return self._seen[encoder]
