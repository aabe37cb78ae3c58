"""What is collected is what the graphs are fed, the same bytes each time; what cannot calibrate anything is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import sievert
from sievert.bundle.errors import CalibrationError, ProfileError, PromptError
from sievert.bundle.names import LOCK
from sievert.bundle.profile import Profile
from sievert.bundle.specs import TensorSpec
from sievert.bundle.store import Bundle
from sievert.calibration.collect import choose_steps, collect, count_steps
from sievert.calibration.collection import Collection, load_collection
from sievert.calibration.material import use_questions
from sievert.calibration.questions import read_questions
from sievert.calibration.record import NAME, CollectionInfo, read_info, render, seal
from sievert.calibration.tensors import pack, unpack
from sievert.engines.run.base import ModelFile
from sievert.engines.run.generate import generate
from sievert.engines.run.ort import OnnxRuntime, OrtSession
from sievert.engines.run.pipeline import Features, Pipeline
from sievert.engines.run.prompt import Prompter
from tests.calibration.conftest import PROMPTS, edit_weight


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK} if folder.exists() else {}


def load(bundle: Bundle, variant: str, graph: str) -> OrtSession:
    """A graph without a pipeline: caches are inputs like others."""
    return OnnxRuntime(threads=1).load(ModelFile(bundle.graph_file(graph, variant=variant), ""))


def refused(folder: Path, bundle: Path, *says: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_collection(folder, Bundle.open(bundle))
    for part in says:
        assert part in str(caught.value), caught.value


def find_decodes(info: CollectionInfo) -> dict[tuple[int, int], tuple[int, int]]:
    """Run and slot of decode, by sample and step."""
    feeds = enumerate(info.graphs["decode"].feeds)
    return {(sample, feed.step): (run, slot) for run, feed in feeds for slot, sample in enumerate(feed.samples) if sample is not None}


@pytest.fixture
def collection(made: Path, data: Path, tmp_path: Path) -> Collection:
    return sievert.collect(made, data, samples=2, decode_steps=1, out=tmp_path / "out")


@pytest.mark.parametrize("variant", ["full", "iwp-22", "pair", "slots"])
def test_every_run_of_every_graph_can_be_repeated(made: Path, data: Path, tmp_path: Path, variant: str):
    found = sievert.collect(made, data, variant=variant, decode_steps=[1, 3], out=tmp_path / "out")
    bundle, info = Bundle.open(made), found.info
    profile = bundle.variant(variant).profile
    prompter = Prompter(bundle.path, bundle.manifest.geometry, profile)
    questions = read_questions(data).questions
    assert [sample.line for sample in info.samples] == [2, 3, 4, 5, 6]
    runs = -(-5 // profile.batch)
    assert [found.count(graph) for graph in ("vision_encoder", "embed_tokens", "prefill")] == [runs] * 3
    assert found.graphs[-1] == "decode" and runs <= found.count("decode") <= 2 * runs
    decoded = find_decodes(info)
    sessions = {graph: load(bundle, variant, graph) for graph in found.graphs}
    for number in range(runs):
        asked = questions[number * profile.batch : (number + 1) * profile.batch]
        batch = prompter.prepare([each.images for each in asked], [each.prompt for each in asked])
        fed = {graph: found.feed(graph, number) for graph in ("vision_encoder", "embed_tokens", "prefill")}
        np.testing.assert_array_equal(fed["vision_encoder"]["pixel_values"], batch.pixel_values)
        np.testing.assert_array_equal(fed["embed_tokens"]["input_ids"], batch.input_ids)
        features = sessions["vision_encoder"].run(fed["vision_encoder"])
        np.testing.assert_allclose(fed["embed_tokens"]["image_features"], features["image_features"], atol=1e-5)
        if "visual_scores" in features:
            np.testing.assert_allclose(fed["prefill"]["visual_scores"], features["visual_scores"], atol=1e-5)
        embeds = sessions["embed_tokens"].run(fed["embed_tokens"])["inputs_embeds"]
        np.testing.assert_array_equal(fed["prefill"]["inputs_embeds"], embeds)
        outputs = sessions["prefill"].run(fed["prefill"])
        numbers = [sample for sample in info.graphs["prefill"].feeds[number].samples if sample is not None]
        assert [outputs["logits"][row].argmax() for row in range(len(numbers))] == [info.samples[each].tokens[0] for each in numbers]
        for row, sample in enumerate(numbers):
            if (sample, 1) in decoded:
                run, slot = decoded[sample, 1]
                cached = found.feed("decode", run)["past_key_values.1.value"][slot]
                np.testing.assert_allclose(cached, outputs["present.1.value"][row], atol=1e-5)
    for number, feed in enumerate(info.graphs["decode"].feeds):
        arrays = found.feed("decode", number)
        logits = sessions["decode"].run(arrays)["logits"]
        for row, holder in enumerate(feed.samples):
            if holder is not None:
                tokens = info.samples[holder].tokens
                assert (arrays["input_ids"][row, 0], logits[row].argmax()) == (tokens[feed.step - 1], tokens[feed.step])
    with Pipeline(bundle, variant) as pipeline:
        batch = prompter.prepare([questions[4].images], [PROMPTS[4]])
        (said,) = generate(pipeline, prompter.tokenizer, batch, max_new_tokens=4)
    assert said.tokens == info.samples[4].tokens


def test_the_same_data_gives_the_same_bytes_and_another_place_in_the_order_the_same_inputs(made: Path, data: Path, tmp_path: Path):
    first = sievert.collect(made, data, decode_steps=2, out=tmp_path / "first")
    sievert.collect(made, data.parent, decode_steps=2, out=tmp_path / "again")
    assert content(tmp_path / "first") == content(tmp_path / "again")
    assert "out" not in content(tmp_path / "first")[NAME].decode() and str(tmp_path) not in content(tmp_path / "first")[NAME].decode()
    lines = [line for line in data.read_text().split("\n") if line]
    data.write_text("\n".join(reversed(lines)))
    turned = sievert.collect(made, data, decode_steps=2, out=tmp_path / "turned")
    assert turned.info.data.sha256 != first.info.data.sha256
    runs, other = find_decodes(first.info), find_decodes(turned.info)
    pairs = [("decode", run, other[4 - sample, step][0]) for (sample, step), (run, _) in runs.items()]
    pairs += [(graph, place, 4 - place) for graph in ("vision_encoder", "embed_tokens", "prefill") for place in range(5)]
    for graph, run, again in pairs:
        there, here = first.feed(graph, run), turned.feed(graph, again)
        for name in there:  # what an earlier prompt left in the caches is not among it
            np.testing.assert_array_equal(there[name], here[name], err_msg=f"{graph} {name}")
    fed = first.feed("decode", 0)
    assert not fed["past_key_values.1.key"][:, :, max(int(fed["cache_row"][0]), 16 + 24) :].any()


def test_a_picture_that_is_asked_about_twice_is_stored_once(made: Path, data: Path, tmp_path: Path):
    found = sievert.collect(made, data, decode_steps=1, out=tmp_path / "out")
    files = [feed.file for feed in found.info.graphs["vision_encoder"].feeds]
    assert len(files) == 5 and len(set(files)) == 2
    assert {path.name for path in found.path.iterdir()} == {NAME, *found.info.files}
    assert found.info.stored_bytes == sum(path.stat().st_size for path in found.path.iterdir()) - (found.path / NAME).stat().st_size
    assert found.info.graphs["prefill"].zeros and not found.feed("prefill", 0)["past_key_values.0.key"].any()


def test_an_answer_that_ends_is_not_followed_further(made: Path, data: Path, tmp_path: Path):
    opened = Bundle.open(made)
    endless = opened.manifest.geometry.model_copy(update={"eos_token_ids": ()})
    material = use_questions(read_questions(data, limit=3), template=True)
    whole = collect(
        Bundle(opened.path, opened.manifest.model_copy(update={"geometry": endless})), "full", tmp_path / "whole", material, steps=(1, 2)
    )
    tokens = [sample.tokens for sample in whole.info.samples]
    assert count_steps(whole.info) == {1: 3, 2: 3} and [len(each) for each in tokens] == [3, 3, 3]
    stop = tokens[0][1]
    geometry = opened.manifest.geometry.model_copy(update={"eos_token_ids": (stop,)})
    stopping = Bundle(opened.path, opened.manifest.model_copy(update={"geometry": geometry}))
    found = collect(stopping, "full", tmp_path / "stopped", material, steps=(1, 2))
    expected = [each[: each.index(stop) + 1] if stop in each else each for each in tokens]
    assert [sample.tokens for sample in found.info.samples] == expected
    assert count_steps(found.info)[2] == sum(stop not in each[:2] for each in tokens) < 3
    at_once = geometry.model_copy(update={"eos_token_ids": tuple(range(96))})
    silent = Bundle(opened.path, opened.manifest.model_copy(update={"geometry": at_once}))
    with pytest.raises(CalibrationError, match="no answer reaches decode step 1: the longest has 1 tokens"):
        collect(silent, "full", tmp_path / "none", material, steps=(1, 2))
    assert not (tmp_path / "none").exists()


def test_a_sample_that_leads_to_nan_is_named_by_its_line(made: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Pipeline.encode
    seen = 0

    def encode(pipeline: Pipeline, pixels: Any) -> Features:
        nonlocal seen
        seen += 1
        found = real(pipeline, pixels)
        if seen == 2:
            found.image_features[len(pixels) - 1, 3, 5] = np.nan
        return found

    monkeypatch.setattr(Pipeline, "encode", encode)
    with pytest.raises(CalibrationError, match=r"questions.jsonl, line 3: embed_tokens was fed NaN or infinity in 'image_features'"):
        sievert.collect(made, data, out=tmp_path / "out")
    seen = 0
    with pytest.raises(CalibrationError, match=r"line 3: embed_tokens was fed NaN"):  # and not that prefill keeps tokens twice
        sievert.collect(made, data, variant="iwp-22", out=tmp_path / "out")
    seen = 0
    with pytest.raises(CalibrationError, match=r"line 5: embed_tokens was fed NaN"):  # the second row of the second pair
        sievert.collect(made, data, variant="pair", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_picture_whose_features_are_nan_is_named_by_its_line(made: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = OrtSession.run

    def run(session: OrtSession, feeds: Any, outputs: Any = None) -> Any:
        found = dict(real(session, feeds, outputs))
        if "pixel_values" in feeds:
            found["image_features"] = found["image_features"].copy()
            found["image_features"][1, 3, 5] = np.inf
        return found

    monkeypatch.setattr(OrtSession, "run", run)
    with pytest.raises(CalibrationError, match=r"line 3: vision_encoder gave NaN or infinity in 'image_features'"):
        sievert.collect(made, data, variant="pair", out=tmp_path / "out")


@pytest.mark.parametrize("random", [False, True])
def test_prompts_with_several_images(made: Path, data: Path, tmp_path: Path, random: bool):
    names = [["a.png", "b.png"], ["b.png", "a.png"], ["a.png", "a.png"]]
    data.write_text("\n".join(json.dumps({"images": each, "prompt": PROMPTS[0]}) for each in names))
    found = sievert.collect(made, "" if random else data, variant="two", samples=3, random=random, decode_steps=1, out=tmp_path / "out")
    info, bundle = found.info, Bundle.open(made)
    assert sievert.load_collection(tmp_path / "out", made).info == info
    assert (info.profile.images, info.profile.visual_tokens) == (2, 32)
    assert [found.feed("vision_encoder", run)["pixel_values"].shape for run in range(2)] == [(2, 2, 3, 32, 32)] * 2
    assert all(len(sample.images) == len(sample.images_sha256) == 2 for sample in info.samples)
    sessions = {graph: load(bundle, "two", graph) for graph in ("vision_encoder", "embed_tokens", "prefill")}
    for run in range(2):
        features = sessions["vision_encoder"].run(found.feed("vision_encoder", run))["image_features"]
        np.testing.assert_allclose(found.feed("embed_tokens", run)["image_features"], features, atol=1e-5)
        first = sessions["prefill"].run(found.feed("prefill", run))["logits"].argmax(axis=1)
        numbers = [sample for sample in info.graphs["prefill"].feeds[run].samples if sample is not None]
        assert [info.samples[sample].tokens[0] for sample in numbers] == list(first[: len(numbers)])
    if not random:
        hashes = {name: hashlib.sha256((data.parent / name).read_bytes()).hexdigest() for name in ("a.png", "b.png")}
        assert [sample.images for sample in info.samples] == [tuple(each) for each in names]
        assert [sample.images_sha256 for sample in info.samples] == [tuple(hashes[name] for name in each) for each in names]
        pixels = found.feed("vision_encoder", 0)["pixel_values"]
        np.testing.assert_array_equal(pixels[0], pixels[1, ::-1])
        prompter = Prompter(bundle.path, bundle.manifest.geometry, bundle.variant("two").profile)
        batch = prompter.prepare([each.images for each in read_questions(data).questions[:2]], [PROMPTS[0]] * 2)
        np.testing.assert_array_equal(pixels, batch.pixel_values)
    measured = sievert.ranges(made, tmp_path / "out")
    assert measured.variant == "two" and not measured.keep_float32 and measured.runs["vision_encoder"] == 2
    rewrite(found, profile=info.profile.model_copy(update={"visual_tokens": 16}))
    refused(found.path, made, "16 visual tokens, this model has 32 for 2 images")


def test_lines_with_another_number_of_images_than_the_variant_takes_are_named(made: Path, data: Path, tmp_path: Path):
    with pytest.raises(PromptError, match=r"line 2: 1 image for a prompt, but this variant takes 2 per prompt"):
        sievert.collect(made, data, variant="two", out=tmp_path / "out")
    data.write_text(json.dumps({"images": ["a.png", "b.png"], "prompt": PROMPTS[0]}) + "\n" + data.read_text())
    with pytest.raises(PromptError, match=r"line 1: 2 images for a prompt, but this variant takes 1 per prompt"):
        sievert.collect(made, data, out=tmp_path / "out")


def test_a_model_that_overflows_its_own_type_is_refused(bundle: Path, data: Path, tmp_path: Path):
    edit_weight(bundle, "layers.0.mlp.up_proj", lambda weight: weight * 1e38)
    with pytest.raises(CalibrationError, match="line 2: .* NaN or infinity .* overflows in its own type"):
        sievert.collect(bundle, data, out=tmp_path / "out")


def test_random_data_says_so_each_time(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = sievert.collect(made, random=True, samples=2, decode_steps=1, out=tmp_path / "out")
    assert found.random and "random" in repr(found) and read_info(tmp_path / "out").random
    for _ in range(2):
        caplog.clear()
        assert sievert.load_collection(tmp_path / "out", made).random
        assert "this calibration data is random" in caplog.text
    assert found.name_samples("prefill", 1) == "random sample 2"
    sievert.collect(made, random=True, samples=2, decode_steps=1, out=tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_an_interrupted_collection_leaves_what_was_there(collection: Collection, data: Path, monkeypatch: pytest.MonkeyPatch):
    place, made = collection.path, collection.bundle.path
    before, around = content(place), sorted(place.parent.iterdir())
    real = Pipeline.decode
    steps = 0

    def decode(pipeline: Pipeline, tokens: Any) -> Any:
        nonlocal steps
        if (steps := steps + 1) == 3:
            raise KeyboardInterrupt
        return real(pipeline, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "decode", decode)
        with pytest.raises(KeyboardInterrupt):
            sievert.collect(made, data, out=place, force=True)
    assert content(place) == before and sorted(place.parent.iterdir()) == around
    killed = place.with_name(f".{place.name}.sievert-tmp-0123456789abcdef")
    killed.mkdir()
    (killed / "prefill-00000.safetensors").write_bytes(b"half")
    found = sievert.collect(made, data, samples=3, out=place, force=True)
    assert sorted(place.parent.iterdir()) == around
    assert len(found.info.samples) == 3 and load_collection(place, found.bundle).info == found.info
    assert set(content(place)) == {NAME, *found.info.files}


def test_data_that_changes_meanwhile_is_not_kept(made: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Pipeline.prefill

    def prefill(pipeline: Pipeline, *given: Any) -> Any:
        Image.new("RGB", (8, 8)).save(data.parent / "a.png")
        return real(pipeline, *given)

    monkeypatch.setattr(Pipeline, "prefill", prefill)
    with pytest.raises(CalibrationError, match="were changed while they were collected"):
        sievert.collect(made, data, samples=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_changed_is_refused(collection: Collection, made: Path):
    path = collection.path
    name = collection.info.graphs["decode"].feeds[1].file
    good = content(path)
    for change, says in (
        (lambda: (path / name).write_bytes(good[name][:-1] + b"\0\0"), (name, "changed since it was collected")),
        (lambda: (path / name).write_bytes(good[name][:-1]), (name, "changed since it was collected")),
        (lambda: (path / name).unlink(), (name, "changed since it was collected", "missing")),
        (lambda: (path / NAME).write_text(good[NAME].decode().replace('"random": false', '"random": true')), (NAME, "changed since")),
        (lambda: (path / NAME).write_bytes(good[NAME][:-20]), (NAME, "malformed", "sievert collect")),
        (lambda: (path / NAME).write_text("[]"), (NAME, "malformed")),
        (lambda: (path / NAME).write_text(json.dumps({"format": 2})), ("format 2", "upgrade")),
        (lambda: (path / NAME).unlink(), ("no calibration data", "sievert collect")),
    ):
        change()
        refused(path, made, *says)
        for each, data in good.items():
            (path / each).write_bytes(data)
    assert load_collection(path, Bundle.open(made)).count("decode") == 2


def rewrite(collection: Collection, **changes: Any) -> None:
    """``collection.json`` with other content, as if it had been collected so."""
    (collection.path / NAME).write_bytes(render(seal(collection.info.model_copy(update=changes))))


def test_data_of_another_model_or_length_or_of_one_sample_is_refused(collection: Collection, bundle: Path):
    info = collection.info
    rewrite(collection, profile=info.profile.model_copy(update={"visual_tokens": 25}))
    refused(collection.path, bundle, "25 visual tokens, this model has 16")
    rewrite(collection, samples=info.samples[:1], graphs=_first_only(info))
    refused(collection.path, bundle, "1 sample, which calibrates nothing")
    rewrite(collection, files={name: entry for name, entry in info.files.items() if not name.startswith("prefill-00001")})
    refused(collection.path, bundle, "prefill-00001.safetensors without its hash")
    rewrite(collection, files={**info.files, "../other.safetensors": next(iter(info.files.values()))})
    refused(collection.path, bundle, "'..'")
    rewrite(collection)
    assert load_collection(collection.path, Bundle.open(bundle)).info == info
    edit_weight(bundle, "layers.1.mlp.up_proj", lambda weight: weight * 2)
    refused(collection.path, bundle, "another model", "their weights differ", "collect again")


def _first_only(info: CollectionInfo) -> Any:
    return {name: data.model_copy(update={"feeds": data.feeds[:1]}) for name, data in info.graphs.items()}


def test_data_of_a_variant_that_has_changed_is_refused(collection: Collection, bundle: Path):
    opened = Bundle.open(bundle)
    collection = Collection(collection.path, collection.info, opened)
    with pytest.raises(CalibrationError, match="collected from the variant 'full', which keeps other tokens than 'iwp-22': collect again"):
        collection.require_variant("iwp-22")
    with pytest.raises(CalibrationError, match=r"of other sizes than 'slots' has \(batch 1, now 2, decode_batch 1, now 3\)"):
        collection.require_variant("slots")
    sievert.prune(bundle, cuts=(), name="full", max_text=20, force=True)
    refused(collection.path, bundle, "max_text 24, now 20")
    sievert.prune(bundle, cuts=(), name="full", max_text=24, force=True)
    graphs = collection.info.graphs
    wider = graphs["decode"].inputs[0].model_copy(update={"dtype": "float16"})
    decode = graphs["decode"].model_copy(update={"inputs": (wider, *graphs["decode"].inputs[1:])})
    rewrite(collection, graphs={**graphs, "decode": decode})
    refused(collection.path, bundle, "decode took other inputs", wider.name)
    rewrite(collection, variant="gone")
    refused(collection.path, bundle, "a variant that is gone", "full, iwp-22")


def test_places_that_are_taken_are_refused(collection: Collection, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = collection.bundle.path
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    shutil.copytree(collection.path, tmp_path / "mixed")
    (tmp_path / "mixed" / "mine.txt").write_text("mine")
    for out, force, says in (
        (made / "data", False, "inside the bundle"),
        (data, False, "is a file"),
        (tmp_path / "other", True, "holds other files and no calibration data"),
        (collection.path, False, "already holds calibration data: .* --force"),
        (tmp_path / "mixed", True, "not the collection's .*mine.txt"),
    ):
        with pytest.raises(CalibrationError, match=says):
            sievert.collect(made, data, out=out, force=force)
    real = Pipeline.prefill

    def prefill(pipeline: Pipeline, *given: Any) -> Any:
        (tmp_path / "late").mkdir(exist_ok=True)
        (tmp_path / "late" / "mine.txt").write_text("mine")
        return real(pipeline, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "prefill", prefill)
        with pytest.raises(CalibrationError, match="holds other files"):
            sievert.collect(made, data, samples=2, out=tmp_path / "late", force=True)
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["mine.txt"]
    monkeypatch.setattr("sievert.calibration.collect.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(CalibrationError, match="5 samples need up to 2 MiB .* --samples or --decode-steps"):
        sievert.collect(made, data, decode_steps=[1, 2, 3, 4, 5, 6, 7, 8], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("asked", "expected"), [(1, (1,)), (3, (1, 2, 4)), (9, (1, 2, 4, 8)), ([5], (5,)), ([8, 1, 8], (1, 8)), ((10,), (10,))]
)
def test_decode_steps(asked: Any, expected: tuple[int, ...]):
    assert choose_steps(asked, Profile(visual_tokens=4, max_text=4, max_new_tokens=10)) == expected


@pytest.mark.parametrize("asked", [0, [], [0, 1], [11]])
def test_decode_steps_without_room_are_refused(asked: Any):
    with pytest.raises(ProfileError, match="decode_steps=|at least one step"):
        choose_steps(asked, Profile(visual_tokens=4, max_text=4, max_new_tokens=10))


def test_arrays_come_back_as_they_were(tmp_path: Path):
    arrays = {
        "b": np.linspace(-3, 3, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "h": np.array([[65504, -6e-8]], np.float16),
        "f": np.arange(6, dtype=np.float32).reshape(3, 2).T,
        "i": np.array([2**40], np.int64),
        "t": np.array([True, False]),
    }
    (tmp_path / "x.safetensors").write_bytes(pack(arrays))
    assert pack(dict(reversed(arrays.items()))) == pack(arrays)
    specs = [TensorSpec(name=name, dtype=array.dtype.name, shape=array.shape) for name, array in arrays.items()]
    found = unpack(tmp_path / "x.safetensors", specs)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    for wrong in (specs[:-1], [*specs[:-1], specs[-1].model_copy(update={"dtype": "int8"})]):
        with pytest.raises(CalibrationError, match="does not hold what was collected .t."):
            unpack(tmp_path / "x.safetensors", wrong)
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CalibrationError, match="cannot be read"):
        unpack(tmp_path / "x.safetensors", specs)
