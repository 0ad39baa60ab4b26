"""Which settings of two runs differ, in words."""

from flux_trainer.checkpoint.identity import differences, identity
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
