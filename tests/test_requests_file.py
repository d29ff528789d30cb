"""A file of requests: what a line may hold, and a sentence for each that cannot be meant."""

import contextlib
import json

import pytest

from cosmos3_jax import InputError
from cosmos3_jax.config import TINY, UNIPC, WAN_VAE
from cosmos3_jax.request import Request, resolve
from cosmos3_jax.requests_file import LONGEST_NAME, MOST_TOLD, WORDS, read_requests


@pytest.fixture
def read(tmp_path):
    """`read(text)`: the lines of a file with this text, or these bytes."""

    def read(text: str | bytes):
        path = tmp_path / "requests.jsonl"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_requests(path)

    return read


@pytest.fixture
def request_of(read):
    """`request_of(words, defaults)`: the request of a line with these words."""
    return lambda words, **defaults: read(json.dumps({"name": "a"} | words))[0].request(defaults)


# What is meant


def test_lines_in_their_order(read):
    found = read('{"name": "b", "seed": 1}\n\n  \n{"seed": 2, "name": "a"}\n')
    assert [(line.name, line.words) for line in found] == [("b", {"seed": 1}), ("a", {"seed": 2})]


@pytest.mark.parametrize(
    "text",
    [
        b'\xef\xbb\xbf{"name": "caf\xc3\xa9"}',
        '{"name": "café"}\r\n'.encode(),
        b'{"name": "caf\\u00e9"}',
        '{"name": "café", "prompt": "one\u2028line"}'.encode(),
    ],
    ids=["byte order mark", "Windows", "escaped", "line separator"],
)
def test_texts_as_editors_write_them(read, text):
    assert [line.name for line in read(text)] == ["café"]


@pytest.mark.parametrize(
    "name", ["a", "A b", "日本", "a.mp4", "-rf", "con", "x" * LONGEST_NAME, "é" * (LONGEST_NAME // 2), "a.", "cosmos3.1", "🚗"]
)
def test_names_that_files_can_have(read, tmp_path, name):
    (line,) = read(json.dumps({"name": name}))
    (tmp_path / f".cosmos3.{line.name}.json").write_text("")
    assert line.name == name


def test_words_go_before_defaults(request_of):
    made = request_of(
        {"seed": 1, "enable_sound": False, "image": None}, seed=2, enable_sound=True, image="b.png", prompt="p", fps=8
    )
    assert made == Request("p", seed=1, fps=8, output_type="pil")


def test_a_prompt_that_is_an_object(request_of):
    made = request_of({"prompt": {"subject": "été", "parts": [1, {"a": None}]}, "negative_prompt": {}})
    assert json.loads(made.prompt) == {"subject": "été", "parts": [1, {"a": None}]}
    assert made.negative_prompt == "{}"


@pytest.mark.parametrize("name", ["image", "video"])
def test_paths_are_seen_from_the_folder_of_the_file(request_of, tmp_path, name):
    """Those of flags, from where the command runs."""
    assert getattr(request_of({"prompt": "p", name: "in/a"}), name) == tmp_path / "in" / "a"
    assert getattr(request_of({"prompt": "p", name: "/a"}), name) == tmp_path / "/a"
    assert getattr(request_of({"prompt": "p"}, **{name: "a"}), name) == "a"


# What is not


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("waves", "not JSON (.*)"),
        ('{"name": "a"', "not JSON (.*)"),
        ("[" * 100_000, "not JSON (.*)"),
        ('["a"]', r"a JSON object is expected, not \['a'\]"),
        ('{"name": "a", "seed": 1, "seed": 2}', "not JSON .a key comes twice."),
        ('{"name": "a", "prompt": {"b": 1, "b": 2}}', "not JSON .a key comes twice."),
        ('{"prompt": "a"}', "name=None: a text is expected, which the files will be called by"),
        ('{"name": 7}', "name=7: a text is expected.*"),
        ('{"name": "ok"}', "name='ok' comes twice .*"),
        ('{"name": "OK"}', "name='OK' comes twice .*"),
        ('{"name": "CAFE\u0301"}', "name=.* comes twice .*"),
        *(
            (json.dumps({"name": name}), "name=.*: no name for a file; .*")
            for name in [
                "",
                ".",
                "..",
                ".a",
                "a/b",
                "/",
                "a\\b",
                "a:b",
                "a*",
                "a?",
                " a",
                "a ",
                "a\n",
                "a\0",
                "\ud800",
                "a\u202eb",
            ]
        ),
        (json.dumps({"name": "x" * (LONGEST_NAME + 1)}), f"name=x{{20}}...: {LONGEST_NAME + 1} bytes long; .*"),
        (json.dumps({"name": "é" * (LONGEST_NAME // 2 + 1)}), f"name=é.*: {LONGEST_NAME + 2} bytes long; .*"),
    ],
)
def test_lines_that_cannot_be_read(read, line, sentence):
    with pytest.raises(InputError, match=rf"requests.jsonl: requests that cannot be read\n  line 3: {sentence}\Z"):
        read('{"name": "ok"}\n{"name": "café"}\n' + line)


def test_all_of_them_are_told(read):
    with pytest.raises(InputError) as error:
        read("\n".join(["x"] * (MOST_TOLD + 3)))
    lines = str(error.value).splitlines()
    assert len(lines) == MOST_TOLD + 2
    assert lines[-1] == "  and 3 more"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_requests(read, text):
    with pytest.raises(InputError, match="there are no requests in it; one JSON object a line is expected"):
        read(text)


def test_files_that_cannot_be_read(read, tmp_path):
    for path in (tmp_path / "no", tmp_path, "", "n\0l"):
        with pytest.raises(InputError, match="no text file that can be read"):
            read_requests(path)
    with pytest.raises(InputError, match="no text file that can be read"):
        read(b'{"name": "\xff"}')


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"promt": "a", "prompt": "b"}, "'promt': there is no such setting; .* prompt, .* are known"),
        ({"output_type": "np", "prompt": "b"}, "'output_type': there is no such setting; .*"),
        ({}, "prompt: missing; a text or a JSON object is expected"),
        ({"prompt": "b", "image": ["a.png"]}, r"image=\['a.png'\]: the path of a file is expected"),
        ({"prompt": "b", "video": 7}, "video=7: the path of a file is expected"),
    ],
)
def test_words_that_are_none(request_of, words, sentence):
    with pytest.raises(InputError, match=sentence):
        request_of(words)


@pytest.mark.parametrize("word", sorted(WORDS))
@pytest.mark.parametrize(
    "value", [7, -1.5, 10**400, True, "x", "", [], [1, "x"], [[1], [2, 3]], {}, {"a": 1}, float("nan")], ids=repr
)
def test_whatever_json_has_is_used_or_refused(request_of, word, value):
    """Never anything but InputError: a plain exception would end all that are left. Media are checked when they are opened."""
    with contextlib.suppress(InputError):
        resolve(request_of({"prompt": "p", word: value}, num_frames=5, height=32, width=32), TINY, WAN_VAE, UNIPC)
