"""One weights file of two bundles: compared before it is linked, and nobody's loss when the other goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from sievert.bundle.errors import BundleError, IntegrityError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.store import Bundle
from sievert.exporter.share import open_shared
from tests.bundle.small import WEIGHT, graph_bytes, make_bundle

DATA = memoryview(WEIGHT.tobytes())


def share(bundle: Bundle, path: Path) -> Bundle:
    """A second small bundle over the weights of the first."""
    with open_shared(bundle) as held, Bundle.create(path) as new:
        entry = held.find("W", sha256_bytes(bytes(DATA)), DATA)
        assert entry is not None and entry.offset == 0
        assert held.find("constant", sha256_bytes(b"1234"), memoryview(b"1234")) is None
        name = held.link(new)
        new.add_bytes("decoder", ".onnx", graph_bytes(name))
        new.finish(bundle.manifest.model_copy(update={"files": {}, "history": ()}))
    return Bundle.open(path, verify="full")


def test_two_bundles_have_one_file_and_go_alone(tmp_path: Path):
    one = make_bundle(tmp_path / "one")
    two = share(one, tmp_path / "two")
    first, second = one.weights_path, two.weights_path
    assert first.samefile(second) and first.stat().st_nlink == 2
    assert one.manifest.shared == two.manifest.shared == {first.name}
    assert [step.command for step in Bundle.open(one.path, verify="full").manifest.history] == ["export", "share the weights"]
    shutil.rmtree(one.path)
    left = Bundle.open(two.path, verify="full")
    assert left.weights_path.read_bytes() == WEIGHT.tobytes() and left.weights_path.stat().st_nlink == 1
    third = share(left, tmp_path / "third")  # marked already: no second step
    assert len(Bundle.open(two.path).manifest.history) == 1 and third.weights_path.samefile(left.weights_path)


def test_a_link_that_no_manifest_speaks_of_is_refused_as_ever(tmp_path: Path):
    one = make_bundle(tmp_path / "one")
    two = share(one, tmp_path / "two")
    (tmp_path / "elsewhere").hardlink_to(one.file("config.json"))
    with pytest.raises(IntegrityError, match=r"config\.json is one of 2 hard links"):
        Bundle.open(one.path)
    text = json.loads((two.path / "sievert.json").read_text())
    text["files"][two.weights_path.name]["shared"] = False
    (two.path / "sievert.json").write_text(json.dumps(text))
    with pytest.raises(IntegrityError, match="one of 2 hard links"):
        Bundle.open(two.path)


def test_bytes_are_compared_and_not_believed(tmp_path: Path):
    bundle = make_bundle(tmp_path / "one")
    other = memoryview((WEIGHT + 1).tobytes())
    with open_shared(bundle) as held, pytest.raises(BundleError, match=r"has another W than this export.*leave --share-weights out"):
        held.find("W", sha256_bytes(bytes(other)), other)
    wrong = bundle.manifest.weights[0].model_copy(update={"sha256": sha256_bytes(bytes(other))})
    lying = Bundle(bundle.path, bundle.manifest.model_copy(update={"weights": (wrong,)}))
    with open_shared(lying) as held, pytest.raises(BundleError, match="does not hold the W that its manifest lists"):
        held.find("W", sha256_bytes(bytes(other)), other)
    bundle.weights_path.write_bytes(other)
    with pytest.raises(IntegrityError, match="the manifest says"), open_shared(bundle):
        pass


def test_another_model_and_another_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle(tmp_path / "one")
    with (
        pytest.raises(BundleError, match="0 bytes of this export's weights and lacks 4: it is of another model"),
        open_shared(bundle) as held,
        Bundle.create(tmp_path / "two") as new,
    ):
        held.find("V", sha256_bytes(b"1234"), memoryview(b"1234"))
        held.link(new)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(BundleError, match=r"cannot be shared.*cross-device.*one filesystem"):
        share(bundle, tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    Bundle.open(bundle.path, verify="full")
