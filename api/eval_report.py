"""``report.json`` and ``answers.csv`` of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sievert.bundle.names import FULL
from sievert.calibration.answers import Said
from sievert.calibration.json_lines import writing
from sievert.calibration.questions import Asked, Question
from sievert.eval_score import INTERVALS, agrees, is_right

REPORT: Final = "report.json"
ANSWERS: Final = "answers.csv"
COMPARED: Final = "answers are compared without surrounding space, case and punctuation at the end"


def write_report(folder: Path, report: Mapping[str, Any], questions: Sequence[Question], said: Mapping[str, Mapping[Asked, Said]]) -> None:
    """Write both files, each at once: ``report`` with how it was measured, and a row for each question and variant.

    Raises:
        InputError: the folder cannot be written.
    """
    text = json.dumps({**report, "compared": COMPARED, "intervals": INTERVALS}, indent=1, ensure_ascii=False)
    _replace(folder / REPORT, text + "\n")
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["line", "image", "prompt", "accepted", "variant", "answer", "right", "as_unpruned"])
    for question in questions:
        for variant, answers in said.items():
            text = answers[question.asked].text
            right = str(is_right(question, text)).lower() if question.answers else ""
            same = str(agrees(text, said[FULL][question.asked].text)).lower()
            accepted = " | ".join(question.answers)
            writer.writerow([question.line, question.image_name, question.prompt, accepted, variant, text, right, same])
    _replace(folder / ANSWERS, table.getvalue())


def _replace(path: Path, text: str) -> None:
    """Write beside the file, then take its name: an interruption leaves the old one."""
    beside = path.with_name(f".{path.name}.part")
    with writing(path.parent):
        beside.write_text(text, encoding="utf-8", newline="")
        beside.replace(path)
