"""One bundle of a tiny random LLaVA for all tests of the command line: exported once, copied by those that change it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sievert.bundle.names import LOCK
from sievert.cli import app
from tests.made_once import made_once
from tests.tiny_llava import make_tiny_llava


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, error output."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        """Both outputs."""
        return self.out + self.err


Sievert = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def no_width() -> Iterator[None]:
    """Tables are as wide as in a log, whatever width the process that runs the tests was given (pytest-xdist sets one)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        yield


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Put back what a command configures for its process, also where a fixture of the whole session runs one."""
    ours, root, environment = logging.getLogger("sievert"), logging.getLogger(), dict(os.environ)
    before = [(logger, logger.level, list(logger.handlers)) for logger in (ours, root)]
    try:
        yield
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
        os.environ.clear()
        os.environ.update(environment)


def sievert(*arguments: object) -> Outcome:
    """Run a command in this process, without a terminal."""
    with unchanged_process():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="sievert")
    return Outcome(result.exit_code, result.stdout, result.stderr)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, with its content; empty for a folder that does not exist."""
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what this process's session shares."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP and Llama. Not to be changed."""
    return made_once(tmp_path_factory, "api-checkpoint", make_tiny_llava)


@pytest.fixture(scope="session")
def picture(place: Path) -> Path:
    """A photo of another size than the model's."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    path = place / "photo.png"
    Image.fromarray(pixels).resize((120, 90)).save(path)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The bundle as ``sievert export`` made it, and what that said. Not to be changed."""

    def export(folder: Path) -> None:
        outcome = sievert("export", checkpoint, folder / "bundle", "--keep", "22%", "--max-text", 24, "--max-new-tokens", 8)
        assert outcome.code == 0, outcome.all
        (folder / "said.json").write_text(json.dumps(asdict(outcome)))

    made = made_once(tmp_path_factory, "api-bundle", export)
    return made / "bundle", Outcome(**json.loads((made / "said.json").read_text()))


@pytest.fixture(scope="session")
def shared(exported: tuple[Path, Outcome]) -> Path:
    """The bundle, for tests that only read it."""
    return exported[0]


@pytest.fixture
def bundle(shared: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(shared, tmp_path / "bundle"))
