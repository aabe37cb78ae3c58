from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from sievert.bundle.errors import EngineError, EngineUnavailableError, InputError, IntegrityError, ProfileError, PromptError, VariantError
from sievert.bundle.manifest import EngineEntry, EngineFile
from sievert.bundle.store import Bundle
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.rtx import TensorRT
from sievert.engines.run.slots import IDLE
from tests.engines.run.toy import NV, Toy, make_batch, make_bundle

RUNTIME = OnnxRuntime(threads=1)
TOYS = {
    "one": Toy(),
    "full": Toy(keep=NV),
    "two": Toy(batch=2, decode_batch=2),
    "slots": Toy(batch=1, decode_batch=3),
    "waves": Toy(batch=3, decode_batch=1),
}
PROMPTS, PLACES = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18]], [1, 2, 0]
ATOL = 1e-5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("toy") / "bundle", **TOYS)


def batch_of(name: str, rows: slice = slice(None)) -> PromptBatch:
    toy = TOYS[name]
    return make_batch(toy, PROMPTS[rows][: toy.batch], PLACES[rows][: toy.batch])


@pytest.mark.parametrize("name", ["one", "full", "two"])
def test_prefill_and_decode_equal_a_model_without_caches(bundle, name):
    toy, batch = TOYS[name], batch_of(name)
    with Pipeline(bundle, name, RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        for _ in range(2):  # the second prompt finds the caches of the first
            result = pipeline.prefill(batch, features)
            rows = [list(batch.unpadded(row)) for row in range(toy.batch)]
            logits = result.logits
            for step in range(toy.max_new + 1):
                for row, tokens in enumerate(rows):
                    expected = toy.reference(np.array(tokens), features.image_features[row], batch.visual_index[row])
                    np.testing.assert_allclose(logits[row], expected, atol=ATOL)
                    tokens.append(int(logits[row].argmax()))
                assert pipeline.lengths == tuple(length + step for length in batch.lengths)
                if step < toy.max_new:
                    logits = pipeline.decode(np.array([tokens[-1] for tokens in rows]))
    assert logits.dtype == np.float32
    if toy.keep < NV:
        np.testing.assert_array_equal(result.kept_index[0], batch.visual_index[:, toy.kept])
    else:
        assert result.kept_index == ()


def test_sixteen_bits_are_fed_and_kept_as_such(tmp_path):
    toy = Toy(dtype="float16")
    batch = make_batch(toy, [[5, 6, 7]], [1])
    with Pipeline(make_bundle(tmp_path / "half", one=toy), "one", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)  # float32 from the processor
        pipeline.prefill(batch, features)
        logits = pipeline.decode(np.array([9]))
        assert {features.image_features.dtype, pipeline.caches()[0][0].dtype} == {np.dtype(np.float16)}
    assert logits.dtype == np.float32
    expected = toy.reference(np.array([*batch.unpadded(0), 9]), features.image_features[0], batch.visual_index[0])
    np.testing.assert_allclose(logits[0], expected, atol=0.02)


def test_caches_hold_what_was_read_and_written(bundle):
    toy, batch = TOYS["one"], batch_of("one")
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        pipeline.prefill(batch, features)
        before = pipeline.caches()
        pipeline.decode(np.array([7]))
        after = pipeline.caches()
    assert [key.shape[2] for key, _ in before] == [toy.profile.capacity(), toy.profile.capacity(NV - toy.keep)]
    for layer, row in enumerate((batch.lengths[0], batch.lengths[0] - (NV - toy.keep))):
        for old, new in zip(before[layer], after[layer], strict=True):
            changed = np.flatnonzero((old != new).any(axis=(0, 1, 3)))
            assert changed.tolist() == [row]


def test_pictures_are_remembered_by_content_whatever_the_row(bundle):
    batch = batch_of("two")
    with Pipeline(bundle, "two", RUNTIME) as pipeline:
        calls: list[int] = []
        session = pipeline._sessions["vision_encoder"]
        run = session.run
        session.run = lambda *arguments: calls.append(1) or run(*arguments)  # type: ignore[method-assign, func-returns-value]
        first = pipeline.encode(batch.pixel_values).image_features
        swapped = pipeline.encode(batch.pixel_values[::-1]).image_features
        assert len(calls) == 1
        np.testing.assert_array_equal(swapped, first[::-1])
        pipeline.encode(batch.pixel_values + 1)
        assert len(calls) == 2
        for shift in range(2, 8):
            pipeline.encode(batch.pixel_values + shift)
        pipeline.encode(batch.pixel_values)  # the oldest two, now the newest
        pipeline.encode(batch.pixel_values + 8)
        assert len(pipeline._seen) == 16
        count = len(calls)
        pipeline.encode(batch.pixel_values)
        assert len(calls) == count
        pipeline.encode(batch.pixel_values + 1)
        assert len(calls) == count + 1
        with pytest.raises(ProfileError, match=r"pixel_values has shape \(1, 3, 4, 4\), expected \(2, 3, 4, 4\)"):
            pipeline.encode(batch.pixel_values[:1])


def test_slots_of_a_larger_decode_batch_are_filled_one_by_one(bundle):
    toy = TOYS["slots"]
    with Pipeline(bundle, "slots", RUNTIME) as pipeline:
        rows: dict[int, tuple[list[int], PromptBatch]] = {}
        tokens = np.full(3, IDLE)

        def start(slot: int, prompt: int) -> None:
            batch = batch_of("slots", slice(prompt, prompt + 1))
            logits = pipeline.prefill(batch, pipeline.encode(batch.pixel_values)).logits
            pipeline.fill(slot, 0)
            tokens[slot] = logits[0].argmax()
            rows[slot] = ([*batch.unpadded(0), int(tokens[slot])], batch)

        def step() -> None:
            logits = pipeline.decode(tokens)
            for slot, (ids, batch) in rows.items():
                features = pipeline.encode(batch.pixel_values).image_features[0]
                np.testing.assert_allclose(logits[slot], toy.reference(np.array(ids), features, batch.visual_index[0]), atol=ATOL)
                tokens[slot] = logits[slot].argmax()
                ids.append(int(tokens[slot]))

        start(2, 0)
        step()
        start(0, 1)  # while slot 2 is under way; slot 1 stays empty
        step()
        step()
        start(2, 2)  # a slot is used again
        step()
        assert pipeline.lengths == (len(rows[0][0]) - 1, 0, len(rows[2][0]) - 1)


def test_an_idle_slot_stays_where_it_is(bundle):
    toy, batch = TOYS["two"], batch_of("two")
    with Pipeline(bundle, "two", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        pipeline.prefill(batch, features)
        for token in (20, 21):
            pipeline.decode(np.array([token, IDLE]))
        logits = pipeline.decode(np.array([IDLE, 22]))
        expected = toy.reference(np.array([*batch.unpadded(1), 22]), features.image_features[1], batch.visual_index[1])
        np.testing.assert_allclose(logits[1], expected, atol=ATOL)
        assert pipeline.lengths == (batch.lengths[0] + 2, batch.lengths[1] + 1)


def test_a_full_cache_is_an_error_that_says_what_to_do(bundle):
    toy = TOYS["one"]
    batch = make_batch(toy, [[5, 6, 7, 8, 9, 10]], [1])  # no padding: exactly max_new_tokens rows are left
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        pipeline.prefill(batch, pipeline.encode(batch.pixel_values))
        for _ in range(toy.max_new):
            pipeline.decode(np.array([7]))
        with pytest.raises(ProfileError, match=r"slot 0: the cache is full at 15 tokens.*max_new_tokens=5.*--max-new-tokens"):
            pipeline.decode(np.array([7]))
        pipeline.decode(np.array([IDLE]))


def test_decode_refuses_what_it_cannot_feed(bundle):
    batch = batch_of("two")
    with Pipeline(bundle, "two", RUNTIME) as pipeline:
        with pytest.raises(EngineError, match="slot 0 is empty"):
            pipeline.decode(np.array([5, 6]))
        pipeline.prefill(batch, pipeline.encode(batch.pixel_values))
        with pytest.raises(ProfileError, match="decode takes 2 integer tokens"):
            pipeline.decode(np.array([5]))
        with pytest.raises(ProfileError, match="decode takes 2 integer tokens"):
            pipeline.decode(np.array([5.0, 6.0]))
        with pytest.raises(ProfileError, match=r"slot 1: token 40 is outside the vocabulary 0\.\.39"):
            pipeline.decode(np.array([5, 40]))
        with pytest.raises(EngineError, match="share their caches"):
            pipeline.fill(0, 1)
        with pytest.raises(EngineError, match="row 2 was not prefilled"):
            pipeline.fill(0, 2)
        assert pipeline.lengths == batch.lengths


def test_wrong_prompt_shapes_are_named(bundle):
    batch = batch_of("one")
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        with pytest.raises(ProfileError, match=r"input_ids has shape \(1, 9\), expected \(1, 10\)"):
            pipeline.prefill(replace(batch, input_ids=batch.input_ids[:, :9]), features)
        with pytest.raises(ProfileError, match="attention_mask has type float64, expected int64"):
            pipeline.prefill(replace(batch, attention_mask=batch.attention_mask * 1.0), features)


def test_a_nan_does_not_outlive_its_prompt(bundle):
    toy, batch = TOYS["one"], batch_of("one")
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        long = make_batch(toy, [[5, 6, 7, 8, 9, 10]], [1])
        result = pipeline.prefill(long, replace(features, values={"image_features": features.image_features * np.nan}))
        assert np.isnan(result.logits).all()
        assert np.isnan(pipeline.decode(np.array([7]))).all()  # in a row that no prompt reaches
        short = make_batch(toy, [[5]], [1])
        pipeline.prefill(short, features)
        assert np.isfinite(pipeline.decode(np.array([6]))).all()
        pipeline.caches()[0][0][:] = np.nan  # copies: nothing of the pipeline's own
        assert np.isfinite(pipeline.decode(np.array([6]))).all()


def test_exposed_values_are_returned_as_extra(bundle):
    model = onnx.load(bundle.graph_file("prefill", variant="one"), load_external_data=False)
    model.graph.output.append(onnx.helper.make_tensor_value_info("y0", onnx.TensorProto.FLOAT, (1, 10, 8)))
    batch = batch_of("one")
    graphs = {"prefill": model.SerializeToString()}
    with Pipeline(bundle, "one", RUNTIME, graphs=graphs) as pipeline, Pipeline(bundle, "one", RUNTIME) as plain:
        features = pipeline.encode(batch.pixel_values)
        result, expected = pipeline.prefill(batch, features), plain.prefill(batch, features)
    assert result.extra.keys() == {"y0"}
    assert result.extra["y0"].shape == (1, 10, 8)
    assert result.inputs_embeds.shape == (1, 10, 8)
    assert not expected.extra
    np.testing.assert_allclose(result.logits, expected.logits, atol=ATOL)


def test_a_picture_that_is_no_numbers_is_an_error(bundle):
    batch = batch_of("one")
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        with pytest.raises(EngineError, match="vision_encoder gave NaN or infinity in image_features"):
            pipeline.encode(batch.pixel_values * np.float32(np.nan))
        assert np.isfinite(pipeline.encode(batch.pixel_values).image_features).all()  # nothing of it was remembered


def test_a_token_kept_twice_is_an_error(bundle, monkeypatch):
    batch = batch_of("one")
    with Pipeline(bundle, "one", RUNTIME) as pipeline:
        run, features = pipeline._run, pipeline.encode(batch.pixel_values)

        def repeat(graph, values):
            outputs = run(graph, values)
            if "kept_index.0" in outputs:
                outputs["kept_index.0"] = outputs["kept_index.0"] * 0 + 3
            return outputs

        monkeypatch.setattr(pipeline, "_run", repeat)
        with pytest.raises(EngineError, match="stage 0 kept a token twice"):
            pipeline.prefill(batch, features)


def test_a_prompt_without_a_question_is_refused_where_a_selector_reads_it(bundle):
    toy = TOYS["two"]
    batch = make_batch(toy, [[5, 6, 7], [5, 6, 7]], [1, 3])  # the second image stands at the end
    with Pipeline(bundle, "two", RUNTIME) as pipeline:
        features = pipeline.encode(batch.pixel_values)
        assert batch.without_question() == 1
        assert np.isfinite(pipeline.prefill(batch, features).logits).all()
        pipeline.variant = pipeline.variant.model_copy(update={"reads_question": True})
        with pytest.raises(PromptError, match="prompt 2 of 2 has no text after the image"):
            pipeline.prefill(batch, features)
        assert make_batch(toy, [[5, 6, 7]], [1]).without_question() is None


def test_what_does_not_exist_is_refused(bundle):
    with pytest.raises(VariantError, match="no variant 'iwp'"):
        Pipeline(bundle, "iwp", RUNTIME)
    with pytest.raises(
        InputError, match="engine 'onnx' does not exist: choose one of onnxruntime, onnxruntime-cuda, tensorrt-rtx, tensorrt"
    ):
        Pipeline(bundle, "one", "onnx")
    with pytest.raises(VariantError, match="no engine 'tensorrt-rtx'"):
        Pipeline(bundle, "one", "tensorrt-rtx")
    with pytest.raises(VariantError, match="no engine 'tensorrt-rtx'"):
        Pipeline(bundle, "one", RUNTIME, lowered_for="tensorrt-rtx")
    with pytest.raises(EngineError, match="runs engine files"):
        Pipeline(bundle, "one", TensorRT(), lowered_for="tensorrt-rtx")


def add_engine(bundle: Bundle, variant: str, engine: str, *, lowered: dict[str, bytes], built: bool = False) -> None:
    """Record an engine whose lowered files are ``lowered``, or the graphs themselves; its engine files are those again."""
    with bundle.step("build") as step:
        graphs = {}
        for name, entry in bundle.variant(variant).graphs.items():
            file = step.add_bytes(f"low-{name}", ".onnx", lowered[name]) if name in lowered else entry.file
            digest = (step.added.get(file) or step.manifest.files[file]).sha256
            engine_file = step.add_bytes(f"engine-{name}", ".engine", (bundle.path / file).read_bytes()) if built else None
            graphs[name] = EngineFile(lowered=file, built_from=digest, file=engine_file, builder="test", seconds=0.0)
        step.put_engine(variant, engine, EngineEntry(target=engine, graphs=graphs))


def test_lowered_files_run_in_their_place(tmp_path: Path):
    toy = Toy()
    bundle = make_bundle(tmp_path / "bundle", one=toy)
    other = onnx.load(bundle.graph_file("decode", variant="one"), load_external_data=False)
    head = next(node for node in other.graph.node if node.output[0] == "logits")
    head.op_type = "Abs"  # another answer, so that the file in use is seen
    del head.attribute[:]
    add_engine(bundle, "one", "tensorrt-rtx", lowered={"decode": other.SerializeToString()}, built=True)
    batch = make_batch(toy, [[5, 6, 7]], [1])
    answers = []
    for lowered_for in ("", "tensorrt-rtx"):
        with Pipeline(bundle, "one", RUNTIME, lowered_for=lowered_for) as pipeline:
            pipeline.prefill(batch, pipeline.encode(batch.pixel_values))
            answers.append(pipeline.decode(np.array([9])))
    np.testing.assert_allclose(answers[1], np.abs(answers[0]), atol=ATOL)
    assert (answers[0] < 0).any()
    if TensorRT().unavailable():
        with pytest.raises(EngineUnavailableError):
            Pipeline(bundle, "one", "tensorrt-rtx")


def test_a_graph_that_is_not_what_the_manifest_says(tmp_path: Path):
    bundle = make_bundle(tmp_path / "bundle", one=Toy(), two=Toy(batch=2, decode_batch=2))
    swapped = bundle.graph_file("decode", variant="two").read_bytes()
    add_engine(bundle, "one", "onnxruntime", lowered={"decode": swapped})
    with pytest.raises(IntegrityError, match=r"decode: the loaded file lacks input_ids int64\(1, 1\)"):
        Pipeline(bundle, "one", RUNTIME)


def test_a_closed_pipeline_says_so(bundle):
    pipeline = Pipeline(bundle, "one", RUNTIME)
    pipeline.close()
    with pytest.raises(EngineError, match="was closed"):
        pipeline.decode(np.array([IDLE]))
    assert pipeline.caches() == []
