"""Which settings of two runs differ, in words."""

from flux_trainer.checkpoint.identity import differences


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
