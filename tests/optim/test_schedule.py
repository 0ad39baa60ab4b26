import math

import pytest

from flux_trainer.config.schema import LRScheduler
from flux_trainer.optim.schedule import lr_factor


def factors(steps: int, **kwargs) -> list[float]:
    section = LRScheduler(**kwargs)
    return [lr_factor(s, section, steps) for s in range(1, steps + 1)]


def test_warm_up_rises_linearly_and_then_stays_without_decay():
    assert factors(6, warmup_steps=4, decay_ratio=0.0) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_decay_fills_all_after_the_warm_up_unless_told_otherwise():
    assert factors(6, warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert factors(8, warmup_steps=0, decay_ratio=0.5) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(("kind", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_shapes_at_half_way_and_at_the_end(kind, half):
    section = LRScheduler(warmup_steps=0, decay_type=kind, min_lr_factor=0.2)
    assert lr_factor(51, section, 100) == pytest.approx(0.2 + 0.8 * half)
    assert lr_factor(101, section, 100) == lr_factor(1000, section, 100) == pytest.approx(0.2)


def test_total_steps_fixes_the_horizon_apart_from_training_steps():
    section = LRScheduler(warmup_steps=10, total_steps=100, decay_type="cosine")
    assert [lr_factor(s, section, 50) for s in range(1, 51)] == [
        lr_factor(s, section, 100) for s in range(1, 51)
    ]
