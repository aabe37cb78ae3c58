"""Variants that score in the vision encoder, end to end: pruned by the api, answered by the pipeline, shown and exposed like any other."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import sievert as package
from sievert.bundle.errors import EngineError, PlanError
from sievert.bundle.store import Bundle
from sievert.engines.run.generate import generate
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import Features, Pipeline
from sievert.engines.run.prompt import PromptBatch, Prompter
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.targets import TARGETS
from sievert.planning import Cut
from tests.api.conftest import sievert

Array = NDArray[Any]
QUESTIONS = ("which digit is red ?", "what is the colour ?")
CUTS = {
    "ranked": Cut(selector="fopru", keep="5"),
    "rows": Cut(selector="fopru", keep="50%", options={"strategy": "row", "queries": "class_token"}),
    "zipped": Cut(selector="visionzip", keep="22%"),
}


@dataclass(frozen=True)
class Made:
    """A bundle with a variant of two rows for each of :data:`CUTS`, and what was asked."""

    path: Path
    prompter: Prompter
    batch: PromptBatch

    @contextlib.contextmanager
    def open(self, name: str, **options: Any) -> Iterator[Pipeline]:
        with Pipeline(Bundle.open(self.path), name, OnnxRuntime(threads=1), **options) as pipeline:
            yield pipeline


@pytest.fixture(scope="module")
def made(shared: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = Path(shutil.copytree(shared, tmp_path_factory.mktemp("scored") / "bundle"))
    for name, cut in CUTS.items():
        package.prune(path, cuts=[cut], name=name, batch=2)
    bundle = Bundle.open(path)
    prompter = Prompter(path, bundle.manifest.geometry, bundle.variant("ranked").profile)
    noise = np.random.default_rng(1).standard_normal((3, 32, 32)).astype(np.float32)
    batch = prompter.prepare([picture], QUESTIONS)
    batch.pixel_values[1] = noise  # another picture in the second row
    return Made(path, prompter, batch)


def best(scores: Array, keep: int) -> Array:
    return np.argsort(-scores, axis=1, kind="stable")[:, :keep]


@pytest.mark.parametrize(("name", "keep"), [("ranked", 5), ("rows", 8), ("zipped", 4)])
def test_the_best_scored_tokens_are_kept(made: Made, name: str, keep: int) -> None:
    model = ir.load(Bundle.open(made.path).file(Bundle.open(made.path).graph("prefill", variant=name).file))
    shown = to_bytes(expose(model, ["stage.0.scores", "stage.0.order"]))
    with made.open(name, graphs={"prefill": shown}) as pipeline:
        features = pipeline.encode(made.batch.pixel_values)
        result = pipeline.prefill(made.batch, features)
        said = generate(pipeline, made.prompter.tokenizer, made.batch, max_new_tokens=4, features=features)
    scores = features.values["visual_scores"]
    assert scores.shape == (2, 16) and scores.dtype == np.float32 and np.abs(scores[0] - scores[1]).max() > 1e-3
    order = best(scores, keep)
    if name == "rows":
        sums = scores.reshape(2, 4, 4).sum(2)
        order = (best(sums, keep // 4)[..., None] * 4 + np.arange(4)).reshape(2, keep)
        np.testing.assert_allclose(result.extra["stage.0.scores"], np.repeat(sums, 4, axis=1), rtol=1e-6)
    else:
        np.testing.assert_array_equal(result.extra["stage.0.scores"], scores)
    np.testing.assert_array_equal(result.extra["stage.0.order"], order)
    expected = np.take_along_axis(made.batch.visual_index, np.sort(order, axis=1), axis=1)
    np.testing.assert_array_equal(result.kept_index[0], expected)
    assert all(1 <= len(one.tokens) <= 4 for one in said)


def test_questions_share_the_scores_of_their_picture(made: Made) -> None:
    """The encoder runs once; a picture that is remembered comes with its scores, in any row."""
    with made.open("zipped") as pipeline:
        features = pipeline.encode(made.batch.pixel_values)
        turned = pipeline.encode(made.batch.pixel_values[::-1].copy())
        np.testing.assert_array_equal(turned.values["visual_scores"], features.values["visual_scores"][::-1])
        shared = Features({name: np.repeat(value[:1], 2, axis=0) for name, value in features.values.items()})
        kept = pipeline.prefill(made.batch, shared).kept_index[0] - made.batch.visual_index[:, :1]
        np.testing.assert_array_equal(kept[0], kept[1])
        again = pipeline.prefill(made.batch, features).kept_index[0]
    assert not np.array_equal(again[1] - made.batch.visual_index[1, 0], kept[1])


def test_features_without_scores_are_refused_by_name(made: Made) -> None:
    with made.open("ranked") as pipeline:
        features = pipeline.encode(made.batch.pixel_values)
        with pytest.raises(EngineError, match="visual_scores"):
            pipeline.prefill(made.batch, Features({"image_features": features.image_features}))


def test_the_manifest_names_the_scores_of_these_variants_only(made: Made) -> None:
    bundle = Bundle.open(made.path, verify="full")
    for name in ("full", *CUTS):
        graphs = bundle.variant(name).graphs
        outputs, inputs = graphs["vision_encoder"].outputs, graphs["prefill"].inputs
        found = [(spec.dtype, spec.shape) for spec in (*outputs, *inputs) if spec.name == "visual_scores"]
        assert found == ([] if name == "full" else [("float32", (2, 16))] * 2)
    assert [bundle.variant(name).plan.stages[0].keep for name in CUTS] == [5, 8, 4]
    assert {bundle.variant(name).plan.stages[0].layer for name in CUTS} == {0}
    assert bundle.manifest.geometry.vision_layers == 3 and bundle.manifest.geometry.class_tokens == 1


def test_every_target_takes_the_graphs(made: Made) -> None:
    bundle = Bundle.open(made.path)
    for name, graph in (("rows", "prefill"), ("zipped", "vision_encoder")):
        model = ir.load(bundle.file(bundle.graph(graph, variant=name).file))
        for target in TARGETS:
            assert [finding for finding in lint(lower(model, target), target) if finding.severity == "error"] == []


def test_run_and_inspect_show_them(made: Made, picture: Path) -> None:
    answers = package.run(made.path, picture, QUESTIONS, variant="zipped", max_new_tokens=2)
    (first,), (second,) = (answer.kept for answer in answers.answers)
    assert first == second and len(first) == 4
    said = sievert("inspect", made.path)
    assert said.code == 0 and "visionzip" in said.out and "4 of 16" in said.out and "8 of 16" in said.out


def test_what_cannot_be_made_changes_nothing(made: Made) -> None:
    before = Bundle.open(made.path).manifest
    for cut, words in (
        (Cut(selector="fopru", keep="5", options={"strategy": "row"}), "keep=5 but strategy=row keeps whole rows of 4"),
        (Cut(selector="visionzip", keep="4", layer=1), "before layer 0"),
    ):
        with pytest.raises(PlanError, match=words):
            package.prune(made.path, cuts=[cut], name="never")
    assert Bundle.open(made.path).manifest == before
