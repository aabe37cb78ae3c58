"""`sievert eval`: every variant on the user's own questions, kept as they are answered, compared with the unpruned one."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sievert as package
from sievert.bundle.errors import InputError
from sievert.calibration.answers import Journal, Said
from sievert.calibration.questions import Asked, normalise
from sievert.engines.run.pipeline import Pipeline
from sievert.eval_score import estimate_change, estimate_share
from tests.api.conftest import content, sievert
from tests.api.test_bad_input import png_of_claimed_size, refused

PROMPTS = ("which digit is red ?", "what is the colour ?", "which ?", "what is the digit ?", "is the digit green ?")


@pytest.fixture
def data(tmp_path: Path, picture: Path) -> Path:
    """Five questions about two pictures; the third has no accepted answer."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.open(picture).save(folder / "a.png")
    Image.open(picture).transpose(Image.Transpose.ROTATE_90).save(folder / "b.png")
    lines: list[dict[str, Any]] = [{"image": f"{'ab'[i % 2]}.png", "prompt": prompt, "answer": "no"} for i, prompt in enumerate(PROMPTS)]
    del lines[2]["answer"]
    path = folder / "questions.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def accept(data: Path, line: int, answers: Any) -> None:
    """Set the accepted answers of question ``line``."""
    lines = [json.loads(text) for text in data.read_text().split("\n") if text]
    lines[line]["answer"] = answers
    data.write_text("\n".join(json.dumps(each) for each in lines) + "\n")


def count_calls(patch: pytest.MonkeyPatch, method: str, batches: list[int]) -> None:
    """Note the batch of every pipeline that is asked to do ``method``."""
    real = getattr(Pipeline, method)

    def noted(pipeline: Pipeline, *given: Any) -> Any:
        batches.append(pipeline.profile.batch)
        return real(pipeline, *given)

    patch.setattr(Pipeline, method, noted)


def test_eval_scores_every_variant_against_the_unpruned_one(bundle: Path, data: Path, tmp_path: Path):
    images = [data.parent / f"{'ab'[i % 2]}.png" for i in range(5)]
    texts = {
        name: [
            package.run(bundle, image, [prompt], variant=name, max_new_tokens=3).answers[0].text.strip()
            for image, prompt in zip(images, PROMPTS, strict=True)
        ]
        for name in ("full", "iwp-22")
    }
    accept(data, 0, ["something else", f" {texts['full'][0].upper()}. "])
    accept(data, 1, texts["iwp-22"][1])
    before = content(bundle)
    said = sievert("eval", bundle, "--data", data, "--max-new-tokens", 3)
    assert said.code == 0, said.all
    assert content(bundle) == before
    out = tmp_path / "bundle-eval"
    report = json.loads((out / "report.json").read_text())
    full, pruned = report["variants"]
    assert (full["variant"], pruned["variant"], report["questions"]) == ("full", "iwp-22", 5)
    rights = {name: [texts[name][0] == texts["full"][0], texts[name][1] == texts["iwp-22"][1]] for name in texts}
    assert (full["right"], pruned["right"]) == (sum(rights["full"]), sum(rights["iwp-22"]))
    assert full["answerable"] == pruned["answerable"] == 4 and full["change"] is None
    assert pruned["change"]["value"] == (sum(rights["iwp-22"]) - sum(rights["full"])) / 4
    same = [one == other for one, other in zip(texts["full"], texts["iwp-22"], strict=True)]
    assert pruned["agreement"]["value"] == sum(same) / 5 and pruned["agreement"]["count"] == 5
    rows = list(csv.DictReader((out / "answers.csv").read_text().splitlines()))
    assert [row["answer"] for row in rows if row["variant"] == "iwp-22"] == texts["iwp-22"]
    assert [row["as_unpruned"] == "true" for row in rows if row["variant"] == "iwp-22"] == same
    assert rows[4]["right"] == "" and rows[4]["image"] == "a.png"
    for part in ("4 of 16 from layer 1 on", "intervals are wide", "1 of 5 questions have no accepted answer", "answers.csv", "without"):
        assert part in said.out
    assert "Bonett" in report["intervals"] and "case" in report["compared"]


def test_an_interrupted_eval_goes_on_where_it_was(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ("eval", bundle, "--data", data, "--max-new-tokens", 2, "--out")
    assert sievert(*asked, tmp_path / "whole").code == 0
    added = 0
    real = Journal.add

    def add(journal: Journal, *given: Any) -> int:
        nonlocal added
        if (added := added + 1) == 4:
            raise KeyboardInterrupt
        return real(journal, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        said = sievert(*asked, tmp_path / "parts")
        assert said.code == 130, said.all
    journal = tmp_path / "parts" / "answers.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 3
    with journal.open("a") as file:
        file.write('{"variant": "iwp-22", "ma')  # what a kill leaves of a line
    answered: list[int] = []
    with monkeypatch.context() as patch:
        count_calls(patch, "prefill", answered)
        said = sievert(*asked, tmp_path / "parts")
    assert said.code == 0, said.all
    assert len(answered) == 2 * 5 - 3
    assert sorted(journal.read_text().splitlines()) == sorted((tmp_path / "whole" / "answers.jsonl").read_text().splitlines())
    for name in ("report.json", "answers.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sievert("eval", bundle, "--data", data, "--max-new-tokens", 2, "--out", tmp_path / "parts", "--limit", 2).code == 0
    assert json.loads((tmp_path / "parts" / "report.json").read_text())["questions"] == 2


def test_variants_share_what_one_vision_encoder_says(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package.prune(bundle, cuts=[package.Cut(selector="visionzip")], batch=2)
    package.prune(bundle, cuts=[package.Cut(keep="50%")], batch=2)
    package.prune(bundle, cuts=(), batch=2, name="plain")
    looked: list[int] = []
    count_calls(monkeypatch, "encode", looked)
    found = package.evaluate(bundle, data, max_new_tokens=2, out=tmp_path / "out")
    assert sorted(looked) == [1] * 5 + [2] * 3 * 2  # full and iwp-22 one by one; in pairs visionzip, and iwp-50 with the plain one
    scores = {score.variant: score for score in found.scores}
    assert list(scores) == ["full", "iwp-22", "iwp-50", "plain", "visionzip-22"]
    assert scores["plain"].agreement is not None and scores["plain"].agreement.value == 1.0


def test_variants_that_do_not_fit_the_memory_together_go_one_after_the_other(
    shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    together = package.evaluate(shared, data, max_new_tokens=1, samples=2, out=tmp_path / "together")
    open_now, most, looked = 0, 0, list[int]()
    load, close = Pipeline.__enter__, Pipeline.close

    def enter(pipeline: Pipeline) -> Pipeline:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        return load(pipeline)

    def leave(pipeline: Pipeline) -> None:
        nonlocal open_now
        open_now -= 1
        close(pipeline)

    monkeypatch.setattr(Pipeline, "__enter__", enter)
    monkeypatch.setattr(Pipeline, "close", leave)
    monkeypatch.setattr("sievert.evaluating.find_memory_gib", lambda: 0.0)
    count_calls(monkeypatch, "encode", looked)
    alone = package.evaluate(shared, data, max_new_tokens=1, samples=2, out=tmp_path / "alone")
    assert (most, len(looked), alone.scores) == (1, 4, together.scores)


def _append(data: Path, **line: Any) -> None:
    with data.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _keep_lines(data: Path, *lines: int) -> None:
    texts = [text for text in data.read_text().split("\n") if text]
    data.write_text("\n".join(texts[line] for line in lines) + "\n")


def _other_image(bundle: Path, data: Path) -> None:
    Image.new("RGB", (8, 8)).save(data.parent / "a.png")


def _renamed_image(bundle: Path, data: Path) -> None:
    (data.parent / "a.png").rename(data.parent / "c.png")
    data.write_text(data.read_text().replace("a.png", "c.png"))


def _other_variant(bundle: Path, data: Path) -> None:
    package.prune(bundle, cuts=[package.Cut(keep="50%")], name="iwp-22", force=True)


@pytest.mark.parametrize(
    ("change", "options", "asked"),
    [
        (lambda _, data: accept(data, 0, "yes"), {}, 0),
        (lambda _, data: _keep_lines(data, 4, 0), {}, 0),
        (lambda _, data: _append(data, image="a.png", prompt=PROMPTS[0], answer="yes"), {}, 0),  # asked before, elsewhere in the file
        (_renamed_image, {}, 0),
        (lambda _, data: _append(data, image="b.png", prompt=PROMPTS[0]), {}, 2),
        (lambda *_: None, {"samples": 2}, 0),
        (_other_image, {}, 2 * 3),
        (_other_variant, {}, 5),
        (lambda *_: None, {"max_new_tokens": 2}, 2 * 5),
    ],
    ids=["answers", "fewer lines", "a line twice", "renamed", "a line more", "fewer samples", "another image", "another variant", "longer"],
)
def test_only_what_was_never_asked_is_asked(
    bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], object],
    options: dict[str, Any],
    asked: int,
):
    """An answer belongs to an image's bytes, a prompt, what is run, and the settings; accuracy is that of the data as it is now."""
    package.evaluate(bundle, data, max_new_tokens=1, out=tmp_path / "out")
    change(bundle, data)
    calls: list[int] = []
    counted: list[tuple[int, int]] = []
    count_calls(monkeypatch, "prefill", calls)
    found = package.evaluate(
        bundle, data, **{"max_new_tokens": 1, **options}, out=tmp_path / "out", on_count=lambda *now: counted.append(now)
    )
    assert len(calls) == asked
    assert counted[-1][0] == counted[-1][1] == counted[0][0] + asked
    fresh = package.evaluate(bundle, data, **{"max_new_tokens": 1, **options}, out=tmp_path / "fresh")
    assert (found.scores, found.questions) == (fresh.scores, fresh.questions)
    for name in ("report.json", "answers.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_raw_prompts_are_other_questions(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package.evaluate(shared, data, max_new_tokens=1, samples=1, out=tmp_path / "out")
    calls: list[int] = []
    count_calls(monkeypatch, "prefill", calls)
    package.evaluate(shared, data, max_new_tokens=1, samples=1, template=False, out=tmp_path / "out")
    package.evaluate(shared, data, max_new_tokens=1, samples=1, out=tmp_path / "out")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"tokens"', '"tokes"'), "line 2 is damaged"),
        (lambda text: text.replace('"text": "', '"text": 3, "was": "'), "line 2 is damaged"),
        (lambda text: "[]\n" + text, "line 1 is damaged"),
        (lambda text: text.replace('{"sievert_eval": 2}', '{"sievert_eval": 1, "data": "00"}'), "not written by this version"),
    ],
)
def test_a_damaged_journal_is_not_gone_on_with(shared: Path, data: Path, tmp_path: Path, damage: Callable[[str], str], says: str):
    out = tmp_path / "out"
    asked = ("eval", shared, "--data", data, "--out", out, "--max-new-tokens", 1, "--limit", 1)
    assert sievert(*asked).code == 0
    (out / "answers.jsonl").write_text(damage((out / "answers.jsonl").read_text()))
    refused(*asked, says=(says, "--out"), keeps=out)


def test_what_cannot_be_written_is_said_with_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path, {})
    answers = [(Asked("00", "what ?"), Said("a cat", 2, "stop"))]
    for fault, reason in ((OSError(errno.EIO, "Input/output error"), "Input/output error"), (OSError("out of luck"), "out of luck")):

        def fail(*_: object, fault: OSError = fault) -> None:
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", fail)
            with pytest.raises(InputError, match=rf"{tmp_path} cannot be written \({reason}\)"):
                journal.add("full", "01", answers)
    assert journal.said("01") == {} and journal.add("full", "01", answers) == 1 and journal.add("full", "01", answers) == 0


def test_what_fails_elsewhere_is_not_blamed_on_the_folder(shared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("the runtime lost its device")

    monkeypatch.setattr(Pipeline, "encode", fail)
    with pytest.raises(OSError, match="^the runtime lost its device$"):
        package.evaluate(shared, data, max_new_tokens=1, samples=1, out=tmp_path / "out")


def test_variants_that_cannot_take_a_prompt_are_named_before_anything_runs(bundle: Path, data: Path, tmp_path: Path):
    package.prune(bundle, cuts=[package.Cut(selector="uniform")], max_text=10)
    package.prune(bundle, cuts=[package.Cut(selector="uniform")], max_text=12, name="wider")
    out = tmp_path / "out"
    asked = ("eval", bundle, "--data", data, "--out", out, "--max-new-tokens", 1)
    data.write_text(GOOD + "\n" + json.dumps({"image": "a.png", "prompt": "w1 " * 9}))
    tight = ("line 2: the prompt has 12 text tokens", "'uniform-22' takes 10", "--variant iwp-22 --variant wider)", "--max-text")
    refused(*asked, says=tight)
    assert sievert(*asked, "--variant", "iwp-22", "--variant", "wider").code == 0
    data.write_text(json.dumps({"image": "a.png", "prompt": "w1 " * 40}))
    said = sievert(*asked, "--variant", "iwp-22")
    assert said.code == 2 and "line 1: the prompt has 43 text tokens" in said.err and "takes 24" in said.err
    assert "ask only" not in said.err  # no variant takes it


def test_prompts_without_a_question_are_found_before_anything_runs(bundle: Path, data: Path, tmp_path: Path):
    package.prune(bundle, cuts=[package.Cut(selector="uniform")])
    out = tmp_path / "out"
    asked = ("eval", bundle, "--data", data, "--out", out, "--max-new-tokens", 1, "--raw-prompt")
    data.write_text(GOOD + "\n" + json.dumps({"image": "a.png", "prompt": f"{PROMPTS[0]} <image>"}))
    refused(*asked, says=("line 2: the prompt has no text after the image", "'iwp-22'", "--variant uniform-22)", "after the image"))
    assert not out.exists()
    refused(*asked, "--variant", "iwp-22", says="(--variant full)")
    assert sievert(*asked, "--variant", "uniform-22").code == 0
    assert sievert(*asked, "--variant", "full").code == 0


GOOD = json.dumps({"image": "a.png", "prompt": PROMPTS[0], "answer": "x"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no lines"),
        ("\n\n", "no lines"),
        (GOOD + "\n{'image'}", ("line 2", '{"image"')),
        (GOOD + '\n["a.png", "x"]', "line 2"),
        (GOOD + '\n\n{"image": "a.png"}', "line 3"),
        ('{"image": 3, "prompt": "x"}', ("line 1", "must be texts")),
        ('{"image": "a.png", "prompt": "x", "answer": 3}', ("line 1", "answer must be a text", "but it is 3:", '"answer": "3"')),
        ('{"image": "a.png", "prompt": "x", "answer": []}', ("line 1", "answer must be", "but it is []:")),
        ('{"image": "a.png", "prompt": "x", "answer": ["y", "."]}', ("line 1", "none of them empty")),
        ('{"image": "a.png", "prompt": "\\ud800"}', ("line 1", "no character")),
        (GOOD + '\n{"image": "c.png", "prompt": "x"}', ("line 2", "c.png does not exist")),
        (GOOD + '\n{"image": ".", "prompt": "x"}', ("line 2", "is not a file")),
        (GOOD + '\n{"image": "https://example.org/a.png", "prompt": "x"}', ("line 2", "download it")),
        (GOOD + '\n{"image": "text.png", "prompt": "x"}', ("line 2", "cannot be read")),
        (GOOD + '\n{"image": "bomb.png", "prompt": "x"}', ("line 2", "60000")),
        (GOOD + json.dumps({"image": "a.png", "prompt": "w1 " * 40}).replace("{", "\n{"), ("line 2", "text tokens")),
        (GOOD + '\n{"image": "a.png", "prompt": " "}', ("line 2", "prompt is empty")),
    ],
)
def test_questions_that_cannot_be_asked_are_named_with_their_line(
    shared: Path, data: Path, tmp_path: Path, text: str, says: str | tuple[str, ...]
):
    (data.parent / "text.png").write_text("not an image")
    png_of_claimed_size(data.parent / "bomb.png", 60_000, 60_000)
    data.write_text(text)
    refused("eval", shared, "--data", data, "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_eval_refuses_options_that_do_not_fit(bundle: Path, data: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for options, says in (
        (("--variant", "iwp-23"), ("no variant 'iwp-23'", "full, iwp-22")),
        (("--engine", "fastest"), ("'fastest'", "onnxruntime")),
        (("--limit", 0), "at least one question"),
        (("--max-new-tokens", 9), ("max_new_tokens=9", "1..8", "--max-new-tokens")),
        (("--max-new-tokens", 0), "max_new_tokens=0"),
        (("--out", bundle / "eval"), "inside the bundle"),
        (("--out", bundle), "inside the bundle"),
        (("--out", tmp_path / "other"), "holds other files"),
        (("--out", tmp_path / "file"), "is a file"),
        (("--out", tmp_path / "file" / "below", "--limit", 1), "cannot be written"),
    ):
        refused("eval", bundle, "--data", data, *options, says=says, keeps=bundle)
    refused("eval", bundle, "--data", tmp_path / "no.jsonl", says=("no.jsonl", "cannot be read"))
    refused("eval", bundle, "--data", tmp_path, says=("it is no file", '{"image"'))
    assert (tmp_path / "other" / "report.json").read_text() == "mine"


def test_answers_are_compared_without_what_does_not_matter():
    assert normalise(" The Cat. ") == normalise("the cat !") == "the cat"
    assert normalise("3.5%") == "3.5%" and normalise("C++") == "c++" and normalise("STRASSE") == normalise("Straße")


def test_intervals_do_not_vanish_where_nothing_differs():
    same = estimate_change([True] * 10, [True] * 10)
    assert same.value == 0 and -same.low == pytest.approx(same.high) and same.high == pytest.approx(1.959964 * (2 / 12 / 12) ** 0.5)
    # 6 right both times, 26 gained, 4 lost, 12 never right: statpsych documents ci.prop.ps(.05, 12, 4, 26, 6) as 0.2548067 to 0.6251933.
    known = estimate_change([True] * 32 + [False] * 16, [True] * 6 + [False] * 26 + [True] * 4 + [False] * 12)
    assert (known.low, known.high) == pytest.approx((0.2548067, 0.6251933), abs=1e-6)
    worse = estimate_change([False] * 30 + [True] * 70, [True] * 100)
    assert worse.value == -0.3 and worse.low < -0.3 < worse.high < -0.2
    all_alike = estimate_share([True] * 10)
    assert (all_alike.value, all_alike.high, all_alike.low) == pytest.approx((1.0, 1.0, 10 / (10 + 1.959964**2)))
