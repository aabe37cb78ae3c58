"""Train the digits model on a CPU: `python -m examples.digits_lvlm.train --work runs/digits`.

Kill it and run the same command again: it continues from its last saved step as if nothing had happened. `--evaluate` only measures
the checkpoint beside this file; `--export FOLDER` only writes what a run has reached so far.
"""

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from examples.digits_lvlm import batches
from examples.digits_lvlm.attention import PackedAttention, use_packed
from examples.digits_lvlm.checkpoint import CHECKPOINT, State, publish
from examples.digits_lvlm.data import Scene
from examples.digits_lvlm.evaluate import evaluate, show
from examples.digits_lvlm.model import PatchReader, Shape, build, grow
from examples.digits_lvlm.questions import KINDS, Kind

SAVE_EVERY = 100
SHOW_EVERY = 20
console = Console(width=180)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the recipe. Without `answers`, only the tower and the projector learn, to read patches."""

    name: str
    shape: Shape
    scene: Scene
    steps: int
    peak_lr: float
    warmup: int = 100
    floor: float = 0.02  # of the peak, where the cosine ends
    batch: int = 32
    answers: bool = True
    pointing: float = 0.0  # weight of the pointer's loss
    kinds: dict[Kind, float] | None = None  # how often each kind is asked; all alike by default


_GLYPHS: Final = Scene(grid=10, sizes=(1,), fewest=7, most=9)
_GLYPHS_AND_LARGER: Final = Scene(grid=10, sizes=(1, 2), fewest=4, most=9)
_FEW: Final = Scene(grid=10, sizes=(1, 2), fewest=2, most=5)
# The harder kinds more often; "even" and "edge" no longer.
_WEIGHTS: Final[dict[Kind, float]] = {"digit": 1.0, "colour": 3.0, "count": 1.5, "exists": 1.5, "greater": 2.0}
# A model of the final shape stays on a plateau when trained from scratch. So: learn to see (digits of one patch first, then of four),
# learn to answer while small, then grow.
STAGES: Final = (
    Stage(name="glyphs", shape=Shape(10, 6), scene=_GLYPHS, steps=800, peak_lr=1.5e-3, floor=0.6, answers=False),
    Stage(name="see", shape=Shape(10, 6), scene=_GLYPHS_AND_LARGER, steps=800, peak_lr=1e-3, floor=0.6, answers=False),
    Stage(name="answer", shape=Shape(10, 6), scene=_FEW, steps=600, peak_lr=1e-3, floor=0.4),
    Stage(
        name="point", shape=Shape(10, 6), scene=_FEW, steps=800, peak_lr=1e-3, warmup=30, floor=0.5, batch=16, pointing=1.0, kinds=_WEIGHTS
    ),
    Stage(name="grown", shape=Shape(16, 10), scene=Scene(), steps=600, peak_lr=1e-3, warmup=50, batch=16, pointing=1.0, kinds=_WEIGHTS),
)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine down to `floor` times the peak."""
    if step < stage.warmup:
        return stage.peak_lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.peak_lr * (stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def _patch_loss(logits: Tensor, target: Tensor, empty: int) -> Tensor:
    """Mean over patches with a digit plus mean over those without: the few digits would drown in the background otherwise."""
    loss = cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    full = target.flatten() != empty
    return loss[full].mean() + loss[~full].mean()


def losses(
    model: LlavaForConditionalGeneration, reader: PatchReader, packed: PackedAttention, batch: batches.Batch, stage: Stage
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what to show of it: per-patch and per-answer accuracy in per cent."""
    features = torch.stack(list(model.model.get_image_features(batch.pixel_values, return_dict=True).pooler_output))
    value, colour = reader(features)
    loss = _patch_loss(value, batch.patch_value, value.shape[-1] - 1) + _patch_loss(colour, batch.patch_colour, colour.shape[-1] - 1)
    full = batch.patch_value != value.shape[-1] - 1
    seen = {"value": _percent(value, batch.patch_value, full), "tint": _percent(colour, batch.patch_colour, full)}
    if not stage.answers:
        return loss, seen
    prefix = 2 + features.shape[1]
    words = model.get_input_embeddings()(batch.input_ids)
    embeds = torch.cat([words[:, :2], features.to(words.dtype), words[:, prefix:]], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.text_mask(prefix), position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, prefix - 1 : -1]).float()
    labels, kinds = batch.labels[:, prefix:], batch.kinds[:, prefix:]
    answer_loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=batches.IGNORED)
    seen = {"loss": answer_loss.item(), **seen}
    for index, kind in enumerate(KINDS):
        if stage.kinds is None or kind in stage.kinds:
            seen[kind] = _percent(logits, labels, kinds == index)
    pointer_loss = _pointer_loss(packed, batch.points)
    seen["point"] = 100 * math.exp(-pointer_loss.item())
    return answer_loss + 0.5 * loss + stage.pointing * pointer_loss, seen


def _pointer_loss(packed: PackedAttention, points: Tensor) -> Tensor:
    """How little attention the words of a question pay to the patches they are about.

    Answers alone teach "which digit is red" soon, because colours are plain to see, but leave the inverse ("what colour is the 5") on
    a plateau. With this loss on a single head it takes off within two hundred steps.
    """
    assert packed.looked is not None
    about = packed.looked[:, :, : points.shape[-1]].masked_fill(~points, -torch.inf)
    return -about[points.any(-1)].logsumexp(-1).mean()


def _percent(logits: Tensor, target: Tensor, where: Tensor) -> float:
    return 100.0 * (logits.argmax(-1) == target)[where].float().mean().item()


def _optimizer(model: nn.Module, reader: nn.Module) -> torch.optim.AdamW:
    named = [*model.named_parameters(), *reader.named_parameters()]
    tables = [weight for name, weight in named if weight.ndim >= 2 and "embed" not in name]
    rest = [weight for name, weight in named if weight.ndim < 2 or "embed" in name]
    groups = [{"params": tables, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def start_stage(index: int, stages: tuple[Stage, ...], seed: int, before: State | None) -> State:
    """The state before the first step of a stage: fresh weights, or the previous stage's, grown where the shape differs."""
    torch.manual_seed(seed + index)
    shape = stages[index].shape
    if before is None:
        model, reader = build(shape), PatchReader(128)
    else:
        model = before.model if before.shape == shape else grow(before.model, shape)
        reader = before.reader
    return State(index, 0, shape, model, reader, _optimizer(model, reader))


def run_stage(state: State, stage: Stage, *, seed: int, work: Path) -> None:
    """All remaining steps of a stage, saving the state on the way."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    packed = use_packed(state.model)
    state.model.train()
    parameters = [*state.model.parameters(), *state.reader.parameters()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(stage.name, total=stage.steps, completed=state.step)
        began, seen_sum = time.monotonic(), dict[str, float]()
        while state.step < stage.steps:
            batch = batches.make([seed, state.stage, state.step], size=stage.batch, scene=stage.scene, kinds=stage.kinds)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(stage, state.step)
            # bfloat16 products, float32 weights and sums: a third faster here, and no difference in what is learnt.
            with torch.autocast("cpu", torch.bfloat16):
                loss, seen = losses(state.model, state.reader, packed, batch, stage)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            progress.advance(bar)
            seen_sum = {name: seen_sum.get(name, 0.0) + number for name, number in seen.items()}
            if state.step % SHOW_EVERY == 0:
                means = " ".join(f"{name} {total / SHOW_EVERY:.3g}" for name, total in seen_sum.items())
                console.print(f"{stage.name} {state.step}: {(time.monotonic() - began) / SHOW_EVERY:.2f} s a step, {means}")
                began, seen_sum = time.monotonic(), {}
            if state.step % SAVE_EVERY == 0 or state.step == stage.steps:
                state.save(work)


def train(stages: tuple[Stage, ...], *, seed: int, work: Path) -> LlavaForConditionalGeneration:
    """Run the recipe from wherever `work` has got to, and return the trained model."""
    work.mkdir(parents=True, exist_ok=True)
    state = State.load(work, _optimizer)
    for index in range(0 if state is None else state.stage, len(stages)):
        if state is None or state.stage != index:
            state = start_stage(index, stages, seed, state)
        run_stage(state, stages[index], seed=seed, work=work)
    assert state is not None
    return state.model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/digits"), help="where the state of the run is kept")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the folder to write at the end, or to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="sums depend on it: keep it for the same bits")
    parser.add_argument("--evaluate", action="store_true", help="only measure the checkpoint")
    parser.add_argument("--export", type=Path, help="only write the run's present state, grown to its final shape, to this folder")
    parser.add_argument("--questions", type=int, default=5000, help="how many held-out questions to measure on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if options.export is not None:
        state = State.load(options.work, _optimizer)
        if state is None:
            parser.error(f"{options.work} holds no run: nothing to export")
        shape = STAGES[-1].shape
        publish(state.model if state.shape == shape else grow(state.model, shape), options.export)
        return
    if not options.evaluate:
        publish(train(STAGES, seed=options.seed, work=options.work), options.checkpoint)
    show(console, evaluate(options.checkpoint, questions=options.questions))


if __name__ == "__main__":
    main()
