"""`sievert collect` and `sievert ranges`: what they say, what they leave, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sievert.engines.run.pipeline import Pipeline
from tests.api.conftest import content, sievert
from tests.api.test_bad_input import refused

PROMPTS = ("which digit is red ?", "what is the colour ?", "which ?")


@pytest.fixture
def data(tmp_path: Path, picture: Path) -> Path:
    """Three questions about one picture, in a folder with nothing else."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.open(picture).save(folder / "a.png")
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", "prompt": prompt, "answer": "unused"}) + "\n" for prompt in PROMPTS))
    return path


def test_collect_and_ranges_say_what_they_did_and_what_is_next(bundle: Path, data: Path, tmp_path: Path):
    before = content(bundle)
    said = sievert("collect", bundle, "--data", data.parent, "--decode-steps", "1,8,")
    assert said.code == 0, said.all
    out = tmp_path / "bundle-calibration"
    stored = sum(path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors")
    for part in (
        f"Collected 3 samples of questions.jsonl through full: {stored / 2**20:.1f} MiB in {out}",
        "decode was fed token 1 of 3 answers",
        "no caches (they are zero)",
        f"Next: sievert ranges {bundle} --collection {out}",
    ):
        assert part in said.out, said.out
    assert "samples: 3 of 3" in said.err and "random" not in said.all
    info = json.loads((out / "collection.json").read_text())
    assert (info["variant"], info["random"], info["decode_steps"]) == ("full", False, [1, 8])
    said = sievert("ranges", bundle, "--worst", 3, "--json", tmp_path / "ranges.json")
    assert said.code == 0, said.all
    assert "full in float16: 0 tensors overflow" in said.out and "--variant full --format float16" in said.out and "headroom" in said.out
    report = json.loads((tmp_path / "ranges.json").read_text())
    assert (report["variant"], report["dtype"], report["limit"], report["keep_float32"]) == ("full", "float16", 65504, [])
    assert len(report["tensors"]) > 200 and report["runs"]["prefill"] == 3
    assert content(bundle) == before


def test_random_data_is_never_used_in_silence(bundle: Path, tmp_path: Path):
    refused("collect", bundle, says=("no data was given", "--data", "--random"), keeps=bundle)
    refused("collect", bundle, "--random", "--data", "x.jsonl", says="leave out one of --random and --data", keeps=bundle)
    said = sievert("collect", bundle, "--random", "--samples", 2, "--variant", "iwp-22", "--out", tmp_path / "made-up")
    assert said.code == 0, said.all
    assert "Collected 2 random samples through iwp-22" in said.out and "this calibration data is random" in said.out
    said = sievert("ranges", bundle, "--collection", tmp_path / "made-up", "--engine", "tensorrt-rtx", "--dtype", "bfloat16")
    assert said.code == 0, said.all
    assert "warning: this calibration data is random" in said.err and "iwp-22 in bfloat16" in said.out


def test_overflow_is_shown_with_its_reason(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sievert.calibration import formats

    small = formats.Format("float16", 3.0, 2.0**-14)
    monkeypatch.setattr(formats, "FORMATS", {"float16": small})
    assert sievert("collect", shared, "--data", data, "--samples", 2, "--decode-steps", 1, "--out", tmp_path / "out").code == 0
    said = sievert("ranges", shared, "--collection", tmp_path / "out")
    assert said.code == 0, said.all
    for part in (
        "keep float32 vision_encoder",
        "of 2 runs, float16 ends at 3",
        "more, all in --json",
        "more overflow further on",
        "--format float16 --collection",
        "--format bfloat16 --collection",
    ):
        assert part in said.out, said.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--samples", 1), ("1 sample calibrates nothing", "at least 2")),
        (("--samples", 0), "samples=0"),
        (("--variant", "gone"), ("no variant 'gone'", "full, iwp-22")),
        (("--engine", "fastest"), ("'fastest'", "onnxruntime")),
        (("--decode-steps", "0"), "at least one step"),
        (("--decode-steps", "9,1"), ("decode_steps=9,1", "1..8")),
        (("--decode-steps", "many"), ("'many'", "1,4,16")),
        (("--out", "{bundle}/x"), "inside the bundle"),
        (("--out", "{data}"), ("is a file", "--out")),
        (("--out", "{folder}"), ("holds other files", "--out")),
    ],
)
def test_collect_refuses_what_it_cannot_do(bundle: Path, data: Path, tmp_path: Path, options: tuple[object, ...], says: Any):
    filled = [str(each).format(bundle=bundle, data=data, folder=data.parent) for each in options]
    refused("collect", bundle, "--data", data, *filled, says=says, keeps=bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "data"]


def test_data_that_cannot_be_used_is_named(shared: Path, data: Path, tmp_path: Path):
    out = ("--out", tmp_path / "out")
    good = data.read_text()
    data.write_text(good + json.dumps({"image": "b.png", "prompt": "x"}))
    refused("collect", shared, "--data", data, *out, says=("line 4", "b.png does not exist"))
    data.write_text(good + json.dumps({"image": "a.png", "prompt": "w1 " * 40}))
    refused("collect", shared, "--data", data, *out, says=("line 4", "text tokens"))
    data.write_text(good.splitlines()[0])
    refused("collect", shared, "--data", data, *out, says="1 sample calibrates nothing")
    (data.parent / "more.jsonl").write_text(good)
    refused("collect", shared, "--data", data.parent, *out, says=("one .jsonl file", "more.jsonl, questions.jsonl"))
    refused("collect", shared, "--data", tmp_path / "no.jsonl", *out, says=("no.jsonl", "cannot be read"))
    refused("ranges", shared, "--collection", tmp_path, says=("holds no calibration data", "sievert collect"))
    refused("ranges", shared, "--collection", tmp_path, "--json", tmp_path / "no" / "x.json", says="cannot be written")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_collect_leaves_nothing(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ("collect", shared, "--data", data, "--decode-steps", 1, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        said = sievert(*asked)
    assert said.code == 130, said.all
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert sievert(*asked).code == 0
    refused(*asked, says=("already holds calibration data", "--force"), keeps=tmp_path / "out")
    before = content(tmp_path / "out")
    assert sievert(*asked, "--force").code == 0
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "prefill-00001.safetensors").write_bytes(b"other")
    refused("ranges", shared, "--collection", tmp_path / "out", says=("prefill-00001.safetensors", "changed since it was collected"))
