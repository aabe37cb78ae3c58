"""The splice on decoders whose positions have three axes, in ONNX Runtime against transformers' layers on the same kept tokens.

Prompts of different lengths in one padded batch, caches that start full of garbage, teacher-forced decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.engines.run.positions import Grid, multi_axis_positions
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.expose import expose
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.lower import lower
from sievert.graph_passes.variant import make_variant
from tests.graph_passes.llavas import STEPS, assert_close, plan_of
from tests.tiny_axes import FAMILIES, IMAGE, export_tiny

Array = NDArray[Any]
MAX_TEXT, MAX_NEW, BATCH = 9, 4, 2
GRID = Grid(4, 6)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass(frozen=True)
class Prompts:
    """Inputs of prefill but for the caches, the ids ``[L]`` of each prompt, and the position of its first new token ``[B]``."""

    feeds: dict[str, Array]
    ids: tuple[Array, ...]
    following: Array


def make_prompts(family: str) -> Prompts:
    """A picture between words, elsewhere in each prompt."""
    model, geometry, _ = export_tiny(family)
    rng, length = np.random.default_rng(3), GRID.tokens + MAX_TEXT
    words = [rng.integers(10, 90, MAX_TEXT - 2 * row) for row in range(BATCH)]
    ids = tuple(np.concatenate([text[: row + 1], np.full(GRID.tokens, IMAGE), text[row + 1 :]]) for row, text in enumerate(words))
    visual_index = np.stack([np.flatnonzero(row == IMAGE) for row in ids])
    padded, mask = np.zeros((2, BATCH, length), np.int64)
    for row, prompt in enumerate(ids):
        padded[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    table: Any = model.get_input_embeddings()
    embeds = table(torch.tensor(padded)).detach().numpy().copy()
    for row in range(BATCH):
        embeds[row, visual_index[row]] = rng.standard_normal((GRID.tokens, geometry.width)) / geometry.width**0.5
    positions, following = multi_axis_positions(visual_index, [len(row) for row in ids], length, [[GRID]] * BATCH)
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask, "visual_index": visual_index}
    planes = rng.standard_normal((3, BATCH, GRID.tokens, geometry.width)).astype(np.float32)
    feeds |= {f"deepstack.{number}": plane for number, plane in enumerate(planes)}
    return Prompts(feeds, ids, following)


def make(family: str, plan: Plan, *, planes: int = 0) -> dict[str, ir.Model]:
    """The graphs of a variant, which several tests read. Not to be changed."""
    return _make(family, plan.model_dump_json(), planes)


@cache
def _make(family: str, plan: str, planes: int) -> dict[str, ir.Model]:
    _, geometry, dynamic = export_tiny(family)
    geometry = geometry.model_copy(update={"visual_planes": planes})
    profile = Profile(batch=BATCH, decode_batch=BATCH, visual_tokens=GRID.tokens, max_text=MAX_TEXT, max_new_tokens=MAX_NEW)
    return make_variant(dynamic, geometry, Plan.model_validate_json(plan), profile)


class Session:
    """A graph in ONNX Runtime."""

    def __init__(self, model: ir.Model) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        values = {value.name: feeds.get(value.name) for value in self.session.get_inputs()}
        filled = {
            value.name: np.full(value.shape, 7e3, np.float32) if values[value.name] is None else values[value.name]
            for value in self.session.get_inputs()
        }
        return dict(zip([value.name for value in self.session.get_outputs()], self.session.run(None, filled), strict=True))


def answer(graphs: dict[str, ir.Model], prompts: Prompts, tokens: Array) -> tuple[dict[str, Array], list[Array]]:
    """Outputs of prefill, and logits ``[B, V]`` after the prompt and after each of ``tokens[B, T]``."""
    first = Session(graphs["prefill"]).run(prompts.feeds)
    decode, state, logits = Session(graphs["decode"]), first, [first["logits"]]
    lengths = np.array([len(ids) for ids in prompts.ids])
    for step, token in enumerate(tokens.T):
        caches = {name.replace("present", "past_key_values"): value for name, value in state.items() if name.startswith("present")}
        position_ids = np.tile((prompts.following + step)[:, None], (3, 1, 1))  # [3, B, 1]
        state = decode.run({"input_ids": token[:, None], "position_ids": position_ids, "cache_row": lengths + step, **caches})
        logits.append(state["logits"])
    return first, logits


class Layers:
    """transformers' own layers on one prompt, alone and unpadded."""

    def __init__(self, family: str) -> None:
        self.model: Any = export_tiny(family)[0]
        self.text = self.model.model.language_model
        self.cache: Any = DynamicCache()

    def step(self, number: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Layer ``number`` on ``hidden[1, n, D]`` at ``positions[3, 1, n]``."""
        output: torch.Tensor = self.text.layers[number](
            hidden,
            attention_mask=None,
            position_embeddings=self.text.rotary_emb(hidden, positions),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output

    def logits(self, hidden: torch.Tensor) -> Array:
        found: Array = self.model.lm_head(self.text.norm(hidden[:, -1:]))[0, 0].numpy()
        return found

    @torch.inference_mode()
    def prefill(self, prompts: Prompts, row: int, plan: Plan, kept: list[Array], planes: int) -> Array:
        real = len(prompts.ids[row])
        hidden = torch.tensor(prompts.feeds["inputs_embeds"][row : row + 1, :real])
        positions, rows = torch.tensor(prompts.feeds["position_ids"][:, row : row + 1, :real]), np.arange(real)
        cuts = {stage.layer: kept[number] for number, stage in enumerate(plan.stages)}
        for number in range(len(self.text.layers)):
            if number in cuts:
                stay = torch.tensor(np.isin(rows, cuts[number]) | (prompts.ids[row][rows] != IMAGE))
                hidden, positions, rows = hidden[:, stay], positions[..., stay], rows[stay.numpy()]
            hidden = self.step(number, hidden, positions)
            if number < planes:
                plane, visual = prompts.feeds[f"deepstack.{number}"][row], prompts.feeds["visual_index"][row].tolist()
                for place, original in enumerate(rows.tolist()):
                    if original in visual:
                        hidden[0, place] += torch.tensor(plane[visual.index(original)])
        return self.logits(hidden)

    @torch.inference_mode()
    def decode(self, token: int, position: int) -> Array:
        hidden, positions = self.text.embed_tokens(torch.tensor([[token]])), torch.full((3, 1, 1), position)
        for number in range(len(self.text.layers)):
            hidden = self.step(number, hidden, positions)
        return self.logits(hidden)


def compare(family: str, plan: Plan, graphs: dict[str, ir.Model], *, planes: int = 0) -> dict[str, Array]:
    """Every row's logits and caches agree with the model's own layers on the engine's kept tokens."""
    prompts = make_prompts(family)
    tokens = np.random.default_rng(1).integers(10, 90, (BATCH, STEPS))
    first, logits = answer(graphs, prompts, tokens)
    for row in range(BATCH):
        kept = [first[f"kept_index.{stage}"][row] for stage in range(len(plan.stages))]
        layers = Layers(family)
        expected = [layers.prefill(prompts, row, plan, kept, planes)]
        for number in range(len(layers.text.layers)):
            keys = layers.cache.layers[number].keys[0].numpy()  # [G, rows, d]
            assert_close(first[f"present.{number}.key"][row][:, : keys.shape[1]], keys, f"present.{number}.key of row {row}")
        expected += [layers.decode(int(token), int(prompts.following[row]) + step) for step, token in enumerate(tokens[row])]
        assert_close(np.stack([step[row] for step in logits]), np.stack(expected), f"logits of row {row} under {plan}")
    return first


@pytest.mark.parametrize("selector", ["iwp", "random"])
def test_a_cut_at_layer_2(family: str, selector: str) -> None:
    plan = plan_of([(2, 7)], selector=selector)
    compare(family, plan, make(family, plan))


def test_no_cut_and_several(family: str) -> None:
    for cuts in ([], [(0, 11)], [(1, 9), (4, 4)]):
        plan = plan_of(cuts)
        compare(family, plan, make(family, plan))


def test_unpruned_equals_the_whole_model(family: str) -> None:
    """The layers above are walked by the test; this is the text model's own forward, mask and positions and all."""
    prompts, model = make_prompts(family), export_tiny(family)[0]
    inner: Any = model.model
    names = ("inputs_embeds", "attention_mask", "position_ids")
    with torch.inference_mode():
        hidden = inner.language_model(**{name: torch.tensor(prompts.feeds[name]) for name in names}).last_hidden_state
        head: Any = model.lm_head
        last = head(hidden[torch.arange(BATCH), torch.tensor([len(ids) - 1 for ids in prompts.ids])]).numpy()
    assert_close(Session(make(family, Plan())["prefill"]).run(prompts.feeds)["logits"], last, "logits of the whole model")


@pytest.mark.parametrize("cuts", [[], [(0, 11)], [(1, 7)], [(2, 7)], [(3, 9)], [(1, 9), (2, 4)]])
def test_planes_follow_the_kept_tokens(cuts: list[tuple[int, int]]) -> None:
    """Before, between, at and behind the layers that add planes."""
    plan = plan_of(cuts)
    graphs = make("qwen3_vl", plan, planes=3)
    assert [str(value.name) for value in graphs["prefill"].graph.inputs if str(value.name).startswith("deepstack")] == [
        f"deepstack.{number}" for number in range(3)
    ]
    lowered = {name: lower(graphs[name], "tensorrt-rtx") for name in ("prefill", "decode")}
    assert not {node.op_type for graph in lowered.values() for node in graph.graph} & {"NonZero", "ScatterND"}
    for each in (graphs, lowered):
        compare("qwen3_vl", plan, each, planes=3)


def test_planes_equal_the_whole_model() -> None:
    prompts, model = make_prompts("qwen3_vl"), export_tiny("qwen3_vl")[0]
    inner: Any = model.model
    names = ("inputs_embeds", "attention_mask", "position_ids")
    visual = torch.zeros(BATCH, GRID.tokens + MAX_TEXT, dtype=torch.bool)
    for row, places in enumerate(prompts.feeds["visual_index"]):
        visual[row, torch.tensor(places)] = True
    with torch.inference_mode():
        hidden = inner.language_model(
            **{name: torch.tensor(prompts.feeds[name]) for name in names},
            visual_pos_masks=visual,
            deepstack_visual_embeds=[torch.tensor(prompts.feeds[f"deepstack.{number}"]).flatten(0, 1) for number in range(3)],
        ).last_hidden_state
        head: Any = model.lm_head
        last = head(hidden[torch.arange(BATCH), torch.tensor([len(ids) - 1 for ids in prompts.ids])]).numpy()
    found = Session(make("qwen3_vl", Plan(), planes=3)["prefill"]).run(prompts.feeds)["logits"]
    assert_close(found, last, "logits of the whole model")


def test_interface(family: str) -> None:
    graphs = make(family, plan_of([(2, 7)]))
    shapes = {name: {str(value.name): tuple(value.shape or ()) for value in graphs[name].graph.inputs} for name in ("prefill", "decode")}
    assert shapes["prefill"]["position_ids"] == (3, BATCH, GRID.tokens + MAX_TEXT)
    assert shapes["decode"]["position_ids"] == (3, BATCH, 1)
    assert find_decoder(export_tiny(family)[2]["decoder"]).position_axes == 3


def test_passes_after_the_splice(family: str) -> None:
    """What is lowered computes the same; values can be exposed and operations counted."""
    plan = plan_of([(2, 7)])
    graphs = make(family, plan)
    assert count_flops(graphs["prefill"]) < count_flops(make(family, Plan())["prefill"])
    lowered = {name: lower(graphs[name], "tensorrt-rtx") for name in ("prefill", "decode")}
    assert not {node.op_type for graph in lowered.values() for node in graph.graph} & {"NonZero", "ScatterND"}
    lowered["prefill"] = expose(lowered["prefill"], ["stage.0.scores"])
    assert compare(family, plan, lowered)["stage.0.scores"].shape == (BATCH, GRID.tokens)


def test_compact_positions_are_refused() -> None:
    _, geometry, _ = export_tiny(FAMILIES[0])
    with pytest.raises(PlanError, match="positions compact, but a position of this model is 3 numbers"):
        plan_of([(2, 7)], positions="compact").check(geometry)
    plan_of([(2, 7)], positions="compact").check(geometry.model_copy(update={"position_axes": 1}))
