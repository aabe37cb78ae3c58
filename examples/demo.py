"""The whole chain on the shipped model, as you would type it: `make demo`, or `python examples/demo.py [CHECKPOINT]`.

Exports the checkpoint to the folder `demo-bundle`, keeps 22 % of its visual tokens, builds engines, checks them against PyTorch on
64 held-out pictures, and asks the unpruned and the pruned model three questions about a picture neither has seen. What else it
writes is in `demo-out`: the picture, `kept.png`, the questions, and the report of the check.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `examples` is not installed

from examples.digits_lvlm.checkpoint import CHECKPOINT  # noqa: E402
from examples.digits_lvlm.data import Item, held_out  # noqa: E402
from examples.digits_lvlm.questions import ASKED as KINDS  # noqa: E402

BUNDLE, OUT = Path("demo-bundle"), Path("demo-out")
SAMPLES = 64
_SEED = 7  # not the one that the accuracy is measured with


def sievert(*arguments: str | Path) -> None:
    """Run a command as a user would; one that fails ends the demo with its exit code."""
    shown = [str(argument) for argument in arguments]
    print(f"\n$ sievert {shlex.join(shown)}", flush=True)
    code = subprocess.run([sys.executable, "-c", "from sievert.cli import main; main()", *shown], check=False).returncode
    if code:
        sys.exit(code)


def write_samples(folder: Path, count: int) -> Path:
    """Held-out pictures, each with a question of another kind than the one before, as `sievert check --data` reads them."""
    lines = []
    for number, item in enumerate(islice(held_out(count * (len(KINDS) + 1), _SEED), 0, None, len(KINDS) + 1)):
        item.image.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": item.question, "answer": item.answer}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def three_questions() -> list[Item]:
    """Three questions about one held-out picture."""
    items = list(held_out(2 * len(KINDS), _SEED + 1))
    first = items[0].image
    return [item for item in items if item.image.tobytes() == first.tobytes()][:3]


def main() -> None:
    """Run the demo in the current folder."""
    start = time.monotonic()
    checkpoint = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT
    if not (checkpoint / "config.json").is_file():
        sys.exit(f"{checkpoint} holds no checkpoint: train one with `python -m examples.digits_lvlm.train`")
    if checkpoint.is_relative_to(Path.cwd()):
        checkpoint = checkpoint.relative_to(Path.cwd())
    rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    engines = ["onnxruntime", *(["tensorrt-rtx"] if rtx else [])]
    samples = OUT / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    picture = OUT / "picture.png"
    asked = three_questions()
    asked[0].image.save(picture)

    built = [word for engine in engines for word in ("--engine", engine)]
    sizes = ("--max-text", "24", "--max-new-tokens", "8")
    sievert("export", checkpoint, BUNDLE, "--keep", "22%", *sizes, *built, "--force")
    data = write_samples(samples, SAMPLES)
    sievert("check", BUNDLE, "--data", data, "--samples", str(SAMPLES), "--json", OUT / "report.json")
    prompts = [word for item in asked for word in ("--prompt", item.question)]
    sievert("run", BUNDLE, "--variant", "full", "--image", picture, *prompts)
    sievert("run", BUNDLE, "--variant", "iwp-22", "--image", picture, *prompts, "--show-kept", OUT / "kept.png")

    print("\nThe right answers: " + ", ".join(item.answer for item in asked))
    if not rtx:
        print("NOT RUN: engines of TensorRT for RTX were not built, its package is not installed (pip install 'sievert[tensorrt-rtx]')")
    print(
        f"Done in {time.monotonic() - start:.0f} s. What was kept for each question: {OUT / 'kept.png'}; the check: {OUT / 'report.json'}"
    )


if __name__ == "__main__":
    main()
