"""Text from other programs: what is read, and the words for what is not."""

import codecs
import json

import pytest

from flux_trainer.config import text
from flux_trainer.config.check_text import unusable_text
from flux_trainer.config.pictures import Prompt, read_prompts
from flux_trainer.config.schema import Encoder, Inference, JobConfig, Validation

HALF = "smile \ud83d"
NO_TEXT = [
    (7, "is a number, not text"),
    (0.5, "is a number, not text"),
    (True, "is true or false, not text"),
    (["a cat", "one cat"], "is a list, not text"),
    ({"en": "a cat"}, "is an object, not text"),
    (None, "is null, not text"),
    (HALF, r"is not UTF-8 text: '\ud83d' is half of a surrogate pair"),
    ("a\0c", "holds a NUL character, as UTF-16 does; save it as UTF-8"),
]


@pytest.mark.parametrize(("value", "words"), NO_TEXT)
def test_what_is_no_text_is_called_what_it_is(value, words):
    with pytest.raises(text.TextError) as caught:
        text.usable(value)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("cat".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + "cat".encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
        ("cat".encode("utf-16-le"), "holds a NUL character, as UTF-16 does; save it as UTF-8"),
        (b"caf\xe9", "is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (HALF.encode(errors="surrogatepass"), "is not UTF-8 text: 'utf-8' codec can't decode"),
    ],
)
def test_only_utf_8_is_decoded(data, words):
    with pytest.raises(text.TextError) as caught:
        text.decode(data)
    assert str(caught.value).startswith(words)


def test_what_utf_8_holds_comes_back():
    assert text.decode(codecs.BOM_UTF8 + "größe \U0001f431".encode()) == "größe \U0001f431"
    assert text.usable("größe \U0001f431\n") == "größe \U0001f431\n"
    assert text.trimmed(" \ufeff a cat \n\ufeff") == "a cat"


def test_settings_are_text_that_can_be_used():
    config = JobConfig(
        encoder=Encoder(t5_encoder="caf\udce9"),
        validation=Validation(prompts=["a cat", HALF]),
        inference=Inference(negative_prompt="blurry\0"),
    )
    assert dict(unusable_text(config)) == {
        "encoder.t5_encoder": r"is not UTF-8 text: '\udce9' is half of a surrogate pair",
        "validation.prompts.1": r"is not UTF-8 text: '\ud83d' is half of a surrogate pair",
        "inference.negative_prompt": "holds a NUL character, as UTF-16 does; save it as UTF-8",
    }
    assert list(unusable_text(JobConfig())) == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_prompts_may_begin_with_a_byte_order_mark_and_have_any_line_ends(tmp_path, name):
    lines = ["a cat, asleep", "größe"]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"prompt": f"\ufeff{line} "}, ensure_ascii=False) for line in lines]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + f"{lines[0]}{end}{end}  {end}{lines[1]}".encode())
        assert read_prompts(str(tmp_path / name)) == [Prompt("a cat, asleep"), Prompt("größe")]


@pytest.mark.parametrize(
    ("value", "words"),
    [(value, words) for value, words in NO_TEXT if value is not None]
    + [(" ", "is empty; expected"), (None, 'has no "prompt"; expected')],
)
def test_a_prompt_that_is_no_text_is_named_with_its_line(tmp_path, value, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a cat"}) + "\n" + json.dumps({"prompt": value}))
    with pytest.raises(ValueError, match="line 2") as caught:
        read_prompts(str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize("data", ["a cat".encode("utf-16"), b"caf\xe9", b"a\0c"])
def test_a_file_of_prompts_that_is_not_utf_8_is_named(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.txt .*UTF-"):
        read_prompts(str(path))


def test_nesting_without_end_is_not_json(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not JSON"):
        read_prompts(str(tmp_path / "a.jsonl"))
