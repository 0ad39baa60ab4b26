"""jsonl files: any line at random, and what is wrong with a bad one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pictures import same
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources import JsonlSource, open_source

Picture = Callable[[int], Image.Image]


def test_jsonl_reads_lines_at_random(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    lines = [
        json.dumps({"path": f"images/{i}.png", "words": f"größe {i}"}, ensure_ascii=False) for i in range(3)
    ]
    (tmp_path / "list.jsonl").write_text("\ufeff" + lines[0] + "\n\n  \n" + lines[1] + "\r\n" + lines[2])
    section = Source(type="jsonl", path=str(tmp_path / "list.jsonl"), image_key="path", caption_key="words")
    source = pickle.loads(pickle.dumps(open_source(section)))
    assert len(source) == 3
    for i in (2, 0, 1):
        assert source[i].caption == f"größe {i}"
        assert same(source[i], picture(i))


def test_jsonl_reports_bad_lines(tmp_path: Path) -> None:
    cases = {
        '{"file_name": ': "not a JSON line",
        '["a.png"]': "^the line is a list, not an object",
        '"a.png"': "^the line is text, not an object",
        '{"image": "a.png", "text": "a"}': 'no "file_name" .it has: image, text',
        '{"file_name": "no.png", "text": "a"}': "No such file",
        '{"file_name": ["a.png"], "text": "a"}': '^"file_name" is a list, not a path',
        '{"file_name": "no.png", "caption": "a"}': r"^no caption .*\(the line has: file_name, caption\)",
        '{"file_name": "no.png", "text": null}': '^no caption in "text"',
        '{"file_name": "no.png", "text": " "}': "no caption",
        '{"file_name": "no.png", "text": 7}': '^"text" is a number, not text',
        '{"file_name": "no.png", "text": true}': '^"text" is true or false, not text',
        '{"file_name": "no.png", "text": ["a cat", "one cat"]}': '^"text" is a list, not text',
        '{"file_name": "no.png", "text": {"en": "a cat"}}': '^"text" is an object, not text',
        '{"file_name": "no.png", "text": "a \\ud83d"}': '^"text" is not UTF-8 text: .* surrogate pair',
        '{"file_name": "no.png", "text": "a\\u0000c"}': '^"text" holds a NUL character',
        '{"file_name": "no\\ud83d.png", "text": "a"}': "^cannot read .* surrogates not allowed",
        '{"file_name": "pointer.png", "text": "a"}': "pointer.png is a git-lfs pointer; `git lfs pull`",
        "[" * 100_000: "^not a JSON line",
        '{"file_name": "a\\u0000.png", "text": "a"}': "cannot read .* null",
    }
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "list.jsonl").write_text("\n".join(cases))
    source = JsonlSource(str(tmp_path / "list.jsonl"), "file_name", "text")
    assert len(source) == len(cases)
    for i, reason in enumerate(cases.values()):
        with pytest.raises(BadSample, match=reason):
            source[i]


def test_the_fingerprint_of_a_jsonl_file_changes_with_its_lines(tmp_path: Path) -> None:
    """Not with its place, nor with blank lines."""
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"file_name": "a", "text": "x"}\n')
    first = JsonlSource(str(lines), "file_name", "text").fingerprint
    (tmp_path / "copy.jsonl").write_text("\n" + lines.read_text())  # a blank line is no sample
    assert JsonlSource(str(tmp_path / "copy.jsonl"), "file_name", "text").fingerprint == first
    lines.write_text('{"file_name": "a", "text": "y"}\n')
    assert JsonlSource(str(lines), "file_name", "text").fingerprint != first


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_jsonl_file_that_is_not_utf_8_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"file_name": "a", "text": "x"}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"a\.jsonl is UTF-(16|32).* text; save it as UTF-8\.$"):
        JsonlSource(str(tmp_path / "a.jsonl"), "file_name", "text")
