from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sievert.engines.run.text import Detokenizer


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any character beyond ASCII spans several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"</s>": 0} | {byte: index + 1 for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def wordwise() -> PreTrainedTokenizerFast:
    """Sentencepiece's way: a token carries the space before it, and the first one of a text loses it."""
    words = ["</s>", "▁a", "▁red", "▁dig", "it", ".", "▁", "▁seven"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="</s>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def test_a_character_of_several_tokens_comes_whole(bytewise):
    tokens = bytewise.encode("a é 🙂!")
    assert pieces(bytewise, tokens) == ["a", " ", "", "é", " ", "", "", "", "🙂", "!", ""]


def test_half_a_character_is_said_at_the_end(bytewise):
    tokens = bytewise.encode("a🙂")[:-1]
    said = pieces(bytewise, tokens)
    assert said[:-1] == ["a", "", "", ""]
    assert set(said[-1]) == {"\ufffd"}
    detokenizer = Detokenizer(bytewise)
    detokenizer.push(tokens[0])
    assert detokenizer.flush() == ""


def test_spaces_between_words_are_kept(wordwise):
    assert pieces(wordwise, [1, 2, 3, 4, 5, 0, 7]) == ["a", " red", " dig", "it", ".", "", " seven", ""]


@given(st.text(alphabet="ab é🙂\n漢\u200d", max_size=20))
def test_pieces_join_to_the_whole(bytewise, text):
    assert "".join(pieces(bytewise, bytewise.encode(text))) == text


@given(st.lists(st.integers(1, 7), max_size=12))
def test_pieces_join_to_what_is_decoded_at_once(wordwise, tokens):
    whole = wordwise.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(wordwise, tokens)) == whole
