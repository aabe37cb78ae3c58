"""How many held-out questions a checkpoint answers, asked one at a time as a user would ask them."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from examples.digits_lvlm.data import Item, Split, held_out
from examples.digits_lvlm.questions import ASKED, Kind

Score = dict[Kind, tuple[int, int]]


def answers(model: Any, processor: Any, items: list[Item]) -> list[str]:
    """The greedy answers of a `LlavaForConditionalGeneration`, through the chat template and `generate`.

    Typed `Any`: transformers' annotations refuse the very calls its documentation shows.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": item.image}, {"type": "text", "text": item.question}]}] for item in items
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    with torch.inference_mode():
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [text.strip() for text in processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk


def evaluate(folder: Path, *, questions: int = 5000, seed: int = 0, split: Split = "test") -> Score:
    """(right, asked) for each kind of question, over `questions` questions of a split."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    right: Counter[Kind] = Counter()
    asked: Counter[Kind] = Counter()
    for chunk in _chunks(held_out(questions, seed, split=split), 50):
        for item, said in zip(chunk, answers(model, processor, chunk), strict=True):
            asked[item.kind] += 1
            right[item.kind] += said == item.answer
    return {kind: (right[kind], asked[kind]) for kind in ASKED}


def accuracy(score: Score) -> float:
    """Right answers over questions, all kinds together."""
    return sum(right for right, _ in score.values()) / sum(asked for _, asked in score.values())


def show(console: Console, score: Score) -> None:
    """Print a table, one line for each kind of question."""
    table = Table("question", "right", "asked", "accuracy")
    for kind, (right, asked) in score.items():
        table.add_row(kind, str(right), str(asked), f"{right / max(1, asked):.1%}")
    table.add_row("all", *(str(sum(column)) for column in zip(*score.values(), strict=True)), f"{accuracy(score):.1%}")
    console.print(table)
