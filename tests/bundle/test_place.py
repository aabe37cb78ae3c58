"""Folders that appear whole or not at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from sievert.bundle.errors import BundleError
from sievert.bundle.files import locked
from sievert.bundle.names import LOCK
from sievert.bundle.place import beside, check_place, move_into, writing_beside
from sievert.bundle.pruned import PRUNED, PRUNED_DECODER, create_pruned


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", ["nothing", "a lock", "an older one"])
@pytest.mark.parametrize("atomic", [True, False])
def test_the_folder_takes_its_name_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, atomic: bool):
    place, checks = tmp_path / "in" / "place", list[Path]()
    if there != "nothing":
        place.mkdir(parents=True)
        (place / (LOCK if there == "a lock" else "older")).write_text("")
    if not atomic:
        monkeypatch.setattr("sievert.bundle.place.exchange", lambda first, second: False)
    with writing_beside(place, "test", check=lambda: checks.append(place)) as folder:
        assert folder.parent == place.parent and len(checks) == 1
        with pytest.raises(BundleError, match="another step is writing"), locked(folder, "other"):
            pass
        (folder / "new").write_text("new")
    assert len(checks) == 2 and content(tmp_path) == {"in/place/new": "new"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_what_fails_leaves_nothing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "place"
    place.mkdir()
    (place / "older").write_text("older")
    with pytest.raises(KeyError), writing_beside(place, "test", check=lambda: None) as folder:
        (folder / "new").write_text("new")
        raise KeyError
    assert content(tmp_path) == {"place/older": "older"}
    # Without the exchange the older one stands elsewhere for an instant, and goes back if the new one cannot be moved.
    monkeypatch.setattr("sievert.bundle.place.exchange", lambda first, second: False)
    with pytest.raises(FileNotFoundError):
        move_into(tmp_path / "none", place)
    assert content(tmp_path) == {"place/older": "older"}


def test_what_a_killed_step_left_is_swept_and_what_a_running_one_writes_is_not(tmp_path: Path):
    place = tmp_path / "pruned"
    killed, running = beside(place), beside(place)
    for folder in (killed, running, beside(tmp_path / "other")):
        folder.mkdir()
    with locked(running, "still here"), pytest.raises(BundleError, match="without a record"), create_pruned(place, force=False):
        pass
    assert not killed.exists() and running.exists() and len(list(tmp_path.iterdir())) == 2


def test_a_place_that_was_taken_meanwhile_is_refused(tmp_path: Path):
    place = tmp_path / "pruned"
    with (
        pytest.raises(BundleError, match="holds other files"),
        writing_beside(place, "test", check=partial(check_place, place, PRUNED_DECODER, force=True)) as folder,
    ):
        (folder / "new").write_text("new")
        place.mkdir()
        (place / "theirs").write_text("theirs")
    assert content(tmp_path) == {"pruned/theirs": "theirs"}


def test_a_folder_whose_record_cannot_be_read_is_not_replaced(tmp_path: Path):
    (tmp_path / PRUNED).write_text("{}")
    with pytest.raises(BundleError, match=r"unreadable pruned decoder.*remove the folder yourself"):
        check_place(tmp_path, PRUNED_DECODER, force=True)
    assert content(tmp_path) == {PRUNED: "{}"}
