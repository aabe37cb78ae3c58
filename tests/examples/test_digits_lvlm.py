"""The shipped model: its data are honest, its training resumes, its checkpoint answers."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from examples.digits_lvlm import attention, batches, train
from examples.digits_lvlm.checkpoint import CHECKPOINT, State
from examples.digits_lvlm.data import CELL_PX, Scene, compose, held_out, image_indices
from examples.digits_lvlm.evaluate import accuracy, evaluate
from examples.digits_lvlm.model import Shape, build, grow
from examples.digits_lvlm.processing import build_processor, build_tokenizer
from examples.digits_lvlm.questions import ASKED, KINDS, Digit, ask, describe
from examples.digits_lvlm.samples import IMAGES
from examples.digits_lvlm.words import SPECIAL, VOCABULARY

SMALL = Scene(grid=6, sizes=(1,), fewest=2, most=3)
TINY_STAGES = (
    train.Stage(name="see", shape=Shape(6, 1), scene=SMALL, steps=2, peak_lr=1e-3, warmup=1, batch=2, answers=False),
    train.Stage(
        name="grown", shape=Shape(7, 2), scene=Scene(grid=7, fewest=2, most=3), steps=3, peak_lr=1e-3, warmup=1, batch=2, pointing=1.0
    ),
)
DIGITS = (
    Digit(value=3, colour="red", row=0, column=4, cells=1, source=0),
    Digit(value=8, colour="blue", row=5, column=9, cells=2, source=1),
    Digit(value=3, colour="pink", row=12, column=0, cells=1, source=2),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these small steps twenty times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_digit_image_is_in_both_splits() -> None:
    images = load_digits().images
    parts = [{images[index].tobytes() for index in image_indices(split)} for split in ("train", "test")]
    assert len(image_indices("test")) == 397
    assert sum(map(len, parts)) == len(images) == 1797
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_canvas_holds_only_its_splits_digits_apart_from_each_other(split) -> None:
    labels = load_digits().target
    for seed in range(20):
        canvas = compose(np.random.default_rng(seed), split=split, warped=split == "train")
        taken = np.zeros((16, 16), dtype=int)
        for digit in canvas.digits:
            assert digit.source in image_indices(split)
            assert digit.value == labels[digit.source]
            taken[max(digit.row - 1, 0) : digit.row + digit.cells, max(digit.column - 1, 0) : digit.column + digit.cells] += 1
        assert taken.max() == 1
        assert 3 <= len(canvas.digits) == len({digit.colour for digit in canvas.digits}) <= 6


def test_the_same_seed_gives_the_same_items() -> None:
    one, two = list(held_out(15, 5)), list(held_out(15, 5))
    assert [(i.question, i.answer, i.kind) for i in one] == [(i.question, i.answer, i.kind) for i in two]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(one, two, strict=True))
    assert one[0].image.tobytes() != next(held_out(1, 6)).image.tobytes()
    assert one[0].image.tobytes() != next(held_out(1, 5, split="train")).image.tobytes()
    assert len(one) == 15
    assert {item.kind for item in one} == set(ASKED)


def _truth(question: str, digits: tuple[Digit, ...]) -> str:
    """The answer worked out again from the words of the question alone."""
    words = question.rstrip("?").replace(",", "").split()
    of_colour = {digit.colour: digit for digit in digits}
    match words:
        case ["which", "digit", "is", colour]:
            return str(of_colour[colour].value)
        case ["what", "colour", "is", "the", value]:
            (only,) = [digit for digit in digits if str(digit.value) == value]
            return only.colour
        case ["how", "many", "digits", "are", "there"]:
            return str(len(digits))
        case ["how", "many", "digits", "are", "even"]:
            return str(len([digit for digit in digits if digit.value in (0, 2, 4, 6, 8)]))
        case ["is", "there", "a", colour, "digit"]:
            return "yes" if colour in of_colour else "no"
        case ["which", "is", "greater", "the", one, "or", "the", other, "digit"]:
            assert of_colour[one].value != of_colour[other].value
            return one if of_colour[one].value > of_colour[other].value else other
        case ["what", "colour", "is", "the", side, "digit"]:
            middles = {digit.colour: (digit.row + digit.cells / 2, digit.column + digit.cells / 2) for digit in digits}
            sign = 1 if side in ("leftmost", "highest") else -1
            return min(middles, key=lambda colour: sign * middles[colour][side.endswith("most")])
    raise AssertionError(question)


def test_answers_agree_with_the_digits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        digits = compose(rng, split="train").digits
        for kind in KINDS:
            asked = ask(kind, digits, rng)
            if asked is not None:
                assert asked.answer == _truth(asked.text, digits)
                assert all(word in asked.text and set(about) <= set(digits) for word, about in asked.points.items())


def test_a_question_without_one_answer_is_not_asked() -> None:
    rng = np.random.default_rng(0)
    twins = (DIGITS[0], DIGITS[2])
    assert ask("colour", twins, rng) is None
    assert ask("greater", twins, rng) is None
    assert describe(DIGITS)[1] == "red 3 blue 8 pink 3"


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) == len(set(VOCABULARY))
    for item in held_out(14):
        ids = tokenizer(item.question).input_ids
        assert ids == batches.encode(item.question)
        assert tokenizer.unk_token_id not in ids
    assert tokenizer("Which digit is RED?").input_ids == batches.encode("which digit is red?")
    assert [tokenizer.convert_tokens_to_ids(word) for word in SPECIAL] == list(range(5))


def test_a_packed_row_says_what_the_prompts_say_one_by_one() -> None:
    torch.manual_seed(0)
    model = build(Shape(6, 2)).eval()
    batch = batches.make([0], size=1, scene=SMALL)
    prefix, groups = 2 + 36, batch.conversation[0]
    alone = {
        group: model(
            input_ids=torch.cat([batch.input_ids[0, :prefix], batch.input_ids[0][groups == group]])[None], pixel_values=batch.pixel_values
        ).logits[0, prefix:]
        for group in range(1, int(groups.max()) + 1)
    }
    features = torch.stack(list(model.model.get_image_features(batch.pixel_values, return_dict=True).pooler_output))
    words = model.get_input_embeddings()(batch.input_ids)
    attention.use_packed(model)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([words[:, :2], features, words[:, prefix:]], dim=1),
        attention_mask=batch.text_mask(prefix),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    assert len(alone) > 3
    for group, logits in alone.items():
        torch.testing.assert_close(model.lm_head(hidden)[0][groups == group], logits, atol=1e-5, rtol=1e-4)


def test_training_pixels_are_the_processors_pixels() -> None:
    canvas = compose(np.random.default_rng([0]), split="train", scene=SMALL, warped=True)
    processed = build_processor(6 * CELL_PX, CELL_PX).image_processor(canvas.image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batches.make([0], size=1, scene=SMALL).pixel_values[0], processed)


def test_new_layers_start_as_the_identity() -> None:
    torch.manual_seed(0)
    small = build(Shape(6, 2)).eval()
    batch = batches.make([1], size=1, scene=SMALL)
    inputs = {"input_ids": batch.input_ids[:, :60], "pixel_values": batch.pixel_values}
    torch.testing.assert_close(grow(small, Shape(6, 5)).eval()(**inputs).logits, small(**inputs).logits)


class _KilledError(Exception):
    """Stands for a kill in mid-run."""


def test_a_killed_run_continues_exactly(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    straight = train.train(TINY_STAGES, seed=0, work=tmp_path / "straight").state_dict()

    save, saves = State.save, []

    def save_then_die(self: State, work: Path) -> None:
        save(self, work)
        saves.append(self.step)
        if len(saves) in (1, 4):
            raise _KilledError

    monkeypatch.setattr(State, "save", save_then_die)
    for _ in range(2):
        with pytest.raises(_KilledError):
            train.train(TINY_STAGES, seed=0, work=tmp_path / "killed")
    resumed = train.train(TINY_STAGES, seed=0, work=tmp_path / "killed").state_dict()
    assert saves == [1, 2, 1, 2, 3]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_the_shipped_checkpoint_answers_offline(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    score = evaluate(CHECKPOINT, questions=105)
    assert sum(asked for _, asked in score.values()) == 105
    assert accuracy(score) > 0.88


def test_the_shipped_files_are_small_and_in_order() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 16_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] >= 10
    assert config["image_seq_length"] == 256
    samples = [json.loads(line) for line in (IMAGES / "questions.jsonl").read_text().splitlines()]
    shown = {item.image.tobytes(): (item.question, item.answer) for item in islice(held_out(36, 2024), 0, None, 6)}
    assert len(samples) == len(shown) == 6
    assert all((IMAGES / sample["image"]).stat().st_size < 64_000 for sample in samples)
