"""Write a few held-out canvases and questions for demonstrations: `python -m examples.digits_lvlm.samples`."""

import json
from itertools import islice
from pathlib import Path
from typing import Final

from examples.digits_lvlm.data import held_out
from examples.digits_lvlm.questions import ASKED

IMAGES: Final = Path(__file__).parent / "images"
# Not the seed the accuracy is measured with: these pictures are for showing.
_SEED: Final = 2024


def write(folder: Path = IMAGES, *, count: int = 6) -> None:
    """`count` PNGs, each with a question of another kind, listed in `questions.jsonl` (image, prompt, answer)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    # Every fifth item and one more: another canvas each time, and the next kind of question.
    items = list(islice(held_out(count * (len(ASKED) + 1), _SEED), 0, None, len(ASKED) + 1))
    for index, item in enumerate(items):
        name = f"canvas_{index}.png"
        item.image.save(folder / name, optimize=True)
        lines.append(json.dumps({"image": name, "prompt": item.question, "answer": item.answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
