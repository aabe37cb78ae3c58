"""Training batches: many conversations about one canvas, packed into one row.

A row is `<s> user: <image>...`, then conversations. A token sees the image and its own conversation only, and each conversation
counts its positions from the end of the image: every one of them is laid out exactly as a prompt of its own would be.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.digits_lvlm.data import CELL_PX, Canvas, Scene, compose
from examples.digits_lvlm.questions import KINDS, Digit, Kind, ask, describe
from examples.digits_lvlm.words import ASSISTANT, BOS, COLOURS, EOS, IMAGE, PAD, USER, VOCABULARY

TEXT_TOKENS = 126
IGNORED = -100
KindWeights = npt.NDArray[np.float64]  # a probability for each of KINDS
_ID = {word: index for index, word in enumerate(VOCABULARY)}
_COLOUR_INDEX = {colour: index for index, colour in enumerate(COLOURS)}
_NO_DIGIT = 10


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one step; S is the same in every batch of a scene, so that compiled code is reused."""

    pixel_values: Tensor  # [B, 3, H, W]
    input_ids: Tensor  # [B, S]
    position_ids: Tensor  # [B, S]
    conversation: Tensor  # [B, S]: 0 for the image part, then 1, 2, ..; -1 for padding
    labels: Tensor  # [B, S]: the token itself where it belongs to an answer, IGNORED elsewhere
    kinds: Tensor  # [B, S]: index into KINDS at the answer word of a question, -1 elsewhere
    patch_value: Tensor  # [B, Nv]
    patch_colour: Tensor  # [B, Nv]
    points: Tensor  # [B, T, 2 + Nv] bool: the patches a word of a question is about; no row where it is about none

    def text_mask(self, prefix: int) -> Tensor:
        """What each token after the first `prefix` sees, bool [B, 1, S - prefix, S]; the prefix itself is plainly causal."""
        own, other = self.conversation[:, prefix:, None], self.conversation[:, None, :]
        causal = torch.ones(self.conversation.shape[1], self.conversation.shape[1], dtype=torch.bool).tril()[prefix:]
        return (causal & ((other == 0) | (other == own)))[:, None]


def encode(text: str) -> list[int]:
    """Token ids of a question or answer, as the tokenizer gives them."""
    for mark in "?,.":
        text = text.replace(mark, f" {mark} ")
    return [_ID[word] for word in text.split()]


_Said = tuple[list[int], list[int], list[int], dict[int, tuple[Digit, ...]]]


def _conversation(canvas: Canvas, rng: np.random.Generator, turns: int, weights: KindWeights) -> _Said:
    """Ids, labels, kinds and points of `turns` questions in a row, without the first `user:` (that one precedes the image)."""
    ids: list[int] = []
    labels: list[int] = []
    kinds: list[int] = []
    points: dict[int, tuple[Digit, ...]] = {}
    for turn in range(turns):
        opening = [_ID[USER]] if turn else []
        if turns == 1 and rng.random() < 0.08:
            (question, answer), kind = describe(canvas.digits), -1
        else:
            wanted = KINDS[int(rng.choice(len(KINDS), p=weights))]
            asked = ask(wanted, canvas.digits, rng) or ask("count", canvas.digits, rng)
            assert asked is not None
            question, answer, kind = asked.text, asked.answer, KINDS.index(asked.kind)
            start = len(ids) + len(opening)
            points |= {start + encode(question).index(_ID[word]): about for word, about in asked.points.items()}
        prompt = [*opening, *encode(question), _ID[ASSISTANT]]
        reply = [*encode(answer), _ID[EOS]]
        ids += prompt + reply
        labels += [IGNORED] * len(prompt) + reply
        kinds += [-1] * len(prompt) + [kind] + [-1] * (len(reply) - 1)
    return ids, labels, kinds, points


def _row(canvas: Canvas, rng: np.random.Generator, grid: int, weights: KindWeights) -> tuple[list[list[int]], npt.NDArray[np.bool_]]:
    """Ids, positions, conversation, labels and kinds of one row, each 2 + Nv + TEXT_TOKENS long, and its points [T, 2 + Nv]."""
    ids = [_ID[BOS], _ID[USER]] + [_ID[IMAGE]] * grid**2
    prefix = len(ids)
    positions, groups, labels, kinds = list(range(prefix)), [0] * prefix, [IGNORED] * prefix, [-1] * prefix
    points = np.zeros((TEXT_TOKENS, prefix), dtype=bool)
    length = prefix + TEXT_TOKENS
    for group in range(1, TEXT_TOKENS):
        said, wanted, kind, about = _conversation(canvas, rng, int(rng.choice([1, 2, 3], p=[0.85, 0.1, 0.05])), weights)
        if len(ids) + len(said) > length:
            break
        for place, digits in about.items():
            points[len(ids) - prefix + place] = _patches_of(digits, grid)
        positions += range(prefix, prefix + len(said))
        ids, labels, kinds = ids + said, labels + wanted, kinds + kind
        groups += [group] * len(said)
    rest = length - len(ids)
    fill = (_ID[PAD], prefix, -1, IGNORED, -1)
    return [row + [value] * rest for row, value in zip((ids, positions, groups, labels, kinds), fill, strict=True)], points


def _patches_of(digits: tuple[Digit, ...], grid: int) -> npt.NDArray[np.bool_]:
    """Which tokens of the image part, [2 + Nv], show these digits; `<s>` stands for "nothing"."""
    plane = np.zeros((grid, grid), dtype=bool)
    for digit in digits:
        plane[digit.row : digit.row + digit.cells, digit.column : digit.column + digit.cells] = True
    return np.concatenate([[not digits, False], plane.ravel()])


def make(seed: list[int], *, size: int, scene: Scene, kinds: dict[Kind, float] | None = None) -> Batch:
    """The batch that `seed` stands for: the same one whenever it is asked for, so a resumed run sees what it would have seen.

    `kinds` weighs the kinds of questions; without it all are as likely.
    """
    weights = np.array([1.0 if kinds is None else kinds.get(kind, 0.0) for kind in KINDS])
    rng = np.random.default_rng(seed)
    canvases = [compose(rng, split="train", scene=scene, warped=True) for _ in range(size)]
    values = np.full((size, scene.grid, scene.grid), _NO_DIGIT)
    colours = np.full((size, scene.grid, scene.grid), len(COLOURS))
    for index, canvas in enumerate(canvases):
        for digit in canvas.digits:
            box = slice(digit.row, digit.row + digit.cells), slice(digit.column, digit.column + digit.cells)
            values[index][box], colours[index][box] = digit.value, _COLOUR_INDEX[digit.colour]
    pixels = np.stack([canvas.image for canvas in canvases]).astype(np.float32) / 127.5 - 1.0
    assert pixels.shape[1] == scene.grid * CELL_PX
    rows, points = zip(*(_row(canvas, rng, scene.grid, weights / weights.sum()) for canvas in canvases), strict=True)
    ids, positions, conversations, labels, answered = torch.tensor(rows).unbind(1)
    return Batch(
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        input_ids=ids,
        position_ids=positions,
        conversation=conversations,
        labels=labels,
        kinds=answered,
        patch_value=torch.from_numpy(values).flatten(1),
        patch_colour=torch.from_numpy(colours).flatten(1),
        points=torch.from_numpy(np.stack(points)),
    )
