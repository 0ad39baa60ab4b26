"""Console lines: aligned, readable, complete."""

import math
import re

import pytest

from flux_trainer.metrics.console import duration, ending, training_line, validation_line

READING = {
    "step": 10,
    "loss": 1.21774,
    "grad_norm": 0.8227,
    "lr": 1e-4,
    "images_per_second": 41.2,
    "tokens_per_second": 13184.0,
    "tflops": 0.12,
    "mfu_percent": None,
    "memory_rss_gib": 0.61,
    "data_percent": 0.3,
    "skipped_steps": 0,
    "seconds_left": 192.4,
}


def test_training_line():
    line = training_line(READING, 600)
    assert line == (
        "step:  10/600  loss:  1.21774  grad_norm:   0.8227  lr: 1.00e-04  img/s:    41.2  tok/s:    13,184  "
        "tflops:   0.12  mfu:    n/a  memory:  0.61GiB  data:  0.3%  skipped: 0  left:     3:12"
    )


def test_lines_of_a_run_are_aligned():
    later = {
        **READING,
        "step": 600,
        "loss": 0.5,
        "grad_norm": 123.4,
        "images_per_second": 0.0213,
        "tokens_per_second": 1_000_000.0,
        "mfu_percent": 45.6,
        "tflops": 432.1,
        "data_percent": 12.0,
        "seconds_left": 36_000.0,
    }
    broken = {**READING, "loss": math.nan, "grad_norm": math.inf}
    columns = [
        [m.start() for m in re.finditer(r"\w+(/s)?: ", training_line(reading, 600))]
        for reading in (READING, later, broken)
    ]
    assert columns[0] == columns[1] == columns[2]


def test_gpu_memory_shows_the_share():
    reading = {k: v for k, v in READING.items() if k != "memory_rss_gib"}
    reading |= {"memory_reserved_gib": 61.5, "memory_reserved_percent": 77.2}
    assert "memory: 61.50GiB(77.2%)" in training_line(reading, 600)


def test_color_changes_nothing_but_color():
    plain, colored = training_line(READING, 600), training_line(READING, 600, color=True)
    assert colored != plain
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == plain


def test_validation_line():
    line = validation_line(100, 600, {"loss": 0.91234, "ema_loss": 0.9}, seconds=3.2)
    assert line == "validate step: 100/600  loss:  0.91234  ema_loss:  0.90000  time:     0:03"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0:00"),
        (59.6, "1:00"),
        (192.0, "3:12"),
        (3723.0, "1:02:03"),
        (176523.0, "2d 01:02:03"),
        (None, "n/a"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds).strip() == text


def test_what_is_said_at_the_end():
    assert ending(600, 600, 3723.4, resumable=True) == "Training completed: step 600 of 600, 1:02:03"
    stopped = "Stopped by a signal after step 7 of 600."
    assert ending(7, 600, 60.0, resumable=False) == stopped
    assert ending(7, 600, 60.0, resumable=True) == f"{stopped} The same command goes on from here."
