"""Which settings of two runs differ, in words."""

import pytest

from flux_trainer.checkpoint.identity import CONTENTS, differences, identity
from flux_trainer.config.schema import Data, JobConfig, Source


def test_equal_settings_differ_in_nothing_even_after_json():
    settings = {"seed": 1, "sources": [{"path": "a"}], "betas": (0.9, 0.95), "none": None, "empty": []}
    assert differences({**settings, "betas": [0.9, 0.95]}, settings) == []


def test_each_difference_is_named_with_both_values():
    saved = {"seed": 1, "data": {"sources": [{"path": "a"}], "crop": "center"}, "gone": 3}
    now = {"seed": 2, "data": {"sources": [{"path": "b"}, {"path": "c"}], "crop": "center"}, "new": True}
    assert differences(saved, now) == [
        "seed 1 in the checkpoint, 2 now",
        'data.sources[0].path "a" in the checkpoint, "b" now',
        'data.sources[1].path nothing in the checkpoint, "c" now',
        "new nothing in the checkpoint, true now",
        "gone 3 in the checkpoint, nothing now",
    ]


def with_references(size: int, source: Source, most: int = 1) -> JobConfig:
    return JobConfig(data=Data(sources=[source], reference_size=size, max_references=most))


def test_what_reference_images_become_is_the_same_in_a_resumed_run():
    edits = Source(type="jsonl", path="a", reference_key="before")
    saved = identity(with_references(-1, edits), 8)
    side = JobConfig().training.img_size
    assert differences(saved, identity(with_references(side, edits), 8)) == []
    assert differences(saved, identity(with_references(side + 16, edits, most=2), 8)) == [
        "data.max_references 1 in the checkpoint, 2 now",
        f"data.reference_size {side} in the checkpoint, {side + 16} now",
    ]


def test_without_reference_images_their_settings_are_free():
    plain = Source(type="jsonl", path="a")
    assert identity(with_references(-1, plain), 8) == identity(with_references(512, plain, most=3), 8)


def with_data(*contents):
    """The identity of a run on one source for each of `contents`."""
    sources = [Source(type="jsonl", path=f"{i}.jsonl") for i in range(len(contents))]
    return {**identity(JobConfig(data=Data(sources=sources)), 8), CONTENTS: list(contents)}


def contents(samples, **parts):
    return {"samples": samples, **parts}


@pytest.mark.parametrize(
    ("saved", "now", "change"),
    [
        (contents(3, lines="a"), contents(3, lines="a"), ""),
        (contents(3, lines="a"), contents(4, lines="b"), "number of samples 3 in the checkpoint, 4 now"),
        (
            contents(3, files="a", captions="b"),
            contents(3, files="a", captions="c"),
            "as many samples as in the checkpoint, but other captions",
        ),
        (
            contents(3, captions="b", images="a"),
            contents(3, captions="c", images="b"),
            "as many samples as in the checkpoint, but other captions and images",
        ),
        (contents(3, captions="b"), contents(3, captions="b", images="a"), ""),
        ("3 rows", contents(3, captions="b", images="a"), ""),
        ("3 rows", contents(4, captions="b"), "number of samples 3 in the checkpoint, 4 now"),
        ("20 samples", contents(20), ""),
        ("0c5f", contents(3, files="0c5f", captions="b"), ""),
        ("0c5f", contents(3, files="1234", captions="b"), "other samples than in the checkpoint"),
    ],
)
def test_changed_data_are_named_with_their_source_and_what_changed(saved, now, change):
    """Checkpoints of before hold a hash, or a number of rows."""
    same = contents(5, lines="a")
    expected = [f"data.sources[1] (jsonl 1.jsonl): {change}"] if change else []
    assert differences(with_data(same, saved), with_data(same, now)) == expected


def test_another_source_is_named_before_its_contents():
    saved, now = with_data(contents(3, lines="a")), with_data(contents(4, lines="b"))
    now["data.sources"][0]["path"] = "b"
    assert differences(saved, now) == [
        'data.sources[0].path "0.jsonl" in the checkpoint, "b" now',
        "data.sources[0] (jsonl b): number of samples 3 in the checkpoint, 4 now",
    ]
