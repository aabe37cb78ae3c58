"""Layers that are not purely causal: the rule of what a row sees against transformers' own masks, and whole models after cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxscript import GraphBuilder
from PIL import Image

from sievert.bundle.errors import GraphError
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.pipeline import Pipeline
from sievert.exporter.export import export_model
from sievert.exporter.write import write_bundle
from sievert.graph_passes.causal import prove_causal, read_sights
from sievert.graph_passes.decoder import Decoder, find_decoder
from sievert.graph_passes.lengths import Length
from sievert.graph_passes.prune import add_variant
from sievert.graph_passes.rows import cut_rows, describe_rows
from sievert.graph_passes.sight import CAUSAL, Places, Sight, see
from sievert.parity.check import check_against
from sievert.parity.hooks import stop_before
from sievert.parity.load import load_reference
from sievert.parity.samples import Sample
from sievert.parity.verdict import Verdict
from tests.tiny_families import make_family

WINDOW, TOKENS = 10, 16
FAMILIES = {"gemma3": {"layers": 6}, "paligemma2": {"layers": 4}}
Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A family's checkpoint with windows shorter than a picture, and its bundle."""

    name: str
    folder: Path
    bundle: Bundle

    @property
    def two_way(self) -> Any:
        return self.bundle.manifest.geometry.two_way

    def decoder(self) -> Decoder:
        return find_decoder(ir.load(self.bundle.graph_file("decoder")))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp(request.param)
    folder = make_family(request.param, work / "checkpoint", text={"sliding_window": WINDOW}, **FAMILIES[request.param])
    yield Case(request.param, folder, write_bundle(export_model(folder), work / "bundle"))
    torch.set_num_threads(threads)


def expected_sights(case: Case) -> list[Sight]:
    config = transformers.AutoConfig.from_pretrained(case.folder).get_text_config()
    windows = [WINDOW if kind == "sliding_attention" else 0 for kind in config.layer_types]
    assert set(windows) == {0, WINDOW}
    return [Sight(window, two_way=True, clipped=case.name == "gemma3" or not window) for window in windows]


def make_ids(case: Case, words: tuple[int, ...]) -> Array:
    """A picture after each but the last of so many words."""
    image, rng = case.bundle.manifest.geometry.image_token_id, np.random.default_rng(sum(words))
    parts = [part for count in words for part in (rng.integers(20, 90, count), np.full(TOKENS, image))]
    return np.concatenate(parts[:-1])


def masks_of_the_model(case: Case, ids: Array) -> dict[str, Array]:
    """What transformers hands the decoder, ``[S, S]`` bool by kind of layer."""
    processed = {"gemma3": ids == case.bundle.manifest.geometry.image_token_id, "paligemma2": np.zeros_like(ids)}[case.name]
    config = transformers.AutoConfig.from_pretrained(case.folder)
    model: Any = getattr(transformers, config.architectures[0]).from_pretrained(case.folder, attn_implementation="eager").eval()
    geometry = case.bundle.manifest.geometry
    pictures = int((ids == geometry.image_token_id).sum()) // TOKENS
    with torch.inference_mode(), stop_before(model.get_decoder()) as arguments:
        model(
            input_ids=torch.tensor(ids)[None],
            pixel_values=torch.zeros(pictures, *geometry.picture_shape),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            token_type_ids=torch.tensor(processed.astype(np.int64))[None],
        )
    return {kind: (mask[0, 0] == 0).numpy() for kind, mask in arguments["attention_mask"].items()}


def test_the_exported_masks_are_read_and_proved(case: Case) -> None:
    found = read_sights(case.decoder(), 60, two_way=case.two_way, prompt=55, images=(TOKENS, TOKENS))
    for index, (sight, expected) in enumerate(zip(found.layers, expected_sights(case), strict=True)):
        assert (sight.window, sight.two_way) == (expected.window, expected.two_way), index
        assert not sight.window or sight.clipped == expected.clipped, index
    short = read_sights(case.decoder(), WINDOW, two_way=case.two_way, prompt=WINDOW - 2, images=(4,))
    assert {sight.window for sight in short.layers} == {0}  # a window that never bites is none
    with pytest.raises(GraphError, match="has the input 'two_way', but .* both ways are: none"):
        prove_causal(case.decoder(), 20)


def test_a_mask_of_no_known_rule_is_refused(case: Case) -> None:
    decoder = case.decoder()
    kinds = {"And": "Or", "Or": "And"}
    node = next(node for node in decoder.model.graph if node.op_type in kinds and node.outputs[0] in masks_before(decoder))
    node.op_type = kinds[node.op_type]
    with pytest.raises(GraphError, match=r"layer \d is not causal but for blocks at 60 tokens: row \d+ (sees|does not see) row \d+"):
        read_sights(decoder, 60, two_way=case.two_way, prompt=55, images=(TOKENS, TOKENS))


def masks_before(decoder: Decoder) -> set[ir.Value]:
    """Square values of all masks but those that padding alone makes."""
    return {value for node in decoder.model.graph for value in node.outputs if node.op_type == "Or" and value.uses()}


def test_the_rule_is_transformers_mask_before_and_after_a_cut(case: Case) -> None:
    prompts = [(3, 4, 2), (5, 1, 1)] if case.name == "gemma3" else [(0, 9), (0, 6)]
    ids = [make_ids(case, words) for words in prompts]
    image = case.bundle.manifest.geometry.image_token_id
    visual = np.stack([np.flatnonzero(row == image) for row in ids])
    length, keep, rng = max(map(len, ids)), 7, np.random.default_rng(5)
    order = np.stack([rng.permutation(visual.shape[1])[:keep] for _ in ids])
    real = np.stack([np.arange(length) < len(row) for row in ids])
    kinds = dict(zip(transformers.AutoConfig.from_pretrained(case.folder).text_config.layer_types, expected_sights(case), strict=True))
    masks = [masks_of_the_model(case, row) for row in ids]
    for kind, sight in kinds.items():
        whole, cut, original = run_rule(case, sight, real, visual, order)
        for row, prompt in enumerate(ids):
            model = masks[row][kind]
            block = np.full(len(prompt), 0 if case.two_way == "prompt" else -1)
            for number in range(visual.shape[1] // TOKENS):
                block[visual[row, number * TOKENS : (number + 1) * TOKENS]] = 0 if case.two_way == "prompt" else number
            np.testing.assert_array_equal(sight.allow(block), model, err_msg=kind)
            np.testing.assert_array_equal(whole[row, : len(prompt), : len(prompt)], model, err_msg=kind)
            stays = np.flatnonzero((prompt != image) | np.isin(np.arange(len(prompt)), visual[row][order[row]]))
            np.testing.assert_array_equal(original[row, : len(stays)], stays)
            np.testing.assert_array_equal(cut[row, : len(stays), : len(stays)], model[np.ix_(stays, stays)], err_msg=kind)
            assert not cut[row, : len(stays), len(stays) :].any(), "a real row sees padding"
        assert cut.any(axis=2).all(), "a row that sees nothing is no number"
        assert not np.array_equal(cut[0], np.tri(len(cut[0]), dtype=bool))


def run_rule(case: Case, sight: Sight, real: Array, visual: Array, order: Array) -> tuple[Array, ...]:
    """The masks of a padded batch before and after a cut, and the rows that are left."""
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="rule"))
    feeds = {"attention_mask": real.astype(np.int64), "visual_index": visual, "position_ids": np.cumsum(real, 1), "order": order}
    values: dict[str, Any] = {name: build.input(name, ir.DataType.INT64, list(array.shape)) for name, array in feeds.items()}
    chosen = values.pop("order")
    rows = describe_rows(build.op, batch=len(real), length=Length(real.shape[1]), visual=visual.shape[1], two_way=case.two_way, **values)
    left = cut_rows(build.op, rows, chosen, order.shape[1], compact=False, carried={}).rows
    for name, each in (("whole", rows), ("cut", left)):
        places = Places(each.original_row, each.block)
        build.add_output(see(build.op, sight, places, places), name)
    build.add_output(left.original_row, "original")
    model = ir.to_proto(ir.Model(build.graph, ir_version=11))
    return tuple(np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds))


def test_two_cuts_pass_parity_in_a_padded_batch_with_slots_of_their_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (Stage(selector="iwp", layer=2, keep=9, requested="9"), Stage(selector="fastv", layer=3, keep=5, requested="5"))
    profile = Profile(batch=2, decode_batch=3, visual_tokens=TOKENS, max_text=24, max_new_tokens=8)
    positions: Any = "keep" if case.name == "gemma3" else "compact"
    made = add_variant(case.bundle, name="two", plan=Plan(stages=stages, positions=positions), profile=profile)
    windows = [sight.window for sight in expected_sights(case)]
    told = [spec.name for spec in made.graphs["decode"].inputs if spec.name.startswith("original_row")]
    assert told == [f"original_row.{stage}" for stage, layers in ((0, windows[2:3]), (1, windows[3:])) if any(layers)]
    geometry, rng = case.bundle.manifest.geometry, np.random.default_rng(1)
    pictures = rng.integers(0, 256, (2, geometry.image_height, geometry.image_width, 3), np.uint8)
    # Short questions: the first new tokens' windows then reach into what is left of the picture.
    samples = [Sample(Image.fromarray(each), words) for each, words in zip(pictures, ("what", "which digit is red"), strict=True)]
    reference = load_reference(case.bundle.manifest)
    report = check_against(reference, case.bundle, "two", samples=samples, tokens=8)
    assert report.verdict is Verdict.PASS, report.reason
    # As if the first rows had been cut, and not tokens of the picture: what is left of it is nearer then.
    monkeypatch.setattr(Pipeline, "_place", lambda *_: None)
    assert check_against(reference, case.bundle, "two", samples=samples, tokens=8).first_failure == "teacher-forced logits"


def test_a_causal_layer_needs_no_places() -> None:
    assert CAUSAL.causal
    np.testing.assert_array_equal(CAUSAL.allow(np.full(5, -1)), np.tri(5, dtype=bool))
