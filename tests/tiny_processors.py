"""Tokenizers and processors of :mod:`tests.tiny_families`: written as files, and loaded again, without torchvision."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest import mock

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from tests.tiny_llava import BOS, EOS, PAD, TEMPLATE, UNK, WORDS

VOCABULARY: Final = 112
FIRST_TOKEN: Final = 4
"""The id of a family's first own token, after pad 0, bos 1, eos 2 and unk 3."""


def make_tokenizer(tokens: Sequence[str], *, named: Mapping[str, str] = {}, lines: Sequence[str] = (), bos: bool = True) -> Any:
    """Words of :data:`tests.tiny_llava.WORDS` behind ``tokens``, the family's own special tokens.

    ``named`` are the tokens that processors read as attributes (``tokenizer.boi_token``); ``lines`` are tokens made of line ends, which the
    splitter would drop. Without ``bos`` the tokenizer has no first token, as Qwen's.
    """
    own = [*tokens, *lines]
    words = [PAD, BOS, EOS, UNK, *own, *(word for word in WORDS if word not in (PAD, BOS, EOS, UNK, *own))]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_tokens([AddedToken(line, normalized=False) for line in lines])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=[token for token in tokens if token not in named.values()],
        model_specific_special_tokens=dict(named),
        **({"bos_token": BOS} if bos else {}),
    )


def make_template(placeholder: str, video: str = "<video>") -> str:
    """The chat template of :mod:`tests.tiny_llava` with another placeholder for a picture, and one for a video."""
    other = "{% elif part['type'] == 'video' %} " + video + "{% else %} {{ part['text'] }}"
    return TEMPLATE.replace("{% else %} {{ part['text'] }}", other).replace("<image>", placeholder)


def write_processor(
    folder: Path,
    kind: str,
    *,
    tokenizer: Any,
    images: Any,
    template: str,
    fields: Mapping[str, Any] = {},
    videos: Mapping[str, Any] = {},
) -> None:
    """Write what a processor's ``save_pretrained`` writes.

    By hand, because a processor that has a video processor (whose saved fields are ``videos``) cannot be made without torchvision.
    """
    tokenizer.save_pretrained(folder)
    config = {"processor_class": kind, "image_processor": json.loads(images.to_json_string()), **fields}
    if videos:
        config["video_processor"] = dict(videos)
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "chat_template.jinja").write_text(template)


def offer_processors() -> None:
    """Let transformers find, without torchvision, the processors whose modules want it for nothing that pictures need."""
    if find_spec("torchvision") is None:
        vars(transformers)["PixtralProcessor"] = _pixtral_class()


def _pixtral_class() -> type[ProcessorMixin]:
    """Pixtral's processor, whose module takes one function from the torchvision image processor's: here from its Pillow twin's."""
    package = "transformers.models.pixtral"
    wanted = f"{package}.image_processing_pixtral"
    with mock.patch.dict(sys.modules, {wanted: import_module(f"{package}.image_processing_pil_pixtral")}):
        found: type[ProcessorMixin] = import_module(f"{package}.processing_pixtral").PixtralProcessor
    return found
