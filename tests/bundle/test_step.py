"""A step happens as a whole or not at all: errors, full disks, kills and rivals leave what was there working."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sievert.bundle import files, writer
from sievert.bundle.errors import BundleError, IntegrityError, ManifestError, VariantError
from sievert.bundle.store import Bundle
from tests.bundle.small import WEIGHT, add_engine, add_variant, fill, graph_bytes, make_bundle, run_graph, snapshot, variant

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b")


def start(bundle: Bundle, body: str, *, before: str = "") -> subprocess.Popen[str]:
    """Run ``body`` inside a step of another process, which may call ``kill()`` on itself."""
    script = f"""
import os, resource, signal, time
from sievert.bundle.store import Bundle
from tests.bundle.small import add_variant, fill
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{textwrap.dedent(before)}
bundle = Bundle.open({str(bundle.path)!r})
with bundle.step("other") as step:
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_step_adds_a_variant_and_a_line_of_history(bundle: Bundle):
    with bundle.step("prune --name iwp-22") as step:
        file = add_variant(step, "iwp-22")
    for seen in (bundle, Bundle.open(bundle.path, verify="full")):
        assert sorted(seen.manifest.variants) == ["full", "iwp-22"]
        assert [line.command for line in seen.manifest.history] == ["export", "prune --name iwp-22"]
        assert seen.graph_file("prefill", variant="iwp-22").name == file
    assert np.array_equal(run_graph(bundle.graph_file("prefill", variant="iwp-22")), WEIGHT.sum(0, keepdims=True) + 1)


def test_names_carry_the_content(bundle: Bundle):
    with bundle.step("s") as step:
        one, again, two = (step.add_bytes("a", ".npz", data) for data in (b"1", b"1", b"2"))
        step.replace(step.manifest)
    assert one == again != two
    assert {path.name for path in bundle.path.glob("a.*.npz")} == {one, two}


def test_two_contents_whose_short_hashes_agree_get_two_names(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    hashes = iter(["ab" * 4 + "0" * 56, "ab" * 4 + "1" * 56])
    monkeypatch.setattr(writer, "sha256_bytes", lambda data: next(hashes))
    step = writer.FolderWriter(bundle.path, {})
    assert step.add_bytes("a", ".npz", b"1") == "a.abababab.npz"
    assert step.add_bytes("a", ".npz", b"2") == "a.abababab11111111.npz"


def test_files_are_moved_from_inside_and_copied_from_outside(bundle: Bundle, tmp_path: Path):
    (tmp_path / "outside").write_bytes(b"outside")
    with bundle.step("s") as step:
        inside = step.temporary(".npz")
        inside.write_bytes(b"inside")
        names = step.add_file(inside, "in", ".npz"), step.add_file(tmp_path / "outside", "out", ".npz")
        step.temporary(".onnx").write_bytes(b"never taken")
        step.replace(step.manifest)
    assert [bundle.file(name).read_bytes() for name in names] == [b"inside", b"outside"]
    assert (tmp_path / "outside").exists()
    assert set(snapshot(bundle.path)) == {"sievert.json", *bundle.manifest.files}


def test_a_suffix_that_the_sweep_would_not_know_is_refused(bundle: Bundle):
    with pytest.raises(ValueError, match="suffix"), bundle.step("s") as step:
        step.add_bytes("a", ".txt", b"")


def test_a_variant_that_exists_needs_force_and_is_then_replaced_whole(bundle: Bundle):
    with bundle.step("one") as step:
        first = add_variant(step, "iwp", shift=1.0)
    before = snapshot(bundle.path)
    with pytest.raises(VariantError, match="already has a variant 'iwp'.*--force"):
        bundle.require_new_variant("iwp")
    with pytest.raises(VariantError, match="already has a variant 'iwp'"), bundle.step("two") as step:
        add_variant(step, "iwp", shift=2.0)
    assert snapshot(bundle.path) == before
    with bundle.step("three") as step:
        second = add_variant(step, "iwp", shift=2.0, force=True)
    assert not (bundle.path / first).exists()
    assert first not in bundle.manifest.files
    assert second in bundle.manifest.files
    Bundle.open(bundle.path, verify="full")


def test_replacing_a_variant_removes_its_engines_and_its_own_weights_but_no_shared_file(bundle: Bundle):
    with bundle.step("quantise") as step:
        own = step.add_bytes("weights-int8", ".data", WEIGHT.tobytes())
        file = step.add_bytes("q.prefill", ".onnx", graph_bytes(own))
        step.put_variant("q", variant(file))
    assert (bundle.path / own).exists()
    engine = add_engine(bundle)
    with bundle.step("again") as step:
        add_variant(step, "full", force=True)
        add_variant(step, "q", force=True)
    assert not {own, file, engine} & (snapshot(bundle.path).keys() | bundle.manifest.files.keys())
    reopened = Bundle.open(bundle.path, verify="full")
    assert reopened.graph_file("decoder").exists()
    assert reopened.weights_path.exists()


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "a.b", "-x", "x" * 65])
def test_a_variant_name_becomes_a_file_name(bundle: Bundle, name: str):
    with pytest.raises(VariantError, match="cannot name a variant"):
        bundle.require_new_variant(name)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_body_changes_nothing(bundle: Bundle, error: type[BaseException]):
    before = snapshot(bundle.path)
    with pytest.raises(error), bundle.step("s") as step:
        add_variant(step, "iwp")
        step.temporary().write_bytes(b"half")
        raise error
    assert snapshot(bundle.path) == before
    with bundle.step("after") as step:
        add_variant(step, "iwp")


def test_an_error_does_not_remove_a_file_that_was_added_again(bundle: Bundle):
    with bundle.step("one") as step:
        add_variant(step, "iwp")
    before = snapshot(bundle.path)
    with pytest.raises(ZeroDivisionError), bundle.step("two") as step:
        add_variant(step, "iwp", force=True)
        raise ZeroDivisionError
    assert snapshot(bundle.path) == before


def test_a_step_that_makes_nothing_is_an_error(bundle: Bundle):
    with pytest.raises(BundleError, match="ended without a new manifest"), bundle.step("s") as step:
        step.add_bytes("a", ".npz", b"")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda step: step.put_variant("v", variant("absent.00000000.onnx")), ManifestError, "does not list it"),
        (lambda step: step.put_variant("v", variant("../x.onnx")), IntegrityError, r"contains '\.\.'"),
        (lambda step: step.put_variant("v", variant(step.add_bytes("v", ".onnx", b"junk"))), IntegrityError, "no readable ONNX graph"),
        (lambda step: step.put_variant("v", variant(step.add_bytes("v", ".onnx", graph_bytes("none.data")))), IntegrityError, "is missing"),
        (lambda step: step.replace(step.manifest.model_copy(update={"weights_file": 3})), ManifestError, "malformed at weights_file"),
    ],
)
def test_a_manifest_no_reader_would_take_is_not_committed(bundle: Bundle, make, error: type[BundleError], message: str):
    before = snapshot(bundle.path)
    with pytest.raises(error, match=message), bundle.step("s") as step:
        make(step)
    assert snapshot(bundle.path) == before


def test_a_step_starts_from_the_newest_manifest(bundle: Bundle):
    other = Bundle.open(bundle.path)
    with other.step("theirs") as step:
        add_variant(step, "theirs")
    stale = bundle.manifest
    with bundle.step("mine") as step:
        add_variant(step, "mine")
    assert sorted(bundle.manifest.variants) == ["full", "mine", "theirs"]
    with pytest.raises(BundleError, match="changed by another step"), bundle.step("stale") as step:
        step.replace(stale)


def test_leftovers_are_swept_and_a_users_files_stay(bundle: Bundle):
    ours = ["iwp.prefill.0123abcd.onnx", "weights.0123abcd.data", ".sievert-tmp-0123456789abcdef.onnx", ".sievert-tmp-0123456789abcdef"]
    users = ["notes.txt", "kept.png", "mine.onnx", "weights.data", "notes.0123abcd.md", ".gitignore", "a.0123abcg.onnx"]
    for name in ours + users:
        (bundle.path / name).write_bytes(b"x")
    with bundle.step("s") as step:
        assert not set(ours) & snapshot(bundle.path).keys()  # already at the start: their space may be needed
        add_variant(step, "iwp")
    assert set(snapshot(bundle.path)) == {"sievert.json", *bundle.manifest.files, *users}


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("", 'add_variant(step, "iwp"); kill()'),
        ("", 'step.temporary(".onnx").write_bytes(b"half"); kill()'),
        ('import sievert.bundle.step as s; s.put_manifest = kill', 'add_variant(step, "iwp")'),
        ('import sievert.bundle.writer as w; w.sync = lambda path: kill() if path.is_dir() else None', 'add_variant(step, "iwp")'),
    ],
    ids=["after adding", "in mid-file", "before the manifest", "manifest written, not renamed"],
)  # fmt: skip
def test_a_kill_before_the_commit_leaves_everything_working(bundle: Bundle, before: str, body: str):
    held = snapshot(bundle.path)
    process = start(bundle, body, before=before)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    after = snapshot(bundle.path)
    assert {name: after[name] for name in held} == held
    assert len(after) > len(held), "nothing was left over, so the kill came too early to prove anything"
    assert Bundle.open(bundle.path, verify="full").manifest == bundle.manifest
    with bundle.step("next") as step:  # the lock died with its process
        add_variant(step, "iwp", shift=7.0)
    assert set(snapshot(bundle.path)) == {"sievert.json", *bundle.manifest.files}


def test_a_kill_after_the_commit_leaves_the_new_variant_and_the_old_file_is_swept_later(bundle: Bundle):
    with bundle.step("one") as step:
        first = add_variant(step, "iwp")
    process = start(bundle, 'add_variant(step, "iwp", shift=2.0, force=True)', before="import sievert.bundle.step as s; s._remove = kill")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    reopened = Bundle.open(bundle.path, verify="full")
    assert reopened.manifest.variants["iwp"].graphs["prefill"].file != first
    assert (bundle.path / first).exists()
    with reopened.step("next") as step:
        add_variant(step, "other", shift=3.0)
    assert not (bundle.path / first).exists()


def test_a_killed_export_leaves_no_bundle_and_is_swept_by_the_next(bundle: Bundle, tmp_path: Path):
    target = tmp_path / "new"
    body = f"""
    with Bundle.create({str(target)!r}) as new:
        fill(new)
        kill()
    """
    process = start(bundle, body)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(tmp_path.glob(".new.sievert-tmp-*"))) == 1
    make_bundle(target)
    assert list(tmp_path.glob(".new.sievert-tmp-*")) == []


def test_two_steps_do_not_run_at_once(bundle: Bundle):
    process = start(bundle, 'print("holding", flush=True); time.sleep(60)')
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(BundleError, match=rf"another step is writing to .* \(process {process.pid}: other\)"), bundle.step("mine"):
            pytest.fail("the body ran")
        assert Bundle.open(bundle.path, verify="full")  # readers are not held up
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_an_export_that_still_runs_is_not_swept(bundle: Bundle, tmp_path: Path):
    target = tmp_path / "new"
    with Bundle.create(target) as slow:
        make_bundle(target)
        assert slow.path.exists()
        target.rename(tmp_path / "aside")
        fill(slow)
    assert Bundle.open(target, verify="full").manifest.graphs == bundle.manifest.graphs


@pytest.mark.parametrize("where", ["file", "manifest"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(bundle: Bundle, where: str, monkeypatch: pytest.MonkeyPatch):
    before = snapshot(bundle.path)
    real = files.write_new

    def full(path: Path, data: bytes) -> None:
        if (where == "manifest") == (path.suffix == ".json"):
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    monkeypatch.setattr(writer, "write_new", full)
    with pytest.raises(BundleError, match="No space left on device. Nothing was changed; free some space"), bundle.step("s") as step:
        add_variant(step, "iwp")
    assert snapshot(bundle.path) == before


def test_a_real_write_error_is_one_sentence_and_changes_nothing(bundle: Bundle):
    before = snapshot(bundle.path)
    body = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    step.add_bytes("big", ".npz", bytes(10_000))
    """
    process = start(bundle, body)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "sievert.bundle.errors.BundleError: could not write to" in stderr.splitlines()[-1]
    assert snapshot(bundle.path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_bundle_can_be_read_but_not_changed(bundle: Bundle):
    (bundle.path / ".sievert.lock").unlink()
    bundle.path.chmod(0o555)
    try:
        Bundle.open(bundle.path, verify="full")
        with pytest.raises(BundleError, match="Permission denied.*may write there"), bundle.step("s"):
            pytest.fail("the body ran")
    finally:
        bundle.path.chmod(0o755)


def test_a_link_as_lock_is_not_followed(bundle: Bundle, tmp_path: Path):
    (tmp_path / "victim").write_text("precious")
    lock = bundle.path / ".sievert.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "victim")
    with pytest.raises(BundleError, match="could not write"), bundle.step("s"):
        pytest.fail("the body ran")
    assert (tmp_path / "victim").read_text() == "precious"
