"""The splice on random-weight LLaVAs of every supported kind, in ONNX Runtime against transformers on the same kept tokens.

Prompts of different lengths in one padded batch, caches that start full of garbage, teacher-forced decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from sievert.bundle.plan import Plan, PositionPolicy, Stage
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.variant import make_variant
from sievert.parity.reference import Reference, ReferenceInputs
from tests.graph_passes.conftest import Tiny
from tests.tiny_llava import SHAPES

Array = NDArray[Any]
IMAGE = 4
STEPS = 3
MAX_TEXT, MAX_NEW = 9, 4


@dataclass(frozen=True)
class Prompts:
    """B prompts about one image each: ids ``[L]`` with L different from row to row."""

    ids: tuple[Array, ...]
    pixels: Array


class Static:
    """A variant in memory, run in ONNX Runtime."""

    def __init__(self, exported: Exported, plan: Plan, profile: Profile) -> None:
        graphs = make_variant(exported.graphs, exported.geometry, plan, profile)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {name: ort.InferenceSession(ir.to_proto(model).SerializeToString(), options) for name, model in graphs.items()}
        self.profile = profile

    def run(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        session = self.sessions[graph]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))

    def answer(self, prompts: Prompts, tokens: Array) -> tuple[dict[str, Array], list[Array]]:
        """Outputs of prefill, and logits ``[B, V]`` after the prompt and after each of ``tokens[B, T]``."""
        feeds = pad(prompts, self.profile)
        feeds |= self.run("vision_encoder", feeds)
        feeds |= self.run("embed_tokens", feeds)
        for value in self.sessions["prefill"].get_inputs():
            if value.name.startswith("past_key_values"):
                feeds[value.name] = np.full(value.shape, 7e3, np.float32)
        first = self.run("prefill", feeds)
        logits, lengths, state = [first["logits"]], feeds["attention_mask"].sum(1), first
        for token in tokens.T:
            caches = {name.replace("present", "past_key_values"): value for name, value in state.items() if name.startswith("present")}
            state = self.run("decode", {"input_ids": token[:, None], "position_ids": lengths[:, None], "cache_row": lengths, **caches})
            logits.append(state["logits"])
            lengths = lengths + 1
        return first, logits


def make_prompts(exported: Exported, batch: int, seed: int = 0) -> Prompts:
    """Prompts with text before and after the image; the image starts at another row in each."""
    rng, g = np.random.default_rng(seed), exported.geometry
    ids = []
    for row in range(batch):
        before, after = 1 + row, MAX_TEXT - 1 - row - (row * 2) % 3
        words = rng.integers(5, 60, before + after)
        ids.append(np.concatenate([words[:before], np.full(g.visual_tokens, IMAGE), words[before:]]))
    return Prompts(tuple(ids), rng.standard_normal((batch, g.channels, g.image_height, g.image_width)).astype(np.float32))


def pad(prompts: Prompts, profile: Profile) -> dict[str, Array]:
    """Right-padded inputs of the static graphs."""
    batch, length = len(prompts.ids), profile.sequence
    feeds = {name: np.zeros((batch, length), np.int64) for name in ("input_ids", "attention_mask")}
    for row, ids in enumerate(prompts.ids):
        feeds["input_ids"][row, : len(ids)], feeds["attention_mask"][row, : len(ids)] = ids, 1
    feeds["position_ids"] = np.broadcast_to(np.arange(length), (batch, length)).copy()
    feeds["visual_index"] = np.stack([np.flatnonzero(ids == IMAGE) for ids in prompts.ids])
    feeds["pixel_values"] = prompts.pixels
    return feeds


def plan_of(layers_and_keeps: list[tuple[int, int]], *, selector: str = "iwp", positions: PositionPolicy = "keep") -> Plan:
    stages = tuple(Stage(selector=selector, layer=layer, keep=keep, requested=str(keep)) for layer, keep in layers_and_keeps)
    return Plan(stages=stages, positions=positions)


def profile_of(exported: Exported, batch: int, **sizes: int) -> Profile:
    lengths = {"max_text": MAX_TEXT, "max_new_tokens": MAX_NEW, **sizes}
    return Profile(batch=batch, decode_batch=batch, visual_tokens=exported.geometry.visual_tokens, **lengths)


def assert_close(found: Array, expected: Array, what: str) -> None:
    limit = 1e-5 * max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(found - expected).max())
    assert worst <= limit, f"{what}: off by {worst:.3g}, allowed {limit:.3g}"


def compare(exported: Exported, reference: Reference, plan: Plan, batch: int) -> None:
    """Run the variant and the reference on the engine's own kept tokens; every row's logits and caches agree."""
    prompts = make_prompts(exported, batch)
    tokens = np.random.default_rng(1).integers(5, 60, (batch, STEPS))
    first, logits = Static(exported, plan, profile_of(exported, batch)).answer(prompts, tokens)
    for row, ids in enumerate(prompts.ids):
        kept = [first[f"kept_index.{stage}"][row] for stage in range(len(plan.stages))]
        for stage, rows in zip(plan.stages, kept, strict=True):
            assert len(set(rows.tolist())) == stage.keep, "a kept token stands twice"
            assert np.all(ids[rows] == IMAGE) and np.all(np.diff(rows) > 0)
        state, arrays, _ = reference.prefill(ReferenceInputs(ids, prompts.pixels[row]), plan, kept)
        expected = [state.logits, *(reference.decode(state, int(token)) for token in tokens[row])]
        assert_close(np.stack([step[row] for step in logits]), np.stack(expected), f"logits of row {row} under {plan}")
        for layer in range(exported.geometry.depth):
            for part in ("key", "value"):
                cache = arrays[f"present.{layer}.{part}"]  # [G, rows, d]
                assert_close(first[f"present.{layer}.{part}"][row][:, : cache.shape[1]], cache, f"present.{layer}.{part} of row {row}")


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
