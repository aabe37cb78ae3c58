from collections.abc import Sequence

import numpy as np
import pytest

from sievert.bundle.errors import EngineError, InputError, ProfileError
from sievert.bundle.store import Bundle
from sievert.engines.run.generate import Completion, generate, stream
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.sampling import Sampling
from tests.engines.run.toy import EOS, Toy, make_batch, make_bundle

TOYS = {
    "one": Toy(max_new=8),
    "three": Toy(batch=3, decode_batch=3, max_new=8),
    "slots": Toy(batch=3, decode_batch=5, max_new=8),
    "waves": Toy(batch=3, decode_batch=2, max_new=8),
}
PROMPTS, PLACES = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18]], [1, 2, 0]


class Words:
    """A tokenizer whose words are numbers."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(f" {token}" for token in token_ids if token not in EOS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("toy") / "bundle", **TOYS)


@pytest.fixture(scope="module")
def pipelines(bundle: Bundle) -> dict[str, Pipeline]:
    return {name: Pipeline(bundle, name, OnnxRuntime(threads=1)) for name in TOYS}


def batch_of(name: str, *rows: int) -> PromptBatch:
    chosen = rows or range(TOYS[name].batch)
    batch = make_batch(TOYS[name], [PROMPTS[row] for row in chosen], [PLACES[row] for row in chosen])
    pixels = np.stack([np.full((3, 4, 4), row + 1, np.float32) for row in chosen])
    pixels = np.concatenate([pixels, *[pixels[-1:]] * (TOYS[name].batch - len(chosen))])
    return PromptBatch(**{**vars(batch), "pixel_values": pixels})


def greedy(name: str, row: int, count: int) -> tuple[int, ...]:
    """What a model without caches would say, up to its stop token."""
    toy, batch = TOYS[name], batch_of("one", row)
    features = batch.pixel_values[0].reshape(4, -1) @ toy.weights()["vis"]
    tokens = list(batch.unpadded(0))
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in EOS):
        said.append(int(toy.reference(np.array([*tokens, *said]), features, batch.visual_index[0]).argmax()))
    return tuple(said)


@pytest.mark.parametrize("name", TOYS)
def test_greedy_answers_equal_a_model_without_caches(pipelines, name):
    rows = range(3) if name != "one" else [1]
    answers = generate(pipelines[name], Words(), batch_of(name, *rows), max_new_tokens=8)
    assert [answer.tokens for answer in answers] == [greedy(name, row, 8) for row in rows]
    for answer in answers:
        words = [token for token in answer.tokens if token not in EOS]
        assert answer.text == "".join(f" {word}" for word in words)
        assert answer.finish == ("stop" if answer.tokens[-1] in EOS else "length")


def test_only_real_rows_are_answered(pipelines):
    answers = generate(pipelines["three"], Words(), batch_of("three", 2, 0), max_new_tokens=4)
    assert [answer.tokens for answer in answers] == [greedy("three", row, 4) for row in (2, 0)]


def test_rows_stop_independently(pipelines, monkeypatch):
    # The second token that row 0 says is made a stop token; the others go on to the maximum, or to where they say it.
    stop = greedy("three", 0, 8)[1]
    monkeypatch.setattr(pipelines["three"], "geometry", pipelines["three"].geometry.model_copy(update={"eos_token_ids": (stop,)}))
    answers = generate(pipelines["three"], Words(), batch_of("three"), max_new_tokens=6)
    assert (answers[0].tokens, answers[0].finish) == (greedy("three", 0, 2), "stop")
    assert answers[0].text == f" {answers[0].tokens[0]}"
    assert any(len(answer.tokens) > 2 for answer in answers[1:])
    for row, answer in enumerate(answers):
        whole = greedy("three", row, 6)
        cut = whole.index(stop) + 1 if stop in whole else 6
        assert answer.tokens == whole[:cut]


def test_pieces_come_one_by_one(pipelines):
    pieces = stream(pipelines["one"], Words(), batch_of("one", 0), max_new_tokens=3)
    expected = greedy("one", 0, 3)
    first = next(pieces)
    assert (first.row, first.token, first.text, first.finish) == (0, expected[0], f" {expected[0]}", None)
    rest = list(pieces)
    assert [piece.token for piece in rest] == list(expected[1:])
    assert [piece.finish for piece in rest] == [None, "length"]


def test_a_single_token_needs_no_decode(pipelines, monkeypatch):
    monkeypatch.setattr(pipelines["one"], "decode", lambda tokens: pytest.fail("decoded"))
    assert generate(pipelines["one"], Words(), batch_of("one", 0), max_new_tokens=1)[0].finish == "length"


@pytest.mark.parametrize("count", [0, -1, 9])
def test_more_tokens_than_the_capacity_are_refused_at_once(pipelines, count):
    with pytest.raises(ProfileError, match=rf"max_new_tokens={count}, but this variant's caches hold 1\.\.8: .*--max-new-tokens"):
        stream(pipelines["one"], Words(), batch_of("one", 0), max_new_tokens=count)


def test_the_longest_prompt_and_the_most_tokens_fit(pipelines, monkeypatch):
    monkeypatch.setattr(pipelines["one"], "geometry", pipelines["one"].geometry.model_copy(update={"eos_token_ids": ()}))
    answer = generate(pipelines["one"], Words(), batch_of("one", 2), max_new_tokens=8)[0]
    assert batch_of("one", 2).lengths == (TOYS["one"].profile.sequence,)
    assert len(answer.tokens) == 8


def test_a_stream_whose_prompt_was_replaced_says_so(pipelines):
    pieces = stream(pipelines["one"], Words(), batch_of("one", 0), max_new_tokens=8)
    next(pieces)
    generate(pipelines["one"], Words(), batch_of("one", 1), max_new_tokens=2)
    with pytest.raises(EngineError, match="another prompt was read"):
        next(pieces)


def test_features_given_spare_the_encoder(pipelines, monkeypatch):
    batch = batch_of("one", 0)
    features = pipelines["one"].encode(batch.pixel_values)
    monkeypatch.setattr(pipelines["one"], "encode", lambda pixels: pytest.fail("encoded"))
    answer = generate(pipelines["one"], Words(), batch, max_new_tokens=4, features=features)[0]
    assert answer.tokens == greedy("one", 0, 4)


def test_sampled_rows_do_not_depend_on_the_rest_of_the_batch(pipelines):
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=5)

    def say(name: str, *rows: int, how: Sampling = sampling) -> tuple[Completion, ...]:
        return generate(pipelines[name], Words(), batch_of(name, *rows), max_new_tokens=8, sampling=how)

    together = say("three", 0, 1, 2)
    assert together == say("three", 0, 1, 2) == say("waves", 0, 1, 2)
    assert together[0] == say("one", 0)[0]
    assert together != say("three", 0, 1, 2, how=Sampling(temperature=1.5, top_p=0.9, seed=6))
    assert together[0].tokens != greedy("three", 0, 8)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    chance = np.random.default_rng(0)

    def seen(top_p: float, temperature: float = 1.0) -> dict[int, float]:
        draws = [Sampling(temperature, top_p).choose(logits, chance) for _ in range(4000)]
        return {token: draws.count(token) / 4000 for token in sorted(set(draws))}

    assert seen(0.45).keys() == {1}
    assert seen(0.7).keys() == {1, 3}
    assert seen(0.8).keys() == {1, 2, 3}
    assert seen(1.0) == pytest.approx({0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}, abs=0.03)
    assert seen(0.7)[1] == pytest.approx(2 / 3, abs=0.03)
    assert seen(1.0, 0.5)[1] == pytest.approx(0.25 / 0.345, abs=0.03)
    assert seen(1.0, 1e-6).keys() == {1}


def test_equal_logits_take_the_lower_token():
    assert Sampling().choose(np.array([0.0, 2.0, 2.0], np.float32), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error(value):
    with pytest.raises(EngineError, match="NaN or infinity"):
        Sampling().choose(np.array([0.0, value], np.float32), np.random.default_rng(0))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": np.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}])
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)
