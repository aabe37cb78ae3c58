"""What bad input gets: exit code 2, a message that says what, got, expected and next, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from sievert.bundle.manifest import FORMAT
from sievert.bundle.store import Bundle
from tests.api.conftest import content, sievert

ASK = "which digit is red ?"


def refused(*arguments: object, says: str | tuple[str, ...], keeps: Path | None = None) -> None:
    """The command ends with 2 and one message that says all of ``says``; ``keeps`` holds what it held."""
    before = content(keeps) if keeps is not None else {}
    said = sievert(*arguments)
    assert said.code == 2, said.all
    assert "Traceback" not in said.all
    for part in (says,) if isinstance(says, str) else says:
        assert part in said.err, said.err
    if keeps is not None:
        assert content(keeps) == before


# export


def _empty(folder: Path) -> None:
    (folder / "notes.txt").write_text("no checkpoint")


def _text_only(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))


def _other_family(folder: Path) -> None:
    config = {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))


def _remote_code(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_empty, "no config.json"),
        (_text_only, ("LlamaForCausalLM", "no vision tower", "LlavaForConditionalGeneration (towers: clip")),
        (_other_family, ("MllamaForConditionalGeneration", "LlavaForConditionalGeneration")),
        (_remote_code, ("auto_map", "not run unasked", "--trust-remote-code")),
    ],
)
def test_export_refuses_what_is_no_model_it_knows(make: Callable[[Path], None], says: str | tuple[str, ...], tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    refused("export", folder, tmp_path / "out", says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--layer", 4), ("layer=4", "4 layers", "choose 0..3")),
        (("--layer", -1), ("layer=-1", "choose 0..3")),
        (("--keep", 17), ("keep=17", "16 visual tokens", "choose 1..16")),
        (("--keep", "0"), ("keep=0", "choose 1..16")),
        (("--keep", "0.22"), ("keep=0.22 is ambiguous", "write 22%")),
        (("--keep", "1.0"), ("keep=1.0 is ambiguous", "write 100%")),
        (("--keep", "120%"), ("keep=120%", "at most at 100%")),
        (("--keep", "most"), ("'most'", "22%", "64")),
        (("--selector", "best"), ("'best'", "iwp")),
        (("--option", "power=2"), ("power", "strength")),
        (("--option", "strength=much"), ("strength='much'", "a number")),
        (("--option", "strength"), ("'strength'", "key=value")),
        (("--layer", 1, "--layer", 2, "--keep", 4), ("1 times --keep for 2 cuts", "one --layer and one --keep per cut")),
        (("--layer", 2, "--keep", 4, "--layer", 1, "--keep", 2), ("layers 2 and 1", "ascending order")),
        (("--no-prune", "--keep", 4), "--no-prune"),
        (("--max-text", 500), ("16 visual + 500 text + 128 new tokens = 644", "512", "lower --max-text")),
        (("--batch", 0), "batch=0"),
        (("--name", "a/b"), "'a/b' cannot name a variant"),
        (("--name", "full"), "'full' names the unpruned variant"),
        (("--engine", "fastest"), ("'fastest'", "onnxruntime")),
    ],
)
def test_export_refuses_what_the_model_cannot_take_before_it_writes(
    checkpoint: Path, tmp_path: Path, options: tuple[object, ...], says: str | tuple[str, ...]
):
    refused("export", checkpoint, tmp_path / "out", *options, says=says)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_dtype_and_a_missing_argument_as_usage_errors(checkpoint: Path, tmp_path: Path):
    refused("export", checkpoint, tmp_path / "out", "--dtype", "int3", says=("int3", "float16"))
    refused("export", says="MODEL")
    refused("exprot", says="Did you mean 'export'")


def test_export_leaves_alone_what_stands_at_its_place(checkpoint: Path, bundle: Path, tmp_path: Path):
    refused("export", checkpoint, bundle, says=("already holds a bundle", "--force"), keeps=bundle)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    refused("export", checkpoint, other, "--force", says="holds other files and no bundle", keeps=other)


# prune, build, check, run on a bundle that is in order


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prune", "--layer", 9), ("layer=9", "choose 0..3")),
        (("prune", "--keep", "0.5"), "write 50%"),
        (("prune", "--keep", "22%"), ("already has a variant 'iwp-22'", "--force")),
        (("prune", "--keep", "22%", "--name", "full", "--force"), "'full' names the unpruned variant"),
        (("build", "--variant", "iwp-23"), ("no variant 'iwp-23'", "full, iwp-22")),
        (("build", "--engine", "fastest"), ("'fastest'", "onnxruntime")),
        (("check", "--variant", "iwp-23"), ("no variant 'iwp-23'", "full, iwp-22")),
        (("check", "--engine", "fastest"), ("'fastest'", "onnxruntime")),
        (("check", "--engine", "tensorrt-rtx"), ("has no engine 'tensorrt-rtx'", "onnxruntime", "sievert build")),
        (("check", "--samples", 0), "at least one"),
        (("check", "--tokens", 9, "--samples", 1), ("tokens=9", "1..8")),
        (("check", "--data", "missing.jsonl"), ("missing.jsonl", '{"image"')),
        (("check", "--model", "./gone"), ("'./gone'", "--model")),
    ],
)
def test_commands_refuse_what_the_bundle_has_not(bundle: Path, arguments: tuple[object, ...], says: str | tuple[str, ...]):
    command, *options = arguments
    refused(command, bundle, *options, says=says, keeps=bundle)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", "w1 " * 40), ("text tokens, template included, but this variant takes 24", "--max-text")),
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "<image> what <image> ?"), ("3 image tokens", "expected 1")),
        (("--prompt", ASK, "--max-new-tokens", 9), ("max_new_tokens=9", "1..8", "--max-new-tokens")),
        (("--prompt", ASK, "--temperature", -1), "temperature=-1.0"),
        (("--prompt", ASK, "--top-p", 0), "top_p=0.0"),
        (("--prompt", ASK, "--variant", "iwp-23"), ("no variant 'iwp-23'", "full, iwp-22")),
        (("--prompt", ASK, "--engine", "fastest"), ("'fastest'", "onnxruntime")),
        (("--prompt", ASK, "--show-kept", "kept.jpg"), ".png"),
    ],
)
def test_run_refuses_prompts_and_options(shared: Path, picture: Path, options: tuple[object, ...], says: str | tuple[str, ...]):
    refused("run", shared, "--image", picture, *options, says=says)


def test_run_refuses_a_prompt_without_a_question_where_it_guides_the_choice(shared: Path, picture: Path):
    asked = ("run", shared, "--image", picture, "--prompt", f"{ASK} <image>", "--raw-prompt", "--max-new-tokens", 1)
    refused(*asked, says=("prompt 1 of 1 has no text after the image", "write the question after the image", "variant full"), keeps=shared)
    assert sievert(*asked, "--variant", "full").code == 0


def test_run_asks_which_variant_is_meant(bundle: Path, picture: Path):
    assert sievert("prune", bundle, "--keep", 3).code == 0
    refused("run", bundle, "--image", picture, "--prompt", ASK, says=("several pruned variants", "full, iwp-22, iwp-k3"))


def png_of_claimed_size(path: Path, width: int, height: int) -> None:
    """A PNG whose header promises this many pixels, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_run_refuses_images(shared: Path, tmp_path: Path):
    (tmp_path / "text.png").write_text("not an image")
    png_of_claimed_size(tmp_path / "bomb.png", 60_000, 60_000)
    for name, says in (
        ("missing.png", "does not exist"),
        ("text.png", ("cannot be read", "PNG, JPEG")),
        ("bomb.png", "60000"),
        ("https://example.org/photo.png", ("is an address", "download it")),
    ):
        image = name if "://" in name else tmp_path / name
        refused("run", shared, "--image", image, "--prompt", ASK, says=says)


def test_run_refuses_an_image_that_the_processor_does_not_bring_to_the_models_size(bundle: Path, picture: Path):
    def turn_off(config: Any) -> None:
        config["image_processor"].update(do_resize=False, do_center_crop=False)

    rewrite_json(bundle, "processor_config.json", turn_off)
    said = sievert("run", bundle, "--image", picture, "--prompt", ASK)
    assert said.code == 2, said.all
    assert "120x90" in said.err and "32" in said.err


# bundles that are not in order


def edit_manifest(bundle: Path, edit: Callable[[Any], None]) -> None:
    raw = json.loads((bundle / "sievert.json").read_text())
    edit(raw)
    (bundle / "sievert.json").write_text(json.dumps(raw))


def rewrite(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file and its hash in the manifest, as somebody who means harm would."""
    (bundle / name).write_bytes(data)
    edit_manifest(bundle, lambda raw: raw["files"].update({name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))


def rewrite_json(bundle: Path, name: str, edit: Callable[[Any], None]) -> None:
    raw = json.loads((bundle / name).read_text())
    edit(raw)
    rewrite(bundle, name, json.dumps(raw).encode())


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _graph_changed(bundle: Path) -> None:
    flip_byte(bundle / Bundle.open(bundle).variant("iwp-22").graphs["prefill"].file, 100)


def _weights_changed(bundle: Path) -> None:
    flip_byte(Bundle.open(bundle).weights_path, 5000)


def _weights_missing(bundle: Path) -> None:
    Bundle.open(bundle).weights_path.unlink()


def _weights_cut_short(bundle: Path) -> None:
    path = Bundle.open(bundle).weights_path
    path.write_bytes(path.read_bytes()[:-1])


def _weights_linked(bundle: Path) -> None:
    path = Bundle.open(bundle).weights_path
    path.rename(bundle.parent / "store")
    path.symlink_to(bundle.parent / "store")


def _weights_hard_linked(bundle: Path) -> None:
    (bundle.parent / "store").hardlink_to(Bundle.open(bundle).weights_path)


def _from_the_future(bundle: Path) -> None:
    edit_manifest(bundle, lambda raw: raw.update(format=FORMAT + 1))


def _no_manifest(bundle: Path) -> None:
    (bundle / "sievert.json").unlink()


def _manifest_cut_short(bundle: Path) -> None:
    text = (bundle / "sievert.json").read_text()
    (bundle / "sievert.json").write_text(text[: len(text) // 2])


def _graph_named(name: str) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        edit_manifest(bundle, lambda raw: raw["variants"]["full"]["graphs"]["prefill"].update(file=name))

    return edit


def _weights_read_from(location: str) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        name = Bundle.open(bundle).variant("iwp-22").graphs["prefill"].file
        model = onnx.load(bundle / name, load_external_data=False)
        outside = next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in outside.external_data if entry.key == "location").value = location
        rewrite(bundle, name, model.SerializeToString())

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str | tuple[str, ...]]] = {
    "graph changed": (_graph_changed, ("prefill", "changed")),
    "weights changed": (_weights_changed, ("weights", "changed")),
    "weights missing": (_weights_missing, ("weights", "missing")),
    "weights cut short": (_weights_cut_short, "weights"),
    "weights are a link": (_weights_linked, ("symbolic link", "cp -rL")),
    "weights are a hard link": (_weights_hard_linked, ("hard links", "cp -rL")),
    "newer manifest": (_from_the_future, (f"format {FORMAT + 1}", "upgrade")),
    "no manifest": (_no_manifest, ("no sievert.json", "sievert export")),
    "manifest cut short": (_manifest_cut_short, "no JSON"),
    "graph by absolute path": (_graph_named("/etc/passwd"), "absolute path"),
    "graph outside": (_graph_named("../secret.onnx"), "'..'"),
    "graph in a folder": (_graph_named("sub/prefill.onnx"), "path separator"),
    "graph not listed": (_graph_named("unlisted.onnx"), "does not list it"),
    "weights by absolute path": (_weights_read_from("/etc/passwd"), "absolute path"),
    "weights outside": (_weights_read_from("../store"), "'..'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_by_every_command(bundle: Path, picture: Path, damage: str):
    harm, says = DAMAGES[damage]
    harm(bundle)
    commands = (
        ("prune", bundle, "--keep", 3),
        ("build", bundle),
        ("check", bundle, "--samples", 1),
        ("inspect", bundle, "--verify"),
        ("run", bundle, "--image", picture, "--prompt", ASK),
    )
    for arguments in commands:
        refused(*arguments, says=says, keeps=bundle)


def test_an_engine_file_that_is_not_the_listed_one_is_not_loaded(bundle: Path, picture: Path):
    name = Bundle.open(bundle).variant("iwp-22").engines["onnxruntime"].graphs["decode"].lowered
    other = Bundle.open(bundle).variant("full").engines["onnxruntime"].graphs["decode"].lowered
    (bundle / name).write_bytes((bundle / other).read_bytes())
    refused("run", bundle, "--image", picture, "--prompt", ASK, says=name)


def test_an_engine_that_the_manifest_does_not_list_is_not_loaded(bundle: Path, picture: Path):
    (bundle / "iwp-22.prefill.tensorrt-rtx.00000000.engine").write_bytes(b"from somewhere")
    refused("run", bundle, "--image", picture, "--prompt", ASK, "--engine", "tensorrt-rtx", says=("tensorrt-rtx",))


# interruptions


@pytest.mark.parametrize("command", [("prune", "--keep", 3), ("build", "--engine", "onnxruntime")])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ZeroDivisionError("a bug")])
def test_a_step_that_fails_at_its_end_changes_nothing(
    bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], fault: BaseException
):
    from sievert.bundle import step

    def fail(*_: object) -> None:
        raise fault

    before = content(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(step, "put_manifest", fail)
        said = sievert(command[0], bundle, *command[1:])
    code, says = {OSError: (2, "free some space"), KeyboardInterrupt: (130, "interrupted"), ZeroDivisionError: (70, "please report")}[
        type(fault)
    ]
    assert said.code == code, said.all
    assert says in said.err
    assert ("Traceback" in said.err) is (code == 70)
    assert content(bundle) == before
    assert sievert("run", bundle, "--image", picture, "--prompt", ASK, "--max-new-tokens", 1).code == 0


def test_debug_shows_where_an_error_came_from(shared: Path):
    said = sievert("build", shared, "--variant", "iwp-23", "--debug")
    assert said.code == 2
    assert "Traceback" in said.err and "find_variant" in said.err


def test_a_report_or_picture_that_cannot_be_written_is_said(shared: Path, picture: Path, tmp_path: Path):
    options = ("--image", picture, "--prompt", ASK, "--max-new-tokens", 1)
    refused("run", shared, *options, "--show-kept", tmp_path / "no" / "kept.png", says=("cannot be written", "another place"))


def test_samples_that_cannot_be_used_are_named_with_their_line(shared: Path, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = json.dumps({"image": "a.png", "prompt": ASK})
    for text, says in (
        (good + "\n{'image'}", ("line 2", '{"image"')),
        (good + '\n{"image": "a.png"}', "line 2"),
        ('{"image": 3, "prompt": "x"}', ("line 1", "must be texts")),
        ('{"image": "b.png", "prompt": "x"}', "b.png does not exist"),
        ("", "no lines"),
    ):
        (tmp_path / "data.jsonl").write_text(text)
        refused("check", shared, "--data", tmp_path / "data.jsonl", says=says)
