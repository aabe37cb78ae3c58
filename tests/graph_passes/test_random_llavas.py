"""The splice on random-weight LLaVAs of every supported kind, in ONNX Runtime against transformers on the same kept tokens.

Prompts of different lengths in one padded batch, caches that start full of garbage, teacher-forced decode steps.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from transformers import LlavaForConditionalGeneration

from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.parity.reference import Reference
from tests.graph_passes import llavas
from tests.graph_passes.conftest import Tiny
from tests.graph_passes.llavas import IMAGE, STEPS, Prompts, Static, assert_close, plan_of
from tests.tiny_llava import SHAPES

MAX_TEXT, MAX_NEW = 9, 4


def make_prompts(exported: Exported, batch: int, seed: int = 0) -> Prompts:
    """Prompts with text before and after the image; the image starts at another row in each."""
    rng, g = np.random.default_rng(seed), exported.geometry
    ids = []
    for row in range(batch):
        before, after = 1 + row, MAX_TEXT - 1 - row - (row * 2) % 3
        words = rng.integers(5, 60, before + after)
        ids.append(np.concatenate([words[:before], np.full(g.visual_tokens, IMAGE), words[before:]]))
    return Prompts(tuple(ids), rng.standard_normal((batch, g.channels, g.image_height, g.image_width)).astype(np.float32))


def profile_of(exported: Exported, batch: int, **sizes: int) -> Profile:
    lengths: dict[str, Any] = {"max_text": MAX_TEXT, "max_new_tokens": MAX_NEW, **sizes}
    return Profile(batch=batch, decode_batch=batch, visual_tokens=exported.geometry.visual_tokens, **lengths)


def compare(exported: Exported, reference: Reference, plan: Plan, batch: int) -> None:
    """Run the variant and the reference on the engine's own kept tokens."""
    llavas.compare(exported, reference, plan, profile_of(exported, batch), make_prompts(exported, batch))


@pytest.fixture(scope="module", params=sorted(SHAPES))
def model(request: pytest.FixtureRequest, tiny: Tiny) -> tuple[Exported, Reference]:
    folder, exported = tiny(request.param)
    return exported, Reference(LlavaForConditionalGeneration.from_pretrained(folder))


def keeps_of(exported: Exported) -> tuple[int, ...]:
    visual = exported.geometry.visual_tokens
    return (1, 2, 3, 7, visual // 2, visual - 1, visual)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_keep_with_some_layer(model: tuple[Exported, Reference], batch: int) -> None:
    """Each keep and each layer at least once per model and batch; :func:`test_every_keep_at_every_layer` has all pairs."""
    exported, reference = model
    for number, keep in enumerate(keeps_of(exported)):
        compare(exported, reference, plan_of([((number * 3 + batch) % exported.geometry.depth, keep)]), batch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", [1, 3])
def test_every_keep_at_every_layer(model: tuple[Exported, Reference], batch: int) -> None:
    exported, reference = model
    for keep, layer in product(keeps_of(exported), range(exported.geometry.depth)):
        compare(exported, reference, plan_of([(layer, keep)]), batch)


def test_unpruned(model: tuple[Exported, Reference]) -> None:
    compare(*model, Plan(), 3)


def test_keeping_all_equals_unpruned(model: tuple[Exported, Reference]) -> None:
    exported, _ = model
    prompts, tokens = make_prompts(exported, 3), np.full((3, STEPS), 7)
    _, full = Static(exported, Plan(), profile_of(exported, 3)).answer(prompts, tokens)
    for layer in (0, 2):
        plan = plan_of([(layer, exported.geometry.visual_tokens)])
        _, same = Static(exported, plan, profile_of(exported, 3)).answer(prompts, tokens)
        assert_close(np.stack(same), np.stack(full), "logits when all tokens are kept")


def test_two_maxima_same_answer(model: tuple[Exported, Reference]) -> None:
    exported, _ = model
    prompts, tokens, plan = make_prompts(exported, 3), np.full((3, STEPS), 8), plan_of([(1, 5)])
    short, short_logits = Static(exported, plan, profile_of(exported, 3)).answer(prompts, tokens)
    long, long_logits = Static(exported, plan, profile_of(exported, 3, max_text=17, max_new_tokens=9)).answer(prompts, tokens)
    np.testing.assert_array_equal(short["kept_index.0"], long["kept_index.0"])
    assert_close(np.stack(short_logits), np.stack(long_logits), "logits under two maxima")


@pytest.mark.parametrize("selector", ["iwp", "magnitude", "random", "uniform"])
def test_compact_positions_and_two_cuts(model: tuple[Exported, Reference], selector: str) -> None:
    exported, reference = model
    for positions in ("keep", "compact"):
        compare(exported, reference, plan_of([(1, 9), (3, 4)], selector=selector, positions=positions), 2)
