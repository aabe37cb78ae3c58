"""What a run leaves on disk: its own state, to continue from, and the published checkpoint, in transformers' format."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from examples.digits_lvlm.data import CELL_PX
from examples.digits_lvlm.model import PatchReader, Shape, build
from examples.digits_lvlm.processing import build_processor

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
_STATE = "state.pt"


@dataclass
class State:
    """A run between two steps. Batches follow from (seed, stage, step), so weights and optimizer are all there is to keep."""

    stage: int
    step: int
    shape: Shape
    model: LlavaForConditionalGeneration
    reader: PatchReader
    optimizer: torch.optim.AdamW

    def save(self, work: Path) -> None:
        """Replace the run's state on disk in one step: a kill leaves the old one or the new one."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "reader", "optimizer")}
        torch.save({"at": (self.stage, self.step, self.shape.grid, self.shape.layers), **parts}, work / f"{_STATE}.new")
        (work / f"{_STATE}.new").replace(work / _STATE)

    @classmethod
    def load(cls, work: Path, make_optimizer: Callable[[nn.Module, nn.Module], torch.optim.AdamW]) -> "State | None":
        """The state saved in `work`, or None where no run has begun."""
        if not (work / _STATE).exists():
            return None
        saved = torch.load(work / _STATE, weights_only=True)
        stage, step, grid, layers = saved["at"]
        shape = Shape(grid, layers)
        model, reader = build(shape), PatchReader(128)
        model.load_state_dict(saved["model"])
        reader.load_state_dict(saved["reader"])
        optimizer = make_optimizer(model, reader)
        optimizer.load_state_dict(saved["optimizer"])
        return cls(stage, step, shape, model, reader, optimizer)


def publish(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model, generation config, processor, tokenizer and chat template to `folder`, replacing it as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".publishing-"))
    model.save_pretrained(fresh)
    grid = round(model.config.image_seq_length**0.5)
    build_processor(grid * CELL_PX, CELL_PX).save_pretrained(fresh)
    fresh.chmod(0o755)
    for file in fresh.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)
