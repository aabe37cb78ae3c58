"""A bundle that is not what its manifest says is refused with a reason; one that is works wherever it is copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sievert.bundle.errors import BundleError, IntegrityError, ManifestError, VariantError
from sievert.bundle.manifest import FORMAT
from sievert.bundle.store import Bundle
from tests.bundle.small import WEIGHT, add_engine, fill, make_bundle, run_graph, snapshot


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b")


def edit_manifest(bundle: Bundle, edit) -> None:
    path = bundle.path / "sievert.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_new_bundle_opens_and_lists_every_file(bundle: Bundle):
    assert set(snapshot(bundle.path)) == {"sievert.json", *bundle.manifest.files}
    assert "config.json" in bundle.manifest.files
    assert [step.command for step in bundle.manifest.history] == ["export"]
    assert bundle.manifest.history[0].versions["sievert"]
    assert bundle.weights_path.read_bytes() == WEIGHT.tobytes()
    assert np.array_equal(run_graph(bundle.graph_file("decoder")), WEIGHT.sum(0, keepdims=True))


def test_no_temporary_folder_stays_beside_a_new_bundle(bundle: Bundle):
    assert [path.name for path in bundle.path.parent.iterdir()] == ["b"]


def test_a_bundle_works_after_copy_and_move(bundle: Bundle, tmp_path: Path):
    shutil.copytree(bundle.path, tmp_path / "copy")
    shutil.move(bundle.path, tmp_path / "elsewhere")
    for place in ("copy", "elsewhere"):
        moved = Bundle.open(tmp_path / place, verify="full")
        add_engine(moved)
        assert moved.engine_bytes("full", "rtx", "prefill") == b"engine bytes"
        assert run_graph(moved.graph_file("prefill", variant="full")).shape == (1, 4)


def test_the_manifest_on_disk_is_deterministic(tmp_path: Path):
    texts = []
    for place in ("one", "two"):
        raw = json.loads((make_bundle(tmp_path / place).path / "sievert.json").read_text())
        raw.pop("history")
        texts.append(json.dumps(raw))
    assert texts[0] == texts[1]
    text = (tmp_path / "one" / "sievert.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("verify", ["size", "full"])
@pytest.mark.parametrize("name", ["decoder", "weights", "config"])
def test_one_changed_bit_is_found(bundle: Bundle, verify, name: str):
    (file,) = [file for file in bundle.manifest.files if file.startswith(name)]
    flip(bundle.path / file, 5)
    with pytest.raises(IntegrityError, match=rf"{file} has SHA-256 .* changed after"):
        Bundle.open(bundle.path, verify=verify)


def test_large_files_are_hashed_only_by_a_full_check_but_their_weights_are_sampled(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sievert.bundle.integrity.QUICK_BYTES", 0)
    graph = bundle.graph_file("decoder")
    original = graph.read_bytes()
    at = original.index(b"small")
    flip(graph, at)
    Bundle.open(bundle.path)
    with pytest.raises(IntegrityError, match="SHA-256"):
        Bundle.open(bundle.path, verify="full")
    graph.write_bytes(original)
    flip(bundle.weights_path, 5)
    with pytest.raises(IntegrityError, match="the bytes of W are not those"):
        Bundle.open(bundle.path)


def test_a_truncated_file_is_found(bundle: Bundle):
    bundle.weights_path.write_bytes(WEIGHT.tobytes()[:-1])
    with pytest.raises(IntegrityError, match="has 63 bytes, the manifest says 64"):
        Bundle.open(bundle.path)
    with pytest.raises(IntegrityError, match="has 63 bytes"):
        bundle.file(bundle.manifest.weights_file)


def test_a_missing_file_is_found(bundle: Bundle):
    bundle.weights_path.unlink()
    with pytest.raises(IntegrityError, match="is missing though the manifest names it"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["weights", "decoder", "config", "sievert"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_are_refused_with_the_way_out(bundle: Bundle, tmp_path: Path, name: str, kind: str):
    (path,) = [path for path in bundle.path.iterdir() if path.name.startswith(name)]
    stored = tmp_path / "object"
    path.rename(stored)
    if kind == "symbolic":
        path.symlink_to(stored)
    else:
        os.link(stored, path)
    with pytest.raises(IntegrityError, match=rf"{kind} link.* cp -rL {bundle.path} NEW_FOLDER"):
        Bundle.open(bundle.path)


def test_the_advice_for_links_works(bundle: Bundle, tmp_path: Path):
    store = tmp_path / "store"
    store.mkdir()
    for number, path in enumerate(sorted(bundle.path.iterdir())):
        path.rename(store / str(number))
        if number % 2:
            path.symlink_to(store / str(number))
        else:
            os.link(store / str(number), path)
    assert os.system(f"cp -rL {bundle.path} {tmp_path / 'plain'}") == 0
    assert Bundle.open(tmp_path / "plain", verify="full").manifest == bundle.manifest


def test_a_bundle_may_be_reached_through_a_link_to_its_folder(bundle: Bundle, tmp_path: Path):
    (tmp_path / "alias").symlink_to(bundle.path)
    assert Bundle.open(tmp_path / "alias").path == bundle.path


def test_a_newer_manifest_is_refused_before_its_fields_are_judged(bundle: Bundle):
    edit_manifest(bundle, lambda raw: raw.update(format=FORMAT + 1, invention=1))
    with pytest.raises(ManifestError, match=f"has format {FORMAT + 1}, this version of Sievert reads up to {FORMAT}: upgrade"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(invention=1), "malformed at invention"),
        (lambda raw: raw.pop("weights"), "malformed at weights"),
        (lambda raw: raw["geometry"].update(depth="2"), "malformed at geometry.depth"),
        (lambda raw: raw["variants"]["full"]["profile"].update(batch=0), "malformed: batch=0"),
        (lambda raw: raw.update(format="1"), "no format number"),
        (lambda raw: raw.update(format=True), "no format number"),
        (lambda raw: raw["files"].pop(raw["weights_file"]), "names weights.* but does not list it"),
        (lambda raw: raw["variants"]["full"]["graphs"]["prefill"].update(file="other.onnx"), "names other.onnx for graph prefill of"),
        (lambda raw: raw["weights"][0].update(offset=1), "ends at byte 65 of a weights file of 64 bytes"),
    ],
)  # fmt: skip
def test_a_malformed_manifest_is_refused(bundle: Bundle, edit, message: str):
    edit_manifest(bundle, edit)
    with pytest.raises(ManifestError, match=message):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff\x00"])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Bundle, text: str):
    (bundle.path / "sievert.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("missing", ["nothing", "folder"])
def test_no_bundle_there(tmp_path: Path, missing: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ManifestError, match="is no bundle"):
        Bundle.open(tmp_path / missing)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "is an absolute path"),
        ("C:weights.data", "is an absolute path"),
        ("\\\\host\\share", "is an absolute path"),
        ("../weights.data", "contains '..'"),
        ("a/../../b", "contains '..'"),
        ("sub/weights.data", "contains a path separator"),
        ("sub\\weights.data", "contains a path separator"),
        ("", "is not a plain file name"),
        (".", "is not a plain file name"),
        (".hidden", "is not a plain file name"),
        ("a\0b", "is not a plain file name"),
        ("a\nb", "is not a plain file name"),
        ("sievert.json", "is not a plain file name"),
        ("n" * 300, "is not a plain file name"),
    ],
)
@pytest.mark.parametrize("place", ["files", "weights", "graph", "lowered", "engine"])
def test_names_that_leave_the_bundle_are_refused_wherever_the_manifest_holds_them(bundle: Bundle, name: str, reason: str, place: str):
    add_engine(bundle)

    def edit(raw) -> None:
        entry = raw["files"][raw["weights_file"]]
        engine = raw["variants"]["full"]["engines"]["rtx"]["graphs"]["prefill"]
        match place:
            case "files":
                raw["files"][name] = entry
            case "weights":
                raw["weights_file"] = name
            case "graph":
                raw["graphs"]["decoder"]["file"] = name
            case "lowered":
                engine["lowered"] = name
            case "engine":
                engine["file"] = name

    edit_manifest(bundle, edit)
    with pytest.raises(IntegrityError, match=reason.replace(".", r"\.")):
        Bundle.open(bundle.path)


def test_only_listed_files_are_given_out(bundle: Bundle):
    (bundle.path / "extra.engine").write_bytes(b"planted")
    with pytest.raises(IntegrityError, match="extra.engine is not listed"):
        bundle.file("extra.engine")
    with pytest.raises(IntegrityError, match="contains '..'"):
        bundle.file("../b/config.json")


def test_an_engine_is_hashed_every_time_it_is_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    file = add_engine(bundle)
    assert bundle.engine_file("full", "rtx", "prefill") == bundle.path / file
    assert bundle.engine_bytes("full", "rtx", "prefill") == b"engine bytes"
    flip(bundle.path / file, 0)
    monkeypatch.setattr("sievert.bundle.integrity.QUICK_BYTES", 0)
    opened = Bundle.open(bundle.path)  # a large engine passes by its size...
    for give in (opened.engine_file, opened.engine_bytes):
        with pytest.raises(IntegrityError, match="SHA-256"):  # ...but is never handed to a deserialiser
            give("full", "rtx", "prefill")


def test_an_engine_built_from_another_graph_is_refused(bundle: Bundle):
    add_engine(bundle)
    edit_manifest(bundle, lambda raw: raw["variants"]["full"]["engines"]["rtx"]["graphs"]["prefill"].update(built_from="0" * 64))
    with pytest.raises(IntegrityError, match="built from another version of decoder"):
        Bundle.open(bundle.path).engine_bytes("full", "rtx", "prefill")


def test_what_does_not_exist_is_answered_with_what_does(bundle: Bundle):
    with pytest.raises(VariantError, match="no variant 'iwp-22'; it has: full"):
        bundle.variant("iwp-22")
    with pytest.raises(VariantError, match="no graph 'decode'; it has: prefill"):
        bundle.graph("decode", variant="full")
    with pytest.raises(VariantError, match="no engine 'rtx'; it has: none yet"):
        bundle.engine_file("full", "rtx", "prefill")
    add_engine(bundle)
    with pytest.raises(VariantError, match="no graph 'decode'; it has: prefill"):
        bundle.engine_file("full", "rtx", "decode")


class TestCreate:
    def test_an_error_leaves_nothing(self, tmp_path: Path):
        with pytest.raises(ZeroDivisionError), Bundle.create(tmp_path / "b") as new:
            fill(new)
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_a_body_without_finish_is_refused(self, tmp_path: Path):
        with pytest.raises(BundleError, match="without a manifest"), Bundle.create(tmp_path / "b"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_other_folders_and_files_are_never_replaced(self, tmp_path: Path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "thesis.tex").write_text("x")
        (tmp_path / "file").write_text("x")
        for place, force in [("folder", False), ("folder", True), ("file", False), ("file", True)]:
            with pytest.raises(BundleError, match="choose a path that does not exist yet"), Bundle.create(tmp_path / place, force=force):
                pytest.fail("the body ran")
        assert (tmp_path / "folder" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "x"

    def test_an_empty_folder_is_taken(self, tmp_path: Path):
        (tmp_path / "b").mkdir()
        make_bundle(tmp_path / "b")

    def test_a_bundle_is_replaced_only_with_force(self, bundle: Bundle):
        before = snapshot(bundle.path)
        with pytest.raises(BundleError, match="already holds a bundle.*--force"), Bundle.create(bundle.path):
            pytest.fail("the body ran")
        assert snapshot(bundle.path) == before
        with Bundle.create(bundle.path, force=True) as new:
            fill(new, shift=3.0)
        assert np.array_equal(run_graph(Bundle.open(bundle.path).graph_file("decoder")), WEIGHT.sum(0, keepdims=True) + 3)
        assert [path.name for path in bundle.path.parent.iterdir()] == ["b"]

    def test_without_the_atomic_exchange_it_is_replaced_all_the_same(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sievert.bundle.place.exchange", lambda first, second: False)
        with Bundle.create(bundle.path, force=True) as new:
            fill(new, shift=3.0)
        assert Bundle.open(bundle.path, verify="full").manifest != bundle.manifest
        assert [path.name for path in bundle.path.parent.iterdir()] == ["b"]

    def test_a_failed_replacement_leaves_the_old_bundle(self, bundle: Bundle):
        before = snapshot(bundle.path)
        with pytest.raises(ZeroDivisionError), Bundle.create(bundle.path, force=True) as new:
            fill(new, shift=3.0)
            raise ZeroDivisionError
        assert snapshot(bundle.path) == before

    def test_force_refuses_to_delete_a_users_files(self, bundle: Bundle):
        (bundle.path / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match=r"not the bundle's \(notes.txt\)"), Bundle.create(bundle.path, force=True):
            pytest.fail("the body ran")
        assert (bundle.path / "notes.txt").read_text() == "mine"

    def test_a_folder_inside_is_refused(self, tmp_path: Path):
        with pytest.raises(BundleError, match="one flat folder"), Bundle.create(tmp_path / "b") as new:
            fill(new)
            (new.path / "templates").mkdir()
        assert list(tmp_path.iterdir()) == []

    def test_errors_about_other_files_keep_their_own_words(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError), Bundle.create(tmp_path / "b"):
            (tmp_path / "checkpoint.json").read_text()
