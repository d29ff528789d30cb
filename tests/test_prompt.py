"""Prompts: the exact texts of both styles, and the reference's token ids of them."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cosmos3_jax.checkpoint import BUILT_IN
from cosmos3_jax.config import NANO, TINY
from cosmos3_jax.errors import InputError
from cosmos3_jax.prompt import (
    MOST_TOKENS,
    Metadata,
    diffusers_texts,
    load_tokenizer,
    native_texts,
    pad,
    system_prompt,
    tokenize,
)

GOLDENS = json.loads((Path(__file__).parent / "data" / "token_goldens.json").read_text())
WRITTEN_BY_STYLE = [name for name in GOLDENS if name not in ("t2i_nosys_notemplates", "action_policy_sys")]

VIDEO = Metadata(num_frames=189, height=720, width=1280, fps=24.0)
IMAGE = Metadata(num_frames=1, height=1024, width=768, fps=24.0)
VIDEO_SENTENCES = "The video is 7.9 seconds long and is of 24 FPS. This video is of 720x1280 resolution."
IMAGE_SENTENCE = "This image is of 1024x768 resolution."
NOT_VIDEO = "The video is not 7.9 seconds long and is not of 24 FPS. This video is not of 720x1280 resolution."
NOT_IMAGE = "This image is not of 1024x768 resolution."


def turns(text: str) -> tuple[str | None, str]:
    """(system prompt or None, what the user says) of a whole conversation."""
    system = r"(?:<\|im_start\|>system\n(.*)<\|im_end\|>\n)?"
    user = r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n<\|im_end\|><\|vision_start\|>"
    return re.fullmatch(system + user, text).groups()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUILT_IN / "text_tokenizer", TINY.vocab_size)


@pytest.fixture(scope="module")
def published():
    """The tokenizer of Nano and Super, which is too large to be kept here."""
    if "COSMOS3_TOKENIZER" not in os.environ:
        pytest.skip("COSMOS3_TOKENIZER does not name a published folder text_tokenizer")
    return load_tokenizer(Path(os.environ["COSMOS3_TOKENIZER"]), NANO.vocab_size)


@pytest.mark.parametrize("dots", ["", ".", "..."])
@pytest.mark.parametrize(("metadata", "sentences"), [(VIDEO, VIDEO_SENTENCES), (IMAGE, IMAGE_SENTENCE)], ids=["video", "image"])
def test_a_text_ends_in_the_metadata(metadata, sentences, dots):
    expected = "A cat. It runs. " + sentences
    assert native_texts(f" A cat. It runs{dots}\n", None, metadata, "")[0] == expected
    assert diffusers_texts(f"A cat. It runs{dots}", None, metadata)[0] == expected


@pytest.mark.parametrize("empty", ["", "..."])
def test_an_empty_text_is_the_metadata_alone(empty):
    assert native_texts(empty, None, VIDEO, "")[0] == VIDEO_SENTENCES
    assert diffusers_texts(empty, None, VIDEO)[0] == VIDEO_SENTENCES


def test_seconds_have_one_decimal_and_fps_none():
    assert native_texts("A cat", "", Metadata(61, 480, 832, 29.97), "")[0] == (
        "A cat. The video is 2.0 seconds long and is of 30 FPS. This video is of 480x832 resolution."
    )


@pytest.mark.parametrize("plain", ["7", '"quoted"', "null", "a {cat}"])
def test_what_is_no_json_object_is_a_text(plain):
    assert native_texts(plain, None, IMAGE, "")[0] == f"{plain}. {IMAGE_SENTENCE}"


@pytest.mark.parametrize(
    ("plain", "warning"),
    [
        ('["a", {"b": 1}]', r"prompt: a JSON caption is an object, this is a list; it is taken as text$"),
        ('{"a": 1', r"prompt: it begins like a JSON caption and is not JSON \(.*line 1 column 8.*\); it is taken as text$"),
        ("{a cat}", "prompt: it begins like a JSON caption and is not JSON"),
        ('{"a":' * 50_000, "prompt: it begins like a JSON caption and is not JSON"),
    ],
    ids=["list", "cut", "words", "deep"],
)
def test_what_may_be_meant_as_a_caption_is_warned_of(plain, warning):
    """The text is what it would be without the warning."""
    with pytest.warns(UserWarning, match=f"^{warning}"):
        assert native_texts(plain, None, IMAGE, "")[0] == f"{plain}. {IMAGE_SENTENCE}"


def test_a_json_caption_of_a_video_is_completed():
    caption = ' {"scene": "a cat.", "fps": 5, "aspect_ratio": "16,9", "resolution": "big"}\n'
    assert native_texts(caption, None, VIDEO, "")[0] == (
        '{"scene": "a cat.", "fps": 24.0, "aspect_ratio": "16,9", "resolution": {"H": 720, "W": 1280}, "duration": "7s"}'
    )


def test_a_json_caption_of_an_image_has_no_time():
    caption = '{"duration": "7s", "scene": "a cat.", "fps": 5, "aspect_ratio": "3,4"}'
    assert native_texts(caption, None, IMAGE, "")[0] == (
        '{"scene": "a cat.", "aspect_ratio": "3,4", "resolution": {"H": 1024, "W": 768}}'
    )


@pytest.mark.parametrize(
    ("negative", "metadata", "native", "diffusers"),
    [
        (None, VIDEO, "the checkpoint's", NOT_VIDEO),
        (None, IMAGE, "", NOT_IMAGE),
        ("", VIDEO, "", NOT_VIDEO),
        ("", IMAGE, "", NOT_IMAGE),
        (" blurry.. ", VIDEO, " blurry.. ", f" blurry.. . {NOT_VIDEO}"),
        ("blurry..", IMAGE, "blurry..", f"blurry. {NOT_IMAGE}"),
        ('{"fps": 5}', VIDEO, '{"fps": 5}', f'{{"fps": 5}}. {NOT_VIDEO}'),
    ],
)
def test_negative_prompts(negative, metadata, native, diffusers):
    # Native: as it was written; only where none was, a video takes the checkpoint's. diffusers: with "is not" sentences.
    assert native_texts("A cat", negative, metadata, "the checkpoint's")[1] == native
    assert diffusers_texts("A cat", negative, metadata)[1] == diffusers


def test_brackets_without_end_are_plain_text():
    assert native_texts("[" * 5000, None, IMAGE, "")[0].startswith("[[[")


@pytest.mark.parametrize("name", WRITTEN_BY_STYLE)
def test_texts_of_the_style_diffusers_are_the_references(name):
    golden = GOLDENS[name]
    asked = golden["args"]
    metadata = Metadata(asked["num_frames"], asked["height"], asked["width"], asked.get("fps", 24.0))
    system = system_prompt("diffusers", metadata, asked.get("use_system_prompt", True))
    both = diffusers_texts(asked["prompt"], asked["negative_prompt"], metadata)
    assert [(system, text) for text in both] == [turns(golden["cond_text"]), turns(golden["uncond_text"])]


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("name", GOLDENS)
def test_tokens_are_one_conversation(name, branch, tokenizer):
    conversation = GOLDENS[name][f"{branch}_text"]
    system, text = turns(conversation)
    ids = tokenize(tokenizer, text, system)
    assert tokenizer.decode(ids) == conversation
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|im_end|>", "<|vision_start|>"]


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("name", GOLDENS)
def test_token_ids_are_the_references(name, branch, published):
    system, text = turns(GOLDENS[name][f"{branch}_text"])
    assert tokenize(published, text, system) == GOLDENS[name][f"{branch}_ids"]


def test_any_text_survives_the_tokenizer(tokenizer):
    text = 'é 漢字 🙂\t"x"  {y}'
    assert turns(tokenizer.decode(tokenize(tokenizer, text))) == (None, text)


@pytest.mark.parametrize(("lengths", "bucket"), [([1], 128), ([127, 3], 128), ([128, 128], 128), ([5, 129], 256)])
def test_branches_are_padded_to_one_bucket(lengths, bucket):
    branches = [list(range(1, length + 1)) for length in lengths]
    ids_BS, length_B = pad(branches)
    assert ids_BS.shape == (len(lengths), bucket)
    assert ids_BS.dtype == length_B.dtype == np.int32
    assert [row[:length].tolist() for row, length in zip(ids_BS, length_B, strict=True)] == branches
    assert np.count_nonzero(ids_BS) == sum(lengths)


@pytest.mark.parametrize(("lengths", "name"), [([MOST_TOKENS + 1], "prompt"), ([1, MOST_TOKENS + 1], "negative_prompt")])
def test_a_branch_has_at_most_so_many_tokens(lengths, name):
    assert pad([[1] * MOST_TOKENS])[0].shape == (1, MOST_TOKENS)
    with pytest.raises(InputError, match=f"^{name}: {MOST_TOKENS + 1} tokens .*; {MOST_TOKENS} are possible"):
        pad([[1] * length for length in lengths])


def replaced(file: str, old: str, new: str):
    """Damage: another text in one file of a tokenizer's folder."""
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], "no tokenizer can be read there"),
        (shutil.rmtree, "missing; is the checkpoint complete?"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokenizer can be read there"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "?"}}'), "no tokenizer can be read there"),
        (replaced("chat_template.jinja", "endfor", "end"), "the chat template cannot be used"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template; chat_template.jinja belongs beside it"),
        (replaced("tokenizer.json", "<|vision_start|>", "<|vision|>"), "lacks an end-of-text token or <|vision_start|>"),
        (replaced("tokenizer_config.json", "eos_token", "other"), "lacks an end-of-text token or <|vision_start|>"),
    ],
    ids=[
        "empty_folder",
        "no_folder",
        "cut_off",
        "of_another_kind",
        "broken_template",
        "no_chat_template",
        "no_vision_start",
        "no_end_of_text",
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(damage, message, tmp_path):
    shutil.copytree(BUILT_IN / "text_tokenizer", tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: ") + ".*" + re.escape(message)):
        load_tokenizer(tmp_path, TINY.vocab_size)
