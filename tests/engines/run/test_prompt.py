import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from sievert.bundle.errors import BundleError, ImageError, ProfileError, PromptError
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.engines.run.images import load_image
from sievert.engines.run.prompt import Prompter, load_processor
from tests.tiny_llava import make_tiny_llava

GEOMETRY = Geometry(
    depth=1, width=64, heads=4, kv_heads=2, head_size=16, vocabulary=96, attention_scale=0.25, max_positions=512, image_token_id=4,
    pad_token_id=0, eos_token_ids=(2,), image_height=32, image_width=32, channels=3, grid=(4, 4), visual_tokens=16,
)  # fmt: skip
BOS, IMAGE, USER, ASSISTANT, WHICH, IS, DIGIT, RED = 1, 4, 5, 6, 9, 11, 13, 15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("checkpoint"), layers=1)


@pytest.fixture(scope="module")
def prompter(checkpoint: Path) -> Prompter:
    return Prompter(checkpoint, GEOMETRY, Profile(batch=3, visual_tokens=16, max_text=8, max_new_tokens=4))


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Prompter:
    """For two images in each prompt."""
    return Prompter(checkpoint, GEOMETRY, Profile(batch=3, images=2, visual_tokens=32, max_text=8, max_new_tokens=4))


def picture(width: int = 32, height: int = 32, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_prompts_are_templated_padded_and_copied(prompter):
    batch = prompter.prepare([picture()], ["which digit", "red"])
    first = [BOS, USER, *[IMAGE] * 16, WHICH, DIGIT, ASSISTANT]
    second = [BOS, USER, *[IMAGE] * 16, RED, ASSISTANT]
    assert batch.input_ids.tolist() == [[*first, *[0] * 3], [*second, *[0] * 4], [*second, *[0] * 4]]
    assert batch.lengths == (21, 20, 20)
    assert batch.rows == 2
    assert batch.attention_mask.tolist() == [[1] * 21 + [0] * 3, *[[1] * 20 + [0] * 4] * 2]
    assert batch.position_ids.tolist() == [[*range(21), 20, 20, 20], *[[*range(20), 19, 19, 19, 19]] * 2]
    assert batch.visual_index.tolist() == [list(range(2, 18))] * 3
    assert {array.dtype for array in (batch.input_ids, batch.attention_mask, batch.position_ids, batch.visual_index)} == {
        np.dtype(np.int64)
    }
    assert (batch.pixel_values.shape, batch.pixel_values.dtype) == ((3, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(batch.pixel_values[0], batch.pixel_values[2])
    assert batch.unpadded(1).tolist() == second
    assert prompter.detokenizer().push(RED) == "red"


def test_with_dynamic_text_prompts_are_as_long_as_the_longest_of_their_batch(checkpoint):
    profile = Profile(batch=3, visual_tokens=16, max_text=8, max_new_tokens=4, dynamic_text=True)
    prompter = Prompter(checkpoint, GEOMETRY, profile)
    batch = prompter.prepare([picture()], ["which digit", "red"])
    assert batch.lengths == (21, 20, 20)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.position_ids.shape == (3, 21)
    assert batch.attention_mask.sum(1).tolist() == [21, 20, 20]
    assert prompter.prepare([picture()], ["red"]).input_ids.shape == (3, 20)
    assert prompter.prepare([picture()], ["<image>"], template=False).input_ids.shape == (3, 17), "the shortest that graphs take"
    with pytest.raises(PromptError, match="this variant takes 8"):
        prompter.prepare([picture()], ["red " * 9])


def test_each_prompt_has_its_own_picture(prompter):
    batch = prompter.prepare([picture(seed=1), picture(seed=2)], ["red", "red"])
    assert (batch.pixel_values[0] != batch.pixel_values[1]).any()


def test_raw_prompts_get_the_image_token_in_front_where_they_have_none(prompter):
    batch = prompter.prepare([picture()] * 3, ["red", "which <image> red", "<s> <image> red"], template=False)
    assert batch.unpadded(0).tolist() == [*[IMAGE] * 16, RED]
    assert batch.unpadded(1).tolist() == [WHICH, *[IMAGE] * 16, RED]
    assert batch.unpadded(2).tolist() == [BOS, *[IMAGE] * 16, RED]
    assert batch.visual_index[1].tolist() == list(range(1, 17))


def test_the_longest_prompt_fits_and_one_more_does_not(prompter):
    assert prompter.prepare([picture()], ["red " * 5]).lengths[0] == 24
    with pytest.raises(PromptError, match=r"has 9 text tokens, template included, but this variant takes 8: .*--max-text"):
        prompter.prepare([picture()], ["red " * 6])


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompts_are_refused(prompter, prompt):
    with pytest.raises(PromptError, match="prompt is empty"):
        prompter.prepare([picture()], [prompt])


def test_image_tokens_of_the_user_s_own_are_refused(prompter):
    with pytest.raises(PromptError, match=r"3 image tokens \(<image>\), expected 1: leave them out"):
        prompter.prepare([picture()], ["<image> red <image>"])
    with pytest.raises(PromptError, match="takes one image per prompt"):
        prompter.prepare([picture()], ["<image> red <image>"], template=False)


def test_several_images_stand_before_the_question_in_their_order(pair):
    batch = pair.prepare([[picture(seed=1), picture(seed=2)], [picture(seed=3), picture(seed=1)]], ["which digit", "red"])
    assert batch.unpadded(0).tolist() == [BOS, USER, *[IMAGE] * 32, WHICH, DIGIT, ASSISTANT]
    assert batch.pixel_values.shape == (3, 2, 3, 32, 32)
    np.testing.assert_array_equal(batch.pixel_values[0, 0], batch.pixel_values[1, 1])
    assert (batch.pixel_values[0, 0] != batch.pixel_values[0, 1]).any()
    assert pair.prepare([[picture(), picture()]], ["red", "red"]).visual_index.tolist() == [list(range(2, 34))] * 3


def test_a_templated_prompt_may_say_where_its_images_stand(prompter, pair):
    batch = pair.prepare([[picture(), picture()]], ["which <image> is red <image>"])
    assert batch.unpadded(0).tolist() == [BOS, USER, WHICH, *[IMAGE] * 16, IS, RED, *[IMAGE] * 16, ASSISTANT]
    assert prompter.prepare([picture()], ["which <image>"]).unpadded(0).tolist() == [BOS, USER, WHICH, *[IMAGE] * 16, ASSISTANT]
    with pytest.raises(PromptError, match="the prompt has 3 image tokens .* expected 2: leave them out"):
        pair.prepare([[picture(), picture()]], ["which <image>"])


def test_raw_prompts_say_where_each_image_stands(pair):
    two = [picture(), picture()]
    texts = ["red", "which <image> red <image> digit", "<s> <image> <image> red"]
    batch = pair.prepare([two] * 3, texts, template=False)
    assert batch.unpadded(0).tolist() == [*[IMAGE] * 32, RED]
    assert batch.unpadded(1).tolist() == [WHICH, *[IMAGE] * 16, RED, *[IMAGE] * 16, DIGIT]
    assert batch.unpadded(2).tolist() == [BOS, *[IMAGE] * 32, RED]
    assert batch.visual_index[1].tolist() == [*range(1, 17), *range(18, 34)]
    assert batch.without_question() is None
    assert pair.prepare([two], ["<image> red <image>"], template=False).without_question() is None  # after the first image
    assert pair.prepare([two], ["red <image> <image>"], template=False).without_question() == 0


def test_another_number_of_images_than_the_profile_s_is_refused(prompter, pair):
    with pytest.raises(PromptError, match="1 image for a prompt, but this variant takes 2 per prompt: give 2, or .*--images 1"):
        pair.prepare([picture()], ["red"])
    with pytest.raises(PromptError, match="3 images for a prompt, but this variant takes 2"):
        pair.prepare([[picture()] * 3], ["red"])
    with pytest.raises(PromptError, match="2 images for a prompt, but this variant takes 1 per prompt: give 1, or .*--images 2"):
        prompter.prepare([[picture()] * 2], ["red"])
    with pytest.raises(PromptError, match=r"has 1 image tokens \(<image>\), expected 2: this variant takes 2 images per prompt"):
        pair.prepare([[picture()] * 2], ["<image> red"], template=False)
    with pytest.raises(PromptError, match=r"3 image tokens .*expected 2: leave them out, the template places 2"):
        pair.prepare([[picture()] * 2], ["<image> red"])


def test_counts_that_do_not_fit(prompter):
    with pytest.raises(ProfileError, match=r"4 prompts, but this variant takes 1\.\.3"):
        prompter.prepare([picture()], ["red"] * 4)
    with pytest.raises(ProfileError, match="0 prompts"):
        prompter.prepare([picture()], [])
    with pytest.raises(ProfileError, match="2 images for 3 prompts"):
        prompter.prepare([picture()] * 2, ["red"] * 3)


def test_a_model_without_a_template_says_so(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    (folder / "chat_template.jinja").unlink()
    bare = Prompter(folder, GEOMETRY, Profile(visual_tokens=16, max_text=8, max_new_tokens=4))
    with pytest.raises(PromptError, match="no chat template"):
        bare.prepare([picture()], ["red"])
    assert bare.prepare([picture()], ["red"], template=False).lengths == (17,)


def test_any_size_is_resized_but_a_size_the_model_does_not_take_is_refused(prompter, checkpoint):
    assert prompter.prepare([picture(90, 50)], ["red"]).pixel_values.shape == (3, 3, 32, 32)
    larger = GEOMETRY.model_copy(update={"image_height": 40, "image_width": 48})
    other = Prompter(checkpoint, larger, Profile(visual_tokens=16, max_text=8, max_new_tokens=4))
    with pytest.raises(ImageError, match=r"90x50 pixels became \[3, 32, 32\].*for \[3, 40, 48\].*: resize to 48x40"):
        other.prepare([picture(90, 50)], ["red"])
    fewer = GEOMETRY.model_copy(update={"visual_tokens": 15})
    other = Prompter(checkpoint, fewer, Profile(visual_tokens=15, max_text=8, max_new_tokens=4))
    with pytest.raises(PromptError, match="wrote 16 image tokens, but the model has 15 visual tokens"):
        other.prepare([picture()], ["red"])


def test_processors_that_bring_code_or_are_damaged_are_refused(checkpoint, tmp_path):
    profile = Profile(visual_tokens=16, max_text=8, max_new_tokens=4)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "code"))
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    for name in ("processor_config.json", "config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"auto_map": {"AutoProcessor": "evil.Processor"}, "processor_class": "EvilProcessor", "model_type": "evil"}
        (folder / name).write_text(json.dumps(values))
    with pytest.raises(BundleError, match="would run code of its own"):
        Prompter(folder, GEOMETRY, profile)
    with pytest.raises(BundleError, match="cannot be loaded"):
        Prompter(tmp_path, GEOMETRY, profile)


def test_images_are_processed_by_pillow_even_where_torchvision_is_installed(checkpoint, monkeypatch):
    asked = []
    load = AutoImageProcessor.from_pretrained

    def spy(*arguments, **options):
        asked.append(options.get("backend"))
        return load(*arguments, **options)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", spy)
    processor = load_processor(checkpoint)
    assert asked[-1] == "pil"
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_the_first_token_is_never_doubled(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "bos"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    adding = Prompter(folder, GEOMETRY, Profile(visual_tokens=16, max_text=8, max_new_tokens=4))
    assert adding.prepare([picture()], ["red"]).unpadded(0).tolist() == [BOS, USER, *[IMAGE] * 16, RED, ASSISTANT]
    assert adding.prepare([picture()], ["red"], template=False).unpadded(0).tolist() == [BOS, *[IMAGE] * 16, RED]
    assert adding.prepare([picture()], ["<s> red"], template=False).unpadded(0).tolist() == [BOS, *[IMAGE] * 16, RED]


def test_files_are_read_upright_as_rgb(tmp_path):
    grey = Image.new("L", (4, 2), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    grey.save(tmp_path / "turned.jpg", exif=exif)
    read = load_image(tmp_path / "turned.jpg")
    assert (read.mode, read.size) == ("RGB", (2, 4))
    assert load_image(str(tmp_path / "turned.jpg")).size == (2, 4)
    assert load_image(grey).mode == "RGB"


def test_unreadable_pictures(tmp_path):
    picture(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    picture().save(tmp_path / "other.ppm")  # one of the many formats that nobody needs here
    for name in ("cut.png", "text.png", "ghost.png", "other.ppm"):
        with pytest.raises(ImageError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is not a file"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="is an address"):
        load_image("https://example.org/a.png")


def test_every_cut_or_flipped_png_is_a_picture_or_an_image_error(tmp_path):
    picture(8, 8).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    refused = 0
    for place in range(len(data)):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]):
            (tmp_path / "damaged.png").write_bytes(damaged)
            try:
                load_image(tmp_path / "damaged.png")
            except ImageError:
                refused += 1
    assert refused > len(data)


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(11, 10).save(tmp_path / "large.png")
    picture(30, 30).save(tmp_path / "huge.png")
    picture(10, 10).save(tmp_path / "fits.png")
    with pytest.raises(ImageError, match=r"large\.png has 11x10 pixels, more than the 100"):
        load_image(tmp_path / "large.png")
    with pytest.raises(ImageError, match=r"huge\.png.*decompression bomb"):
        load_image(tmp_path / "huge.png")
    with pytest.raises(ImageError, match="11x11 pixels"):
        load_image(picture(11, 11))
    assert load_image(tmp_path / "fits.png").size == (10, 10)
