"""The layer-by-layer reference is the transformers model, and its pruned runs are that model on fewer rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sievert.bundle.errors import PlanError, UnsupportedModelError
from sievert.bundle.plan import Plan, Stage
from sievert.parity.hooks import stop_before, watch_arguments, watch_outputs
from sievert.parity.record import cache_names
from sievert.parity.reference import Reference
from tests.parity.conftest import Load
from tests.parity.engine import PLAN, TWO_CUTS, make_inputs
from tests.tiny_llava import SHAPES


def tensors(inputs: Any) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(inputs.input_ids)[None]
    return {"input_ids": ids, "pixel_values": torch.from_numpy(inputs.pixel_values), "attention_mask": torch.ones_like(ids)}


def count_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("shape", SHAPES)
def test_unpruned_is_generate(load: Load, shape: str) -> None:
    model, inputs = load(shape), make_inputs()
    record = Reference(model).record(inputs, Plan(), tokens=4)
    with torch.inference_mode():
        made = model.generate(
            **tensors(inputs), max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert len(made.logits) == 5
    for name, logits in zip(("logits", *(f"step.{step}.logits" for step in range(4))), made.logits, strict=True):
        assert np.abs(record.arrays[name] - logits[0].numpy()).max() < 1e-5
    cache = made.past_key_values.layers
    assert len(cache) == len(model.model.language_model.layers)
    for layer, rows in enumerate(cache):
        assert np.abs(record.arrays[f"end.{layer}.key"] - rows.keys[0].numpy()).max() < 1e-5
        assert np.abs(record.arrays[f"end.{layer}.value"] - rows.values[0].numpy()).max() < 1e-5


def test_eager_attention_gives_the_same(load: Load) -> None:
    import copy

    eager, inputs = copy.deepcopy(load("clip-llama")), make_inputs()
    eager.set_attn_implementation("eager")
    for plan in (Plan(), PLAN):
        one, other = (Reference(model).record(inputs, plan, tokens=3) for model in (load("clip-llama"), eager))
        assert max(np.abs(one.arrays[name] - other.arrays[name]).max() for name in one.arrays) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_leave_the_logits_bit_equal(load: Load, shape: str) -> None:
    model, inputs = load(shape), make_inputs()
    attention = model.model.language_model.layers[1].self_attn
    watched = {"q": getattr(attention, "q_norm", attention.q_proj), "k": attention.k_proj, "layer": model.model.language_model.layers[2]}
    with torch.inference_mode():
        before = model(**tensors(inputs)).logits
        with watch_outputs(watched) as seen, watch_arguments(attention) as arguments:
            during = model(**tensors(inputs)).logits
        after = model(**tensors(inputs)).logits
    assert seen.keys() == watched.keys() and "position_embeddings" in arguments
    assert torch.equal(before, during) and torch.equal(before, after)


def test_hooks_are_gone_after_an_error(load: Load) -> None:
    model = load("clip-llama")
    before = count_hooks(model)
    text = model.model.language_model
    with pytest.raises(ZeroDivisionError), watch_outputs({"text": text}), stop_before(text):
        assert count_hooks(model) == before + 3
        raise ZeroDivisionError
    assert count_hooks(model) == before


def test_the_reference_leaves_no_hook_behind(load: Load) -> None:
    model, inputs = load("clip-qwen3"), make_inputs()
    with torch.inference_mode():
        model(**tensors(inputs))  # transformers adds hooks of its own at the first call
    before = count_hooks(model)
    Reference(model).record(inputs, PLAN, tokens=1)
    assert count_hooks(model) == before


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_everything_changes_nothing(load: Load, shape: str, positions: Any) -> None:
    reference, inputs = Reference(load(shape)), make_inputs()
    stages = tuple(Stage(selector="iwp", layer=layer, keep=16, requested="100%") for layer in (0, 2))
    unpruned, pruned = (reference.record(inputs, plan, tokens=3) for plan in (Plan(), Plan(stages=stages, positions=positions)))
    assert pruned.tokens == unpruned.tokens
    for name, array in unpruned.arrays.items():
        assert np.array_equal(array, pruned.arrays[name]), name


def run_with_gathering_hooks(model: Any, inputs: Any, layer: int, rows: Any, tokens: tuple[int, ...]) -> tuple[list[Any], Any]:
    """An independent way to prune: the model's own forward, with a hook that hands ``rows`` on before ``layer``."""
    text = model.model.language_model
    picked: dict[str, Any] = {}

    def gather(_module: Any, args: Any, kwargs: Any) -> Any:
        picked["rotary"] = tuple(table[:, rows] for table in kwargs["position_embeddings"])
        return (args[0][:, rows], *args[1:]), {**kwargs, "position_embeddings": picked["rotary"]}

    def rotate(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_embeddings": picked["rotary"]}

    hooks = [text.layers[layer].register_forward_pre_hook(gather, with_kwargs=True)]
    hooks += [later.register_forward_pre_hook(rotate, with_kwargs=True) for later in text.layers[layer + 1 :]]
    with torch.inference_mode():
        made = model(**tensors(inputs), use_cache=True)
        for hook in hooks:
            hook.remove()
        logits, cache = [made.logits[0, -1]], made.past_key_values
        for step, token in enumerate(tokens):
            position = torch.tensor([[len(inputs.input_ids) + step]])
            hidden = text.embed_tokens(torch.tensor([[token]]))
            rotary = text.rotary_emb(hidden, position)
            for decoder_layer in text.layers:  # the model's own mask would be made for one length
                hidden = decoder_layer(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
            logits.append(model.lm_head(text.norm(hidden))[0, -1])
    return logits, cache


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_is_the_model_on_the_kept_rows(load: Load, shape: str, layer: int) -> None:
    model, inputs = load(shape), make_inputs(seed=3)
    plan = Plan(stages=(Stage(selector="iwp", layer=layer, keep=5, requested="5"),))
    kept = np.array([2, 6, 7, 11, 17])
    record = Reference(model).record(inputs, plan, kept=[kept], tokens=3)
    rows = np.sort(np.concatenate([np.flatnonzero(inputs.input_ids != 4), kept]))
    logits, cache = run_with_gathering_hooks(model, inputs, layer, torch.from_numpy(rows), record.tokens)
    for name, expected in zip(("logits", "step.0.logits", "step.1.logits", "step.2.logits"), logits, strict=True):
        assert np.abs(record.arrays[name] - expected.numpy()).max() < 1e-5
    for number, own in enumerate(cache.layers):
        length = len(inputs.input_ids) if number < layer else len(rows)
        assert record.arrays[cache_names(number)[0]].shape[1] == length
        assert np.abs(record.arrays[f"end.{number}.key"] - own.keys[0].numpy()).max() < 1e-5


def test_what_the_selector_reads_is_what_attention_multiplies(load: Load) -> None:
    for shape in SHAPES:
        reference, inputs = Reference(load(shape)), make_inputs()
        plan = Plan(stages=(Stage(selector="iwp", layer=1, keep=16, requested="16"),))
        _, arrays, (trace,) = reference.prefill(inputs, plan)
        key, value = cache_names(1)
        tap = trace.inputs.tap
        assert np.abs(tap("k_rotary") - arrays[key]).max() < 1e-5
        assert np.abs(tap("v") - arrays[value]).max() < 1e-5
        assert np.abs(tap("k")[:, 0] - arrays[key][:, 0]).max() < 1e-5  # position 0 is not turned
        assert np.abs(tap("k")[:, 5] - arrays[key][:, 5]).max() > 1e-2
        lengths = [np.linalg.norm(heads, axis=-1) for heads in (tap("q"), tap("q_rotary"))]
        assert np.allclose(*lengths) and len(tap("q")) == load(shape).config.text_config.num_attention_heads


def test_two_cuts_see_what_is_left(load: Load) -> None:
    reference, inputs = Reference(load("siglip-qwen2")), make_inputs()
    record = reference.record(inputs, TWO_CUTS, tokens=2)
    first, second = record.traces
    assert len(second.rows) == len(inputs.input_ids) - 7 and set(second.own_kept) < set(first.own_kept)
    assert second.inputs.original.tolist() == (first.own_kept - 2).tolist()
    assert [record.arrays[cache_names(layer)[0]].shape[1] for layer in range(4)] == [25, 18, 18, 13]
    assert record.arrays["stage.1.residual"].shape == (18, 112)
    assert first.inputs.text.tolist() == list(range(18, 25)) and first.inputs.all_text.tolist() == [0, 1, *range(18, 25)]


def test_compact_renumbers(load: Load) -> None:
    """With the dropped rows at the end of the picture, compacting is pruning a prompt that never had them."""
    reference, inputs = Reference(load("clip-llama")), make_inputs()
    plan = Plan(stages=(Stage(selector="uniform", layer=0, keep=6, requested="6"),), positions="compact")
    record = reference.record(inputs, plan, kept=[np.arange(2, 8)], tokens=3)
    model = load("clip-llama")
    _, merged = reference.embed(inputs)
    rows = np.r_[0:8, 18:25]
    with torch.inference_mode():
        cache, embeds, logits = None, merged[:, rows], []
        for token in (*record.tokens, 0):
            made = model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            logits.append(model.lm_head(made.last_hidden_state[0, -1]).numpy())
            cache, embeds = made.past_key_values, model.model.language_model.embed_tokens(torch.tensor([[token]]))
    for name, expected in zip(("logits", "step.0.logits", "step.1.logits", "step.2.logits"), logits, strict=True):
        assert np.abs(record.arrays[name] - expected).max() < 1e-5


def test_an_unknown_selector_is_refused(load: Load) -> None:
    for stage, said in (
        (Stage(selector="guess", layer=1, keep=4, requested="4"), "no float64 transcription"),
        (Stage(selector="iwp", layer=1, keep=4, requested="4", options={"lambda": 1.0}), "no option 'lambda'"),
    ):
        with pytest.raises(PlanError, match=said):
            Reference(load("clip-llama")).record(make_inputs(), Plan(stages=(stage,)), tokens=1)


def test_a_sliding_window_that_would_hide_tokens_is_refused(load: Load) -> None:
    import copy

    model = copy.deepcopy(load("clip-mistral"))
    model.model.language_model.layers[0].self_attn.sliding_window = 20
    with pytest.raises(UnsupportedModelError, match="sliding window of 20"):
        Reference(model).record(make_inputs(), Plan(), tokens=1)
