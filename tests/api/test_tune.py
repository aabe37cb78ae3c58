"""`sievert tune`: the cheapest plan that keeps the target, the same after an interruption, confirmed on other questions."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sievert as package
from sievert.bundle.errors import InputError
from sievert.bundle.store import Bundle
from sievert.calibration.questions import normalise
from sievert.calibration.tune_ask import Asker
from sievert.engines.run.pipeline import Pipeline
from tests.api.conftest import content, sievert
from tests.api.test_bad_input import refused
from tests.api.test_eval import count_calls

RESULTS = ("front.csv", "front.png", "plan.yaml", "tune.json")
GRID = ("--selector", "iwp", "--layer", 1, "--keep", "25%,50%,75%", "--no-options")


@pytest.fixture(scope="session")
def data(place: Path) -> Path:
    """24 questions, two about each of 12 pictures."""
    folder, draw = place / "tune-data", np.random.default_rng(1)
    folder.mkdir()
    lines = []
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        lines += [{"image": f"{number}.png", "prompt": prompt} for prompt in ("which digit is red ?", "what is the colour ?")]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tuned(shared: Path, data: Path, place: Path) -> Path:
    """What an uninterrupted run made. Not to be changed."""
    out = place / "tuned"
    said = sievert("tune", shared, "--data", data, "--target", "40%", "--max-new-tokens", 2, "--out", out, *GRID)
    assert said.code == 0, said.all
    return out


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "tune.json").read_text())
    return report


def test_the_chosen_plan_is_the_cheapest_of_the_grid_that_keeps_the_target(tuned: Path, shared: Path, tmp_path: Path, data: Path):
    report = read(tuned)
    assert report["accepted"] and report["task"]["metric"] == "agreement"
    assert report["chosen"]["score"]["value"] >= 0.4 and report["chosen"]["score"]["count"] == report["questions"]["tuning"] == 12
    assert report["confirmed"]["count"] == report["questions"]["confirming"] == 12
    rows = list(csv.DictReader((tuned / "front.csv").read_text().splitlines()))
    assert [row["chosen"] for row in rows].count("yes") == 1
    costs = [float(row["cost"]) for row in rows]
    assert costs == sorted(costs) and costs[0] > 0 and costs[-1] < 1
    ratios = list(csv.DictReader((tuned / "times.csv").read_text().splitlines()))
    assert ratios and all(float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in ratios)
    with Image.open(tuned / "front.png") as picture:
        assert picture.width > 400
    assert not tuned.with_name("tuned.partial").exists()


def test_the_plan_file_makes_the_plan_and_the_score_is_what_eval_measures(tuned: Path, bundle: Path, data: Path, tmp_path: Path):
    report = read(tuned)
    made = package.prune(bundle, plan=tuned / "plan.yaml", name="tuned")
    assert made.variant.plan.model_dump(mode="json") == report["chosen"]["plan"]
    found = package.evaluate(bundle, data, variants=["tuned"], max_new_tokens=2, out=tmp_path / "eval")
    agreement = found.scores[1].agreement
    parts = [report[part] if part == "confirmed" else report[part]["score"] for part in ("chosen", "confirmed")]
    assert agreement is not None
    assert agreement.value == pytest.approx(sum(part["value"] * part["count"] for part in parts) / 24)


def test_killed_in_the_middle_and_resumed_it_gives_the_same_result(tuned: Path, shared: Path, data: Path, tmp_path: Path):
    out = tmp_path / "again"
    asked = ["tune", shared, "--data", data, "--target", "40%", "--max-new-tokens", 2, "--out", out, *GRID]
    code = "from sievert.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, asked)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, whole = tmp_path / "again.partial" / "answers.jsonl", len((tuned / "answers.jsonl").read_text().splitlines())
    end = time.monotonic() + 600
    while not (journal.exists() and journal.read_bytes().count(b"\n") > whole // 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and 1 < len(journal.read_text().splitlines()) < whole
    with journal.open("a") as file:
        file.write('{"variant": "')  # what a kill leaves of a line
    before = len(journal.read_text().splitlines()) - 1
    said = sievert(*asked)
    assert said.code == 0, said.all
    assert {name: (out / name).read_bytes() for name in RESULTS} == {name: (tuned / name).read_bytes() for name in RESULTS}
    assert len((out / "answers.jsonl").read_text().splitlines()) == whole > before
    assert (out / "decisions.jsonl").read_bytes() == (tuned / "decisions.jsonl").read_bytes()


def test_what_plans_have_in_common_is_computed_once(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looked: list[int] = []
    prepared = 0
    real = Asker.prepare

    def prepare(asker: Asker, *given: Any) -> Any:
        nonlocal prepared
        prepared += 1
        return real(asker, *given)

    count_calls(monkeypatch, "encode", looked)
    monkeypatch.setattr(Asker, "prepare", prepare)
    monkeypatch.setattr("sievert.calibration.tune.time_plans", lambda *_: ())
    package.tune(
        shared,
        data,
        target="30%",
        selectors=["iwp", "magnitude"],
        layers=[1],
        keeps=["50%"],
        options=False,
        max_new_tokens=1,
        out=tmp_path / "o",
    )
    plans = {json.loads(line)["variant"] for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()[1:]}
    assert len(plans) == 3  # the unpruned one too
    assert len(looked) == 12 and prepared == 24  # each picture once, each question once


def test_another_target_asks_only_what_is_not_answered(
    tuned: Path, shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "tuned"
    out.mkdir()
    for name, held in content(tuned).items():
        (out / name).write_bytes(held)
    refused("tune", shared, "--data", data, "--out", out, says=("already holds results", "--force"), keeps=out)

    def make(*_: Any, **__: Any) -> Any:
        raise AssertionError("not even a graph has to be made")

    monkeypatch.setattr("sievert.calibration.tune_ask.preview_variant", make)
    monkeypatch.setattr("sievert.calibration.tune.time_plans", lambda *_: ())
    said = sievert("tune", shared, "--data", data, "--target", "40%", "--max-new-tokens", 2, "--out", out, "--force", *GRID)
    assert said.code == 0, said.all
    assert (out / "tune.json").read_bytes() == (tuned / "tune.json").read_bytes()


def test_no_plan_means_no_plan_file_and_an_exit_code_of_its_own(shared: Path, data: Path, tmp_path: Path):
    grid = ("--selector", "random", "--layer", 1, "--keep", "1", "--no-options")
    said = sievert("tune", shared, "--data", data, "--max-new-tokens", 2, "--out", tmp_path / "out", *grid)
    assert said.code == 1, said.all
    assert "No plan reaches 99 %" in said.out and "Next:" not in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"front.csv", "front.png", "tune.json"}
    assert not (tmp_path / "out" / "plan.yaml").exists()
    assert read(tmp_path / "out")["chosen"] is None


def test_an_interruption_says_where_it_goes_on(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "prefill", stop)
    said = sievert("tune", shared, "--data", data, "--out", tmp_path / "out", *GRID)
    assert said.code == 130
    assert str(tmp_path / "out.partial") in said.err and "goes on from there" in said.err
    assert (tmp_path / "out.partial" / "answers.jsonl").exists() and not (tmp_path / "out").exists()


def test_a_decision_that_comes_out_otherwise_is_an_error(tuned: Path, shared: Path, data: Path, tmp_path: Path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in ("answers.jsonl", "plans.jsonl", "decisions.jsonl"):
        (partial / name).write_bytes((tuned / name).read_bytes())
    lines = (partial / "decisions.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"verdict": "', '"verdict": "not ')
    (partial / "decisions.jsonl").write_text("\n".join(lines) + "\n")
    asked = ("tune", shared, "--data", data, "--target", "40%", "--max-new-tokens", 2, "--out", tmp_path / "out", *GRID)
    refused(*asked, says=("decision 1 was", "start again"))


def test_confirmation_is_honest_in_words(tuned: Path, shared: Path, data: Path, tmp_path: Path):
    copy = tmp_path / "tuned"
    copy.mkdir()
    for name, held in content(tuned).items():
        (copy / name).write_bytes(held)
    score = read(tuned)["chosen"]["score"]["value"]
    target = f"{int(score * 100)}%"  # 12 questions cannot show what was just reached
    said = sievert("tune", shared, "--data", data, "--target", target, "--max-new-tokens", 2, "--out", copy, "--force", *GRID)
    assert said.code == 0, said.all
    confirmed = read(copy)["confirmed"]
    assert confirmed["low"] < score and "Not confirmed on 12 questions" in said.out
    below = "do not count on the target" if confirmed["value"] < int(score * 100) / 100 else "do not show that it keeps the target"
    assert below in said.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "0%"), "above 0%"),
        (("--target", "101%"), "at most at 100%"),
        (("--target", "0.99"), "is no percentage"),
        (("--budget", "-1%"), "above 0%"),
        (("--split", "100%"), "below 100 %"),
        (("--metric", "accuracy"), "needs accepted answers"),
        (("--questions", "5"), "at least 10"),
        (("--split", "90%"), "each part needs 10"),
        (("--strict",), "each part needs 381"),
        (("--strict", "--target", "100%"), "no number of questions"),
        (("--selector", "visionzip", "--layer", "1"), "nothing is left to search"),
        (("--selector", "nothing"), "no selector 'nothing'"),
        (("--keep", "22%,120%"), "above 0% and at most at 100%"),
        (("--keep", "17"), "choose 1..16"),
        (("--layer", "9"), "choose 0..3"),
        (("--engine", "tensorrt-rtx"), "runs engine files"),
        (("--max-new-tokens", "99"), "max_new_tokens=99"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(shared: Path, data: Path, tmp_path: Path, arguments: tuple[str, ...], says: str):
    refused("tune", shared, "--data", data, "--out", tmp_path / "out", *arguments, says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused(shared: Path, data: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    (tmp_path / "file").write_text("")
    for out, says in (("other", "mine.txt"), ("file", "is a file")):
        refused("tune", shared, "--data", data, "--out", tmp_path / out, says=says)
    refused("tune", shared, "--data", data, "--out", shared / "x", says="inside the bundle")


def test_accuracy_is_relative_to_the_unpruned_model(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sievert.calibration.tune.time_plans", lambda *_: ())
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    full = package.evaluate(shared, data, variants=["full"], max_new_tokens=1, out=tmp_path / "eval")
    with (full.out / "answers.csv").open(newline="") as file:
        said = [row["answer"] for row in csv.DictReader(file)]
    for number, (line, answer) in enumerate(zip(lines, said, strict=True)):
        line["image"] = str(data.parent / line["image"])
        line["answer"] = answer if number % 2 and normalise(answer) else "something else"
    given = tmp_path / "answered.jsonl"
    given.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    options: dict[str, Any] = {"selectors": ["iwp"], "layers": [1], "keeps": ["25%"], "options": False, "max_new_tokens": 1}
    found = package.tune(shared, given, target="1%", out=tmp_path / "o", **options)
    assert found.task.split.metric == "accuracy"
    trial = found.result.found.trials[0]
    answers = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()[1:]]
    mine = {(one["image"], one["prompt"]): one["text"] for one in answers if one["variant"] == trial.plan.model_dump_json()}
    tuning = found.task.split.tuning
    now = sum(mine[question.asked.image, question.asked.prompt] in question.answers for question in tuning)
    before = sum(question.answers != ("something else",) for question in tuning)
    assert trial.score.value == pytest.approx(now / before)
    for line in lines:
        line["answer"] = "never"
    given.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    with pytest.raises(InputError, match="answers none of the 12 questions"):
        package.tune(shared, given, out=tmp_path / "p", **options)
    assert Bundle.open(shared).manifest.variants.keys() == {"full", "iwp-22"}
